"""The throughput ladder: every row takes the same step, and its operations are the ledger's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_models import tiny_llama

from benchmarks.throughput_data import (
    SHAPES,
    alike,
    as_pairs,
    as_sft,
    quads_of_lengths,
    useful_tokens,
)
from benchmarks.throughput_flops import Weights, counter, ledger, processed_tokens
from benchmarks.throughput_variants import BEST, LADDER, PLAIN, Trainer, Variant
from iopo.data.example import Example
from iopo.model.attention import SHARED

QWEN2_7B = Weights(
    trunk=6_524_239_872, recomputed=6_524_239_872, adapters=0, head=3584 * 152064,
    attention=28 * 3584,
)  # fmt: skip


def trainer(full: bool, **overrides) -> Trainer:
    def make(seed=0):
        return tiny_llama(vocab=300, seed=seed, tied=True, attention=SHARED, **overrides)

    return Trainer(
        make(),
        full=full,
        dtype=torch.float32,
        device=torch.device("cpu"),
        reference_lm=make() if full else None,
        tokens_per_microbatch=70,
    )


def unequal_quads() -> list[Example]:
    draw = np.random.default_rng(3)

    def some(n):
        return draw.integers(0, 300, n).astype(np.int32)

    quads = []
    for i, (p1, p2, r1, r2) in enumerate([(5, 9, 3, 1), (12, 2, 7, 8), (4, 4, 40, 2)]):
        y1, y2 = some(r1), some(r2)
        quads.append(Example(f"q{i}", (some(p1), some(p2)), ((y1, y2), (y2, y1))))
    return quads


@pytest.mark.parametrize("full", [False, True])
def test_every_row_takes_the_same_step(full):
    quads = unequal_quads()
    expected = None
    for row in LADDER:
        one = trainer(full)
        cache = one.cache(quads)
        one.use(row)
        losses = one.step(quads, row, cache=cache)
        state = torch.cat([p.detach().flatten() for p in one.train_model.parameters.values()])
        if expected is None:
            expected = losses, state
            assert (losses - np.log(2)).abs().min() > 1e-5  # policy and reference do differ
        torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state, expected[1], rtol=0, atol=2.1e-6)  # Adam's step is 1e-6


@pytest.mark.parametrize("objective, rows", [("dpo", as_pairs), ("sft", as_sft)])
def test_the_other_objectives_take_the_same_step(objective, rows):
    examples = rows(unequal_quads())
    results = []
    for row in (PLAIN, LADDER[-1]):
        one = trainer(full=False)
        cache = one.cache(examples)
        one.use(row)
        results.append(one.step(examples, row, objective=objective, cache=cache))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("row", LADDER, ids=lambda row: row.name)
def test_counted_operations_are_the_ledger_s(row, full):
    # the first block's inputs need no gradient under LoRA, so the model must not be too shallow
    one = trainer(full, num_hidden_layers=12, hidden_size=64, intermediate_size=128)
    quads = quads_of_lengths(np.arange(300, dtype=np.int32), alike(30, 20, 2))
    cache = one.cache(quads)
    one.use(row)
    with counter() as counted:
        one.step(quads, row, cache=cache)
    weights = Weights.of(one.policy.causal_lm)
    expected = ledger(weights, one.micro_batches(quads, row), row, full=full)
    assert counted.get_total_flops() == pytest.approx(expected, rel=0.02)


def test_the_ledger_by_hand():
    """Qwen2-7B at P/R = 200/300 and 1000/500 without padding, in units of 1e12 operations."""
    tokens, attention = 6000, 4 * 1500**2 / 2 * 4 * 28 * 3584
    quad = quads_of_lengths(np.arange(300, dtype=np.int32), alike(1000, 500, 1))
    plain = 2 * tokens * (4 * 6_524_239_872 + 3 * 3584 * 152064) + 5.5 * attention
    assert ledger(QWEN2_7B, [quad], PLAIN, full=False) == pytest.approx(plain)
    tokens, pairs = 4000, 2 * (1500**2 / 2 + 1000 * 500 + 500**2 / 2)
    shared = 2 * tokens * 2 * 6_524_239_872 + 2 * 2000 * 2 * 3584 * 152064
    shared += 3.5 * pairs * 4 * 28 * 3584
    assert ledger(QWEN2_7B, [quad], BEST, full=False) == pytest.approx(shared)


def test_the_demo_s_lengths_are_those_of_the_committed_results():
    path = Path(__file__).resolve().parents[2] / "benchmarks/results/throughput_cpu.json"
    rows = json.loads(path.read_text())["shapes"]["demo"]
    quads = quads_of_lengths(np.arange(300, dtype=np.int32), SHAPES["demo"])
    assert {row["useful_tokens"] for row in rows} == {useful_tokens(quads)}
    assert rows[-1]["processed_tokens"] == processed_tokens([quads], BEST)


def test_lengths():
    quad = quads_of_lengths(np.arange(50, dtype=np.int32), alike(20, 10, 1))
    (example,) = quad
    assert [len(x) for x in example.prompts] == [20, 20]
    assert example.responses[0][0] is example.responses[1][1]
    assert useful_tokens(quad) == 4 * 30
    assert useful_tokens(as_pairs(quad)) == 2 * 30
    assert useful_tokens(as_sft(quad)) == 30
    shared = Variant("shared", "shared", fused=True, live=False, checkpoint_every=0)
    assert processed_tokens([quad], shared) == 2 * 20 + 4 * 10
    assert processed_tokens([unequal_quads()], PLAIN) == 3 * 4 * 44
