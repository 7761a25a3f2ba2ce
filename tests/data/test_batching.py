"""Steps, ranks and micro-batches: every example once, within the budget, in balance."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iopo.data import batching as b
from iopo.data.example import Example
from iopo.data.layout import build_plain, build_shared


def realistic_tokens(quads: int = 4096) -> np.ndarray:
    """2P + 4R tokens of quads with log-normal prompts and responses, 1,500 on average."""
    draw = np.random.default_rng(0)
    prompts = np.clip(draw.lognormal(5.5, 0.5, (quads, 2)), 20, 2000)
    responses = np.clip(draw.lognormal(5.3, 0.6, (quads, 2)), 5, 2000)
    return (prompts.sum(1) + 2 * responses.sum(1)).astype(np.int64)


def by_budget(quads: int = 16, ranks: int = 1, budget: int = 8192, **more) -> b.Batching:
    return b.Batching(quads, ranks, seed=0, tokens_per_microbatch=budget, **more)


def quads_in(batches: list[b.MicroBatch]) -> list[int]:
    return [quad for members in batches for quad in members or ()]


def ids(length: int) -> np.ndarray:
    return np.arange(1, length + 1, dtype=np.int32)


def example(p1: int, p2: int, r1: int, r2: int) -> Example:
    y1, y2 = ids(r1), ids(r2)
    return Example("quad", (ids(p1), ids(p2)), ((y1, y2), (y2, y1)))


@pytest.mark.parametrize(
    ("layout", "expected"),
    # P = 5, 7; R = 2, 3. shared 5+7 + 2(2+3); plain four rows of 7+3
    [("shared", 22), ("plain", 40)],
)
def test_tokens_by_hand(layout, expected):
    assert b.member_tokens(example(5, 7, 2, 3)) == [7, 8, 10, 9]
    assert b.tokens(example(5, 7, 2, 3), layout) == expected


@pytest.mark.parametrize(
    ("layout", "build"),
    [("shared", build_shared), ("plain", build_plain)],
)
def test_tokens_are_those_of_the_layout(layout, build):
    examples = [example(5, 7, 2, 3), example(9, 4, 1, 6), example(3, 3, 3, 3)]
    counted = b.microbatch_tokens(b.token_counts(examples, layout), range(3), layout)
    assert counted == build(examples).input_ids.numel()


def test_every_example_once_an_epoch_in_a_new_order():
    batching, tokens_N = by_budget(16, ranks=4), realistic_tokens(77)
    epochs = []
    for epoch in range(2):
        seen = []
        for step in range(epoch * 5, epoch * 5 + 5):  # 77 quads: four steps of 16 and one of 13
            shares = [quads_in(b.micro_batches(tokens_N, batching, step)[r]) for r in range(4)]
            step_quads = sum(shares, [])
            assert len(step_quads) == (13 if step % 5 == 4 else 16)
            seen += step_quads
        assert sorted(seen) == list(range(77))
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_order_is_a_function_of_seed_epoch_and_step():
    tokens_N = realistic_tokens(64)
    first = b.micro_batches(tokens_N, by_budget(8), step=11)[0]
    b.order_of_epoch.cache_clear()
    b.micro_batches(tokens_N, by_budget(8), step=3)  # another step before: no state
    assert b.micro_batches(tokens_N, by_budget(8), step=11)[0] == first
    other = b.Batching(8, 1, seed=1, tokens_per_microbatch=8192)
    assert b.micro_batches(tokens_N, other, step=11)[0] != first


@settings(max_examples=60, deadline=None)
@given(
    quads=st.integers(1, 70),
    per_rank=st.integers(1, 9),
    step=st.integers(0, 20),
    layout=st.sampled_from(["shared", "plain"]),
    limit=st.one_of(
        st.tuples(st.just("micro_batch_quads"), st.integers(1, 5)),
        st.tuples(st.just("tokens_per_microbatch"), st.integers(500, 20_000)),
    ),
)
def test_ranks_and_packing_change_only_who_does_what(quads, per_rank, step, layout, limit):
    tokens_N = realistic_tokens()[:quads]
    for ranks in (1, 2, 5):
        batching = b.Batching(per_rank * 10, ranks, seed=3, layout=layout, **dict([limit]))
        expected = sorted(b.quads_of_step(quads, batching, step).tolist())
        shares = [b.micro_batches(tokens_N, batching, step)[rank] for rank in range(ranks)]
        assert sorted(quad for share in shares for quad in quads_in(share)) == expected
        assert len({len(share) for share in shares}) == 1  # collective calls match
        assert all(members != () for share in shares for members in share)
        for members in (members for share in shares for members in share if members is not None):
            if limit[0] == "micro_batch_quads":
                assert len(members) <= limit[1]
            else:
                used = b.microbatch_tokens(tokens_N, members, layout)
                assert used <= limit[1] or len(members) == 1


def test_the_quads_of_a_step_do_not_depend_on_ranks():
    steps = [b.quads_of_step(500, by_budget(64, ranks), 9).tolist() for ranks in (1, 2, 8, 64)]
    assert all(quads == steps[0] for quads in steps)


def test_first_fit_fills_the_budget():
    tokens_N = realistic_tokens(2000)
    for budget in (8192, 16384):
        order = b._longest_first(tokens_N, range(2000))
        bins = b.first_fit(tokens_N, order, budget, "shared")
        assert tokens_N.sum() / (len(bins) * budget) >= 0.97


def test_tensors_hold_tokens_and_no_padding():
    draw = np.random.default_rng(1)
    examples = [example(*draw.integers(20, 200, 4)) for _ in range(64)]
    counts_N = b.token_counts(examples, "shared")
    useful = allocated = 0
    for members in b.pass_micro_batches(counts_N, by_budget(64, budget=8192), rank=0):
        batch = build_shared([examples[quad] for quad in members], multiple=128)
        useful += b.microbatch_tokens(counts_N, members, "shared")
        allocated += batch.input_ids.numel()
    assert useful / allocated >= 0.97


def test_ranks_are_in_balance():
    tokens_N = realistic_tokens()
    for limit in ({"micro_batch_quads": 4}, {"tokens_per_microbatch": 16384}):
        batching = b.Batching(256, 8, seed=0, **limit)
        for step in range(16):
            loads = [
                tokens_N[quads_in(b.micro_batches(tokens_N, batching, step)[rank])].sum()
                for rank in range(8)
            ]
            assert max(loads) / np.mean(loads) <= 1.05


def test_a_quad_above_the_budget_runs_alone():
    tokens_N = np.array([100, 900, 100, 100])
    batching = by_budget(4, budget=400)
    assert sorted(b.micro_batches(tokens_N, batching, 0)[0]) == [(0, 2, 3), (1,)]


def test_a_rank_without_quads_gets_none():
    tokens_N = np.array([100, 900, 900])  # a last step of one quad on two ranks
    batching = by_budget(2, ranks=2, budget=1000)
    shares = [b.micro_batches(tokens_N, batching, 1)[rank] for rank in range(2)]
    assert shares[1] == [None] and len(shares[0]) == 1 and shares[0] != [None]


def test_micro_batches_are_spread_so_that_no_rank_idles():
    # rank 0 must take two micro-batches (700 + 700 > 1000); rank 1's four small quads would fit in
    # one, and are spread over two instead of leaving an empty one
    tokens_N = np.array([700, 700, 350, 350, 350, 340])
    shares = [b.micro_batches(tokens_N, by_budget(6, ranks=2, budget=1000), 0)[r] for r in (0, 1)]
    assert [len(share) for share in shares] == [2, 2]
    assert None not in shares[0] + shares[1]


def test_ranks_take_equally_many_quads_where_micro_batches_count_quads():
    tokens_N = np.array([900, 10, 10, 10, 10, 10, 10, 10])
    batching = b.Batching(8, 2, seed=0, micro_batch_quads=2)
    shares = [b.micro_batches(tokens_N, batching, 0)[rank] for rank in (0, 1)]
    assert [len(quads_in(share)) for share in shares] == [4, 4]


def test_plain_micro_batches_keep_similar_lengths_together():
    # rows padded to widths 9 and 2 are 3 * 9 + 3 * 2 = 33 tokens; balanced ones would be 51
    tokens_N = np.array([9, 8, 2, 2, 2, 2])
    halves = b._into(tokens_N, [[0, 1, 2, 3, 4, 5]], 2, 54, "plain")
    assert sorted(map(sorted, halves)) == [[0, 1, 2], [3, 4, 5]]


def test_balancing_that_would_overflow_the_budget_is_not_used():
    # first-fit packs (6, 4) and (5, 3, 2); balancing the same five over two gives 11 and 9
    tokens_N = np.array([6, 5, 4, 3, 2])
    bins = b._into(tokens_N, [[0, 2], [1, 3, 4]], 2, 10, "shared")
    assert [int(tokens_N[members].sum()) for members in bins] == [10, 10]


def test_a_pass_over_the_data_set_visits_all_in_file_order_windows():
    tokens_N = realistic_tokens(2500)
    batching = by_budget(16, ranks=4)
    shares = [b.pass_micro_batches(tokens_N, batching, rank) for rank in range(4)]
    assert sorted(quad for share in shares for quad in quads_in(share)) == list(range(2500))
    assert len({len(share) for share in shares}) == 1
    half = [quads_in(share[: len(share) // 3]) for share in shares]  # windows of 1,024
    assert max(quad for share in half for quad in share) < 1024


def test_plan_counts_the_short_last_step():
    assert b.plan_steps(77, by_budget(16), epochs=3) == 15
    assert b.plan_steps(64, by_budget(16), epochs=1) == 4
    assert b.plan_steps(5, by_budget(16), epochs=2, max_steps=1) == 1


@pytest.mark.parametrize(("ranks", "near"), [(3, "15 or 18"), (32, "32")])
def test_ranks_that_do_not_divide_the_batch_are_refused(ranks, near):
    with pytest.raises(ValueError, match=f"which {ranks} ranks do not divide: set it to {near}"):
        by_budget(16, ranks)
