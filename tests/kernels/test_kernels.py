"""The linear log-probability against its definition in float64, and its guards (CPU)."""

import pytest
import torch
import torch.nn.functional as F
from helpers_kernels import by_definition
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from iopo.kernels import tiled
from iopo.kernels.linear_logprob import linear_logprob


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiled, "ROWS", 4)
    monkeypatch.setattr(tiled, "VOCAB", 16)
    monkeypatch.setattr(tiled, "FAST_VOCAB", 8)


def problem(rows, width, words, dtype=torch.float64, *, scale=1.0, bias=False, seed=0):
    """Random inputs whose logits have a standard deviation of `scale`."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=random, dtype=torch.float64) * scale
    weight = torch.randn(words, width, generator=random, dtype=torch.float64) / width**0.5
    targets = torch.randint(0, words, (rows,), generator=random)
    bias_V = torch.randn(words, generator=random, dtype=torch.float64).to(dtype) if bias else None
    return hidden.to(dtype), weight.to(dtype), targets, bias_V


def values_and_gradients(function, hidden, weight, targets, bias, upstream, softcap=None):
    inputs = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    bias_V = None if bias is None else inputs[2]
    logp = function(inputs[0], inputs[1], targets, bias_V=bias_V, softcap=softcap)
    return logp.detach(), *torch.autograd.grad(logp, inputs, upstream.to(logp.dtype))


def frozen_head(hidden, weight, targets, bias, upstream, softcap=None):
    """(logp, gradient of hidden) when only hidden wants one: it is computed in the forward pass."""
    hidden = hidden.detach().clone().requires_grad_()
    logp = linear_logprob(hidden, weight, targets, bias_V=bias, softcap=softcap)
    (grad,) = torch.autograd.grad(logp, hidden, upstream.to(logp.dtype))
    return logp.detach(), grad


def assert_all_close(ours, theirs, **tolerance):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 9),
    words=st.integers(1, 50),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([0.1, 1.0, 20.0]),
    seed=st.integers(0, 99),
)
def test_any_shape_equals_the_definition(rows, width, words, bias, softcap, scale, seed):
    hidden, weight, targets, bias_V = problem(rows, width, words, scale=scale, bias=bias, seed=seed)
    upstream = torch.randn(rows, dtype=torch.float64)
    args = (hidden, weight, targets, bias_V, upstream, softcap)
    assert_all_close(
        values_and_gradients(linear_logprob, *args),
        values_and_gradients(by_definition, *args),
        rtol=1e-9,
        atol=1e-9,
    )


def test_two_words_by_hand():
    hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0], [1.0, 7.0]])
    logp = linear_logprob(hidden.expand(2, 2), weight, torch.tensor([0, 1]))  # logits 0 and 1
    torch.testing.assert_close(logp, torch.tensor([-1.3132617, -0.3132617]))


def test_gradcheck():
    hidden, weight, targets, bias = problem(5, 3, 19, bias=True)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprob(h, w, targets, bias_V=b, softcap=2.0), inputs
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("kept_bytes", [2**30, 0])
def test_error_is_below_that_of_log_softmax_in_the_same_dtype(
    dtype, scale, kept_bytes, monkeypatch
):
    monkeypatch.setattr(tiled, "KEPT_BYTES", kept_bytes)
    hidden, weight, targets, _ = problem(64, 96, 500, dtype, scale=scale)
    upstream = torch.linspace(-1, 2, 64)
    wide = (hidden.double(), weight.double(), targets, None, upstream.double())
    truth = values_and_gradients(by_definition, *wide)

    def plain(hidden, weight, targets, **_):
        return F.linear(hidden, weight).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

    ours = values_and_gradients(linear_logprob, hidden, weight, targets, None, upstream)
    theirs = values_and_gradients(plain, hidden, weight, targets, None, upstream)
    frozen = frozen_head(hidden, weight, targets, None, upstream)[1]
    # In float32 the products, which both round alike, leave little else: 10% is a draw.
    allowed = 1.1 if dtype == torch.float32 else 0.9
    names = ["logp", "dH", "dW", "dH of a frozen head"]
    compared = zip(names, [*ours, frozen], [*theirs, theirs[1]], [*truth, truth[1]], strict=True)
    for name, one, other, exact in compared:
        error, peer = ((x.double() - exact).norm() / exact.norm() for x in (one, other))
        assert error <= peer * allowed, f"{name}: {error:.2e} against {peer:.2e}"
    assert ours[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_log_probability_above_zero_on_peaky_logits(dtype):
    hidden, weight, _, _ = problem(200, 64, 300, dtype, scale=12.0)
    logits = hidden.double() @ weight.double().t()
    assert logits.abs().max() > 40
    logp = linear_logprob(hidden, weight, logits.argmax(1))
    assert (logp <= 0).all()
    torch.testing.assert_close(logp.double(), logits.log_softmax(-1).amax(1), rtol=1e-4, atol=1e-9)


def test_confident_tokens_keep_their_digits():
    """log p = -1e-10 and its gradient, where log_softmax in float32 returns 0."""
    logits = torch.tensor([[23.0, 0.0], [30.0, 0.0]])
    hidden, weight = logits.requires_grad_(), torch.eye(2)
    targets = torch.zeros(2, dtype=torch.int64)
    logp = linear_logprob(hidden, weight, targets)
    (grad,) = torch.autograd.grad(logp.sum(), hidden)
    others = torch.exp(torch.tensor([-23.0, -30.0]))
    torch.testing.assert_close(logp.detach(), -others, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, torch.stack([others, -others], 1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_repeatable(dtype):
    hidden, weight, targets, bias = problem(40, 32, 200, dtype, bias=True)
    runs = [
        values_and_gradients(linear_logprob, hidden, weight, targets, bias, torch.arange(40.0))
        for _ in range(3)
    ]
    for run in runs[1:]:
        assert_all_close(run, runs[0], rtol=0, atol=0)


@pytest.fixture(params=["kept", "computed again"])
def errors_of_a_trained_head(request, monkeypatch):
    monkeypatch.setattr(tiled, "KEPT_BYTES", 2**30 if request.param == "kept" else 0)
    return request.param


def test_large_reference_moves_do_not_lose_the_earlier_tiles(errors_of_a_trained_head):
    """Logits that climb by 30 from tile to tile, and fall again, move the reference every time."""
    climb = torch.tensor([0.0, 30.0, 60.0, 45.0, 90.0, 10.0]).repeat_interleave(16).double()
    hidden, weight = torch.ones(3, 1).double(), climb[:, None]
    targets = torch.tensor([0, 70, 40])
    upstream = torch.tensor([1.0, -2.0, 0.5])
    args = (hidden, weight, targets, None, upstream)
    theirs = values_and_gradients(by_definition, *args)
    assert_all_close(values_and_gradients(linear_logprob, *args), theirs)
    _, grad = frozen_head(hidden, weight, targets, None, upstream)
    torch.testing.assert_close(grad, theirs[1])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_trained_head_is_the_definition_s(errors_of_a_trained_head, softcap, monkeypatch):
    """Several tiles of rows and of entries, of which the last are narrower."""
    hidden, weight, targets, _ = problem(9, 6, 45, scale=20.0)
    args = (hidden, weight, targets, None, torch.linspace(-1, 2, 9), softcap)
    kept = []
    real = tiled.weight_gradient
    monkeypatch.setattr(tiled, "weight_gradient", lambda k, *rest: kept.append(k) or real(k, *rest))
    ours = values_and_gradients(linear_logprob, *args)
    assert_all_close(ours, values_and_gradients(by_definition, *args), rtol=1e-9, atol=1e-9)
    assert len(kept) == (errors_of_a_trained_head == "kept")


def test_a_row_that_is_certain_of_its_target_has_no_gradient(errors_of_a_trained_head):
    """Its logit is 200 above all others, further than the exponentials of float32 reach."""
    hidden, weight = torch.ones(1, 1), torch.zeros(40, 1)
    weight[20] = 200.0
    args = (hidden, weight, torch.tensor([20]), None, torch.ones(1))
    for value in values_and_gradients(linear_logprob, *args):
        assert torch.equal(value, torch.zeros_like(value))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    words=st.integers(1, 50),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([0.1, 1.0, 20.0]),
    seed=st.integers(0, 99),
)
def test_a_frozen_head_has_the_same_values_and_gradient(rows, words, bias, softcap, scale, seed):
    hidden, weight, targets, bias_V = problem(rows, 6, words, scale=scale, bias=bias, seed=seed)
    upstream = torch.randn(rows, dtype=torch.float64)
    args = (hidden, weight, targets, bias_V, upstream, softcap)
    logp, grad = frozen_head(*args)
    trained = values_and_gradients(linear_logprob, *args)
    assert torch.equal(logp, trained[0])
    torch.testing.assert_close(grad, trained[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_without_gradient_has_the_same_bits(dtype):
    """The reference is computed without gradient, the policy with: equal weights, equal loss."""
    hidden, weight, targets, bias = problem(40, 32, 200, dtype, scale=8.0, bias=True)
    logp, _ = frozen_head(hidden, weight, targets, bias, torch.ones(40))
    assert torch.equal(logp, linear_logprob(hidden, weight, targets, bias_V=bias))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 4e-3)])
def test_a_frozen_head_is_exact_for_any_upstream(dtype, tolerance):
    hidden, weight, targets, _ = problem(64, 96, 500, dtype, scale=8.0)
    upstream = torch.tensor([0.3, -1.0, 2.0, 0.01]).repeat(16)
    wide = (hidden.double(), weight.double(), targets, None, upstream.double())
    truth = values_and_gradients(by_definition, *wide)[1]
    _, grad = frozen_head(hidden, weight, targets, None, upstream)
    assert (grad.double() - truth).norm() / truth.norm() < tolerance


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_the_gradient_is_computed_in_the_forward_pass_only_if_the_head_is_frozen(
    trained, monkeypatch
):
    hidden, weight, targets, bias = problem(5, 4, 20, bias=True)
    calls = []
    for name in ("forward", "backward"):
        real = getattr(tiled, name)

        def counted(*args, name=name, real=real, **options):
            calls.append((name, options.get("with_gradient")))
            return real(*args, **options)

        monkeypatch.setattr(tiled, name, counted)
    hidden.requires_grad_()
    {"hidden": hidden, "weight": weight, "bias": bias}[trained].requires_grad_()
    linear_logprob(hidden, weight, targets, bias_V=bias).sum().backward()
    with torch.no_grad():
        linear_logprob(hidden, weight, targets, bias_V=bias)
    step = [("forward", True)] if trained == "hidden" else [("forward", False), ("backward", None)]
    assert calls == [*step, ("forward", False)]


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_the_logits_never_exist():
    hidden, weight, targets, _ = problem(40, 8, 400)
    with Largest() as largest:
        inputs = tiled.Inputs(hidden, weight, targets, softcap=3.0)
        saved = tiled.forward(inputs, with_gradient=True)[:3]
        tiled.backward(inputs, saved[0], saved, need_weight=True, need_bias=False)
    assert largest.elements == weight.numel() == 3200
    with Largest() as largest:
        by_definition(hidden, weight, targets)
    assert largest.elements == 40 * 400


def test_padded_vocabulary_is_a_view_of_the_weight():
    hidden, weight, targets, _ = problem(6, 5, 40)
    weight.requires_grad_()
    logp = linear_logprob(hidden, weight[:33], targets % 33)
    torch.testing.assert_close(
        logp, by_definition(hidden, weight[:33], targets % 33), rtol=1e-9, atol=1e-9
    )
    logp.sum().backward()
    assert (weight.grad[33:] == 0).all() and (weight.grad[:33] != 0).any()


def test_tied_embeddings_receive_both_gradients():
    _, weight, targets, _ = problem(6, 5, 40)
    weight.requires_grad_()
    tokens = torch.tensor([1, 2, 3, 3, 2, 1])
    grads = [
        torch.autograd.grad(function(weight[tokens].tanh(), weight, targets).sum(), weight)[0]
        for function in (linear_logprob, by_definition)
    ]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_strided_inputs():
    hidden, weight, targets, _ = problem(6, 10, 40)
    args = (hidden[:, ::2], weight.t().contiguous().t()[:, 1::2], targets, None, torch.ones(6))
    assert_all_close(
        values_and_gradients(linear_logprob, *args),
        values_and_gradients(by_definition, *args),
    )


@pytest.mark.parametrize("frozen", [True, False])
def test_second_derivatives_are_refused(frozen):
    hidden, weight, targets, _ = problem(3, 4, 20)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    loss = linear_logprob(hidden, weight, targets).square().sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), hidden)


def test_bfloat16_leaves_the_precision_setting_as_it_found_it():
    hidden, weight, targets, _ = problem(3, 4, 20, torch.bfloat16)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    linear_logprob(hidden, weight, targets)
    assert matmul.fp32_precision == before


@pytest.mark.parametrize("wants", ["nothing", "hidden", "all"])
def test_opcheck(wants):
    hidden, weight, targets, bias = problem(5, 4, 20, torch.float32, bias=True)
    hidden.requires_grad_(wants != "nothing")
    for tensor in (weight, bias):
        tensor.requires_grad_(wants == "all")
    ops, in_forward = torch.ops.iopo, wants == "hidden"
    for options in ((bias, 3.0, False), (None, None, False)):
        torch.library.opcheck(ops.linear_logprob, (hidden, weight, targets, *options, in_forward))
    if wants == "all":
        keep = (hidden, weight, targets, None, 3.0, True, True)
        torch.library.opcheck(ops.linear_logprob, keep)
    hidden, weight, bias = (x.detach() for x in (hidden, weight, bias))
    *_, scale, _, kept = ops.linear_logprob(hidden, weight, targets, None, 3.0, True, True)
    torch.library.opcheck(
        ops.linear_logprob_weight_gradient, (kept, hidden, scale, scale, len(weight))
    )
    *saved, _, _ = ops.linear_logprob(hidden, weight, targets, bias, 3.0, False, False)
    for need in ((True, True), (False, False)):
        torch.library.opcheck(
            ops.linear_logprob_backward,
            (saved[0], hidden, weight, targets, *saved, bias, 3.0, *need),
        )


@pytest.mark.parametrize("frozen", [True, False])
def test_compiles_without_a_graph_break(frozen):
    hidden, weight, targets, _ = problem(5, 4, 20, torch.float32)
    weight.requires_grad_(not frozen)

    def loss(hidden):
        return linear_logprob(hidden * 2, weight, targets, softcap=5.0).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    grads = []
    for function in (loss, compiled):
        leaf = hidden.clone().requires_grad_()
        function(leaf).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def refused(message, **changes):
    hidden, weight, targets, _ = problem(5, 4, 20, torch.float32)
    arguments = {"hidden_RD": hidden, "weight_VD": weight, "targets_R": targets} | changes
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments)


def test_guards():
    for wrong in (20, -1, -100):
        refused("targets must be in", targets_R=torch.tensor([0, 1, 2, 3, wrong]))
    refused("expected targets int64", targets_R=torch.zeros(4, dtype=torch.int64))
    refused("expected targets int64", targets_R=torch.zeros(5, dtype=torch.int32))
    refused("expected hidden", hidden_RD=torch.zeros(1, 5, 4))
    refused(r"expected hidden.*float32 \[20, 3\]", weight_VD=torch.zeros(20, 3))
    refused("one floating dtype", weight_VD=torch.zeros(20, 4, dtype=torch.bfloat16))
    refused("one floating dtype", hidden_RD=torch.zeros(5, 4, dtype=torch.int64))
    refused("are the vocabulary", weight_VD=torch.zeros(0, 4))
    refused("expected bias", bias_V=torch.zeros(19))
    refused("expected bias", bias_V=torch.zeros(20).double())
    refused("expected softcap above 0", softcap=0.0)


@pytest.mark.slow
def test_more_logits_than_an_int32_can_count(monkeypatch):
    monkeypatch.undo()
    rows, words = 2**16 + 1, 2**15 + 1
    hidden, weight, targets, _ = problem(rows, 2, words, torch.float32)
    logp = linear_logprob(hidden, weight, targets)
    tail = slice(rows - 7, rows)
    expected = by_definition(hidden[tail].double(), weight.double(), targets[tail])
    torch.testing.assert_close(logp[tail].double(), expected, rtol=1e-5, atol=1e-5)
