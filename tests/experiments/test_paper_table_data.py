"""The rows that methods are compared on: what they are made from, and that code checked them."""

import json
import random
from pathlib import Path

import pytest

from iopo.constraints import follows, from_dict, make
from iopo.construct.quadruples import four_cells
from iopo.construct.tasks import INPUT_MARK
from iopo.experiments.paper_table import data as comparison

DATA = Path(__file__).resolve().parents[2] / "data/verified"
HELDOUT = [DATA / "heldout.jsonl", DATA / "heldout_kinds.jsonl"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, list[dict]]:
    out = tmp_path_factory.mktemp("data")
    sizes = {"quads": 96, "validation": 20, "test": 40}
    comparison.make(DATA / "train.jsonl", HELDOUT, out, **sizes)
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in out.glob("*.jsonl")
    }


def cells(row: dict) -> tuple[bool, ...]:
    c1, c2 = ([from_dict(c) for c in row[c]] for c in ("c1", "c2"))
    return four_cells(c1, row["y1"], c2, row["y2"])


def test_no_task_is_in_two_splits(made):
    def tasks(name):
        return {row["task"].split(INPUT_MARK)[-1] for row in made[name]}

    assert not tasks("train") & tasks("validation")
    assert not (tasks("train") | tasks("validation")) & tasks("test")
    assert {row["split"] for row in made["validation"]} == {"validation"}


def test_test_rows_say_what_training_never_saw(made):
    asked = [c for row in made["train"] for c in (*row["c1"], *row["c2"])]
    kinds = {c["kind"] for c in asked}
    values = [(c["kind"], c["params"]) for c in asked]
    for row in made["test"]:
        own = [*row["c1"], *row["c2"]]
        new_kind = any(c["kind"] not in kinds for c in own)
        new_value = any((c["kind"], c["params"]) not in values for c in own)
        expected = "unseen_kinds" if new_kind else "unseen_params" if new_value else "seen"
        assert row["split"] == expected
        assert cells(row) == (True, False, True, False)
    assert {row["split"] for row in made["test"]} >= {"unseen_kinds", "unseen_params"}


def test_a_third_of_the_test_asks_for_nothing_new(tmp_path):
    counts = comparison.make(
        DATA / "train.jsonl", HELDOUT, tmp_path, quads=1400, validation=150, test=300
    )
    assert min(counts["test_splits"].values()) >= 95, counts["test_splits"]
    rows = [json.loads(x) for x in (tmp_path / "test.jsonl").read_text().splitlines()]
    for row in (row for row in rows if row["split"] == "seen"):
        assert cells(row) == (True, False, True, False)
        assert row["x1"].count("\n") >= len(row["c1"]), "the prompt still lists its constraints"
        assert all(c["text"] in row["x1"] for c in row["c1"])


def test_asymmetric_quads_have_an_easy_side_and_stay_strict(made):
    assert len(made["asymmetric"]) > 60
    for row in made["asymmetric"]:
        easy, hard = (1, 2) if len(row["y1"]) < len(row["y2"]) else (2, 1)
        assert len(row[f"c{easy}"]) == 1 and len(row[f"c{hard}"]) >= 3
        assert cells(row) == (True, False, True, False)


def test_noise_exchanges_the_responses_of_its_share(made):
    """More noise keeps the wrong labels of less."""
    right = {row["id"]: row["y1"] for row in made["train"]}
    wrong = {
        name: {row["id"] for row in made[name] if row["y1"] != right[row["id"]]}
        for name in ("noise10", "noise30")
    }
    assert wrong["noise10"] < wrong["noise30"]
    assert 0.2 < len(wrong["noise30"]) / len(right) < 0.4
    for row in made["noise30"]:
        assert row["id"] in wrong["noise30"] or cells(row) == (True, False, True, False)


def test_a_worse_answer_breaks_a_constraint_and_the_right_one_none(made):
    rows = {row["id"]: row for row in made["train"]}
    assert len(made["worse"]) == 2 * len(rows)
    edited = 0
    for pair in made["worse"]:
        quad, side = pair["id"].split("/")
        row = rows[quad]
        checks = [from_dict(c) for c in row[f"c{side}"]]
        assert pair["x"] == row[f"x{side}"] and pair["chosen"] == row[f"y{side}"]
        assert all(follows(checks, pair["chosen"]))
        kept = follows(checks, pair["rejected"])
        assert not all(kept)
        assert [c.kind for c, ok in zip(checks, kept, strict=True) if not ok] == pair["broken"]
        edited += pair["by"] != "other response"
    assert edited > 0.9 * len(made["worse"]), "worse answers must be edits, not other answers"


def test_an_edit_breaks_as_few_constraints_as_it_can():
    rng = random.Random(0)
    checks = [make("case", style="lower"), make("commas", relation="exactly", number=0)]
    for _ in range(20):
        found = comparison.worse(checks, "rain falls on the roof. it is wet.", rng)
        assert found is not None
        assert sum(not ok for ok in follows(checks, found[1])) == 1


def test_add_and_delete_keep_the_responses_and_change_only_one_instruction(made):
    originals = {row["id"]: row for row in made["train"]}
    operations = set()
    for row in made["add_delete"]:
        quad, operation = row["id"].split("/")
        original = originals[quad]
        operations.add(operation)
        assert (row["y1"], row["y2"]) == (original["y1"], original["y2"])
        kept, changed = ("x1", "x2") if operation == "delete" else ("x2", "x1")
        assert row[kept] == original[kept] and row[changed] != original[changed]
        assert cells(row) == ((1, 0, 1, 1) if operation == "delete" else (1, 1, 1, 0))
        more, fewer = ("c1", "c2") if operation == "delete" else ("c2", "c1")
        assert len(row[fewer]) < len(row[more])
        for number, constraint in enumerate(row[fewer], 1):
            assert f"\n{number}. {constraint['text']}" in row[changed]
        assert f"\n{len(row[fewer]) + 1}. " not in row[changed]
    assert operations == {"add", "delete"}


def test_the_same_rows_give_the_same_files_and_strict_quads_stay_strict(made):
    assert [comparison.add_delete(row) for row in made["train"]] == made["add_delete"]
    assert all(cells(row) == (1, 0, 1, 0) for row in made["train"])


def test_too_few_rows_and_shared_tasks_are_refused(tmp_path):
    train, heldout = DATA / "train.jsonl", HELDOUT[0]
    sizes = {"quads": 96, "validation": 20, "test": 40}
    with pytest.raises(ValueError, match="quads for train, expected 9000"):
        comparison.make(train, [heldout], tmp_path, **(sizes | {"quads": 9000}))
    with pytest.raises(ValueError, match="tasks are in .* and in a held-out file"):
        comparison.make(train, [train], tmp_path, **sizes)
    row = json.loads(train.read_text().splitlines()[0])
    (tmp_path / "bad.jsonl").write_text(json.dumps(row | {"c1": []}) + "\n")
    with pytest.raises(ValueError, match="bad.jsonl:1: no c1"):
        comparison.make(tmp_path / "bad.jsonl", [heldout], tmp_path, **sizes)
