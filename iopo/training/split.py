"""A quad that is too long for one backward pass: one prompt, with its responses, at a time.

The loss of a quad needs the log-probs of all its members; its gradient is a sum over them,
    dloss/dtheta = sum_m f_m dlogp_m/dtheta,    f_m = dloss/dlogp_m,
so the activations of one prompt can go before the next prompt is processed, if the factors f are
known by then. Two ways, both exact:

once   IOPO's factors are one scalar per quad times signs that are known before (the direction in
       objectives.py). Each prompt is back-propagated with the signs as factors, into gradients of
       their own, which the scalar multiplies at the end. For adapters on ranks that hold the whole
       model: there these gradients are small, and not yet summed over ranks.
twice  A forward without gradient gives the log-probs, the loss gives the factors, and every prompt
       is processed again, with gradient. For everything else; costs one more forward.

Letters: E examples, M members per example, N examples of the data set.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from iopo import objectives
from iopo.config import TrainConfig
from iopo.data.batching import Batching, micro_batches
from iopo.data.example import Example
from iopo.data.layout import Batch
from iopo.model.parallel import TrainModel
from iopo.training.policy import shards


@dataclass(frozen=True)
class Splitting:
    """Which quads are split, and how.

    budget: tokens; a quad above it runs alone (batching.py) and is split. inf: none is.
    collective: sharded models communicate in every forward, so that all ranks split their
        micro-batch when one does.
    direction: of dloss/dlogp_M, to go through each prompt once; None to go twice.
    """

    budget: float = math.inf
    collective: bool = False
    direction: tuple[int, ...] | None = None

    def split_microbatches(
        self, tokens_N: np.ndarray, batching: Batching, step: int, rank: int
    ) -> set[int]:
        """Numbers (from 0) of the micro-batches of `step` (from 0) that `rank` splits."""
        if self.budget == math.inf:
            return set()
        per_rank = micro_batches(tokens_N, batching, step)
        seen = per_rank if self.collective else [per_rank[rank]]
        return {
            i
            for i, batches in enumerate(zip(*seen, strict=True))
            if any(tokens_N[quad] > self.budget for batch in batches for quad in batch or ())
        }


def splitting(cfg: TrainConfig, world_size: int) -> Splitting:
    """How quads above the token budget are split."""
    if not cfg.parallel.split_quads:
        return Splitting()
    assert cfg.optim.tokens_per_microbatch is not None  # checked in the config
    sharded = shards(cfg.model.lora, cfg.parallel, world_size)
    once = cfg.model.lora.rank > 0 and not sharded and cfg.objective.sft_weight == 0
    direction = objectives.OBJECTIVES[cfg.objective.name].direction if once else None
    return Splitting(cfg.optim.tokens_per_microbatch, sharded, direction)


def by_prompt(rows: Sequence[Example]) -> list[list[Example]]:
    """For each prompt of an example, all rows reduced to that prompt and its responses."""
    return [
        [replace(row, prompts=(row.prompts[i],), responses=(row.responses[i],)) for row in rows]
        for i in range(len(rows[0].prompts))
    ]


class PromptByPrompt:
    """Log-probs of a micro-batch, and their gradient, one prompt at a time.

    batches: by prompt (by_prompt), in member order. direction: see Splitting; with it a micro-batch
    is one example, because each example has a scalar of its own.
    """

    def __init__(
        self, train_model: TrainModel, batches: Sequence[Batch], direction: tuple[int, ...] | None
    ):
        assert direction is None or batches[0].examples == 1, "one scalar for several examples"
        self.train_model, self.batches, self.direction = train_model, batches, direction
        self.before: list[Tensor | None] = []  # gradients of the micro-batches before this one
        self.logp_EM = torch.empty(0)

    def log_probs(self) -> Tensor:
        """[E, M]; a leaf: the loss is back-propagated to it, and then `backward` takes its grad."""
        if self.direction is None:
            with torch.no_grad():
                parts = [self.train_model.model(batch) for batch in self.batches]
        else:
            parts = []
            self.before = [p.grad for p in self.train_model.parameters.values()]
            for parameter in self.train_model.parameters.values():
                parameter.grad = None
            whole = torch.tensor([self.direction], device=self.batches[0].input_ids.device)
            for batch, signs_EM in zip(self.batches, self._by_prompt(whole), strict=True):
                logp_EM = self.train_model.model(batch)
                (logp_EM * signs_EM).sum().backward()
                parts.append(logp_EM.detach())
        self.logp_EM = torch.cat(parts, dim=1).requires_grad_()
        return self.logp_EM

    def backward(self, *, last: bool) -> None:
        """Add sum_m f_m dlogp_m/dtheta to the gradients. last: of the step's micro-batches."""
        factor_EM = self.logp_EM.grad
        if factor_EM is None:  # no loss: a micro-batch that only other ranks have
            factor_EM = torch.zeros_like(self.logp_EM)
        if self.direction is None:
            factors = self._by_prompt(factor_EM)
            for i, (batch, part_EM) in enumerate(zip(self.batches, factors, strict=True)):
                self.train_model.set_sync(last and i == len(self.batches) - 1)
                (self.train_model.model(batch) * part_EM).sum().backward()
            return
        scalar = factor_EM[0, 0] / self.direction[0]
        parameters = self.train_model.parameters.values()
        for parameter, before in zip(parameters, self.before, strict=True):
            if parameter.grad is None:
                parameter.grad = before
                continue
            parameter.grad *= scalar
            if before is not None:
                parameter.grad = before.add_(parameter.grad)

    def _by_prompt(self, value_EM: Tensor) -> tuple[Tensor, ...]:
        return value_EM.split([batch.members for batch in self.batches], dim=1)
