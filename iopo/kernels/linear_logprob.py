"""Log-probabilities of target tokens from hidden states: the operator that the project uses.

Shapes: R response rows, D width, V vocabulary.
`linear_logprob` is traced through by torch.compile. On CUDA with Triton the work is in
triton_gemm.py, elsewhere in tiled.py.

A row's upstream gradient is one number, so it commutes with the rest: d logp / d hidden can be
computed in the forward pass, while the logits are there, and multiplied afterwards. That is exact
for any upstream, and 4RDV operations instead of 6RDV with the logits computed again. The gradient
of the weight sums over rows and must wait for the upstream. A trained head on a CPU keeps the
errors until then, if they are few and not bfloat16 (tiled.py); others compute their logits again.
"""

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from iopo.kernels import tiled
from iopo.kernels.tiled import Inputs

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def linear_logprob(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Log-probability of each row's target token; the logits are never stored.

    z = cap(h W^T + b), logp = z[target] - log sum_v exp z_v, where cap(z) is
    softcap tanh(z / softcap) if softcap is given (Gemma 2) and z otherwise.

    hidden_RD, weight_VD: [R, D] and [V, D], bfloat16, float16, float32 or float64, the same dtype.
        Every row of the weight is an entry, as in the model's own logits: for a vocabulary padded
        to V pass the whole weight to include the padding, weight_VD[:n] to leave it out.
    targets_R: int64 [R], in [0, V).
    bias_V: [V] in the same dtype. softcap: > 0.
    Returns logp_R in nats, <= 0, float32 (float64 for float64 inputs): products are summed in
    float32 and the sums are rounded to nothing narrower. Not summed over tokens, no length
    normalisation.
    Gradient reaches hidden, weight and bias (each only if it needs one), in their dtype; it is not
    differentiable twice. If only hidden needs one, it is computed here: call under torch.no_grad()
    where no gradient is wanted. Equal inputs give equal bits on the same device and thread count.
    Raises ValueError on other shapes and dtypes and on sharded weights; targets out of range are a
    ValueError on CPU and a device-side assertion on CUDA, where asking would stall the queue.
    """
    _check(Inputs(hidden_RD, weight_VD, targets_R, bias_V, softcap))
    trained = weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)
    in_forward = torch.is_grad_enabled() and hidden_RD.requires_grad
    keep = in_forward and weight_VD.requires_grad and keeps(hidden_RD, weight_VD, bias_V)
    in_forward = in_forward and (keep or not trained)
    return _forward(hidden_RD, weight_VD, targets_R, bias_V, softcap, keep, in_forward)[0]


def keeps(hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> bool:
    """Whether a trained head keeps its errors, R V numbers, for the gradient of its weight."""
    size = tiled.kept_bytes(len(hidden_RD), len(weight_VD), hidden_RD.dtype)
    ours = (
        hidden_RD.device.type == "cpu" and _backend(hidden_RD) is tiled
    )  # not Triton's interpreter
    return size > 0 and bias_V is None and ours


def _check(inputs: Inputs) -> None:
    hidden, weight, targets, bias, softcap = inputs
    if isinstance(weight, DTensor):
        raise ValueError(
            "linear_logprob: the weight is a sharded DTensor; shard LogProbs itself as the FSDP "
            "root, whose forward sees it whole, and give the output layer no group of its own"
        )
    expected = None
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        expected = "hidden [R, D] and weight [V, D]"
    elif hidden.dtype not in DTYPES or weight.dtype != hidden.dtype:
        expected = "one floating dtype of hidden and weight; cast the weight once, outside"
    elif targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        expected = "targets int64 [R], one per row"
    elif weight.shape[0] == 0:
        expected = "a weight with rows, which are the vocabulary"
    elif bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        expected = "bias [V] in the weight's dtype"
    elif softcap is not None and not softcap > 0:
        expected = "softcap above 0, or None"
    if expected is not None:
        found = [f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else x for x in inputs]
        raise ValueError(f"linear_logprob: expected {expected}; found {inputs._fields} = {found}")


def _check_targets(targets_R: Tensor, vocab: int) -> None:
    """Inside the operator, where the values exist even under torch.compile."""
    wrong_R = (targets_R < 0) | (targets_R >= vocab)
    if targets_R.is_cuda:
        torch._assert_async(~wrong_R.any(), f"linear_logprob: targets outside [0, {vocab})")
    elif wrong_R.any():
        raise ValueError(
            f"linear_logprob: targets must be in [0, {vocab}), found {int(targets_R[wrong_R][0])}; "
            "select the rows to score before the call, masked ones (-100) are not skipped"
        )


def _backend(hidden_RD: Tensor):
    """The module that computes on this device."""
    if hidden_RD.is_cuda and hidden_RD.dtype != torch.float64 and find_spec("triton"):
        from iopo.kernels import triton_gemm  # Triton is absent where there is no CUDA

        return triton_gemm
    return tiled


@torch.library.custom_op("iopo::linear_logprob", mutates_args=())
def _forward(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    keep: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp_R, shift_R, scale_R, unit_RD, kept): softmax = scale * exp(z - shift).

    unit_RD is d logp_R / d hidden_RD in hidden's dtype, empty unless with_gradient; kept, of
    tiled.forward, is empty unless keep.
    """
    _check_targets(targets_R, weight_VD.shape[0])
    inputs = Inputs(hidden_RD, weight_VD, targets_R, bias_V, softcap)
    kept = _kept(hidden_RD, weight_VD, keep)
    options = {"kept": kept} if keep else {}  # of tiled.py alone
    found = _backend(hidden_RD).forward(inputs, with_gradient=with_gradient, **options)
    logp_R, shift_R, scale_R, unit_RD = found
    unit_RD = hidden_RD.new_empty(0) if unit_RD is None else unit_RD.to(hidden_RD.dtype)
    return logp_R, shift_R, scale_R, unit_RD, kept


def _kept(hidden_RD: Tensor, weight_VD: Tensor, keep: bool) -> Tensor:
    elements = len(hidden_RD) * len(weight_VD) if keep else 0
    return hidden_RD.new_empty(elements, dtype=_wide(hidden_RD))


def _wide(hidden_RD: Tensor) -> torch.dtype:
    return torch.promote_types(hidden_RD.dtype, torch.float32)


@_forward.register_fake
def _(hidden_RD, weight_VD, targets_R, bias_V, softcap, keep, with_gradient):
    logp_R = hidden_RD.new_empty(hidden_RD.shape[0], dtype=_wide(hidden_RD))
    unit_RD = hidden_RD.new_empty(hidden_RD.shape if with_gradient else 0)
    kept = _kept(hidden_RD, weight_VD, keep)
    return logp_R, torch.empty_like(logp_R), torch.empty_like(logp_R), unit_RD, kept


@torch.library.custom_op("iopo::linear_logprob_backward", mutates_args=())
def _backward(
    grad_R: Tensor,
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    logp_R: Tensor,
    shift_R: Tensor,
    scale_R: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by hidden, weight and bias; an unwanted one is an empty tensor."""
    inputs = Inputs(hidden_RD, weight_VD, targets_R, bias_V, softcap)
    hidden, weight, bias = _backend(hidden_RD).backward(
        inputs, grad_R, (logp_R, shift_R, scale_R), need_weight=need_weight, need_bias=need_bias
    )
    empty = [hidden_RD.new_empty(0) for _ in range(2)]
    return hidden, empty[0] if weight is None else weight, empty[1] if bias is None else bias


@_backward.register_fake
def _(grad_R, hidden_RD, weight_VD, targets_R, logp_R, shift_R, scale_R, bias_V, softcap,
      need_weight, need_bias):  # fmt: skip
    return (
        hidden_RD.new_empty(hidden_RD.shape),
        weight_VD.new_empty(weight_VD.shape) if need_weight else hidden_RD.new_empty(0),
        bias_V.new_empty(bias_V.shape) if need_bias else hidden_RD.new_empty(0),
    )


@torch.library.custom_op("iopo::linear_logprob_weight_gradient", mutates_args=())
def _weight_gradient(
    kept: Tensor, hidden_RD: Tensor, grad_R: Tensor, scale_R: Tensor, words: int
) -> Tensor:
    """The weight's gradient from what the forward pass kept."""
    return tiled.weight_gradient(kept, hidden_RD, grad_R, scale_R, words)


@_weight_gradient.register_fake
def _(kept, hidden_RD, grad_R, scale_R, words):
    return hidden_RD.new_empty(words, hidden_RD.shape[1])


def _save_for_backward(ctx, inputs, output) -> None:
    hidden_RD, weight_VD, targets_R, bias_V, ctx.softcap, ctx.keep, ctx.with_gradient = inputs
    *per_row, unit_RD, kept = output
    ctx.mark_non_differentiable(*output[1:])
    if ctx.keep:
        ctx.words = len(weight_VD)
        ctx.save_for_backward(unit_RD, kept, hidden_RD, per_row[2])
    elif ctx.with_gradient:
        ctx.save_for_backward(unit_RD)
    else:
        ctx.save_for_backward(hidden_RD, weight_VD, targets_R, *per_row, bias_V)


@once_differentiable
def _differentiate(ctx, grad_R, *_):
    if ctx.with_gradient:
        unit_RD, *of_weight = ctx.saved_tensors
        # into memory of its dtype: the product of bfloat16 and float32 would be float32, [R, D]
        hidden, weight = torch.empty_like(unit_RD), None
        torch.mul(unit_RD, grad_R[:, None], out=hidden)
        if ctx.keep:
            kept, hidden_RD, scale_R = of_weight
            weight = _weight_gradient(kept, hidden_RD, grad_R, scale_R, ctx.words)
        return hidden, weight, *[None] * 5
    _, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    wanted = need_weight, need_bias
    hidden, weight, bias = _backward(grad_R, *ctx.saved_tensors, ctx.softcap, *wanted)
    given = weight if need_weight else None, None, bias if need_bias else None
    return hidden, *given, *[None] * 3


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
