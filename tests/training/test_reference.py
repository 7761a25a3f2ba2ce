"""The cache of reference log-probs: by content, atomic, never silently stale."""

import dataclasses
import fcntl

import numpy as np
import pytest
import torch

from iopo.data.tokenize import Example, content_key
from iopo.training.reference import cache as module
from iopo.training.reference.cache import (
    Cache,
    CachedReference,
    FillingReference,
    Manifest,
    fill,
    recheck,
)

MANIFEST = Manifest(
    weights="w", tokenizer="t", data="d", truncation="p", dtype="fp32", layout="shared",
    attention="a", kernel="k",
)  # fmt: skip


def example(i: int, members: int = 4) -> Example:
    prompt = np.array([1, 2, 3 + i], dtype=np.int32)
    y1, y2 = np.array([7, i], dtype=np.int32), np.array([8], dtype=np.int32)
    other = np.array([1, 2, 3 + i, 4], dtype=np.int32)
    if members == 4:
        return Example(f"q{i}", (prompt, other), ((y1, y2), (y2, y1)))
    return Example(f"q{i}", (prompt,), ((y1, y2),))


def score(examples):
    """Stands for a model: some number for every member of every example."""
    return torch.tensor([[-float(e.prompts[0][2]) - m for m in range(4)] for e in examples])


def one_by_one(examples):
    return [[i] for i in range(len(examples))]


def filled(tmp_path, examples, score=score) -> tuple[Cache, CachedReference]:
    cache = Cache(tmp_path, MANIFEST)
    rows = fill(cache, examples, 4, score, one_by_one, lambda done, total: None)
    return cache, CachedReference(rows, "cache")


def test_rows_come_back_in_the_order_asked_for(tmp_path):
    examples = [example(i) for i in range(5)]
    _, reference = filled(tmp_path, examples)
    asked = [examples[i] for i in (3, 0, 3)]
    torch.testing.assert_close(reference(asked), score(asked))


def test_a_fill_waits_for_another_run_and_says_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FILL_POLL_S", 0.01)
    cache, examples = Cache(tmp_path, MANIFEST), [example(0)]
    cache.folder.mkdir(parents=True)
    other = open(cache.folder / "filling", "w")  # noqa: SIM115 - closed by `waiting`
    fcntl.flock(other, fcntl.LOCK_EX)
    waits = []

    def waiting():
        waits.append(1)
        if len(waits) == 3:
            other.close()

    progress = lambda done, total: None  # noqa: E731
    assert len(fill(cache, examples, 4, score, one_by_one, progress, waiting)) == 1
    assert len(waits) == 3
    with open(cache.folder / "filling", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # what is there already waits for nobody
        assert len(fill(cache, examples, 4, score, one_by_one, progress, waiting)) == 1


def test_a_second_fill_computes_only_what_is_missing(tmp_path):
    filled(tmp_path, [example(i) for i in range(3)])
    seen = []

    def counting(examples):
        seen.extend(e.id for e in examples)
        return score(examples)

    filled(tmp_path, [example(i) for i in range(5)], counting)
    assert seen == ["q3", "q4"]


def test_key_is_content_not_id():
    renamed = dataclasses.replace(example(1), id="other")
    assert content_key(renamed) == content_key(example(1))
    assert content_key(example(2)) != content_key(example(1))


def test_a_miss_raises_with_ids(tmp_path):
    _, reference = filled(tmp_path, [example(0)])
    with pytest.raises(ValueError, match=r"no reference log-probs for 2 examples.*q7"):
        reference([example(0), example(7), example(8)])


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Manifest)])
def test_every_manifest_field_names_another_cache(field):
    other = dataclasses.replace(MANIFEST, **{field: "changed"})
    assert other.hash() != MANIFEST.hash()


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_damage_is_noticed(tmp_path, damage):
    cache, _ = filled(tmp_path, [example(i) for i in range(50)])
    data = bytearray(cache.path(4).read_bytes())
    if damage == "truncate":
        data = data[: len(data) // 2]
    elif damage == "flip":
        data[len(data) // 2] ^= 0x40
    else:
        data = bytearray()
    cache.path(4).write_bytes(data)
    with pytest.raises(ValueError, match="damaged.*delete it"):
        cache.read(4)


def test_non_finite_values_are_not_stored(tmp_path):
    with pytest.raises(ValueError, match="non-finite"):
        filled(tmp_path, [example(0)], lambda examples: torch.full((1, 4), float("nan")))
    assert Cache(tmp_path, MANIFEST).read(4) == {}


def test_recheck_finds_foreign_numbers(tmp_path):
    examples = [example(i) for i in range(4)]
    _, reference = filled(tmp_path, examples)
    assert recheck(reference, examples, score, tolerance=1e-4) == 0
    with pytest.raises(ValueError, match="differ from recomputed"):
        recheck(reference, examples, lambda e: score(e) + 0.01, tolerance=1e-3)
    with pytest.raises(ValueError, match="differ"):
        recheck(reference, examples, lambda e: score(e) * float("nan"), tolerance=1e-3)


def test_a_killed_fill_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STORE_EVERY_ROUNDS", 2)
    examples = [example(i) for i in range(5)]

    def until_the_fourth(rows):
        if rows[0].id == "q3":
            raise KeyboardInterrupt
        return score(rows)

    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, examples, until_the_fourth)
    kept = Cache(tmp_path, MANIFEST).read(4)
    assert kept.keys() == {content_key(e) for e in examples[:2]}
    _, reference = filled(tmp_path, examples)
    torch.testing.assert_close(reference(examples), score(examples))


class Filler:
    """A run, or a rank, that fills the cache in tmp_path; `seen` are the ids it has computed."""

    def __init__(self, tmp_path, expected, score=score):
        self.cache, self.seen = Cache(tmp_path, MANIFEST), []
        rows = self.cache.read(4)

        def counting(batch):  # a list of examples stands for their tensors
            self.seen += [e.id for e in batch]
            return score(batch)

        self.call = FillingReference(self.cache, 4, rows, counting, expected)

    def __call__(self, *examples):
        return self.call(examples, list(examples))


def test_filling_computes_each_row_once_and_stores_them_after_the_first_epoch(tmp_path):
    examples = [example(i) for i in range(4)]
    run = Filler(tmp_path, examples)
    torch.testing.assert_close(run(*examples[:2]), score(examples[:2]))
    assert run.cache.read(4) == {}
    run(*examples[2:])
    assert run.cache.read(4).keys() == {content_key(e) for e in examples}
    torch.testing.assert_close(run(*examples[::-1]), score(examples[::-1]))
    assert run.seen == ["q0", "q1", "q2", "q3"]
    later = Filler(tmp_path, examples)
    torch.testing.assert_close(later(*examples), score(examples))
    assert later.seen == []


def test_ranks_and_runs_take_over_each_others_rows(tmp_path):
    examples = [example(i) for i in range(4)]
    ranks = Filler(tmp_path, examples[:2]), Filler(tmp_path, examples[2:])
    ranks[0](*examples[:2])
    ranks[1](*examples[2:])
    torch.testing.assert_close(ranks[0](*examples[2:]), score(examples[2:]))
    torch.testing.assert_close(ranks[1](*examples[:2]), score(examples[:2]))
    assert [rank.seen for rank in ranks] == [["q0", "q1"], ["q2", "q3"]]


def test_rows_that_a_kill_lost_are_computed_again_and_stored_ones_keep_their_bits(tmp_path):
    examples = [example(i) for i in range(3)]
    killed = Filler(tmp_path, examples)
    killed(examples[0])
    killed.call.store()  # as before a checkpoint
    killed(examples[1])  # lost
    resumed = Filler(tmp_path, examples, score=lambda rows: score(rows) + 1e-5)
    resumed(*examples[1:])
    again = resumed(*examples)
    assert resumed.seen == ["q1", "q2"]
    assert torch.equal(again[0], score(examples[:1])[0])
    assert not torch.equal(again[1], score(examples[1:2])[0])
    late = FillingReference(resumed.cache, 4, {}, lambda rows: score(rows) + 1, examples)
    late.rows = {}
    late.seen = late._version()  # it began before the rows were stored, and has computed its own
    assert torch.equal(late(examples[:1], examples[:1])[0], score(examples[:1])[0] + 1)
    late.store()
    assert torch.equal(late(examples[:1], examples[:1])[0], score(examples[:1])[0])
