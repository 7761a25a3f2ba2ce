"""The layouts' tensors: by hand in the docstrings, and as properties of random forests."""

import doctest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.throughput_variants import build_packed
from iopo.data import layout
from iopo.data.example import Example
from iopo.data.layout import build_plain, build_shared


def test_docstrings():
    assert doctest.testmod(layout).failed == 0


@st.composite
def forests(draw) -> list[Example]:
    """One to three examples with the same number of responses per prompt, all tokens distinct."""
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    examples, token = [], 1
    for index in range(draw(st.integers(1, 3))):
        prompts, responses = [], []
        for count in shape:
            lengths = [draw(st.integers(1, 4))] + [draw(st.integers(0, 4)) for _ in range(count)]
            parts = []
            for length in lengths:
                parts.append(np.arange(token, token + length, dtype=np.int32))
                token += length
            prompts.append(parts[0])
            responses.append(tuple(parts[1:]))
        examples.append(Example(f"e{index}", tuple(prompts), tuple(responses)))
    return examples


def paths(examples):
    return [
        (list(prompt), list(response))
        for example in examples
        for prompt, responses in zip(example.prompts, example.responses, strict=True)
        for response in responses
    ]


@settings(max_examples=100, deadline=None)
@given(forests(), st.sampled_from([build_shared, build_packed, build_plain]))
def test_every_response_token_is_scored_once_from_the_token_before_it(examples, build):
    batch = build(examples)
    ids = batch.input_ids.flatten()
    members = batch.rows_R.split(batch.scored_M.tolist())
    targets = batch.targets_R.split(batch.scored_M.tolist())
    for member, (prompt, response) in enumerate(paths(examples)):
        rows = members[member]
        assert targets[member].tolist() == response
        path = prompt + response
        assert ids[rows].tolist() == path[len(prompt) - 1 : -1][: len(response)]
        predicted_at = batch.positions.flatten()[rows]
        assert predicted_at.tolist() == list(range(len(prompt) - 1, len(path) - 1))
    assert batch.examples * batch.members == len(paths(examples)) == len(batch.scored_M)


@settings(max_examples=100, deadline=None)
@given(forests(), st.sampled_from([build_shared, build_packed]), st.integers(1, 9))
def test_a_token_sees_exactly_the_path_that_leads_to_it(examples, build, multiple):
    """Tokens are distinct, so what a token may see names its path; the tail sees only itself."""
    batch = build(examples, multiple=multiple)
    ids, segments = batch.input_ids[0].tolist(), batch.attention
    assert len(ids) % multiple == 0
    seen = {}
    for index, (start, stop, prefix_start, prefix_stop) in enumerate(segments.ranges_N4.tolist()):
        keys = segments.gather_K[segments.cu_k[index] : segments.cu_k[index + 1]].tolist()
        assert keys == [*range(prefix_start, prefix_stop), *range(start, stop)]
        assert (int(segments.cu_q[index]), int(segments.cu_q[index + 1])) == (start, stop)
        for query in range(start, stop):
            seen[query] = [ids[key] for key in keys[: len(keys) - (stop - query) + 1]]
    assert sorted(seen) == list(range(len(ids)))
    allowed = [p + r for p, r in paths(examples)]
    for query, tokens in seen.items():
        assert batch.positions[0, query] == len(tokens) - 1
        if ids[query] == 0:
            assert set(tokens) == {0}
        else:
            assert any(tokens == path[: len(tokens)] for path in allowed)
    assert segments.cu_q.dtype == segments.cu_k.dtype == torch.int32
    lengths = segments.cu_k.diff()
    assert (segments.max_q, segments.max_k) == (segments.cu_q.diff().max(), lengths.max())


def test_a_quad_takes_2P_plus_4R_tokens():
    x, y = np.ones(10, np.int32), np.ones(4, np.int32)
    quad = Example("q", (x, x), ((y, y), (y, y)))
    assert build_shared([quad] * 3).input_ids.shape == (1, 3 * (2 * 10 + 4 * 4))
    assert build_packed([quad] * 3).input_ids.shape == (1, 3 * 4 * (10 + 4))
    assert build_plain([quad] * 3).input_ids.shape == (12, 14)


def test_three_members():
    x1, x2, y1, y2 = (np.array([n], np.int32) for n in (1, 2, 3, 4))
    batch = build_shared([Example("q", (x1, x2), ((y1, y2), (y1,)))])
    assert batch.input_ids.tolist() == [[1, 3, 4, 2, 3]]
    assert (batch.members, batch.targets_R.tolist()) == (3, [3, 4, 3])


def test_refusals():
    token, none = np.ones(1, np.int32), np.ones(0, np.int32)
    pair = Example("pair", (token,), ((token, token),))
    with pytest.raises(AssertionError, match="'bad' has an empty prompt"):
        build_plain([Example("bad", (none,), ((token,),))])
    with pytest.raises(AssertionError, match="'bad' has a prompt without response"):
        build_plain([Example("bad", (token,), ((),))])
    with pytest.raises(AssertionError, match="equally many members"):
        build_shared([pair, Example("sft", (token,), ((token,),))])


def test_moving_a_batch_keeps_the_ranges_on_the_cpu():
    x = np.ones(2, np.int32)
    example = Example("a", (x,), ((x, x),))
    moved = build_shared([example]).to("meta")
    assert moved.input_ids.is_meta and moved.attention.cu_q.is_meta and moved.attention.cu_k.is_meta
    assert moved.attention.gather_K.is_meta and moved.attention.ranges_N4.device.type == "cpu"
    assert build_plain([example]).to("meta").padding_mask.is_meta
