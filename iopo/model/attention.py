"""The attention function that lets transformers' models run on the shared layout.

`register_attention` makes it known to transformers under the name SHARED; a model loaded with
`attn_implementation=SHARED` then works on all layouts. With `segments=` among the keyword
arguments of the model's forward, attention is by segments (see SharedSegments): PyTorch's
varlen_attn on CUDA, attention_cpu on the CPU. Without it (plain layout, generation) it is
transformers' own "sdpa".
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from iopo.data.layout import SharedSegments
from iopo.model.attention_cpu import segment_attention

SHARED = "shared"


def register_attention() -> None:
    """Make SHARED a choice for `attn_implementation`; calling it again changes nothing."""
    AttentionInterface.register(SHARED, shared_attention)
    # For calls without segments. With segments the caller passes `no_mask`, which transformers
    # hands on as it is: otherwise it would build a T x T mask, and a wrong one, because it takes
    # the restart of positions before a second response for the start of a new document.
    AttentionMaskInterface.register(SHARED, sdpa_mask)


def no_mask(device: torch.device) -> Tensor:
    """The attention_mask to pass with segments: a prepared 4-D mask without elements."""
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)


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
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention by segments if `segments` is given, else transformers' "sdpa".

    query [1, H, T, E], key and value [1, K, T, E], after rotary embedding and norms. H query heads
    share K key/value heads. scaling defaults to E ** -0.5.
    Returns (output [1, T, H, E] in query's dtype, None).
    Raises ValueError, with segments, on what they do not support: dropout, soft-capped scores, a
    sliding window shorter than the longest path, a key/value cache, a mask.
    """
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, softcap=softcap, **kwargs,
        )  # fmt: skip
    _refuse(module, query, key, attention_mask, segments, dropout, sliding_window, softcap)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # [1, heads, T, E] -> [T, heads, E]: transformers made the former as a view of the latter.
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if query.is_cuda:
        out = _varlen(q, k, v, segments, scale)
    else:
        out, _ = segment_attention(q, k, v, segments.ranges_N4, scale)
    return out.unsqueeze(0), None


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: SharedSegments, scale: float) -> Tensor:
    """[T, H, E] by PyTorch's FlashAttention over gathered keys, causal aligned bottom-right."""
    from torch.nn.attention.varlen import varlen_attn  # needs CUDA

    # A prompt token occurs once per response. With at most two responses the backward adds two
    # terms to zero, in either order the same bits.
    k, v = k.index_select(0, segments.gather_K), v.index_select(0, segments.gather_K)
    out = varlen_attn(
        q, k, v, segments.cu_q, segments.cu_k, segments.max_q, segments.max_k,
        scale=scale, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)  # a tuple only when the log-sum-exp is asked for
    return out


def _refuse(module, query, key, attention_mask, segments, dropout, sliding_window, softcap) -> None:
    where = f"attention {SHARED!r} in {type(module).__name__}"
    if dropout:
        raise ValueError(
            f"{where}: attention dropout is {dropout}; the shared layout needs 0, because the "
            "members that share a prompt would also share its mask. Set attention_dropout to 0"
        )
    if softcap is not None:
        raise ValueError(
            f"{where}: soft-capped attention scores ({softcap}) are not supported in the shared "
            "layout; use data.layout=plain with attn_implementation=eager for this model"
        )
    if sliding_window is not None and sliding_window < segments.max_k:
        raise ValueError(
            f"{where}: a sliding window of {sliding_window} is shorter than the longest prompt and "
            f"response ({segments.max_k} tokens); shorten the data or use the plain layout"
        )
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{where}: expected as many keys as queries, found {key.shape[2]} and "
            f"{query.shape[2]}; pass use_cache=False"
        )
    if attention_mask is None or attention_mask.numel():
        raise ValueError(
            f"{where}: segments replace the mask; pass attention_mask=no_mask(device) with them"
        )
