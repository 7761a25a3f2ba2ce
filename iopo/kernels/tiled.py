"""Row chunks x vocabulary tiles with an online log-sum-exp: CPU, and any device without Triton.

Shapes: R response rows, r rows of one chunk, D width, V vocabulary, v columns of one tile.
The largest intermediate is one r x v tile of logits in float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 512  # rows of a chunk
COLUMNS = 4096  # words of a tile


def forward(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Return (logp_R, lse_R), both in the accumulation dtype (float32; float64 for float64)."""
    wide = torch.promote_types(hidden_RD.dtype, torch.float32)
    logp_R = hidden_RD.new_empty(hidden_RD.shape[0], dtype=wide)
    lse_R = torch.empty_like(logp_R)
    for rows in _spans(hidden_RD.shape[0], ROWS):
        hidden_rD, targets_r = hidden_RD[rows].to(wide), targets_R[rows]
        max_r = logp_R.new_full((hidden_rD.shape[0],), -torch.inf)
        sum_r, target_r = torch.zeros_like(max_r), torch.zeros_like(max_r)
        for words in _spans(weight_VD.shape[0], COLUMNS):
            logits_rv, _ = _logits(hidden_rD, weight_VD[words].to(wide), bias_V, words, softcap)
            here_r, column_r = _targets_in(targets_r, words)
            target_r += logits_rv.gather(1, column_r[:, None]).squeeze(1) * here_r
            new_max_r = torch.maximum(max_r, logits_rv.amax(1))
            sum_r *= torch.exp(max_r - new_max_r)
            sum_r += logits_rv.sub_(new_max_r[:, None]).exp_().sum(1)
            max_r = new_max_r
        # The maximum contributes exp(0) = 1 to the sum and the target is at most the maximum, so
        # that neither term can be above 0 and logp cannot be either.
        logp_R[rows] = (target_r - max_r) - sum_r.log()
        lse_R[rows] = max_r + sum_r.log()
    return logp_R, lse_R


def backward(
    grad_R: Tensor,
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    lse_R: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    *,
    need_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of sum(grad_R * logp_R): (d hidden, d weight or None, d bias or None)."""
    wide = lse_R.dtype
    grad_hidden_RD = torch.zeros_like(hidden_RD, dtype=wide)
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if need_weight else None
    grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=wide)
    for rows in _spans(hidden_RD.shape[0], ROWS):
        hidden_rD, targets_r = hidden_RD[rows].to(wide), targets_R[rows]
        grad_r = grad_R[rows].to(wide)
        for words in _spans(weight_VD.shape[0], COLUMNS):
            weight_vD = weight_VD[words].to(wide)
            logits_rv, slope_rv = _logits(hidden_rD, weight_vD, bias_V, words, softcap)
            here_r, column_r = _targets_in(targets_r, words)
            # d logp / d z = onehot(target) - softmax(z)
            grad_rv = logits_rv.sub_(lse_R[rows, None]).exp_().mul_(-grad_r[:, None])
            grad_rv.scatter_add_(1, column_r[:, None], (grad_r * here_r)[:, None])
            if slope_rv is not None:
                grad_rv *= slope_rv
            grad_hidden_RD[rows].addmm_(grad_rv, weight_vD)
            if grad_weight_VD is not None:
                grad_weight_VD[words].addmm_(grad_rv.t(), hidden_rD)
            if grad_bias_V is not None:
                grad_bias_V[words] += grad_rv.sum(0)
    return grad_hidden_RD, grad_weight_VD, grad_bias_V


def _spans(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _logits(
    hidden_rD: Tensor, weight_vD: Tensor, bias_V: Tensor | None, words: slice, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Logits of one tile and, with a soft cap, the cap's derivative there."""
    logits_rv = hidden_rD @ weight_vD.t()
    if bias_V is not None:
        logits_rv += bias_V[words]
    if softcap is None:
        return logits_rv, None
    tanh_rv = logits_rv.div_(softcap).tanh_()
    return softcap * tanh_rv, 1 - tanh_rv * tanh_rv


def _targets_in(targets_r: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """(is the target one of these words, its column there or 0)."""
    here_r = (targets_r >= words.start) & (targets_r < words.stop)
    return here_r, torch.where(here_r, targets_r - words.start, 0)
