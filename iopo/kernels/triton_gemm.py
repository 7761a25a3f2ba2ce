"""CUDA: a matrix product whose epilogue reduces the logits, in Triton.

Shapes: R response rows, r rows of one chunk, D width, V vocabulary, B vocabulary blocks.
Forward: each program multiplies one block of rows with one of the vocabulary and keeps, of its
float32 accumulator, the maximum and the sum of exponentials of every row and the logits of the
targets in it. The partial results [B, R] are merged in a fixed order: no atomics, no locks. As in
tiled.py the target stays out of the sums.
Backward: the same product again in chunks of rows; its epilogue writes d loss / d logits in the
inputs' dtype, and cuBLAS multiplies that with the weight and, if wanted, with the hidden rows.
R changes with every batch: the kernels are not compiled anew for its value or its alignment.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from iopo.kernels.tiled import Inputs, log_probability

LOG2_E = tl.constexpr(1.4426950408889634)
CHUNK_BYTES_PER_ENTRY = 8192  # of d loss / d logits: 4096 rows of bfloat16, 1.25 GB at V = 152,064


@dataclass(frozen=True, slots=True)
class Blocks:
    """One program's share of the product, and how it is run."""

    rows: int
    vocab: int
    width: int
    warps: int
    stages: int
    descriptors: bool  # copy blocks by TMA; a chip without it would copy them unpipelined
    group: int = 16  # row blocks that share a block of V while it is in the L2 cache


def blocks_for(capability: int, itemsize: int, softcap: float | None) -> Blocks:
    """Block sizes by compute capability (80, 90, 100, ...) and bytes per input element.

    They fill the chip's shared memory (163 KB on sm_80, 227 KB on sm_90 and sm_100, 99 KB on the
    others) and its registers, of which a soft cap needs more: test_kernels_triton.py looks.
    """
    if itemsize == 4:  # no tensor cores: float32 is multiplied as float32
        return Blocks(rows=64, vocab=64, width=32, warps=4, stages=2, descriptors=False)
    vocab = 256 if softcap is None else 128
    if capability in (90, 100, 103):
        return Blocks(rows=128, vocab=vocab, width=64, warps=8, stages=4, descriptors=True)
    if capability == 80:
        return Blocks(rows=128, vocab=vocab, width=64, warps=8, stages=3, descriptors=False)
    return Blocks(rows=128, vocab=128, width=32, warps=8, stages=4, descriptors=False)


@triton.jit
def _logits(hidden, weight, bias_ptr, R, V, D, SOFTCAP: tl.constexpr, ROWS: tl.constexpr,
            VOCAB: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
            DESCRIPTORS: tl.constexpr):  # fmt: skip
    """(row, entry, float32 logits [ROWS, VOCAB] from there on) of this program's blocks.

    A group of row blocks shares each vocabulary block. Logits beyond R and V mean nothing.
    """
    in_group = GROUP * tl.cdiv(V, VOCAB)
    program = tl.program_id(0)
    first = program // in_group * GROUP
    rows_here = min(tl.cdiv(R, ROWS) - first, GROUP)
    row = (first + program % in_group % rows_here) * ROWS
    entry = program % in_group // rows_here * VOCAB
    logits = tl.zeros((ROWS, VOCAB), dtype=tl.float32)
    if DESCRIPTORS:
        for k in range(0, D, WIDTH):
            hidden_block = hidden.load([row, k])
            weight_block = weight.load([entry, k])
            logits = tl.dot(hidden_block, weight_block.T, logits, input_precision="ieee")
    else:
        column = tl.arange(0, WIDTH)
        rows = tl.minimum(row + tl.arange(0, ROWS), R - 1).to(tl.int64)
        vocab = tl.minimum(entry + tl.arange(0, VOCAB), V - 1).to(tl.int64)
        hidden_ptrs = hidden + rows[:, None] * D + column[None, :]
        weight_ptrs = weight + vocab[None, :] * D + column[:, None]
        for k in range(0, D, WIDTH):
            hidden_block = tl.load(hidden_ptrs + k, mask=column[None, :] < D - k, other=0.0)
            weight_block = tl.load(weight_ptrs + k, mask=column[:, None] < D - k, other=0.0)
            logits = tl.dot(hidden_block, weight_block, logits, input_precision="ieee")
    if bias_ptr is not None:
        vocab = entry + tl.arange(0, VOCAB)
        logits += tl.load(bias_ptr + vocab, mask=vocab < V, other=0).to(tl.float32)[None, :]
    if SOFTCAP is not None:
        # tanh x = sign(x) (1 - e) / (1 + e) with e = exp(-2 |x|), which cannot overflow
        e = tl.exp(-2 * tl.abs(logits) / SOFTCAP)
        tanh = tl.where(logits < 0, -1.0, 1.0) * (1 - e) / (1 + e)
        logits = SOFTCAP * tanh
    return row, entry, logits


@triton.jit(do_not_specialize=["R", "V"])
def forward_kernel(hidden, weight, bias_ptr, targets_ptr, top_ptr, sum_ptr, target_ptr, error_ptr,
                   R, V, D, error_stride, SOFTCAP: tl.constexpr, ROWS: tl.constexpr,
                   VOCAB: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
                   DESCRIPTORS: tl.constexpr):  # fmt: skip
    """Per row of a vocabulary block: maximum, sum of exponentials, logit of the target if here.

    With error_ptr also exp(z - maximum) times the soft cap's slope, 0 at the target, from which the
    gradient follows when the rows' sums are known.
    """
    row, entry, logits = _logits(hidden, weight, bias_ptr, R, V, D, SOFTCAP, ROWS, VOCAB, WIDTH,
                                 GROUP, DESCRIPTORS)  # fmt: skip
    rows, vocab = row + tl.arange(0, ROWS), entry + tl.arange(0, VOCAB)
    inside = rows < R
    targets = tl.load(targets_ptr + rows, mask=inside, other=-1).to(tl.int32)
    here = (targets >= entry) & (targets < entry + VOCAB)
    others = logits
    # One block in five holds a target, at V = 152,064, and the last may reach beyond V.
    if (tl.max(here.to(tl.int32), 0) > 0) | (entry + VOCAB > V):
        hits = vocab[None, :] == targets[:, None]
        tl.store(target_ptr + rows, tl.max(tl.where(hits, logits, float("-inf")), 1), mask=here)
        others = tl.where(hits | (vocab[None, :] >= V), float("-inf"), logits)
    top = tl.maximum(tl.max(others, 1), -1e30)  # a block without others: exp(-inf + 1e30)
    # 2^(x log2 e): one multiply-add and one exponential, which is the hardware's
    exps = tl.exp2(others * LOG2_E - (top * LOG2_E)[:, None])
    partial = (entry // VOCAB).to(tl.int64) * R + rows
    tl.store(top_ptr + partial, top, mask=inside)
    tl.store(sum_ptr + partial, tl.sum(exps, 1), mask=inside)
    if error_ptr is not None:
        if SOFTCAP is not None:
            exps *= 1 - (logits / SOFTCAP) * (logits / SOFTCAP)
        place = rows.to(tl.int64)[:, None] * error_stride + vocab[None, :]
        tl.store(error_ptr + place, exps.to(error_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["R", "V"])
def error_kernel(hidden, weight, bias_ptr, targets_ptr, shift_ptr, factor_ptr, miss_ptr, error_ptr,
                 R, V, D, error_stride, SOFTCAP: tl.constexpr, ROWS: tl.constexpr,
                 VOCAB: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
                   DESCRIPTORS: tl.constexpr):  # fmt: skip
    """d loss / d logits = factor exp(z - shift), miss at the target, times the soft cap's slope."""
    row, entry, logits = _logits(hidden, weight, bias_ptr, R, V, D, SOFTCAP, ROWS, VOCAB, WIDTH,
                                 GROUP, DESCRIPTORS)  # fmt: skip
    rows, vocab = row + tl.arange(0, ROWS), entry + tl.arange(0, VOCAB)
    inside = rows < R
    targets = tl.load(targets_ptr + rows, mask=inside, other=-1).to(tl.int32)
    shift = tl.load(shift_ptr + rows, mask=inside, other=0)
    factor = tl.load(factor_ptr + rows, mask=inside, other=0)
    miss = tl.load(miss_ptr + rows, mask=inside, other=0)
    error = tl.exp2(logits * LOG2_E - (shift * LOG2_E)[:, None]) * factor[:, None]
    here = (targets >= entry) & (targets < entry + VOCAB)
    if tl.max(here.to(tl.int32), 0) > 0:
        error = tl.where(vocab[None, :] == targets[:, None], miss[:, None], error)
    if SOFTCAP is not None:
        error *= 1 - (logits / SOFTCAP) * (logits / SOFTCAP)
    place = rows.to(tl.int64)[:, None] * error_stride + vocab[None, :]
    tl.store(error_ptr + place, error.to(error_ptr.dtype.element_ty), mask=inside[:, None])


def forward(inputs: Inputs, *, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As tiled.forward: (logp_R, shift_R, scale_R, d logp_R / d hidden_RD in hidden's dtype)."""
    inputs, width = _aligned(inputs)
    if not with_gradient:
        logp_R, shift_R, scale_R, _ = _reduce(inputs)
        return logp_R, shift_R, scale_R, None
    hidden_RD, weight_VD, targets_R, _, softcap = inputs
    shift_R = hidden_RD.new_empty(len(hidden_RD), dtype=torch.float32)
    logp_R, scale_R = torch.empty_like(shift_R), torch.empty_like(shift_R)
    unit_RD = torch.empty_like(hidden_RD)
    error_rV = _error_buffer(inputs)
    for rows in _chunks(hidden_RD):
        hidden_rD, targets_r = hidden_RD[rows], targets_R[rows]
        error_here = error_rV[: len(hidden_rD)]
        logp_R[rows], shift_R[rows], scale_R[rows], partial = _reduce(
            inputs._replace(hidden_RD=hidden_rD, targets_R=targets_r), error_here
        )
        top_Br, target_r = partial
        # Each vocabulary block was taken relative to its own maximum.
        factor_Br = -torch.exp(top_Br - shift_R[rows]) * scale_R[rows]
        error_here.view(len(hidden_rD), len(top_Br), -1).mul_(factor_Br.t()[:, :, None])
        miss_r = -torch.expm1(logp_R[rows])
        if softcap is not None:
            miss_r *= 1 - (target_r / softcap).square()
        error_here.scatter_(1, targets_r[:, None], miss_r[:, None].to(error_here.dtype))
        torch.mm(error_here[:, : len(weight_VD)], weight_VD, out=unit_RD[rows])
    return logp_R, shift_R, scale_R, unit_RD[:, :width]


def backward(
    inputs: Inputs,
    grad_R: Tensor,
    forward_R: tuple[Tensor, Tensor, Tensor],
    *,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As tiled.backward. The gradient of the weight is summed in float32 over chunks of rows."""
    inputs, width = _aligned(inputs)
    hidden_RD, weight_VD, targets_R, _, _ = inputs
    dtype, (logp_R, shift_R, scale_R) = hidden_RD.dtype, forward_R
    factor_R, miss_R = -grad_R * scale_R, -torch.expm1(logp_R) * grad_R
    grad_hidden_RD = torch.empty_like(hidden_RD)
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
    grad_bias_V = weight_VD.new_zeros(len(weight_VD), dtype=torch.float32) if need_bias else None
    error_rV = _error_buffer(inputs)
    for rows in _chunks(hidden_RD):
        hidden_rD = hidden_RD[rows]
        error_here = error_rV[: len(hidden_rD)]
        per_row = (targets_R[rows], shift_R[rows], factor_R[rows], miss_R[rows])
        _launch(error_kernel, inputs._replace(hidden_RD=hidden_rD), per_row, error_here)
        error_here = error_here[:, : len(weight_VD)]
        torch.mm(error_here, weight_VD, out=grad_hidden_RD[rows])
        if grad_weight_VD is not None:
            if dtype == torch.float32:
                grad_weight_VD.addmm_(error_here.t(), hidden_rD)
            else:
                torch.addmm(
                    grad_weight_VD, error_here.t(), hidden_rD,
                    out_dtype=torch.float32, out=grad_weight_VD,
                )  # fmt: skip
        if grad_bias_V is not None:
            grad_bias_V += error_here.sum(0, dtype=torch.float32)
    return (
        grad_hidden_RD[:, :width],
        None if grad_weight_VD is None else grad_weight_VD[:, :width].to(dtype),
        None if grad_bias_V is None else grad_bias_V.to(dtype),
    )


def _reduce(
    inputs: Inputs, error_RV: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(logp_R, shift_R, scale_R, (maxima top_BR, logits of the targets)); fills error_RV."""
    rows, vocab = len(inputs.hidden_RD), len(inputs.weight_VD)
    vocab_blocks = triton.cdiv(vocab, _blocks(inputs).vocab)
    top_BR = inputs.hidden_RD.new_empty(vocab_blocks, rows, dtype=torch.float32)
    sum_BR = torch.empty_like(top_BR)
    target_R = top_BR.new_empty(rows)
    _launch(forward_kernel, inputs, (inputs.targets_R, top_BR, sum_BR, target_R), error_RV)
    reference_R = top_BR.amax(0)
    sum_R = sum_BR.mul_(torch.exp(top_BR - reference_R)).sum(0)
    return *log_probability(reference_R, sum_R, target_R), (top_BR, target_R)


def _launch(kernel: Any, inputs: Inputs, per_row: tuple, error_RV: Tensor | None) -> None:
    hidden_RD, weight_VD, _, bias_V, softcap = inputs
    rows, vocab, width = len(hidden_RD), len(weight_VD), hidden_RD.shape[1]
    if rows == 0:
        return
    blocks = _blocks(inputs)
    grid = (triton.cdiv(rows, blocks.rows) * triton.cdiv(vocab, blocks.vocab),)
    hidden, weight = hidden_RD, weight_VD
    if blocks.descriptors:
        hidden = TensorDescriptor.from_tensor(hidden_RD, [blocks.rows, blocks.width])
        weight = TensorDescriptor.from_tensor(weight_VD, [blocks.vocab, blocks.width])
    kernel[grid](
        hidden, weight, bias_V, *per_row, error_RV, rows, vocab, width,
        0 if error_RV is None else error_RV.stride(0),
        SOFTCAP=softcap, ROWS=blocks.rows, VOCAB=blocks.vocab, WIDTH=blocks.width,
        GROUP=blocks.group, DESCRIPTORS=blocks.descriptors,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip


def _blocks(inputs: Inputs) -> Blocks:
    major, minor = torch.cuda.get_device_capability(inputs.hidden_RD.device)
    return blocks_for(10 * major + minor, inputs.hidden_RD.element_size(), inputs.softcap)


def _chunks(hidden_RD: Tensor) -> list[slice]:
    size = CHUNK_BYTES_PER_ENTRY // hidden_RD.element_size()
    return [slice(i, min(i + size, len(hidden_RD))) for i in range(0, len(hidden_RD), size)]


def _error_buffer(inputs: Inputs) -> Tensor:
    """Memory for one chunk's d loss / d logits; whole blocks of V, so that none is masked."""
    vocab, hidden_RD = _blocks(inputs).vocab, inputs.hidden_RD
    rows = min(len(hidden_RD), CHUNK_BYTES_PER_ENTRY // hidden_RD.element_size())
    return hidden_RD.new_empty(rows, triton.cdiv(len(inputs.weight_VD), vocab) * vocab)


def _aligned(inputs: Inputs) -> tuple[Inputs, int]:
    """Contiguous inputs whose rows are multiples of 16 bytes, which tensor descriptors demand.

    Every real model's are. A width that is not is padded with zeros in a copy of both: exact, but
    it costs the memory of the weight once more. Returns also the width before padding.
    """
    hidden_RD, weight_VD = inputs.hidden_RD, inputs.weight_VD
    width = hidden_RD.shape[1]
    padding = -width % (16 // hidden_RD.element_size())
    if padding:
        hidden_RD = torch.nn.functional.pad(hidden_RD, (0, padding))
        weight_VD = torch.nn.functional.pad(weight_VD, (0, padding))
    bias_V = inputs.bias_V
    made = Inputs(
        hidden_RD.contiguous(),
        weight_VD.contiguous(),
        inputs.targets_R.contiguous(),
        None if bias_V is None else bias_V.contiguous(),
        inputs.softcap,
    )
    return made, width
