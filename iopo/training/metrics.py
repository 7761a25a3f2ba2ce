"""What is measured at every step, as sums and counts that add up over micro-batches and ranks.

Letters: E examples, M members per example (4 for quads in the order x1y1, x1y2, x2y2, x2y1).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from iopo.objectives import Rows

# name -> what a reader of the curves needs to know. docs/curves.md is written from this table.
GLOSSARY = {
    "loss": "objective, mean over examples",
    "margin": "(P1 + P2) / 2 in nats: how much more the matched members are preferred than by the "
    "reference; what beta multiplies",
    "accuracy": "share of examples whose margin is above 0 (quads: group accuracy against the "
    "reference)",
    "margin/out_x1": "log-ratio x1y1 - x1y2: output preference under x1",
    "margin/out_x2": "log-ratio x2y2 - x2y1: output preference under x2",
    "margin/in_y1": "log-ratio x1y1 - x2y1: input preference of y1",
    "margin/in_y2": "log-ratio x2y2 - x1y2: input preference of y2",
    "logratio/MEMBER": "policy - reference log-prob of a member, nats per response",
    "logp/MEMBER": "policy log-prob of a member, nats per response",
    "logp_per_token": "mean over examples of log-prob per response token of the first member",
    "group_accuracy": "held-out share of quads with L11 + L22 > L12 + L21 (L: policy log-prob)",
    "x_preference": "held-out share of quads with L11 > L21 and L22 > L12",
    "y_preference": "held-out share of quads with L11 > L12 and L22 > L21",
    "grad_norm": "global 2-norm of the gradient before clipping",
    "lr": "learning rate of this step",
    "tokens_per_s": "response and prompt tokens, each counted once per member, per second",
    "step_s": "seconds for the step",
}


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
    """float32 [E, len(columns)] of what one example contributes.

    Without a reference (SimPO, ORPO) margins are of the policy's own log-probs.
    """
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

    group_accuracy: L11 + L22 > L12 + L21. x_preference: both responses prefer their instruction
    (L11 > L21 and L22 > L12), which no bias for a response can fake. y_preference: both
    instructions prefer their response (L11 > L12 and L22 > L21).
    """
    L11, L12, L22, L21 = policy_Q4.unbind(1)
    return {
        "group_accuracy": L11 + L22 > L12 + L21,
        "x_preference": (L11 > L21) & (L22 > L12),
        "y_preference": (L11 > L12) & (L22 > L21),
    }
