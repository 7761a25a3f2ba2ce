"""The head's benchmarks: all compute the same function, and their tables say what was measured."""

import pytest
import torch

from benchmarks import gpu_head, heads, linear_logprob
from benchmarks.linear_logprob import tables

PEERS = ("plain", "chunked_checkpoint", "linear_cross_entropy", "linear_cross_entropy_chunked")


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch):
    """Compilation takes longer than all the rest, and is PyTorch's own to test."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("pass_name", linear_logprob.PASSES)
def test_every_head_returns_the_same_and_the_same_gradients(pass_name):
    case = linear_logprob.Case(40, 16, 300, "float32", pass_name)
    inputs = case.inputs()
    truth_R = heads.exact(inputs, rows=8)
    gradients = []
    for name, head in heads.heads().items():
        logp = heads.step(head, pass_name, inputs)
        assert heads.errors(head, logp, truth_R, inputs)["mean"] < 1e-5, name
        gradients.append([x.grad for x in inputs[:2] if x.requires_grad])
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0], rtol=1e-4, atol=1e-5)


def test_a_head_that_computes_something_else_stops_the_benchmark(monkeypatch):
    wrong = {"wrong": lambda *inputs: heads.plain(*inputs) + 0.01}
    monkeypatch.setattr(linear_logprob, "heads", lambda: wrong)
    case = linear_logprob.Case(4, 8, 30, "float32", "forward")
    with pytest.raises(ValueError, match="wrong is off by 1.0e-02 nats"):
        linear_logprob.time_case(case, ["wrong"], seconds=0)


def test_the_verdict_is_against_the_fastest_peer_and_memory_against_plain():
    ms = {"linear_logprob": 100.0, "plain": 150.0, "linear_cross_entropy": 105.0}
    case = {"rows": 2048, "width": 500, "words": 10000, "dtype": "float32", "pass_name": "forward"}
    cell = {
        "case": case,
        "gflops": 256.0,  # the floor is 80 ms
        "variants": {name: {"ms": t, "error": {"largest": 1e-6}} for name, t in ms.items()},
        "extra_bytes": {"linear_logprob": 4e6, "plain": 50e6},
    }
    text = tables({"machine": {"cpu": "test"}, "cases": [cell]})
    label = "| forward float32 R=2048 D=500 V=10000 |"
    assert f"{label} 80 | 100 (80%) | 150 (53%) | 105 (76%) | 1.05 | missed |" in text
    assert f"{label} 4 | 50 | not run | 12.5 | met |" in text


def test_the_gpu_benchmark_runs_on_stand_ins_and_prints_a_line_per_variant(monkeypatch):
    """All of its Python but the device; an absent GPU must not hide a slip in it."""
    monkeypatch.setattr(gpu_head, "WIDTH", 16)
    monkeypatch.setattr(gpu_head, "WORDS", 300)

    def make_inputs(*arguments, device, **options):
        return heads.make_inputs(*arguments, device="cpu", **options)

    monkeypatch.setattr(gpu_head, "make_inputs", make_inputs)
    monkeypatch.setattr(gpu_head, "_milliseconds", lambda run: run() is None or 2.0)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    cells = [
        {"rows": 8, "logits": "flat", "pass": name, "variants": gpu_head.time_case(8, "flat", name)}
        for name in gpu_head.NEEDED
    ]
    about = {"name": "a GPU", "date": "today", "packages": {}, "peak_tflops": 989}
    text = gpu_head.table({"device": about, "head": cells, "not_run": ["frozen flat 16384"]})
    wanted = ["linear_logprob", *(p for p in PEERS if p in heads.heads())]
    for name in wanted:
        assert text.count(f" {name}  ") == 3, text
    assert text.count(" product ") == 1 and "not run, the time was up: frozen flat 16384" in text
