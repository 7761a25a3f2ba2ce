"""The log-probability of target tokens from hidden states, as one differentiable operator.

Shapes: R response rows, D width, V vocabulary.
"""

import torch
from torch import Tensor

from iopo.kernels import tiled


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, targets_R, bias_V, softcap):
        logp_R, lse_R = tiled.forward(hidden_RD, weight_VD, targets_R, bias_V, softcap)
        ctx.save_for_backward(hidden_RD, weight_VD, targets_R, bias_V, lse_R)
        ctx.softcap = softcap
        return logp_R

    @staticmethod
    def backward(ctx, grad_R):
        hidden_RD, weight_VD, targets_R, bias_V, lse_R = ctx.saved_tensors
        grads = tiled.backward(
            grad_R, hidden_RD, weight_VD, targets_R, lse_R, bias_V, ctx.softcap,
            need_weight=ctx.needs_input_grad[1],
        )  # fmt: skip
        hidden, weight, bias = grads
        weight = None if weight is None else weight.to(weight_VD.dtype)
        bias = None if bias is None or bias_V is None else bias.to(bias_V.dtype)
        return hidden.to(hidden_RD.dtype), weight, None, bias, None


def linear_logprob(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Log-probability (nats, float32, <= 0) of targets_R under softmax(hidden_RD weight_VD^T)."""
    if targets_R.numel() and not (0 <= targets_R.min() and targets_R.max() < weight_VD.shape[0]):
        raise ValueError(
            f"linear_logprob: targets must be in [0, {weight_VD.shape[0]}), found "
            f"{int(targets_R.min())}..{int(targets_R.max())}"
        )
    return _LinearLogprob.apply(hidden_RD, weight_VD, targets_R, bias_V, softcap)
