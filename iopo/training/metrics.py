"""What is measured at every step, as sums and counts that add up over micro-batches and ranks.

docs/curves.md says what each number means.
Letters: E examples, M members per example (4 for quads in the order x1y1, x1y2, x2y2, x2y1).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from iopo.objectives import Rows


def columns(rows: Rows, with_reference: bool) -> list[str]:
    """Names of the columns that `per_example` returns, in order."""
    names = ["loss", "logp_per_token"] + [f"logp/{m}" for m in rows.members]
    margins = list(rows.margins(torch.zeros(1, len(rows.members))))
    if margins:
        names += [margins[0], "accuracy", *margins[1:]]
    if with_reference:
        names += [f"logratio/{m}" for m in rows.members]
    return names


@torch.no_grad()
def per_example(
    rows: Rows, loss_E: Tensor, policy_EM: Tensor, reference_EM: Tensor | None, tokens_EM: Tensor
) -> Tensor:
    """float32 [E, columns]; without a reference margins are of the policy's own log-probs."""
    r_EM = policy_EM if reference_EM is None else policy_EM - reference_EM
    out = [loss_E, policy_EM[:, 0] / tokens_EM[:, 0], *policy_EM.unbind(1)]
    margins = list(rows.margins(r_EM).values())
    if margins:
        out += [margins[0], margins[0] > 0, *margins[1:]]
    if reference_EM is not None:
        out += r_EM.unbind(1)
    return torch.stack([value.float() for value in out], dim=1)


def sum_over_ranks(values: Tensor) -> list[float]:
    """`values` (any 1-D tensor, on the run's device) summed over all ranks, in float64."""
    values = values.double()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values.tolist()


def preferences(policy_Q4: Tensor) -> dict[str, Tensor]:
    """Which held-out quads the policy alone gets right, bool [Q] each, no reference involved.

    x_preference: both responses prefer their instruction, which no bias for a response can fake.
    y_preference: both instructions prefer their response.
    """
    L11, L12, L22, L21 = policy_Q4.unbind(1)
    return {
        "group_accuracy": L11 + L22 > L12 + L21,
        "x_preference": (L11 > L21) & (L22 > L12),
        "y_preference": (L11 > L12) & (L22 > L21),
    }
