"""The cache of reference log-probs: by content, atomic, never silently stale."""

import dataclasses

import numpy as np
import pytest
import torch

from iopo.data.tokenize import Example, content_key
from iopo.reference import Cache, CachedReference, Manifest, fill, recheck

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
