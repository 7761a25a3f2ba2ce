"""Log-probabilities of target tokens from hidden states: the operator that the project uses.

Shapes: R response rows, M members, D width, V vocabulary.
Two entry points, both traced through by torch.compile: `linear_logprob`, one value per row, any
upstream gradient; and `linear_logprob_sums`, one value per member, for a head that is not trained.
On CUDA with Triton the work is in triton_gemm.py, elsewhere in tiled.py.
"""

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from iopo.kernels import tiled

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
        Every row of the weight is a word, as in the model's own logits: for a vocabulary padded
        to V pass the whole weight to include the padding, weight_VD[:n] to leave it out.
    targets_R: int64 [R], in [0, V).
    bias_V: [V] in the same dtype. softcap: > 0.
    Returns logp_R in nats, <= 0, float32 (float64 for float64 inputs): products are summed in
    float32 and the sums are rounded to nothing narrower. Not summed over tokens, no length
    normalisation.
    Gradient reaches hidden, weight and bias (each only if it needs one), in their dtype; it is not
    differentiable twice. Equal inputs give equal bits on the same device and thread count.
    Raises ValueError on other shapes and dtypes and on sharded weights; targets out of range are a
    ValueError on CPU and a device-side assertion on CUDA, where asking would stall the queue.
    """
    _check(hidden_RD, weight_VD, targets_R, bias_V, softcap)
    return _forward(hidden_RD, weight_VD, targets_R, bias_V, softcap)[0]


def linear_logprob_sums(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    member_R: Tensor,
    members: int,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Sum of log-probabilities per member, its gradient computed in the forward pass.

    sums[m] = sum of linear_logprob over the rows with member_R == m. The upstream gradient is then
    one number per member, which multiplies d sums / d hidden after the fact: the logits are
    computed once and not again in the backward pass (4RDV operations, not 6RDV), for one
    [R, D] tensor in hidden's dtype kept until then.

    member_R: int64 [R], in [0, members), in any order. Other arguments as in linear_logprob.
    Returns sums_M float32 (float64 for float64) in nats; 0 for a member without rows.
    Raises ValueError also if weight or bias want a gradient: use linear_logprob for those.
    """
    _check(hidden_RD, weight_VD, targets_R, bias_V, softcap)
    if member_R.shape != targets_R.shape or member_R.dtype != torch.int64:
        raise ValueError(
            f"linear_logprob_sums: member_R must be int64 {list(targets_R.shape)}, one entry per "
            f"row, found {member_R.dtype} {list(member_R.shape)}"
        )
    with_gradient = torch.is_grad_enabled() and hidden_RD.requires_grad
    if torch.is_grad_enabled() and (
        weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)
    ):
        raise ValueError(
            "linear_logprob_sums: the weight or bias of the head wants a gradient, which cannot be "
            "computed before the upstream gradient is known; freeze the head or use linear_logprob"
        )
    return _sums(
        hidden_RD, weight_VD, targets_R, member_R, members, bias_V, softcap, with_gradient
    )[0]


def sum_by_member(value_R: Tensor, member_R: Tensor, members: int) -> Tensor:
    """Sum the rows of each member, in a fixed order: index_add_ is not repeatable on CUDA."""
    belongs_MR = member_R == torch.arange(members, device=member_R.device)[:, None]
    return torch.where(belongs_MR, value_R, 0).sum(1)


def _check(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
) -> None:
    if isinstance(weight_VD, DTensor):
        raise ValueError(
            "linear_logprob: the weight is a sharded DTensor; call this inside the forward of the "
            "FSDP module that holds the head, where the weight is whole"
        )
    if hidden_RD.dim() != 2 or weight_VD.dim() != 2 or hidden_RD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            "linear_logprob: expected hidden [R, D] and weight [V, D], found "
            f"{list(hidden_RD.shape)} and {list(weight_VD.shape)}"
        )
    if hidden_RD.dtype not in DTYPES or weight_VD.dtype != hidden_RD.dtype:
        raise ValueError(
            "linear_logprob: hidden and weight must share one floating dtype, found "
            f"{hidden_RD.dtype} and {weight_VD.dtype}; cast the weight once, outside"
        )
    if targets_R.shape != hidden_RD.shape[:1] or targets_R.dtype != torch.int64:
        raise ValueError(
            f"linear_logprob: targets must be int64 [{hidden_RD.shape[0]}], one per row, found "
            f"{targets_R.dtype} {list(targets_R.shape)}"
        )
    if weight_VD.shape[0] == 0:
        raise ValueError("linear_logprob: the weight has no rows, hence no vocabulary")
    if bias_V is not None and (
        bias_V.shape != weight_VD.shape[:1] or bias_V.dtype != weight_VD.dtype
    ):
        raise ValueError(
            f"linear_logprob: bias must be {weight_VD.dtype} [{weight_VD.shape[0]}], found "
            f"{bias_V.dtype} {list(bias_V.shape)}"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"linear_logprob: softcap must be above 0, or None, found {softcap}")


def _check_range(name: str, index_R: Tensor, stop: int) -> None:
    """Inside the operators, where the values exist even under torch.compile."""
    wrong_R = (index_R < 0) | (index_R >= stop)
    if index_R.is_cuda:
        torch._assert_async(~wrong_R.any(), f"linear_logprob: {name} outside [0, {stop})")
    elif wrong_R.any():
        raise ValueError(
            f"linear_logprob: {name} must be in [0, {stop}), found {int(index_R[wrong_R][0])}; "
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp_R, shift_R, scale_R): softmax = scale * exp(z - shift)."""
    _check_range("targets", targets_R, weight_VD.shape[0])
    forward = _backend(hidden_RD).forward
    return forward(hidden_RD, weight_VD, targets_R, bias_V, softcap)[:3]


@_forward.register_fake
def _(hidden_RD, weight_VD, targets_R, bias_V, softcap):
    wide = torch.promote_types(hidden_RD.dtype, torch.float32)
    logp_R = hidden_RD.new_empty(hidden_RD.shape[0], dtype=wide)
    return logp_R, torch.empty_like(logp_R), torch.empty_like(logp_R)


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
    backward = _backend(hidden_RD).backward
    hidden, weight, bias = backward(
        grad_R, hidden_RD, weight_VD, targets_R, logp_R, shift_R, scale_R, bias_V, softcap,
        need_weight=need_weight, need_bias=need_bias,
    )  # fmt: skip
    nothing = hidden_RD.new_empty(0)
    return (
        hidden,
        nothing if weight is None else weight,
        nothing.clone() if bias is None else bias,
    )


@_backward.register_fake
def _(grad_R, hidden_RD, weight_VD, targets_R, logp_R, shift_R, scale_R, bias_V, softcap,
      need_weight, need_bias):  # fmt: skip
    return (
        hidden_RD.new_empty(hidden_RD.shape),
        weight_VD.new_empty(weight_VD.shape) if need_weight else hidden_RD.new_empty(0),
        bias_V.new_empty(bias_V.shape) if need_bias else hidden_RD.new_empty(0),
    )


def _save_for_backward(ctx, inputs, output) -> None:
    hidden_RD, weight_VD, targets_R, bias_V, ctx.softcap = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(hidden_RD, weight_VD, targets_R, *output, bias_V)


def _differentiate(ctx, grad_R, _grad_shift_R, _grad_scale_R):
    _, weight_needed, _, bias_needed, _ = ctx.needs_input_grad
    hidden, weight, bias = _backward(
        grad_R, *ctx.saved_tensors, ctx.softcap, weight_needed, bias_needed
    )
    return hidden, weight if weight_needed else None, None, bias if bias_needed else None, None


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)


@torch.library.custom_op("iopo::linear_logprob_sums", mutates_args=())
def _sums(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    member_R: Tensor,
    members: int,
    bias_V: Tensor | None,
    softcap: float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """(sums_M, d logp_R / d hidden_RD, empty unless with_gradient)."""
    _check_range("targets", targets_R, weight_VD.shape[0])
    _check_range("member_R", member_R, members)
    forward = _backend(hidden_RD).forward
    logp_R, _, _, unit_RD = forward(
        hidden_RD, weight_VD, targets_R, bias_V, softcap, with_gradient=with_gradient
    )
    unit_RD = hidden_RD.new_empty(0) if unit_RD is None else unit_RD.to(hidden_RD.dtype)
    return sum_by_member(logp_R, member_R, members), unit_RD


@_sums.register_fake
def _(hidden_RD, weight_VD, targets_R, member_R, members, bias_V, softcap, with_gradient):
    wide = torch.promote_types(hidden_RD.dtype, torch.float32)
    unit = hidden_RD.new_empty(hidden_RD.shape if with_gradient else 0)
    return hidden_RD.new_empty(members, dtype=wide), unit


def _save_unit_gradient(ctx, inputs, output) -> None:
    sums_M, unit_RD = output
    ctx.mark_non_differentiable(unit_RD)
    ctx.save_for_backward(unit_RD, inputs[3])


def _scale_unit_gradient(ctx, grad_M, _grad_unit_RD):
    unit_RD, member_R = ctx.saved_tensors
    grad_hidden_RD = (unit_RD * grad_M[member_R][:, None]).to(unit_RD.dtype)
    return grad_hidden_RD, None, None, None, None, None, None, None


_sums.register_autograd(_scale_unit_gradient, setup_context=_save_unit_gradient)
