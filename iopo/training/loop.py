"""The training loop: a generator that yields after every optimizer step.

It knows nothing of files: train.py decides when to log, save and evaluate. Letters: E examples,
M members per example, Q held-out quads.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from iopo import objectives
from iopo.data.batching import (
    Batching,
    member_tokens,
    micro_batches,
    pass_micro_batches,
    quads_of_step,
    token_counts,
)
from iopo.data.layout import Batch, build_plain, build_shared
from iopo.data.tokenize import Example
from iopo.model.parallel import TrainModel
from iopo.progress import progress, tracked
from iopo.training import metrics
from iopo.training.launch.signals import heartbeat
from iopo.training.split import PromptByPrompt, Splitting, by_prompt

# Packed lengths are rounded up to this many tokens: compiled code, and oneDNN, which keeps a kernel
# for every shape it has met, then meet few of them (docs/performance.md, "Memory on a CPU").
LENGTH_STEP = 64

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """Log-probs of the starting weights: how to obtain them, and how far off they may be.

    call: (examples, their batch) -> float32 [E, M] without gradient. where: for messages.
    tolerance: largest difference of the loss at step 0 from its value at policy == reference.
    rounding: largest log-ratio, in nats, that rounding may cause. collective: call gathers weights,
    so that a rank without examples has to call it too.
    """

    call: Callable[[Sequence[Example], Batch], Tensor]
    where: str
    tolerance: float
    rounding: float = 0.0
    collective: bool = False


def reference_log_probs(
    reference: Reference | None, rows: Sequence[Example], batch: Batch, *, idle: bool = False
) -> Tensor | None:
    """float32 [E, M] on the batch's device; None without a reference.

    idle: the batch is of other ranks, and this one only takes part where all have to.
    """
    if reference is None or (idle and not reference.collective):
        return None
    return reference.call(rows, batch).to(batch.input_ids.device)


@dataclass(frozen=True)
class Job:
    """What stays the same through a run on one rank."""

    objective: str
    options: objectives.Options
    batching: Batching
    examples: Sequence[Example]
    heldout: Sequence[Example]
    tokens_N: np.ndarray
    steps: int  # of the whole run
    lr_at: Callable[[int], float]
    clip_norm: float
    rank: int
    device: torch.device
    splitting: Splitting = Splitting()  # of quads above the token budget

    def build(self, rows: Sequence[Example]) -> Batch:
        """Tensors of one micro-batch, in the run's layout, on its device."""
        if self.batching.layout == "plain":
            return build_plain(rows).to(self.device)
        return build_shared(rows, multiple=LENGTH_STEP).to(self.device)


@dataclass
class StepResult:
    """What one optimizer step did on this rank; `reduce` makes it the step of all ranks."""

    step: int  # 1 for the first
    lr: float
    grad_norm: float
    seconds: float
    names: list[str]
    sums: Tensor  # [columns], over this rank's examples
    examples: int
    tokens: int  # prompt and response tokens, each counted once per member

    def reduce(self) -> dict[str, float]:
        """Means over all examples of the step on all ranks. Every rank must call it."""
        counts = self.sums.new_tensor([self.tokens, self.examples])
        *sums, tokens, examples = metrics.sum_over_ranks(torch.cat([self.sums, counts]))
        means = {name: value / examples for name, value in zip(self.names, sums, strict=True)}
        speed = {"step_s": self.seconds, "tokens_per_s": tokens / self.seconds}
        return means | {"grad_norm": self.grad_norm, "lr": self.lr} | speed


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a number: the step's update was not applied."""


def train_steps(
    job: Job,
    train_model: TrainModel,
    optimizer: torch.optim.Optimizer,
    reference: Reference | None,
    *,
    first_step: int,
) -> Iterator[StepResult]:
    """Run the optimizer steps first_step..job.steps (counted from 1), yielding after each.

    Every micro-loss is the sum over its examples divided by the examples of the whole step, so
    gradients depend on neither micro-batch size, accumulation, packing nor ranks.
    Raises NonFiniteError before the update if the gradient's norm is not finite.
    """
    names = metrics.columns(objectives.OBJECTIVES[job.objective].rows, reference is not None)
    for step in range(first_step, job.steps + 1):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = job.lr_at(step)
        sums = torch.zeros(len(names), device=job.device)
        rows: list[Example] = []
        for rows_of_batch, values_EK in gradients(job, train_model, reference, step):
            sums += values_EK.sum(0)
            rows += rows_of_batch
        grad_norm = train_model.reduce_and_clip(job.clip_norm).item()
        # A NaN in one rank's quads has reached every rank's gradient by now: all stop together.
        if not math.isfinite(grad_norm):
            loss = "finite" if torch.isfinite(sums[0]) else "not finite"
            raise NonFiniteError(
                f"step {step}: gradient norm {grad_norm}, loss {loss} on this rank; the update was "
                f"not applied. Its examples on this rank: {', '.join(row.id for row in rows)}. Add "
                f"replay_step={step} to the command to print every member"
            )
        optimizer.step()
        train_model.zero_grad()
        yield StepResult(
            step=step,
            lr=job.lr_at(step),
            grad_norm=grad_norm,
            seconds=time.perf_counter() - started,
            names=names,
            sums=sums,
            examples=len(rows),
            tokens=sum(sum(member_tokens(row)) for row in rows),
        )


def gradients(
    job: Job, train_model: TrainModel, reference: Reference | None, step: int
) -> Iterator[tuple[list[Example], Tensor]]:
    """Add the gradients of this rank's micro-batches of `step`; yields examples and metrics' values
    [E, columns] of each. In one that only other ranks have, it only takes part in communication."""
    batches = micro_batches(job.tokens_N, job.batching, step - 1)[job.rank]
    split = job.splitting.split_microbatches(job.tokens_N, job.batching, step - 1, job.rank)
    total = len(quads_of_step(len(job.tokens_N), job.batching, step - 1))
    for i, indices in enumerate(batches):
        last = i == len(batches) - 1
        train_model.set_sync(last)
        idle = indices is None
        rows = [job.examples[j] for j in indices or (0,)]
        batch = job.build(rows)
        reference_EM = reference_log_probs(reference, rows, batch, idle=idle)
        parts = None
        if i in split:
            of_prompts = [job.build(part) for part in by_prompt(rows)]
            parts = PromptByPrompt(train_model, of_prompts, job.splitting.direction)
        if idle and parts is None:
            train_model.empty_backward(batch)
            continue
        policy_EM = train_model.model(batch) if parts is None else parts.log_probs()
        if not idle:
            loss_E, values_EK = score(job, batch, rows, policy_EM, reference_EM)
            (loss_E.sum() / total).backward()
        if parts is not None:  # the loss reached the log-probs, not yet the model
            parts.backward(last=last)
        if not idle:
            yield rows, values_EK


def score(
    job: Job,
    batch: Batch,
    rows: Sequence[Example],
    policy_EM: Tensor,
    reference_EM: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """loss_E with gradient, and the metrics' values [E, columns] without.

    Log-probs are of the batch's members. Where these are quads and the objective is on other rows,
    E counts the examples that the quads hold.
    """
    rows_of = objectives.OBJECTIVES[job.objective].rows
    tokens_EM = batch.scored_M.view(batch.examples, batch.members)
    differing_E = torch.tensor([row.differing for row in rows], device=policy_EM.device)
    rewards_EM = None
    if rows[0].rewards:
        rewards_EM = torch.tensor([row.rewards for row in rows], device=policy_EM.device)
    elif batch.members != sum(rows_of.responses):
        policy_EM, tokens_EM = rows_of.of_quads(policy_EM), rows_of.of_quads(tokens_EM)
        reference_EM = None if reference_EM is None else rows_of.of_quads(reference_EM)
        differing_E = differing_E.repeat_interleave(len(policy_EM) // len(rows))
        if rows_of.rewards:
            rewards_EM = policy_EM.new_tensor(rows_of.rewards).expand_as(policy_EM)
    values = (policy_EM, reference_EM, tokens_EM)
    facts = differing_E if rewards_EM is None else rewards_EM
    loss_E = objectives.compute(job.objective, *values, facts, job.options)
    return loss_E, metrics.per_example(rows_of, loss_E, *values, rewards_EM)


@torch.no_grad()
def check_start(job: Job, policy: nn.Module, reference: Reference) -> None:
    """At step 0 the policy is the reference: the loss must be the objective's value at margin 0.

    For the sigmoid link without an added margin that is ln 2. Looks at the first micro-batch of
    this rank. Raises ValueError if the loss is off by more than the reference's tolerance, and not
    because a steep objective magnifies rounding.
    """
    indices = micro_batches(job.tokens_N, job.batching, 0)[job.rank][0]
    rows = [job.examples[j] for j in indices or (0,)]
    batch = job.build(rows)
    with progress(None, "scoring the first micro-batch before training"):
        policy_EM = policy(batch)
        reference_EM = reference_log_probs(reference, rows, batch)
    assert reference_EM is not None
    loss_E, _ = score(job, batch, rows, policy_EM, reference_EM)
    expected_E, _ = score(job, batch, rows, policy_EM, policy_EM)
    worst = (policy_EM - reference_EM).abs().max().item()
    loss, expected = loss_E.mean().item(), expected_E.mean().item()
    if not math.isfinite(expected):
        sums = policy_EM.sum(1).tolist()
        bad = [row.id for row, x in zip(rows, sums, strict=True) if not math.isfinite(x)]
        raise NonFiniteError(f"step 0: the starting weights give no finite log-prob for {bad}")
    if not (abs(loss - expected) <= reference.tolerance or worst <= reference.rounding):
        raise ValueError(
            f"step 0: loss {loss:.8f}, expected {expected:.8f} (policy equal to the reference) "
            f"within {reference.tolerance:g}; largest |log-ratio| {worst:.3g} nats. The reference "
            f"({reference.where}) was not computed as this policy is: set reference.source=live, "
            "or reference.cache_dir to a folder of this run's own"
        )
    log.info(f"step 0: loss {loss:.7f}, largest |log-ratio| to the reference {worst:.2g} nats")


@torch.no_grad()
def evaluate(job: Job, policy: nn.Module, reference: Reference | None) -> dict[str, float]:
    """Means of `metrics.columns` and `metrics.preferences` over all held-out quads on all ranks.

    Every rank calls it; {} without held-out quads. A pair or sft objective is scored on the rows
    that a quad holds.
    """
    if not job.heldout:
        return {}
    names = metrics.columns(objectives.OBJECTIVES[job.objective].rows, reference is not None)
    shares = list(metrics.preferences(torch.zeros(1, 4)))
    sums = torch.zeros(len(names) + len(shares) + 2, device=job.device)
    policy.eval()
    tokens_N = token_counts(job.heldout, job.batching.layout)
    batches = pass_micro_batches(tokens_N, job.batching, job.rank)
    for indices in tracked(batches, "batches of held-out quads"):
        heartbeat()
        rows = [job.heldout[i] for i in indices or (0,)]
        batch = job.build(rows)
        policy_Q4 = policy(batch)
        reference_Q4 = reference_log_probs(reference, rows, batch, idle=indices is None)
        if indices is None:  # it took part because other ranks' weights are gathered together
            continue
        _, per_example = score(job, batch, rows, policy_Q4, reference_Q4)
        per_quad = torch.stack(list(metrics.preferences(policy_Q4).values()), dim=1)
        counts = sums.new_tensor([len(per_example), len(rows)])
        sums += torch.cat([per_example.sum(0), per_quad.sum(0), counts])
    policy.train()
    *totals, example_count, quad_count = metrics.sum_over_ranks(sums)
    values = {name: totals[i] / example_count for i, name in enumerate(names)}
    return values | {name: totals[len(names) + i] / quad_count for i, name in enumerate(shares)}
