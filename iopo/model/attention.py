"""The attention function that lets transformers' models run on the shared layout.

`register_attention` makes it known to transformers under the name SHARED; a model loaded with
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

# From 2.12 on varlen_attn has a switch for key heads that serve several query heads. (This is no
# comparison of text: torch.__version__ is a TorchVersion.)
VARLEN_GROUPS_HEADS = torch.__version__ >= "2.12"


def register_attention() -> None:
    """Make SHARED a choice for `attn_implementation`; calling it again changes nothing."""
    AttentionInterface.register(SHARED, shared_attention)
    # For calls without segments. With segments, forward_arguments passes a mask that transformers
    # hands on as it is: otherwise it would build a T x T mask, and a wrong one, because it takes
    # the restart of positions before a second response for the start of a new document.
    AttentionMaskInterface.register(SHARED, sdpa_mask)


def forward_arguments(
    config: PretrainedConfig, segments: SharedSegments, device: torch.device
) -> dict[str, Any]:
    """What the model's forward needs beside input_ids and position_ids, with `segments`.

    config: the model's. To be made once per batch.
    Raises ValueError for a model that was not loaded with SHARED.
    """
    name = config._attn_implementation
    if name != SHARED:
        raise ValueError(
            f"the shared layout needs a model loaded with attention {SHARED!r}, found {name!r}; "
            "load it with this, or use the plain layout"
        )
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention by segments if `segments` is given, else transformers' "sdpa".

    query [1, H, T, E], key and value [1, K, T, E], after rotary embedding and norms; H is a
    multiple of K. scaling defaults to E ** -0.5.
    Returns (output [1, T, H, E] in query's dtype, None).
    Raises ValueError, with segments, on what they do not support: dropout, soft-capped scores, a
    sliding window shorter than the longest path, a key/value cache, a mask, float32 on CUDA.
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, softcap=softcap, **kwargs,
        )  # fmt: skip
    where = f"attention {SHARED!r} in {type(module).__name__}"
    _refuse(where, dropout, softcap, sliding_window, segments.max_k)
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{where}: expected as many keys as queries, found {key.shape[2]} and "
            f"{query.shape[2]}; pass use_cache=False"
        )
    if attention_mask is None or attention_mask.numel():
        raise ValueError(f"{where}: pass what forward_arguments returns in place of a mask")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # [1, heads, T, E] -> [T, heads, E]: transformers made the former as a view of the latter
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if query.is_cuda:
        out = varlen(q, k, v, segments, scale)
    else:
        out, _ = segment_attention(q, k, v, segments.ranges_N4, scale)
    return out.unsqueeze(0), None


def varlen(q: Tensor, k: Tensor, v: Tensor, segments: SharedSegments, scale: float) -> Tensor:
    """Attention by segments in PyTorch's FlashAttention over gathered keys; CUDA only.

    q [T, H, E], k and v [T, K, E], float16 or bfloat16. Returns [T, H, E].
    The causal mask is aligned bottom-right, which is what (prefix, own) keys need.
    Deterministic when a prompt has at most two responses: the gradient of a prompt's key is then
    a sum of two terms, the same bits in either order.
    """
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"attention {SHARED!r} on CUDA needs bfloat16 or float16, found {q.dtype}; set the "
            "model's dtype, or use the plain layout"
        )
    k, v = k.index_select(0, segments.gather_K), v.index_select(0, segments.gather_K)
    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if VARLEN_GROUPS_HEADS:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = varlen_attn(
        q, k, v, segments.cu_q, segments.cu_k, segments.max_q, segments.max_k,
        scale=scale, window_size=(-1, 0), **options,
    )  # fmt: skip
    assert isinstance(out, Tensor)  # a tuple only when the log-sum-exp is asked for
    return out


def _refuse(
    where: str, dropout: float, softcap: float | None, window: int | None, longest: int
) -> None:
    """longest: keys that a query may attend to."""
    if dropout:
        raise ValueError(
            f"{where}: attention dropout is {dropout}, the shared layout needs 0, because members "
            "that share a prompt would share its dropped scores; set attention_dropout to 0"
        )
    if softcap is not None:
        raise ValueError(
            f"{where}: soft-capped scores (here {softcap}) are not supported in the shared layout; "
            "use the plain layout with attention 'eager' for this model"
        )
    if window is not None and window < longest:
        raise ValueError(
            f"{where}: the model's sliding window of {window} tokens is shorter than the longest "
            f"prompt with response ({longest} tokens), which the shared layout does not support; "
            "lower data.max_prompt_tokens or data.max_response_tokens, or use the plain layout"
        )
