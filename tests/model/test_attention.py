"""Attention by segments against a masked softmax written out, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch

from iopo.data.layout import segments
from iopo.model import attention, attention_cpu
from iopo.model.attention import forward_arguments, shared_attention
from iopo.model.attention_cpu import segment_attention, segment_attention_backward

# Prompts of 5 and 1 tokens, the first with responses of 3 and 2, the second with 1, 4 and 1 tokens;
# then a tail of 2.
RANGES = [
    (0, 8, 0, 0),
    (8, 10, 0, 5),
    (10, 12, 10, 10),
    (12, 16, 10, 11),
    (16, 17, 10, 11),
    (17, 19, 17, 17),
]
T = 19
CPU = torch.device("cpu")
HEADS = pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (3, 1)])


def allowed_TT() -> torch.Tensor:
    """True where query t may see key s, from the definition: a loop over both."""
    mask = torch.zeros(T, T, dtype=torch.bool)
    for start, stop, prefix_start, prefix_stop in RANGES:
        for query in range(start, stop):
            mask[query, prefix_start:prefix_stop] = True
            mask[query, start : query + 1] = True
    return mask


def by_definition(query, key, value, scale):
    """[T, H, E] from [T, H, E] and [T, K, E] by explicit scores and softmax, and the scores."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = torch.einsum("the,she->hts", query, key) * scale
    scores = scores.masked_fill(~allowed_TT(), -torch.inf)
    return torch.einsum("hts,she->the", scores.softmax(-1), value), scores


def inputs(heads, groups, dtype=torch.float64, width=16):
    generator = torch.Generator().manual_seed(heads * 10 + groups)
    shapes = ((T, heads, width), (T, groups, width), (T, groups, width))
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for shape in shapes
    ]


def gradients(out, query, key, value):
    upstream = torch.linspace(-1, 2, out.numel()).to(out.dtype).view(out.shape)
    return torch.autograd.grad(out, (query, key, value), upstream)


def assert_close(actual, expected, tolerance=1e-12):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["kernel", "written out"])
def way(request, monkeypatch):
    """Each of the two ways of the CPU, whatever the dtype and the machine."""
    written = request.param == "written out"
    monkeypatch.setattr(attention_cpu, "_written_out", lambda dtype, tree: written)


@HEADS
def test_segments_equal_the_masked_softmax(heads, groups, way):
    query, key, value = inputs(heads, groups)
    out, lse = segment_attention(query, key, value, segments(RANGES).ranges_N4, 0.3)
    expected, scores = by_definition(query, key, value, 0.3)
    assert_close([out, lse], [expected, scores.logsumexp(-1)])
    assert_close(gradients(out, query, key, value), gradients(expected, query, key, value))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_narrow_dtypes_are_as_exact_as_they_can_be(dtype, tolerance, way):
    query, key, value = inputs(6, 2, dtype)
    out, lse = segment_attention(query, key, value, segments(RANGES).ranges_N4, 0.3)
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    expected, _ = by_definition(*wide, 0.3)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close([out], [expected], tolerance)
    assert_close(gradients(out, query, key, value), gradients(expected, *wide), tolerance)


def test_the_operators_keep_torchs_contract(way):
    """Fake kernels, autograd registration and no aliasing, as torch.compile relies on them."""
    query, key, value = inputs(4, 2)
    ranges_N4 = segments(RANGES).ranges_N4
    torch.library.opcheck(segment_attention, (query, key, value, ranges_N4, 0.3))
    out, lse = segment_attention(query, key, value, ranges_N4, 0.3)
    plain = [x.detach() for x in (out, query, key, value, out, lse)]
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in plain[:4]]  # as a model's
    torch.library.opcheck(segment_attention_backward, (*strided, *plain[4:], ranges_N4, 0.3))
    torch.library.opcheck(segment_attention_backward, (*plain, ranges_N4, 0.3))


def slow_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """varlen_attn as documented, one segment at a time; causal means bottom-right."""
    assert window_size == (-1, 0) and cu_q.dtype == cu_k.dtype == torch.int32
    assert enable_gqa == (attention.VARLEN_GROUPS_HEADS and q.shape[1] != k.shape[1])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    outs = []
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        queries, keys = int(b - a), int(d - c)
        assert queries <= max_q and keys <= max_k
        scores = torch.einsum("qhe,khe->hqk", q[a:b], k[c:d]) * scale
        seen = torch.ones(queries, keys).tril(keys - queries).bool()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hqk,khe->qhe", weights, v[c:d]))
    return torch.cat(outs)


@HEADS
@pytest.mark.parametrize("groups_heads", [True, False])
def test_varlen_arguments_describe_the_masked_softmax(heads, groups, groups_heads, monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", slow_varlen)
    monkeypatch.setattr(attention, "VARLEN_GROUPS_HEADS", groups_heads)
    query, key, value = inputs(heads, groups, torch.float16)
    out = attention.varlen(query, key, value, segments(RANGES), 0.3)
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    expected, _ = by_definition(*wide, 0.3)
    assert_close([out], [expected], 2e-3)
    assert_close(gradients(out, query, key, value), gradients(expected, *wide), 2e-2)


class SpyVarlen(torch.autograd.Function):
    """Stands for varlen_attn; its backward notes whether PyTorch must be deterministic."""

    seen: list[int] = []

    @staticmethod
    def forward(ctx, q, k, v):
        return q + 0

    @staticmethod
    def backward(ctx, grad):
        SpyVarlen.seen.append(torch.get_deterministic_debug_mode())
        return grad, None, None


def test_only_the_backward_of_varlen_is_told_to_be_deterministic(monkeypatch):
    monkeypatch.setattr(
        attention, "varlen_attn", lambda q, k, v, *_, **__: SpyVarlen.apply(q, k, v)
    )
    query, key, value = inputs(4, 4, torch.float16)
    for _ in range(2):
        (attention.varlen(query, key, value, segments(RANGES), 0.3) * 1.0).sum().backward()
        assert torch.get_deterministic_debug_mode() == 0
    assert SpyVarlen.seen == [2, 2]
    with torch.no_grad():
        assert attention.varlen(query, key, value, segments(RANGES), 0.3).grad_fn is None


def call(**changes):
    query, key, value = (x.detach().transpose(0, 1)[None] for x in inputs(6, 2))
    config = SimpleNamespace(_attn_implementation=attention.SHARED)
    arguments = forward_arguments(config, segments(RANGES), CPU) | {"key": key} | changes
    return shared_attention(torch.nn.Identity(), query, **{"value": value} | arguments)


def test_the_function_takes_transformers_shapes():
    query, key, value = (x.detach() for x in inputs(6, 2))
    out, weights = call(sliding_window=8)  # exactly the longest path
    assert out.shape == (1, T, 6, 16) and weights is None
    assert_close([out[0]], [by_definition(query, key, value, 0.25)[0]])


def test_a_window_shorter_than_the_longest_path_is_refused():
    with pytest.raises(ValueError, match=r"sliding window of 7 tokens is .* \(8 tokens\)"):
        call(sliding_window=7)


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.1},
        {"key": torch.zeros(1, 2, T + 1, 16)},
        {"attention_mask": None},
        {"attention_mask": torch.ones(1, 1, T, T)},
    ],
)
def test_what_segments_cannot_do_is_refused(changes):
    with pytest.raises(AssertionError):
        call(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"s_aux": torch.zeros(6)}, "Identity needs the attention keyword s_aux"),
        ({"temperature": 0.0}, "keyword temperature"),
        ({"softcap": 50.0}, "soft-capped"),
        ({"is_causal": False}, "not causal"),
        ({"value": torch.zeros(1, 2, T, 8)}, "different width .16 and 8"),
    ],
)
def test_what_a_model_asks_for_and_is_not_known_is_named(changes, named):
    with pytest.raises(ValueError, match=named):
        call(**changes)


def test_unknown_keywords_are_refused_without_segments_too():
    with pytest.raises(ValueError, match="keyword s_aux"):
        call(segments=None, attention_mask=None, s_aux=torch.zeros(6))
    call(s_aux=None, position_ids=torch.arange(T)[None])


def test_float32_is_refused_on_cuda():
    query, key, value = inputs(2, 2, torch.float32)
    with pytest.raises(ValueError, match="needs bfloat16 or float16, found torch.float32"):
        attention.varlen(query, key, value, segments(RANGES), 1.0)


def test_other_implementations_are_refused():
    with pytest.raises(AssertionError, match="needs this attention"):
        config = SimpleNamespace(_attn_implementation="sdpa")
        forward_arguments(config, segments(RANGES), CPU)


@pytest.mark.gpu
@HEADS
def test_varlen_on_cuda_equals_the_masked_softmax(heads, groups):
    query, key, value = inputs(heads, groups, torch.bfloat16, width=64)
    cuda = [x.detach().cuda().requires_grad_() for x in (query, key, value)]
    out = attention.varlen(*cuda, segments(RANGES).to("cuda"), 0.125)
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    expected, _ = by_definition(*wide, 0.125)
    assert_close([out.cpu()], [expected], 3e-2)
    grads = gradients(out, *cuda)
    assert_close([x.cpu() for x in grads], gradients(expected, *wide), 3e-2)
