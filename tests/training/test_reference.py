"""The cache of reference log-probs: by content, atomic, never silently stale."""

import dataclasses
import fcntl
from pathlib import Path

import numpy as np
import pytest
import torch

from iopo.data.batching import Batching
from iopo.data.example import Example, content_key
from iopo.training.reference import cache as module
from iopo.training.reference.cache import Cache, fill, look_up, recheck

WHERE = Path("the-cache")
MANIFEST = {"weights": "w", "tokenizer": "t", "dtype": "fp32"}


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


ONE_BY_ONE = Batching(global_batch_quads=1, ranks=1, seed=0, micro_batch_quads=1)


def filled(tmp_path, examples, score=score) -> tuple[Cache, dict[str, np.ndarray]]:
    cache = Cache(tmp_path, MANIFEST)
    return cache, fill(cache, examples, 4, score, ONE_BY_ONE)


def test_rows_come_back_in_the_order_asked_for(tmp_path):
    examples = [example(i) for i in range(5)]
    _, rows = filled(tmp_path, examples)
    asked = [examples[i] for i in (3, 0, 3)]
    torch.testing.assert_close(look_up(rows, asked, WHERE), score(asked))


def test_a_fill_waits_for_another_run_and_says_that_it_lives(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "FILL_POLL_S", 0.01)
    cache, examples = Cache(tmp_path, MANIFEST), [example(0)]
    cache.folder.mkdir(parents=True)
    other = open(cache.folder / "filling", "w")  # noqa: SIM115 - closed by the third beat
    fcntl.flock(other, fcntl.LOCK_EX)
    beats = []

    def beat():
        beats.append(1)
        if len(beats) == 3:
            other.close()

    monkeypatch.setattr(module, "heartbeat", beat)
    with caplog.at_level("INFO"):
        assert len(fill(cache, examples, 4, score, ONE_BY_ONE)) == 1
    assert len(beats) == 4  # the last is of the one batch
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.endswith("waiting for it")
    with open(cache.folder / "filling", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # what is in the cache already waits for nobody
        assert len(fill(cache, examples, 4, score, ONE_BY_ONE)) == 1


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
    _, rows = filled(tmp_path, [example(0)])
    with pytest.raises(ValueError, match=r"the-cache: no reference log-probs for 2 .*q7"):
        look_up(rows, [example(0), example(7), example(8)], WHERE)


def test_another_manifest_names_another_cache(tmp_path):
    folders = {Cache(tmp_path, MANIFEST | {key: "changed"}).folder for key in MANIFEST}
    assert len(folders | {Cache(tmp_path, MANIFEST).folder}) == 1 + len(MANIFEST)


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
    cache, rows = filled(tmp_path, examples)
    found, again = look_up(rows, examples, WHERE), score(examples)
    tokens = torch.full(found.shape, 4)
    assert recheck(found, again, tokens, 1e-4, cache.folder) == 0
    for wrong in (again + 0.01, again * float("nan")):
        with pytest.raises(ValueError, match="differ from recomputed") as caught:
            recheck(found, wrong, tokens, 1e-3, cache.folder)
        assert "reference.cache_dir" in str(caught.value) and "delete" not in str(caught.value)


def test_recheck_bears_one_member_far_off_by_rounding(tmp_path):
    """Measured with bf16 on a CPU with AMX: 0.95 nats between two shapes of batches."""
    tokens, noise = torch.full((4, 4), 40), torch.full((4, 4), 0.25)
    noise[0, 0] = 0.95
    cached = torch.full((4, 4), -50.0)
    assert recheck(cached, cached + noise, tokens, 0.15, tmp_path) < 0.1
    with pytest.raises(ValueError, match="differ from recomputed"):
        recheck(cached, cached + 1.2, tokens, 0.15, tmp_path)


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
    _, rows = filled(tmp_path, examples)
    torch.testing.assert_close(look_up(rows, examples, WHERE), score(examples))
