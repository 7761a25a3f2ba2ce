"""What is measured at every step, as sums and counts that add up over micro-batches and ranks.

docs/curves.md says what each number means.
Letters: E examples, M members per example (4 for quads in the order x1y1, x1y2, x2y2, x2y1),
N names of members: M, but 1 of a group, whose members are alike.
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
    if rows.rewards:
        names += of_groups(*torch.ones(3, 1, 2))
    if with_reference:
        names += [f"logratio/{m}" for m in rows.members]
    return names


@torch.no_grad()
def per_example(
    rows: Rows,
    loss_E: Tensor,
    policy_EM: Tensor,
    reference_EM: Tensor | None,
    tokens_EM: Tensor,
    rewards_EM: Tensor | None = None,
) -> Tensor:
    """float32 [E, columns]; without a reference margins are of the policy's own log-probs."""

    def by_name(values_EM: Tensor) -> Tensor:
        return values_EM.unflatten(1, (len(rows.members), -1)).mean(2)  # [E, N]

    r_EM = policy_EM if reference_EM is None else policy_EM - reference_EM
    out = [loss_E, by_name(policy_EM / tokens_EM)[:, 0], *by_name(policy_EM).unbind(1)]
    margins = list(rows.margins(r_EM).values())
    if margins:
        out += [margins[0], margins[0] > 0, *margins[1:]]
    if rewards_EM is not None:
        out += of_groups(r_EM, tokens_EM, rewards_EM).values()
    if reference_EM is not None:
        out += by_name(r_EM).unbind(1)
    return torch.stack([value.float() for value in out], dim=1)


def of_groups(r_EG: Tensor, tokens_EG: Tensor, rewards_EG: Tensor) -> dict[str, Tensor]:
    """What is reported of groups, [E] each; the margin is that of the responses above the mean
    reward over the others, by their mean log-ratio, and 0 where all rewards are equal."""
    above_EG = rewards_EG > rewards_EG.mean(1, keepdim=True)
    signal_E = rewards_EG.amax(1) > rewards_EG.amin(1)
    above_E, below_E = ((r_EG * of).sum(1) / of.sum(1).clamp(min=1) for of in (above_EG, ~above_EG))
    margin_E = (above_E - below_E) * signal_E
    return {
        "margin": margin_E,
        "accuracy": margin_E > 0,
        "reward": rewards_EG.mean(1),
        "signal": signal_E,
        "logratio_per_token": (r_EG / tokens_EG).abs().mean(1),
    }


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
