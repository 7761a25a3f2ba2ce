"""The training loop: a generator that yields after every optimizer step.

It knows nothing of files: train.py decides when to log, save and evaluate. Letters: E examples,
M members per example.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iopo import objectives
from iopo.data.layout import Batch, build_plain, build_shared
from iopo.data.tokenize import Example
from iopo.logprobs import LogProbs
from iopo.model.parallel import Prepared
from iopo.training import metrics

Reference = Callable[[Sequence[Example], Batch], Tensor]


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
        return means | {
            "grad_norm": self.grad_norm,
            "lr": self.lr,
            "step_s": self.seconds,
            "tokens_per_s": tokens / self.seconds,
        }


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a number: the step's update was not applied."""


def build(examples: Sequence[Example], layout: str) -> Batch:
    """Tensors of one micro-batch in the layout of the config (shared | plain)."""
    return build_shared(examples) if layout == "shared" else build_plain(examples)


def train_steps(
    policy: LogProbs,
    prepared: Prepared,
    optimizer: torch.optim.Optimizer,
    *,
    examples: Sequence[Example],
    micro_batches: Callable[[int], tuple[list[list[int] | None], int]],
    objective: str,
    options: objectives.Options,
    reference: Reference | None,
    lr_at: Callable[[int], float],
    clip_norm: float,
    layout: str,
    device: torch.device,
    first_step: int,
    last_step: int,
) -> Iterator[StepResult]:
    """Run optimizer steps first_step..last_step (inclusive, counted from 1).

    micro_batches(step) -> (index lists of this rank, examples in the step over all ranks). A None
    stands for a micro-batch that only other ranks have. Every micro-loss is the sum over its
    examples divided by the examples of the whole step, so gradients do not depend on the split.
    Raises NonFiniteError before the update if the loss or the gradient is not finite.
    """
    names = metrics.columns(objectives.KINDS[objective].members, reference is not None)
    for step in range(first_step, last_step + 1):
        started = time.perf_counter()
        lr = lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batches, total = micro_batches(step)
        sums = torch.zeros(len(names), device=device)
        count = tokens = 0
        for i, indices in enumerate(batches):
            prepared.set_sync(i == len(batches) - 1)
            rows = [examples[j] for j in indices or ()]
            if not rows:
                prepared.empty_backward(policy, build(examples[:1], layout).to(device))
                continue
            batch = build(rows, layout).to(device)
            policy_EM = policy(batch)
            reference_EM = None if reference is None else reference(rows, batch).to(device)
            loss_E, values_EK = score(objective, options, batch, rows, policy_EM, reference_EM)
            (loss_E.sum() / total).backward()
            sums += values_EK.sum(0)
            count += len(rows)
            tokens += sum(example_tokens(row) for row in rows)
        grad_norm = prepared.reduce_and_clip(clip_norm).item()
        if not (torch.isfinite(sums[0]).item() and grad_norm < float("inf")):
            raise NonFiniteError(_non_finite(step, grad_norm, examples, batches))
        optimizer.step()
        prepared.zero_grad()
        seconds = time.perf_counter() - started
        yield StepResult(step, lr, grad_norm, seconds, names, sums, count, tokens)


def score(
    objective: str,
    options: objectives.Options,
    batch: Batch,
    rows: Sequence[Example],
    policy_EM: Tensor,
    reference_EM: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """loss_E with gradient and the metrics' values [E, columns] without."""
    tokens_EM = batch.scored_M.view(batch.examples, batch.members)
    differing_E = torch.tensor([row.differing for row in rows], device=policy_EM.device)
    loss_E = objectives.compute(objective, policy_EM, reference_EM, tokens_EM, differing_E, options)
    return loss_E, metrics.per_example(loss_E, policy_EM, reference_EM, tokens_EM)


def example_tokens(example: Example) -> int:
    """Tokens of all members, prompts counted once per member: 4 (P + R) for an even quad."""
    return sum(
        len(responses) * len(prompt) + sum(len(r) for r in responses)
        for prompt, responses in zip(example.prompts, example.responses, strict=True)
    )


def _non_finite(
    step: int, grad_norm: float, examples: Sequence[Example], batches: list[list[int] | None]
) -> str:
    ids = [examples[j].id for indices in batches for j in indices or ()]
    return (
        f"step {step}: the loss or the gradient is not finite (gradient norm {grad_norm}); the "
        f"update was not applied. Quads of this step on this rank: {', '.join(ids)}. "
        f"`python train.py run=... replay_step={step}` prints each member"
    )


@torch.no_grad()
def check_start(
    policy: LogProbs,
    reference: Reference,
    rows: Sequence[Example],
    *,
    objective: str,
    options: objectives.Options,
    layout: str,
    device: torch.device,
    tolerance: float,
) -> tuple[float, float]:
    """At step 0 the policy is the reference: its loss must be the objective's value at margin 0.

    For the sigmoid link without an added margin that value is ln 2. Returns (loss, largest
    |log-ratio| in nats); raises ValueError if the loss is off by more than `tolerance`.
    """
    batch = build(rows, layout).to(device)
    policy_EM = policy(batch)
    reference_EM = reference(rows, batch).to(device)
    loss_E, _ = score(objective, options, batch, rows, policy_EM, reference_EM)
    expected_E, _ = score(objective, options, batch, rows, policy_EM, policy_EM)
    worst = (policy_EM - reference_EM).abs().max().item()
    loss, expected = loss_E.mean().item(), expected_E.mean().item()
    if not abs(loss - expected) <= tolerance:
        raise ValueError(
            f"step 0: loss {loss:.8f}, expected {expected:.8f} (policy equal to the reference) "
            f"within {tolerance:g}; largest |log-ratio| {worst:.3g} nats. The reference does not "
            "belong to these starting weights: delete its cache or check model.path"
        )
    return loss, worst
