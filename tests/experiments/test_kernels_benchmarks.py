"""The head's benchmarks: all compute the same function, and their tables say what was measured."""

from dataclasses import asdict

import pytest
import torch

from benchmarks import heads, linear_logprob
from benchmarks.gpu import head as gpu_head
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


def test_the_gpu_benchmark_times_every_variant_and_names_what_was_not_run(monkeypatch):
    for name, value in gpu_head.TINY.items():
        monkeypatch.setattr(gpu_head, name, value)
    cases = [case for case in gpu_head.cases() if case.rows == 8 and case.logits == "flat"]
    assert [case.compiled for case in cases] == [False] * 3 + [True] * 3
    cells = [{"case": asdict(case), "variants": gpu_head.time_case(case, "cpu")} for case in cases]
    report = {"device": gpu_head.facts("cpu"), "head": cells, "not_run": ["frozen flat 16384"]}
    text = gpu_head.table(report)
    assert text.count(" linear_logprob  ") == 6 and text.count(" compile  ") == 3, text
    for name in (p for p in PEERS if p in heads.heads()):
        assert text.count(f" {name}  ") == 3, text
    assert text.count(" product  ") == 2 and "not run, the time was up: frozen flat 16384" in text
