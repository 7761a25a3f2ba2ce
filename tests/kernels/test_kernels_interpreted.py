"""The Triton kernels in Triton's interpreter, against the definition in float64.

Run by test_kernels_triton.py with TRITON_INTERPRET=1. Only float32 and float16: the interpreter
multiplies the bit patterns of bfloat16.
"""

import os

import pytest
import torch
from helpers_kernels import by_definition

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_kernels_triton.py in the interpreter", allow_module_level=True)

from iopo.kernels import linear_logprob, triton_gemm
from iopo.kernels.tiled import Inputs
from iopo.kernels.triton_gemm import Blocks

SHAPES = [(7, 16, 33), (37, 24, 100), (40, 20, 97), (16, 16, 32), (3, 9, 2), (1, 5, 65), (0, 8, 20)]


@pytest.fixture(autouse=True, params=[True, False], ids=["descriptors", "pointers"])
def small_blocks(monkeypatch, request):
    """Small blocks and chunks, so that small problems have several; two groups of row blocks."""
    blocks = Blocks(
        rows=16, vocab=32, width=16, warps=4, stages=1, descriptors=request.param, group=2
    )
    monkeypatch.setattr(triton_gemm, "_blocks", lambda inputs: blocks)
    monkeypatch.setattr(triton_gemm, "CHUNK_BYTES_PER_ENTRY", 4 * 32)
    monkeypatch.setattr(linear_logprob, "_backend", lambda hidden: triton_gemm)


def problem(rows, width, words, dtype, *, scale=1.0, bias=False):
    random = torch.Generator().manual_seed(rows + words)
    hidden = (torch.randn(rows, width, generator=random) * scale).to(dtype)
    weight = (torch.randn(words, width, generator=random) / width**0.5).to(dtype)
    targets = torch.randint(0, words, (rows,), generator=random)
    return hidden, weight, targets, torch.randn(words).to(dtype) if bias else None


def results(function, hidden, weight, targets, bias, upstream, softcap):
    inputs = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    bias_V = None if bias is None else inputs[2]
    logp = function(inputs[0], inputs[1], targets, bias_V=bias_V, softcap=softcap)
    return logp.detach(), *torch.autograd.grad(logp, inputs, upstream.to(logp.dtype))


def wide(tensor):
    return None if tensor is None else tensor.double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"bias": True, "softcap": 2.0}])
def test_float32_equals_the_definition(shape, options):
    softcap, bias = options.get("softcap"), options.get("bias", False)
    hidden, weight, targets, bias_V = problem(*shape, torch.float32, scale=3.0, bias=bias)
    upstream = torch.randn(shape[0])
    ours = results(
        linear_logprob.linear_logprob, hidden, weight, targets, bias_V, upstream, softcap
    )
    theirs = results(
        by_definition,
        wide(hidden), wide(weight), targets, wide(bias_V), wide(upstream), softcap,
    )  # fmt: skip
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_float16_has_float32_log_probabilities(shape):
    hidden, weight, targets, _ = problem(*shape, torch.float16, scale=8.0)
    hidden.requires_grad_()
    upstream = torch.randn(shape[0])
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = by_definition(exact_hidden, weight.double(), targets)
    logp = linear_logprob.linear_logprob(hidden, weight, targets)
    torch.testing.assert_close(logp.detach().double(), exact.detach(), rtol=2e-5, atol=2e-5)
    (grad,) = torch.autograd.grad(logp, hidden, upstream)
    (truth,) = torch.autograd.grad(exact, exact_hidden, upstream.double())
    torch.testing.assert_close(grad.double(), truth, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_frozen_head_with_the_gradient_in_the_forward_pass(dtype, shape, softcap):
    hidden, weight, targets, bias = problem(*shape, dtype, scale=3.0, bias=True)
    hidden.requires_grad_()
    upstream = torch.randn(shape[0])
    options = {"bias_V": bias, "softcap": softcap}
    logp = linear_logprob.linear_logprob(hidden, weight, targets, **options)
    with torch.no_grad():
        assert torch.equal(logp, linear_logprob.linear_logprob(hidden, weight, targets, **options))
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = by_definition(
        exact_hidden, weight.double(), targets, bias_V=bias.double(), softcap=softcap
    )
    (grad,) = torch.autograd.grad(logp, hidden, upstream)
    (truth,) = torch.autograd.grad(exact, exact_hidden, upstream.double())
    tolerance = 2e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(grad.double(), truth, rtol=tolerance, atol=tolerance)


def test_strided_inputs_give_what_their_copies_give():
    hidden, weight, targets, bias = problem(20, 24, 100, torch.float32, scale=3.0, bias=True)
    upstream = torch.randn(20)[::2]
    args = [hidden.t().contiguous().t()[::2], weight.t().contiguous().t()[::2]]
    args += [targets[::2] // 2, bias[::2]]
    f = linear_logprob.linear_logprob
    ours = results(f, *args, upstream, None)
    copies = results(f, *(x.contiguous() for x in args), upstream.contiguous(), None)
    for one, other in zip(ours, copies, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_log_probability_above_zero_and_the_same_bits_twice(dtype):
    hidden, weight, _, _ = problem(40, 32, 300, dtype, scale=16.0)
    logits = hidden.double() @ weight.double().t()
    assert logits.abs().max() > 40
    runs = [linear_logprob.linear_logprob(hidden, weight, logits.argmax(1)) for _ in range(2)]
    assert (runs[0] <= 0).all()
    assert torch.equal(*runs)
    exact = logits.log_softmax(-1).amax(1)
    torch.testing.assert_close(runs[0].double(), exact, rtol=1e-4, atol=1e-9)


def test_offsets_do_not_wrap_at_2_to_the_31():
    """The third row of the errors begins at element 2^31 of memory that is mostly never touched."""
    hidden, weight, targets, _ = problem(3, 16, 32, torch.float16)
    inputs = Inputs(hidden, weight, targets)
    logp, shift, scale, _ = triton_gemm.forward(inputs, with_gradient=False)
    memory = torch.empty(2**31 + 32, dtype=torch.float16)
    error = memory.as_strided((3, 32), (2**30, 1))
    per_row = (targets, shift, -scale, -torch.expm1(logp))
    triton_gemm._launch(triton_gemm.error_kernel, inputs, per_row, error)
    probabilities = (hidden.double() @ weight.double().t()).softmax(-1)
    expected = torch.nn.functional.one_hot(targets, 32) - probabilities
    torch.testing.assert_close(error.double(), expected, rtol=2e-3, atol=2e-3)
