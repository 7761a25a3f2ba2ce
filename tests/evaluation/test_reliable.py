"""reliable@k: by hand, through the command's own path, and between two models."""

from pathlib import Path

import pytest

from iopo.construct.cousins.__main__ import build
from iopo.evaluation import run
from iopo.evaluation.benchmarks import ifeval
from iopo.evaluation.compare import compare_folders
from iopo.evaluation.config import (
    BenchmarkSection,
    DataSection,
    EvaluateConfig,
    ResponsesSection,
)
from iopo.evaluation.scoring import summarise
from iopo.files import read_records, write_records

QUADS = Path(__file__).resolve().parents[2] / "data" / "verified" / "heldout.jsonl"


def item(key, of, change):
    row = {"key": key, "prompt": "Do it.", "cousin_of": of, "change": change}
    row |= {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    return ifeval.Item(str(key), (), row)


def test_reliable_at_k_by_hand():
    rows = [  # key, prompt, change, follows, answers
        (1, 1, "none", 1, 1), ("1-1", 1, "reworded", 1, 1), ("1-2", 1, "distractor", 1, 1),
        (2, 2, "none", 1, 1), ("2-1", 2, "reworded", 1, 1), ("2-2", 2, "reworded", 0, 1),
        (3, 3, "none", 1, 1), ("3-1", 3, "distractor", 1, 0), ("3-2", 3, "reworded", 1, 1),
        (4, 4, "none", 0, 1), ("4-1", 4, "reworded", 1, 1), ("4-2", 4, "distractor", 1, 1),
        (5, 5, "none", 1, 0), ("5-1", 5, "parameter", 1, 1),
    ]  # fmt: skip
    items = [item(*row[:3]) for row in rows]
    verdicts = [
        {"strict": [bool(f)], "loose": [bool(f)], "hollow": [] if a else ["echo"]}
        for *_, f, a in rows
    ]
    table = ifeval.measures(items, verdicts)
    value = {
        name: sum(num for num, _ in units.values()) / sum(den for _, den in units.values())
        for name, units in table.items()
    }
    assert len(table["prompt_strict"]) == 5, "plain scores are of the prompts alone"
    assert value["prompt_strict"] == 4 / 5 and value["follows_and_answers"] == 3 / 5
    assert value["reliable"] == 1 / 5 and value["drop"] == pytest.approx(2 / 3)
    assert value["drop"] == pytest.approx(1 - value["reliable"] / value["follows_and_answers"])
    # following alone: 1, 3 and 5 hold
    assert value["reliable_strict"] == 3 / 5 and value["drop_strict"] == 1 / 4
    # of 1, 2 and 3, right by themselves, rewording loses 2 and a distractor loses 3 (2 has none)
    assert value["drop/reworded"] == pytest.approx(1 / 3) and value["drop/distractor"] == 1 / 2
    assert value["share/reworded"] == 4 / 5 and value["share/distractor"] == 2 / 3
    assert "drop/reordered" not in table and "share/parameter" in table
    assert "drop/parameter" not in table, "its only prompt is wrong by itself"
    scores = summarise(table, resamples=50, seed=0)
    assert scores["drop"]["n"] == 3 and scores["drop"]["method"] == "wilson"
    assert scores["reliable"]["n"] == 5


def evaluate(data, answers, out, **more):
    config = EvaluateConfig(
        benchmark=BenchmarkSection("ifeval"),
        data=DataSection(str(data)),
        responses=ResponsesSection(str(answers)),
        out=str(out),
        bootstrap=200,
        **more,
    )
    return run.evaluate(config)["scores"]


def test_scores_of_cousins_and_their_comparison(tmp_path):
    """The quads' own responses; of the second model every reworded prompt's answer is hollow."""
    write_records(tmp_path / "in.jsonl", read_records(QUADS)[:20])
    quad_file = tmp_path / "quads.jsonl"
    build(tmp_path / "in.jsonl", quad_file, 4, 0)
    quads = {row["id"]: row for row in read_records(QUADS)}
    answers = []
    for row in read_records(quad_file):
        name, side = row["cousin_of"].rsplit("-x", 1)
        answers.append({"key": row["key"], "response": quads[name][f"y{side}"]})
    write_records(tmp_path / "a.jsonl", answers)
    changes = {row["key"]: row["change"] for row in read_records(quad_file)}
    for row in answers:
        if changes[row["key"]] == "reworded":
            row["response"] = "Yes."
    write_records(tmp_path / "b.jsonl", answers)
    good = evaluate(quad_file, tmp_path / "a.jsonl", tmp_path / "a")
    bad = evaluate(quad_file, tmp_path / "b.jsonl", tmp_path / "b")
    assert good["follows_and_answers"]["value"] == 1 == bad["follows_and_answers"]["value"]
    assert good["reliable"]["value"] == 1 - good["drop"]["value"] > 0.4
    assert good["drop/reworded"]["value"] == 0 and good["drop/parameter"]["value"] > 0.2
    assert bad["reliable"]["value"] == 0 and bad["drop/reworded"]["value"] == 1
    (rows,) = compare_folders(tmp_path / "a", tmp_path / "b", resamples=50, seed=0).values()
    found = {row.metric: row for row in rows}
    assert found["reliable"].units == 40 and found["reliable"].high < 0
    assert found["drop"].low > 0 and found["drop"].difference == -found["reliable"].difference
    taken = evaluate(quad_file, tmp_path / "a.jsonl", tmp_path / "some", limit=7)
    assert taken["reliable"]["n"] == 7, "limit counts prompts, each with its cousins"
    assert len(read_records(tmp_path / "some" / "verdicts.jsonl")) == 35


def test_a_cousin_without_its_prompt_is_refused(tmp_path):
    rows = [item(*row).row for row in ((1, 1, "none"), ("1-1", 1, "reworded"))]
    for bad in (rows[1:], [rows[0], rows[1] | {"change": "other"}]):
        write_records(tmp_path / "data.jsonl", bad)
        with pytest.raises(ValueError, match=r"cousin_of is .* and change '(reworded|other)'"):
            ifeval.load(tmp_path / "data.jsonl")
