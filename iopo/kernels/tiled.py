"""Row chunks x vocabulary tiles with an online log-sum-exp: CPU, and any device without Triton.

Shapes: R response rows, r rows of one chunk, D width, V vocabulary, v entries of one tile.
Logits exist one r x v tile at a time, in the accumulation dtype ("wide": float32, float64 for
float64 inputs); only the gradient of the weight keeps the R x v errors of some entries, to be one
product. The vocabulary is the outer loop, so that a bfloat16 tile of the weight is widened once for
all rows and a tile of its gradient is finished before the next one begins.
Tiles live in buffers that are allocated once: fresh memory costs a CPU more than the exponentials.

The target is kept out of the sum over the vocabulary. With `others` the sum of exp(z_v - shift)
over the other entries and `hit` the target's own exponential
    logp = -log1p(others / hit)    where hit > others,    1 - p[target] = -expm1(logp),
which cannot be above 0 and stays exact for confident tokens, where log p and 1 - p taken from a sum
that contains the target would be differences of nearly equal numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

ROWS, VOCAB = 2048, 1024  # a tile of float32 is 8 MB at most and stays in the caches
SLACK = 16.0  # the reference of the exponentials moves only if a logit passes it by this much


class Inputs(NamedTuple):
    """The arguments of linear_logprob.py, which documents and checks them."""

    hidden_RD: Tensor
    weight_VD: Tensor
    targets_R: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None


def forward(inputs: Inputs, *, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (logp_R, shift_R, scale_R, d logp_R / d hidden_RD or None), all in the wide dtype.

    softmax(z) = scale * exp(z - shift): what the backward pass needs, kept as two numbers because
    their log-sum-exp, shift - log(scale), would round the probabilities of peaky rows.
    The gradient costs one more product per tile and no second pass: like attention over the
    vocabulary, sum_v exp(z_v - reference) weight_v is rescaled whenever the reference moves.
    """
    hidden_RD, weight_VD, targets_R, bias_V, softcap = inputs
    dtype, wide = hidden_RD.dtype, torch.promote_types(hidden_RD.dtype, torch.float32)
    hidden_RD = hidden_RD.to(wide)
    reference_R = hidden_RD.new_full(targets_R.shape, torch.finfo(wide).min)
    sum_R, target_R, slope_R = (torch.zeros_like(reference_R) for _ in range(3))
    mean_RD = torch.zeros_like(hidden_RD) if with_gradient else None
    logits_buffer, weight_buffer = _buffers(hidden_RD, weight_VD)
    with _products_of(dtype):
        for vocab in _spans(weight_VD.shape[0], VOCAB):
            weight_vD = _widened(weight_VD[vocab], weight_buffer)
            for rows in _spans(hidden_RD.shape[0], ROWS):
                logits_rv = _product(hidden_RD[rows], weight_vD, logits_buffer)
                slope_rv = _finish_logits(logits_rv, bias_V, vocab, softcap)
                here_r, column_r1 = _targets_in(targets_R[rows], vocab)
                logit_r1 = logits_rv.gather(1, column_r1)
                target_R[rows] = torch.where(here_r, logit_r1.squeeze(1), target_R[rows])
                logits_rv.scatter_(1, column_r1, logit_r1.masked_fill_(here_r[:, None], -torch.inf))

                top_r = logits_rv.amax(1)
                moved_r = top_r > reference_R[rows] + SLACK
                if moved_r.any():
                    new_r = torch.where(moved_r, top_r, reference_R[rows])
                    shrink_r = torch.exp(reference_R[rows] - new_r)
                    reference_R[rows] = new_r
                    sum_R[rows] *= shrink_r
                    if mean_RD is not None:
                        mean_RD[rows] *= shrink_r[:, None]
                sum_R[rows] += logits_rv.sub_(reference_R[rows, None]).exp_().sum(1)
                if mean_RD is not None:
                    if slope_rv is not None:
                        slope_r = slope_rv.gather(1, column_r1).squeeze(1)
                        slope_R[rows] = torch.where(here_r, slope_r, slope_R[rows])
                        logits_rv.mul_(slope_rv)
                    mean_RD[rows].addmm_(logits_rv, weight_vD)

    logp_R, shift_R, scale_R = log_probability(reference_R, sum_R, target_R)
    if mean_RD is None:
        return logp_R, shift_R, scale_R, None
    miss_R = -torch.expm1(logp_R) if softcap is None else -torch.expm1(logp_R) * slope_R
    mean_RD *= -(torch.exp(reference_R - shift_R) * scale_R)[:, None]
    mean_RD.addcmul_(weight_VD[targets_R].to(wide), miss_R[:, None])
    return logp_R, shift_R, scale_R, mean_RD


def backward(
    inputs: Inputs,
    grad_R: Tensor,
    forward_R: tuple[Tensor, Tensor, Tensor],
    *,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of sum(grad_R * logp_R) by hidden, weight and bias, each in its input's dtype.

    forward_R: logp, shift and scale of `forward`.
    Sums are wide and rounded once. A tile holds magnitude * (softmax - onehot), and factor *
    magnitude = -grad: wide inputs keep the exponentials as they are and leave scale and grad to
    the factor, which multiplies narrower tensors; a tile of bfloat16 inputs is rounded by the
    product, so that their factor is a sign, which rounds nothing a second time.
    """
    hidden_RD, weight_VD, targets_R, bias_V, softcap = inputs
    logp_R, shift_R, scale_R = forward_R
    dtype, wide = hidden_RD.dtype, logp_R.dtype
    hidden_RD = hidden_RD.to(wide)
    if dtype == wide:
        magnitude_R, factor_R = 1 / scale_R, -grad_R * scale_R
    else:
        magnitude_R, factor_R = grad_R.abs(), -grad_R.sign()
        shift_R = shift_R - (magnitude_R * scale_R).log()
    miss_R1 = (torch.expm1(logp_R) * magnitude_R)[:, None]
    grad_hidden_RD = torch.zeros_like(hidden_RD)
    grad_weight_VD = torch.empty_like(weight_VD) if need_weight else None
    grad_bias_V = torch.zeros_like(weight_VD[:, 0], dtype=wide) if need_bias else None
    logits_buffer, weight_buffer = _buffers(hidden_RD, weight_VD)
    # a CPU that multiplies bfloat16 with float32 sums, and fast
    multiplies = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    narrow = dtype if multiplies else wide
    kept_rows = len(hidden_RD) if need_weight else 0  # dW needs all rows of a tile: one product
    in_place = need_weight and narrow == wide
    errors_buffer = hidden_RD.new_empty(kept_rows * len(weight_buffer), dtype=narrow)
    scaled_RD = (hidden_RD * factor_R[:, None]).to(narrow) if need_weight else hidden_RD
    with _products_of(dtype):
        for vocab in _spans(weight_VD.shape[0], VOCAB):
            weight_vD = _widened(weight_VD[vocab], weight_buffer)
            errors_Rv = errors_buffer[: kept_rows * len(weight_vD)].view(kept_rows, len(weight_vD))
            for rows in _spans(hidden_RD.shape[0], ROWS):
                buffer = errors_Rv[rows].view(-1) if in_place else logits_buffer
                error_rv = _product(hidden_RD[rows], weight_vD, buffer)
                slope_rv = _finish_logits(error_rv, bias_V, vocab, softcap)
                error_rv.sub_(shift_R[rows, None]).exp_()
                here_r, column_r1 = _targets_in(targets_R[rows], vocab)
                miss_r1 = torch.where(here_r[:, None], miss_R1[rows], error_rv.gather(1, column_r1))
                error_rv.scatter_(1, column_r1, miss_r1)
                if slope_rv is not None:
                    error_rv.mul_(slope_rv)
                grad_hidden_RD[rows].addmm_(error_rv, weight_vD)
                if need_weight and not in_place:
                    errors_Rv[rows] = error_rv
                if grad_bias_V is not None:
                    grad_bias_V[vocab] += factor_R[rows] @ error_rv
            if grad_weight_VD is not None and narrow == dtype:
                torch.mm(errors_Rv.t(), scaled_RD, out=grad_weight_VD[vocab])
            elif grad_weight_VD is not None:
                grad_weight_VD[vocab] = errors_Rv.t() @ scaled_RD
    grad_bias_V = None if grad_bias_V is None else grad_bias_V.to(dtype)
    return grad_hidden_RD.mul_(factor_R[:, None]).to(dtype), grad_weight_VD, grad_bias_V


def log_probability(
    reference_R: Tensor, sum_R: Tensor, target_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, shift, scale) from the target's logit and the others' sum of exponentials.

    In float64 and rounded once: a few numbers per row, whose rounding would show in the result.
    """
    wide, sum_R = reference_R.dtype, sum_R.double()
    shift_R = torch.maximum(reference_R, target_R)
    others_R = sum_R * torch.exp(reference_R.double() - shift_R)
    log_hit_R = target_R.double() - shift_R
    hit_R = torch.exp(log_hit_R)
    total_R = others_R + hit_R
    likely_R = -torch.log1p(others_R / hit_R)
    logp_R = torch.where(hit_R > others_R, likely_R, log_hit_R - total_R.log())
    return logp_R.to(wide), shift_R, (1 / total_R).to(wide)


@contextmanager
def _products_of(dtype: torch.dtype) -> Iterator[None]:
    """Let oneDNN multiply float32 matrices on the bfloat16 unit, if the inputs were bfloat16.

    On a CPU this is the way to bfloat16 products with float32 results: torch.mm(out_dtype=...) is
    for CUDA only, and a plain bfloat16 product rounds the logits. Widened bfloat16 numbers are
    multiplied exactly; only softmax(z) - onehot is rounded, as it is on a GPU. A CPU without the
    unit multiplies in float32.
    """
    if dtype != torch.bfloat16:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _spans(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _buffers(hidden_RD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the logits of one tile and for its weights, in hidden's (wide) dtype."""
    vocab = min(VOCAB, weight_VD.shape[0])
    logits = hidden_RD.new_empty(min(ROWS, hidden_RD.shape[0]) * vocab)
    return logits, hidden_RD.new_empty(vocab, weight_VD.shape[1])


def _widened(weight_vD: Tensor, buffer: Tensor) -> Tensor:
    same = weight_vD.dtype == buffer.dtype
    return weight_vD if same else buffer[: len(weight_vD)].copy_(weight_vD)


def _product(hidden_rD: Tensor, weight_vD: Tensor, buffer: Tensor) -> Tensor:
    rows, vocab = len(hidden_rD), len(weight_vD)
    logits_rv = buffer[: rows * vocab].view(rows, vocab)
    return torch.mm(hidden_rD, weight_vD.t(), out=logits_rv)


def _finish_logits(
    logits_rv: Tensor, bias_V: Tensor | None, vocab: slice, softcap: float | None
) -> Tensor | None:
    """Add the bias and cap the logits in place; return the cap's derivative if there is a cap."""
    if bias_V is not None:
        logits_rv += bias_V[vocab]
    if softcap is None:
        return None
    tanh_rv = logits_rv.div_(softcap).tanh_()
    slope_rv = 1 - tanh_rv * tanh_rv
    logits_rv.mul_(softcap)
    return slope_rv


def _targets_in(targets_r: Tensor, vocab: slice) -> tuple[Tensor, Tensor]:
    """(is the target one of these entries, its column there or 0)."""
    here_r = (targets_r >= vocab.start) & (targets_r < vocab.stop)
    return here_r, torch.where(here_r, targets_r - vocab.start, 0)[:, None]
