"""Attention by segments on the CPU, as an operator that torch.compile leaves whole.

A segment's queries attend to all keys of its prefix and causally to their own. Two ways, by size:

- PyTorch's flash kernel on slices, without a mask and without copying keys: once for the prefix,
  once for the segment itself, merged by their log-sum-exps. The backward gives the kernel the
  merged output and log-sum-exp, so that each part's gradient is that of the merged softmax.
- A prompt and all its responses (a tree) as one masked softmax written out, where bfloat16
  products are fast and the tree is small: the kernel's blocks are then mostly overhead.

Measured, forward and backward of one layer, one thread of an EPYC with AVX512-BF16, bfloat16, 9
query and 3 key heads of 64: a tree of 95 + 2 x 40 tokens takes 3.1 ms by the kernel and 1.8 written
out, one of 250 + 2 x 130 tokens 19.5 and 15.6 ms, and from 800 tokens on the two are level.

Letters: T packed tokens, H query heads, K key/value heads, G = H / K, E head dimension, N segments,
S tokens of a tree.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from iopo.kernels.tiled import narrow, products_of

# The kernel behind scaled_dot_product_attention on the CPU. The public function keeps its
# log-sum-exp to itself, and merging needs it.
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

WRITTEN_OUT = 512  # tokens of the largest tree whose scores are written out: all pairs of them
Range = tuple[int, int, int, int]  # start, stop, prefix_start, prefix_stop


@torch.library.custom_op("iopo::segment_attention", mutates_args=())
def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, ranges_N4: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each segment's queries over its prefix and, causally, over itself.

    query [T, H, E], key and value [T, K, E], of one floating dtype; H is a multiple of K.
    ranges_N4: int64 [N, 4] on the CPU, see SharedSegments; every token lies in one segment.
    Returns the output [T, H, E] in query's dtype and the log-sum-exp [H, T] (nats, float32 or
    float64). Gradient flows to query, key and value, not through the log-sum-exp.
    """
    tokens, heads, width = query.shape
    out = query.new_empty(tokens, heads, width)
    accum_dtype = torch.promote_types(query.dtype, torch.float32)
    lse = torch.empty(tokens, heads, dtype=accum_dtype).t()
    groups = key.shape[1]
    q, k, v, o = (_by_group(x, groups, heads) for x in (query, key, value, out))
    lse_g = lse.unflatten(0, (groups, -1))
    for tree in _trees(ranges_N4):
        if _written_out(query.dtype, tree):
            at = slice(tree[0][0], tree[-1][1])
            rows, to = (query[at], key[at], value[at]), (out[at], lse[:, at])
            _softmax(rows, _mask(_from_0(tree), accum_dtype), scale, to)
            continue
        for start, stop, prefix_start, prefix_stop in tree:
            own, prefix = slice(start, stop), slice(prefix_start, prefix_stop)
            q_own = q[:, :, own]
            o_own, lse_own = _forward(q_own, k[:, :, own], v[:, :, own], 0.0, True, scale=scale)
            if prefix_start == prefix_stop:
                o[:, :, own], lse_g[:, :, own] = o_own, lse_own
                continue
            o_pre, lse_pre = _forward(
                q_own, k[:, :, prefix], v[:, :, prefix], 0.0, False, scale=scale
            )
            merged = torch.logaddexp(lse_own, lse_pre)
            weight_own = (lse_own - merged).exp().unsqueeze(-1)
            o[:, :, own] = torch.lerp(o_pre.to(accum_dtype), o_own.to(accum_dtype), weight_own)
            lse_g[:, :, own] = merged
    return out, lse


@torch.library.custom_op("iopo::segment_attention_backward", mutates_args=())
def segment_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    ranges_N4: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of segment_attention for query, key and value, in their shapes and dtypes."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (query, key, value))  # not in their strides
    for tree in _trees(ranges_N4):
        at = slice(tree[0][0], tree[-1][1])
        rows = (grad[at], query[at], key[at], value[at], out[at])
        to = (dq[at], dk[at], dv[at])
        if _written_out(query.dtype, tree):
            _softmax_backward(rows, _mask(_from_0(tree), lse.dtype), scale, to)
        else:
            _flash_backward(rows, lse[:, at], _from_0(tree), scale, to)
    return dq, dk, dv


def _flash_backward(
    rows: Sequence[Tensor], lse: Tensor, tree: Sequence[Range], scale: float, to: Sequence[Tensor]
) -> None:
    """Gradients of a tree for query, key and value, written `to` where they belong."""
    heads, groups = rows[1].shape[1], rows[2].shape[1]
    # In float32 whatever came in: the kernel's bfloat16 backward takes 2.9 times as long at 80 + 40
    # tokens (0.83 times at 1000 + 500) and is less exact.
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in rows]
    g, q, k, v, o = (_by_group(x, groups, heads) for x in wide)
    lse_g = lse.unflatten(0, (groups, -1))
    dq, dk, dv = (
        torch.empty_like(wide[n], memory_format=torch.contiguous_format) for n in (1, 2, 3)
    )
    dq_g, dk_g, dv_g = _by_group(dq, groups, heads), dk.transpose(0, 1), dv.transpose(0, 1)
    for start, stop, prefix_start, prefix_stop in tree:
        own, prefix = slice(start, stop), slice(prefix_start, prefix_stop)
        of_rows = (g[:, :, own], q[:, :, own])
        merged = (o[:, :, own], lse_g[:, :, own], 0.0)
        to_q, to_k, to_v = _backward(
            *of_rows, k[:, :, own], v[:, :, own], *merged, True, scale=scale
        )
        dq_g[:, :, own] = to_q
        dk_g[:, own], dv_g[:, own] = to_k.sum(1), to_v.sum(1)
        if prefix_start == prefix_stop:
            continue
        k_pre, v_pre = k[:, :, prefix], v[:, :, prefix]
        to_q, to_k, to_v = _backward(*of_rows, k_pre, v_pre, *merged, False, scale=scale)
        dq_g[:, :, own] += to_q
        dk_g[:, prefix] += to_k.sum(1)
        dv_g[:, prefix] += to_v.sum(1)
    for one, whole in zip(to, (dq, dk, dv), strict=True):
        one.copy_(whole)


def _softmax(rows: Sequence[Tensor], mask_SS: Tensor, scale: float, to: Sequence[Tensor]) -> None:
    """Fill `to`, out [S, H, E] and lse [H, S], of a tree. mask_SS: see _mask."""
    (query, key, value), (out, lse) = rows, to
    scores = _scores(query, key, mask_SS, scale)
    top = scores.amax(-1, keepdim=True)
    weights = torch.softmax(scores, -1)
    # the largest weight is 1 over the sum of exponentials less the largest score
    lse.unflatten(0, (key.shape[1], -1)).copy_((top - weights.amax(-1, keepdim=True).log())[..., 0])
    made = torch.bmm(weights.to(query.dtype).flatten(1, 2), value.transpose(0, 1))
    _heads(out, key).copy_(made.view_as(_heads(query, key)))


def _softmax_backward(
    rows: Sequence[Tensor], mask_SS: Tensor, scale: float, to: Sequence[Tensor]
) -> None:
    """As _flash_backward. The weights and their gradients are rounded to the inputs' dtype, as they
    are on a GPU; all sums are wide, and rounded once."""
    grad, query, key, value, out = rows
    dtype, wide = query.dtype, mask_SS.dtype
    # exp(scores - lse) are the same numbers in three times the time: -inf is slow to exponentiate
    weights = torch.softmax(_scores(query, key, mask_SS, scale), -1).flatten(1, 2)
    g, q, o = (_heads(x, key).flatten(1, 2) for x in (grad, query, out))
    k, v = key.transpose(0, 1), value.transpose(0, 1)
    delta = (g.to(wide) * o.to(wide)).sum(-1, keepdim=True)
    with products_of(dtype):
        of_scores = torch.bmm(g.to(wide), v.to(wide).transpose(1, 2))
    of_scores = of_scores.sub_(delta).mul_(weights).mul_(scale).to(dtype)
    weights = weights.to(dtype)
    dq, dk, dv = to
    made = torch.bmm(of_scores, k).view_as(_heads(query, key))
    _heads(dq, key).copy_(made)
    dk.transpose(0, 1).copy_(torch.bmm(of_scores.transpose(1, 2), q))
    dv.transpose(0, 1).copy_(torch.bmm(weights.transpose(1, 2), g))


def _scores(query: Tensor, key: Tensor, mask_SS: Tensor, scale: float) -> Tensor:
    """Wide scores [K, G, S, S] from exact products, plus the mask."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q = _heads(query, key)
    with products_of(query.dtype):
        found = torch.bmm(q.flatten(1, 2).to(wide), key.transpose(0, 1).to(wide).transpose(1, 2))
    return found.mul_(scale).view(*q.shape[:3], -1).add_(mask_SS)


def _heads(x: Tensor, key: Tensor) -> Tensor:
    """[S, H, E] as [K, G, S, E]."""
    return _by_group(x, key.shape[1], x.shape[1])


def _trees(ranges_N4: Tensor) -> Iterator[list[Range]]:
    """Each segment without a prefix, with those after it whose prefix lies in it."""
    tree: list[Range] = []
    for start, stop, prefix_start, prefix_stop in ranges_N4.tolist():
        if tree and prefix_start == prefix_stop:
            yield tree
            tree = []
        tree.append((start, stop, prefix_start, prefix_stop))
    yield tree


def _from_0(tree: Sequence[Range]) -> tuple[Range, ...]:
    """The same tree, its first token being 0."""
    first = tree[0][0]
    return tuple(
        (a - first, b - first, *((c - first, d - first) if c < d else (0, 0)))
        for a, b, c, d in tree
    )


@lru_cache(maxsize=32)  # those of a micro-batch, for its layers; a megabyte each at most
def _mask(tree: tuple[Range, ...], dtype: torch.dtype) -> Tensor:
    """[S, S], -inf where the query of a row must not see the key of a column, else 0; to be added,
    which takes an eighth of the time of filling."""
    size = tree[-1][1]
    mask_SS = torch.full((size, size), -torch.inf, dtype=dtype).triu(1)
    for start, stop, _, prefix_stop in tree[1:]:
        mask_SS[start:stop, prefix_stop:start] = -torch.inf
    return mask_SS


def _written_out(dtype: torch.dtype, tree: Sequence[Range]) -> bool:
    return dtype == torch.bfloat16 == narrow(dtype) and tree[-1][1] - tree[0][0] <= WRITTEN_OUT


def _by_group(x: Tensor, groups: int, heads: int) -> Tensor:
    """[T, H or K, E] as a view [K, G, T, E]: a key head serves G query heads without copies."""
    x = x.transpose(0, 1)
    if x.shape[0] == heads:
        return x.unflatten(0, (groups, -1))
    return x.unsqueeze(1).expand(-1, heads // groups, -1, -1)


@segment_attention.register_fake
def _(query, key, value, ranges_N4, scale):
    accum_dtype = torch.promote_types(query.dtype, torch.float32)
    lse = torch.empty(query.shape[0], query.shape[1], dtype=accum_dtype, device=query.device)
    return query.new_empty(query.shape), lse.t()


@segment_attention_backward.register_fake
def _(grad, query, key, value, out, lse, ranges_N4, scale):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _save(ctx, inputs, output):
    query, key, value, ranges_N4, scale = inputs
    ctx.save_for_backward(query, key, value, ranges_N4, *output)
    ctx.scale = scale


def _differentiate(ctx, grad, _grad_lse):
    query, key, value, ranges_N4, out, lse = ctx.saved_tensors
    grads = segment_attention_backward(grad, query, key, value, out, lse, ranges_N4, ctx.scale)
    return *grads, None, None


segment_attention.register_autograd(_differentiate, setup_context=_save)
