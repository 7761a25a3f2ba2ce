"""Row chunks x vocabulary tiles with an online log-sum-exp: CPU, and any device without Triton.

Shapes: R response rows, r rows of one chunk, D width, V vocabulary, v entries of one tile.
Logits exist one r x v tile at a time, in the accumulation dtype ("wide": float32, float64 for
float64 inputs). The gradient of the weight needs the errors of all rows: if all R x V of them take
at most KEPT_BYTES, the forward pass keeps them; otherwise R x v at a time are computed again. The
vocabulary is the outer loop, so that a bfloat16 tile of the weight is widened once for all rows and
a tile of its gradient is finished before the next one begins.
Tiles live in buffers that are allocated once: fresh memory costs a CPU more than the exponentials.

The target is kept out of the sum over the vocabulary. With `others` the sum of exp(z_v - shift)
over the other entries and `hit` the target's own exponential
    logp = -log1p(others / hit)    where hit > others,    1 - p[target] = -expm1(logp),
which cannot be above 0 and stays exact for confident tokens, where log p and 1 - p taken from a sum
that contains the target would be differences of nearly equal numbers.
"""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from iopo.files import cache_root, sha256_text, write_text

FAST = 1.3  # times as fast as float32: bfloat16 products that are worth their rounding
ROWS, VOCAB = 2048, 1024  # a tile of float32 is 8 MB at most and stays in the caches
FAST_VOCAB = 512  # where products are fast, passes over a tile count, and want nearer caches
KEPT_BYTES = 2**30  # a choice by size alone: equal inputs, equal bits
SLACK = 16.0  # the reference of the exponentials moves only if a logit passes it by this much


class Inputs(NamedTuple):
    """The arguments of linear_logprob.py, which documents and checks them."""

    hidden_RD: Tensor
    weight_VD: Tensor
    targets_R: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None


def narrow(dtype: torch.dtype) -> torch.dtype:
    """The dtype of errors: bfloat16 where this CPU multiplies it fast, with float32 sums."""
    fast = dtype == torch.bfloat16 and bf16_speed() > FAST
    return dtype if fast else torch.promote_types(dtype, torch.float32)


def tile_words(dtype: torch.dtype) -> int:
    """Entries of the vocabulary in a tile, as measured (docs/log/2026-11-performance.md)."""
    return FAST_VOCAB if narrow(dtype) == torch.bfloat16 else VOCAB


def kept_bytes(rows: int, words: int, dtype: torch.dtype) -> int:
    """Of the errors that a forward pass keeps for `weight_gradient`; 0 if it had better not.

    They are too many, or bfloat16, whose products cost no more than writing and reading them where
    they are fast (docs/log/2026-11-performance.md).
    """
    size = rows * words * torch.promote_types(dtype, torch.float32).itemsize
    return size if size <= KEPT_BYTES and dtype != torch.bfloat16 else 0


def forward(
    inputs: Inputs, *, with_gradient: bool, kept: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (logp_R, shift_R, scale_R, d logp_R / d hidden_RD or None), all in the wide dtype.

    kept: R V numbers to be filled with the errors (softmax - onehot) / scale, one tile [R, v] after
        the other, for weight_gradient; with_gradient only.
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
    logits_buffer, weight_buffer = _buffers(hidden_RD, weight_VD, tile_words(dtype))
    with products_of(dtype):
        for vocab in _spans(weight_VD.shape[0], tile_words(dtype)):
            weight_vD = _widened(weight_VD[vocab], weight_buffer)
            for rows in _spans(hidden_RD.shape[0], ROWS):
                tile = logits_buffer if kept is None else _tile(kept, vocab, len(hidden_RD))[rows]
                logits_rv = _product(hidden_RD[rows], weight_vD, tile.view(-1))
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
                    if kept is not None and vocab.start > 0:
                        moved = rows.start + moved_r.nonzero().squeeze(1)
                        earlier = kept[: vocab.start * len(hidden_RD)]
                        earlier.view(-1, len(hidden_RD), VOCAB)[:, moved] *= shrink_r[moved_r, None]
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
    own_scale_R = torch.exp(reference_R - shift_R) * scale_R
    mean_RD *= -own_scale_R[:, None]
    mean_RD.addcmul_(weight_VD[targets_R].to(wide), miss_R[:, None])
    if kept is None:
        return logp_R, shift_R, scale_R, mean_RD
    count, first_R = len(hidden_RD), targets_R - targets_R % VOCAB  # of the target's tile
    widths_R = (len(weight_VD) - first_R).clamp_max(VOCAB)
    places_R = first_R * count + torch.arange(count) * widths_R + targets_R - first_R
    # a scale of 0 belongs to a row that is certain of its target: nothing is missed there
    kept[places_R] = -miss_R / own_scale_R.clamp_min(torch.finfo(wide).tiny)
    return logp_R, reference_R, own_scale_R, mean_RD


def weight_gradient(
    kept: Tensor, hidden_RD: Tensor, grad_R: Tensor, scale_R: Tensor, words: int
) -> Tensor:
    """The gradient [V, D] of sum(grad_R * logp_R) by the weight, in hidden's dtype.

    kept, scale_R: of `forward`. Sums are wide and rounded once.
    """
    gradient_VD = hidden_RD.new_empty(words, hidden_RD.shape[1])
    scaled_RD = hidden_RD * (-grad_R * scale_R)[:, None]
    for vocab in _spans(words, VOCAB):
        errors_Rv = _tile(kept, vocab, len(hidden_RD))
        if kept.dtype == hidden_RD.dtype:
            torch.mm(errors_Rv.t(), scaled_RD, out=gradient_VD[vocab])
        else:
            gradient_VD[vocab] = errors_Rv.t() @ scaled_RD
    return gradient_VD


def _tile(kept: Tensor, vocab: slice, rows: int) -> Tensor:
    """[R, v] of `kept`."""
    return kept[vocab.start * rows : vocab.stop * rows].view(rows, -1)


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
    errors = narrow(dtype)
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
    logits_buffer, weight_buffer = _buffers(hidden_RD, weight_VD, tile_words(dtype))
    kept_rows = len(hidden_RD) if need_weight else 0  # dW needs all rows of a tile: one product
    in_place = need_weight and errors == wide
    errors_buffer = hidden_RD.new_empty(kept_rows * len(weight_buffer), dtype=errors)
    scaled_RD = (hidden_RD * factor_R[:, None]).to(errors) if need_weight else hidden_RD
    with products_of(dtype):
        for vocab in _spans(weight_VD.shape[0], tile_words(dtype)):
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
            if grad_weight_VD is not None and errors == dtype:
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


@cache
def bf16_speed() -> float:
    """How many times as fast as float32 matrices this CPU multiplies bfloat16 ones, on one core.

    Measured, because flags do not tell: two CPUs with AVX512-BF16 gave 2.2 and 0.6
    (docs/performance.md). Once for a processor, torch and oneDNN's limit, and remembered in the
    user's cache: the ranks of a run, and its resume, agree.
    """
    about = r"^(?:model name|flags|CPU part|Features)\s*:.*"
    lines = set(re.findall(about, Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    identity = "\n".join([*sorted(lines), torch.__version__, limit])
    note = cache_root() / "bf16_speed" / (sha256_text(identity) + ".json")
    if not note.is_file():
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, json.dumps(_measured_speed()))
    return json.loads(note.read_text())


def _measured_speed() -> float:
    """In turn, on one thread, in processor time, the fastest of each: others matter little."""
    squares = [torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    seconds: tuple[list[float], list[float]] = ([], [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(8):  # the first makes oneDNN's kernel
        for seen, square in zip(seconds, squares, strict=True):
            started = time.thread_time()
            torch.mm(square, square.t())
            seen.append(time.thread_time() - started)
    torch.set_num_threads(threads)
    return min(seconds[0]) / min(seconds[1])


@contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
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


def _buffers(hidden_RD: Tensor, weight_VD: Tensor, words: int) -> tuple[Tensor, Tensor]:
    """Memory for the logits of one tile and for its weights, in hidden's (wide) dtype."""
    vocab = min(words, weight_VD.shape[0])
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
