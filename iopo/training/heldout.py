"""Held-out quads during training: loss and preferences, from log-probs alone."""

from collections.abc import Callable

import torch
from torch import Tensor

from iopo import objectives
from iopo.data.batching import pass_micro_batches, token_counts
from iopo.logprobs import LogProbs
from iopo.training import metrics
from iopo.training.loop import Job, Reference


@torch.no_grad()
def evaluate(
    job: Job, policy: LogProbs, reference: Reference | None, alive: Callable[[], None]
) -> dict[str, float]:
    """Means over all held-out quads on all ranks; every rank calls it together.

    Every objective is scored on quads: a pair or sft objective on the rows that a quad holds.
    Returns the columns of `metrics.columns` and the shares of `metrics.preferences`; {} without
    held-out quads. alive: called before each batch, so that a long evaluation is not a hang.
    """
    if not job.heldout:
        return {}
    kind = objectives.OBJECTIVES[job.objective].rows
    names = metrics.columns(kind, reference is not None)
    shares = list(metrics.preferences(torch.zeros(1, 4)))
    sums = torch.zeros(len(names) + len(shares) + 2, device=job.device)
    policy.eval()
    tokens_N = token_counts(job.heldout, job.batching.layout)
    for indices in pass_micro_batches(tokens_N, job.batching, job.rank):
        alive()
        rows = [job.heldout[i] for i in indices or (0,)]
        batch = job.build(rows)
        policy_Q4, reference_Q4 = policy(batch), None
        if reference is not None and (reference.collective or indices is not None):
            reference_Q4 = reference.call(rows, batch).to(job.device)
        if indices is None:  # it took part because other ranks' weights are gathered together
            continue
        tokens_Q4 = batch.scored_M.view(batch.examples, 4)
        policy_EM, tokens_EM = _rows(policy_Q4, kind), _rows(tokens_Q4, kind)
        reference_EM = None if reference_Q4 is None else _rows(reference_Q4, kind)
        differing_Q = torch.tensor([row.differing for row in rows], device=job.device)
        differing_E = differing_Q.repeat_interleave(len(policy_EM) // len(rows))
        loss_E = objectives.compute(
            job.objective, policy_EM, reference_EM, tokens_EM, differing_E, job.options
        )
        per_example = metrics.per_example(kind, loss_E, policy_EM, reference_EM, tokens_EM)
        per_quad = torch.stack(list(metrics.preferences(policy_Q4).values()), dim=1)
        counts = sums.new_tensor([len(policy_EM), len(rows)])
        sums += torch.cat([per_example.sum(0), per_quad.sum(0), counts])
    policy.train()
    *totals, example_count, quad_count = metrics.sum_over_ranks(sums)
    values = {name: totals[i] / example_count for i, name in enumerate(names)}
    return values | {name: totals[len(names) + i] / quad_count for i, name in enumerate(shares)}


def _rows(quads_Q4: Tensor, kind: objectives.Rows) -> Tensor:
    return quads_Q4[:, list(kind.columns)].reshape(-1, len(kind.members))
