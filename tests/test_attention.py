"""The CPU operator against a masked softmax written out, and what the attention refuses."""

import pytest
import torch

from iopo.data.layout import segments
from iopo.model.attention_cpu import segment_attention

# Two prompts of 5 and 1 tokens with responses 3, 2 and 1, 0 (dropped), 4, then a tail of 2.
RANGES = [(0, 8, 0, 0), (8, 10, 0, 5), (10, 12, 10, 10), (12, 16, 10, 11), (16, 18, 16, 16)]
T = 18


def allowed_TT() -> torch.Tensor:
    """True where query t may see key s, from the definition: a loop over both."""
    mask = torch.zeros(T, T, dtype=torch.bool)
    for start, stop, prefix_start, prefix_stop in RANGES:
        for query in range(start, stop):
            mask[query, prefix_start:prefix_stop] = True
            mask[query, start : query + 1] = True
    return mask


def by_definition(query, key, value, scale):
    """[T, H, E] from [T, H, E] and [T, K, E] by explicit scores and softmax."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = torch.einsum("the,she->hts", query, key) * scale
    weights = scores.masked_fill(~allowed_TT(), -torch.inf).softmax(-1)
    return torch.einsum("hts,she->the", weights, value), scores


def inputs(heads, groups, dtype=torch.float64, width=8):
    generator = torch.Generator().manual_seed(heads * 10 + groups)
    shapes = ((T, heads, width), (T, groups, width), (T, groups, width))
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (3, 1)])
def test_segments_equal_the_masked_softmax(heads, groups):
    query, key, value = inputs(heads, groups)
    out, lse = segment_attention(query, key, value, segments(RANGES).ranges_N4, 0.3)
    expected, scores = by_definition(query, key, value, 0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    expected_lse = scores.masked_fill(~allowed_TT(), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)
    upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    grads = torch.autograd.grad(out, (query, key, value), upstream)
    expected_grads = torch.autograd.grad(expected, (query, key, value), upstream)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-12)
