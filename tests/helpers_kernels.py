"""What every kernel of iopo/kernels must compute, in plain PyTorch.

Shapes: R response rows, D width, V vocabulary.
"""

import torch
from torch import Tensor


def by_definition(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Log-probability of each row's target: z = cap(h W^T + b), logp = z[target] - log sum exp z.

    Products and sums are in float32 whatever the inputs are, in float64 for float64 inputs.
    cap(z) = softcap * tanh(z / softcap) when softcap is given (Gemma 2), the identity otherwise.
    Returns logp_R in nats. Keeps all R x V logits.
    """
    wide = torch.promote_types(hidden_RD.dtype, torch.float32)
    logits_RV = hidden_RD.to(wide) @ weight_VD.to(wide).t()
    logits_RV = logits_RV if bias_V is None else logits_RV + bias_V.to(wide)
    logits_RV = logits_RV if softcap is None else softcap * torch.tanh(logits_RV / softcap)
    return torch.log_softmax(logits_RV, dim=-1).gather(1, targets_R[:, None]).squeeze(1)
