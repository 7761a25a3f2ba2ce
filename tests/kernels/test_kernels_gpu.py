"""The linear log-probability on a CUDA device against float64: `pytest -m gpu`."""

import subprocess
import sys

import pytest
import torch
from helpers_kernels import by_definition

from iopo.kernels.linear_logprob import linear_logprob

pytestmark = pytest.mark.gpu

SHAPES = [(1, 64, 50), (77, 96, 1000), (300, 200, 5003), (513, 1024, 32000)]


def problem(rows, width, words, dtype, *, scale=1.0, bias=False):
    random = torch.Generator("cuda").manual_seed(0)
    options = {"generator": random, "device": "cuda"}
    hidden = (torch.randn(rows, width, **options) * scale).to(dtype)
    weight = (torch.randn(words, width, **options) / width**0.5).to(dtype)
    targets = torch.randint(0, words, (rows,), **options)
    return hidden, weight, targets, torch.randn(words, **options).to(dtype) if bias else None


def results(function, hidden, weight, targets, bias, upstream, softcap):
    inputs = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    bias_V = None if bias is None else inputs[2]
    logp = function(inputs[0], inputs[1], targets, bias_V=bias_V, softcap=softcap)
    return logp.detach(), *torch.autograd.grad(logp, inputs, upstream.to(logp.dtype))


def exact(hidden, weight, targets, bias, upstream, softcap):
    wide = [None if x is None else x.double() for x in (hidden, weight, bias, upstream)]
    return results(by_definition, wide[0], wide[1], targets, wide[2], wide[3], softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 5.0}])
def test_values_and_gradients(shape, dtype, options):
    softcap, bias = options.get("softcap"), options.get("bias", False)
    hidden, weight, targets, bias_V = problem(*shape, dtype, scale=4.0, bias=bias)
    upstream = torch.randn(shape[0], device="cuda")
    args = (hidden, weight, targets, bias_V, upstream, softcap)
    ours, truth = results(linear_logprob, *args), exact(*args)
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-5, atol=5e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 6e-3
    for one, other in zip(ours[1:], truth[1:], strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 5.0}])
def test_frozen_head_with_the_gradient_in_the_forward_pass(dtype, options):
    softcap, bias = options.get("softcap"), options.get("bias", False)
    hidden, weight, targets, bias_V = problem(700, 256, 5003, dtype, scale=4.0, bias=bias)
    upstream = torch.randn(700, device="cuda")
    expected, truth, *_ = exact(hidden, weight, targets, bias_V, upstream, softcap)
    hidden.requires_grad_()
    logp = linear_logprob(hidden, weight, targets, bias_V=bias_V, softcap=softcap)
    torch.testing.assert_close(logp.detach().double(), expected, rtol=1e-5, atol=5e-5)
    with torch.no_grad():
        again = linear_logprob(hidden, weight, targets, bias_V=bias_V, softcap=softcap)
    torch.testing.assert_close(logp.detach(), again, rtol=0, atol=1e-6)
    (grad,) = torch.autograd.grad(logp, hidden, upstream)
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    assert (grad.double() - truth).norm() <= tolerance * truth.norm()


def test_weight_gradient_over_several_chunks_of_rows():
    hidden, weight, targets, _ = problem(9001, 128, 2000, torch.bfloat16, scale=4.0)
    upstream = torch.randn(9001, device="cuda")
    args = (hidden, weight, targets, None, upstream, None)
    for one, other in zip(results(linear_logprob, *args), exact(*args), strict=True):
        assert (one.double() - other).norm() <= 6e-3 * other.norm()


def test_no_log_probability_above_zero_and_the_same_bits_twice():
    hidden, weight, _, _ = problem(500, 512, 30011, torch.bfloat16, scale=12.0)
    logits = hidden.double() @ weight.double().t()
    assert logits.abs().max() > 40
    targets, upstream = logits.argmax(1), torch.randn(500, device="cuda")
    runs = [results(linear_logprob, hidden, weight, targets, None, upstream, None) for _ in "ab"]
    assert (runs[0][0] <= 0).all()
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_full_size_head_beyond_int32_in_little_memory():
    """16,384 x 152,064 logits are more than 2^31; the last rows are right; no 1.5 GB are used."""
    rows, width, words = 16384, 3584, 152064
    hidden, weight, targets, _ = problem(rows, width, words, torch.bfloat16)
    hidden.requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logp = linear_logprob(hidden, weight, targets)
    logp.sum().backward()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 1.5e9, f"{extra / 1e9:.2f} GB"
    last = slice(rows - 8, rows)
    expected = by_definition(hidden[last].detach(), weight, targets[last])
    torch.testing.assert_close(logp[last].detach(), expected, rtol=1e-4, atol=1e-3)


def test_a_target_out_of_range_is_a_device_side_assertion():
    """In a process of its own: the assertion ends the CUDA context."""
    program = (
        "import torch; from iopo.kernels.linear_logprob import linear_logprob as f;"
        "h = torch.ones(2, 64, device='cuda'); f(h, h, torch.tensor([0, 2], device='cuda'));"
        "torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0 and "assert" in done.stderr.lower()
