"""The attention function that lets transformers' models run on the shared layout.

Importing this file makes it known to transformers under the name SHARED; a model loaded with
`attn_implementation=SHARED` then works on both layouts. With `segments=` among the keyword
arguments of the model's forward, attention is by segments (see SharedSegments): PyTorch's
varlen_attn on CUDA, attention_cpu on the CPU. Without it (plain layout, generation) it is
transformers' own "sdpa".

Letters: T packed tokens, H query heads, K key/value heads, E head dimension.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from iopo.data.layout import SharedSegments
from iopo.model.attention_cpu import segment_attention

SHARED = "shared"

# What transformers may hand on to any attention function and what has no say in the result here.
WITHOUT_EFFECT = {"position_ids", "output_attentions", "output_router_logits", "use_cache"}

# varlen_attn's switch for key heads that serve several query heads; PyTorch 2.11 has no switch and
# takes them. (A TorchVersion, not a text.)
VARLEN_GROUPS_HEADS = torch.__version__ >= "2.12"


def forward_arguments(
    config: PretrainedConfig, segments: SharedSegments, device: torch.device
) -> dict[str, Any]:
    """What the model's forward needs beside input_ids and position_ids, once per batch.

    config: of a model that was loaded with SHARED.
    Raises ValueError for a sliding window shorter than the longest path: some models put it into
    their mask alone, and do not tell their attention.
    """
    assert config._attn_implementation == SHARED, "the shared layout needs this attention"
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if getattr(config, "use_sliding_window", True) and (not kinds or "sliding_attention" in kinds):
        _check_window(type(config).__name__, window, segments)
    # A 4-D mask without elements, which transformers hands on as it is.
    mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)
    return {"attention_mask": mask, "segments": segments, "use_cache": False}


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: SharedSegments | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention by segments if `segments` is given, else transformers' "sdpa".

    query [1, H, T, E], key and value [1, K, T, E], after rotary embedding and norms; H is a
    multiple of K. scaling defaults to E ** -0.5.
    Returns (output [1, T, H, E] in query's dtype, None).
    Segments support no dropout, key/value cache and mask.
    Raises ValueError, with the model's layer, for keyword arguments that are not known here, and
    with segments for soft-capped scores, attention that is not causal, values of another width than
    keys, a sliding window shorter than the longest path and for float32 on CUDA.
    """
    unknown = [k for k, v in others.items() if v is not None and k not in WITHOUT_EFFECT]
    if unknown:
        raise _refusal(module, f"the attention keyword {', '.join(unknown)}")
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, sliding_window=sliding_window, softcap=softcap,
        )  # fmt: skip
    if softcap is not None:
        raise _refusal(module, "soft-capped attention scores (softcap)")
    if is_causal is False:
        raise _refusal(module, "attention that is not causal (is_causal=False)")
    if value.shape[-1] != key.shape[-1]:
        widths = f"{key.shape[-1]} and {value.shape[-1]}"
        raise _refusal(module, f"keys and values of different width ({widths})")
    # Members that share a prompt would share its dropped scores.
    assert not dropout
    assert key.shape[2] == query.shape[2], "as many keys as queries: use_cache=False"
    assert attention_mask is not None and not attention_mask.numel(), "see forward_arguments"
    _check_window(type(module).__name__, sliding_window, segments)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # [1, heads, T, E] -> [T, heads, E]: transformers made the former as a view of the latter
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if query.is_cuda:
        out = varlen(q, k, v, segments, scale)
    else:
        out, _ = segment_attention(q, k, v, segments.ranges_N4, scale)
    return out.unsqueeze(0), None


def _check_window(name: str, window: int | None, segments: SharedSegments) -> None:
    if window and window < segments.max_k:
        raise ValueError(
            f"{name}: the model's sliding window of {window} tokens is shorter than the longest "
            f"prompt with response ({segments.max_k} tokens), which the shared layout does not "
            "support; lower data.max_prompt_tokens or data.max_response_tokens, or use the plain "
            "layout"
        )


def _refusal(module: nn.Module, what: str) -> ValueError:
    return ValueError(f"{type(module).__name__} needs {what}, which attention {SHARED!r} lacks")


def varlen(q: Tensor, k: Tensor, v: Tensor, segments: SharedSegments, scale: float) -> Tensor:
    """Attention by segments in PyTorch's FlashAttention over gathered keys; CUDA only.

    q [T, H, E], k and v [T, K, E], float16 or bfloat16. Returns [T, H, E].
    The causal mask is aligned bottom-right, which is what (prefix, own) keys need.
    Deterministic, but under torch.compile, when a prompt has at most two responses: the gradient of
    a prompt's key is then a sum of two terms, the same bits in either order.
    """
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"attention {SHARED!r} on CUDA needs bfloat16 or float16, found {q.dtype}; set the "
            "model's dtype, or use the plain layout"
        )
    k, v = k.index_select(0, segments.gather_K), v.index_select(0, segments.gather_K)
    options: dict[str, Any] = {}
    if VARLEN_GROUPS_HEADS and q.shape[1] != k.shape[1]:
        options["enable_gqa"] = True
    out = varlen_attn(
        q, k, v, segments.cu_q, segments.cu_k, segments.max_q, segments.max_k,
        scale=scale, window_size=(-1, 0), **options,
    )  # fmt: skip
    assert isinstance(out, Tensor)  # a tuple only when the log-sum-exp is asked for
    if out.grad_fn is not None and not torch.compiler.is_compiling():
        _deterministic_backward(out.grad_fn)
    return out


def _deterministic_backward(node: Any) -> None:
    """FlashAttention's backward adds to the queries' gradients in any order, unless PyTorch is told
    to be deterministic: for this one operator, for others refuse to work then."""
    before: list[int] = []

    def begin(grads: Any) -> None:
        before.append(torch.get_deterministic_debug_mode())
        torch.set_deterministic_debug_mode("error")

    def end(of_inputs: Any, of_outputs: Any) -> None:
        torch.set_deterministic_debug_mode(before.pop())

    node.register_prehook(begin)
    node.register_hook(end)


AttentionInterface.register(SHARED, shared_attention)
# For calls without segments. With segments, forward_arguments passes a mask that transformers hands
# on as it is: otherwise it would build a T x T mask, and a wrong one, because it takes the restart
# of positions before a second response for the start of a new document.
AttentionMaskInterface.register(SHARED, sdpa_mask)
