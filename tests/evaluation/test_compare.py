"""Scores, paired differences and their pictures."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from iopo.evaluation import compare, scoring
from iopo.evaluation.benchmarks import followbench
from iopo.files import write_records
from iopo.stats import wilson


def shares(values: list[float]) -> dict[str, tuple[float, float]]:
    return {str(i): (v, 1) for i, v in enumerate(values)}


def test_shares_get_wilson_and_ratios_a_bootstrap() -> None:
    table = {
        "share": shares([1, 1, 0, 1]),
        "weighted": {"a": (0.25, 0.25), "b": (0.0, 0.25)},
        "ratio": {"a": (1, 2), "b": (3, 3), "c": (0, 1)},
        "mean": shares([0.5, 0.7]),
    }
    found = scoring.summarise(table, resamples=500, seed=0)
    expected = wilson(3, 4)
    assert {k: found["share"][k] for k in expected} == expected
    assert found["weighted"]["method"] == "wilson" and found["weighted"]["value"] == 0.5
    assert found["ratio"]["value"] == 4 / 6 and found["ratio"]["n"] == 3
    assert found["ratio"]["low"] <= 4 / 6 <= found["ratio"]["high"]
    assert found["mean"]["method"] == "bootstrap"
    sure = scoring.summarise({"x": {"a": (2, 2), "b": (1, 1)}}, resamples=50, seed=0)["x"]
    assert {k: sure[k] for k in expected} == wilson(2, 2), "not certain, though all were right"
    assert scoring.from_rows(scoring.to_rows(table)) == table


def test_intervals_keep_the_constraints_of_an_item_together() -> None:
    """100 items of 10 equal verdicts are 100 observations, not 1,000."""
    rng = np.random.default_rng(0)
    units = {str(i): (10.0 * held, 10.0) for i, held in enumerate(rng.random(100) < 0.5)}
    entry = scoring.summarise({"x": units}, resamples=2000, seed=0)["x"]
    assert entry["high"] - entry["low"] > 0.15


def test_paired_differences_by_hand() -> None:
    a = {"m": shares([1, 1, 0, 0, 1, 0, 1, 0]), "r": {"0": (1, 2), "1": (2, 2)}}
    b = {"m": shares([1, 1, 1, 1, 1, 1, 0, 0]), "r": {"0": (2, 2), "1": (2, 2), "9": (0, 2)}}
    row = scoring.compare("m", a, b, resamples=2000, seed=0)
    assert (row.a, row.b, row.difference) == (0.5, 0.75, 0.25)
    assert (row.only_a, row.only_b) == (1, 3)
    assert row.p == 10 / 16  # 1 against 3 discordant pairs: 2 (C(4,0) + C(4,1)) / 2^4
    assert row.low < 0.25 < row.high
    ratio = scoring.compare("r", a, b, resamples=100, seed=0)
    assert ratio.units == 2 and ratio.difference == 0.25 and ratio.p is None
    with pytest.raises(ValueError, match="no item in common"):
        scoring.compare("m", {"m": {"x": (1, 1)}}, {"m": {"y": (1, 1)}}, resamples=10, seed=0)


def test_the_same_verdicts_are_no_difference() -> None:
    """Of FollowBench, though one run lacks some: a type weighs what its judged items say."""
    rng = np.random.default_rng(0)
    cells = [("content", 10), ("style", 30), ("format", 40)]
    items = [
        followbench.Item(f"en/{kind}/{number}/{level}", (), row)
        for kind, count in cells
        for number in range(count)
        for level in range(1, 6)
        for row in [{"language": "en", "constraint_type": kind, "example_id": number,
                     "level": level}]
    ]  # fmt: skip
    held = rng.random(len(items)) < 0.4
    whole = [{"scores": [float(h)]} for h in held]
    some = [
        {"scores": None} if "style" in item.id and rng.random() < 0.2 else one
        for item, one in zip(items, whole, strict=True)
    ]
    few = [(item, one) for item, one in zip(items, whole, strict=True) if "/1/" not in item.id]
    full = followbench.measures(items, whole)
    for other in (
        followbench.measures(items, some),
        followbench.measures(*map(list, zip(*few, strict=True))),
    ):
        for a, b in ((full, other), (other, full)):
            for metric in ("HSR/en", "SSR/en", "CSL/en", "HSR/en/level 2"):
                row = scoring.compare(
                    metric, a, b, resamples=50, seed=0, cluster=followbench.cluster
                )
                assert row.difference == pytest.approx(0) and row.differing == 0
                assert row.a == pytest.approx(row.b)


def test_levels_of_an_instruction_stay_together() -> None:
    """Five levels that are held or not together are one observation."""
    rng = np.random.default_rng(0)
    units = {
        f"en/content/{group}/{level}": (float(held), 1.0)
        for group, held in enumerate(rng.random(100) < 0.5)
        for level in range(1, 6)
    }
    alone = {unit.removesuffix("/1"): held for unit, held in units.items() if unit.endswith("/1")}
    found, expected = (
        scoring.summarise({"HSR/en": of}, resamples=2000, seed=0, cluster=followbench.cluster)
        for of in (units, alone)
    )
    assert found["HSR/en"]["n"] == 100
    width, wanted = (of["HSR/en"]["high"] - of["HSR/en"]["low"] for of in (found, expected))
    assert width == pytest.approx(wanted, rel=0.1)
    row = scoring.compare(
        "m", {"m": units}, {"m": {u: (1.0, 1.0) for u in units}}, resamples=50, seed=0,
        cluster=followbench.cluster,
    )  # fmt: skip
    assert row.units == 100 and row.only_b == row.differing


def test_pairing_narrows_the_interval() -> None:
    """Two runs that agree on nearly all items differ by little, whatever the items' spread."""
    rng = np.random.default_rng(1)
    base = (rng.random(400) < 0.5).astype(float)
    better = base.copy()
    better[np.flatnonzero(base == 0)[:12]] = 1
    table_a, table_b = {"m": shares(list(base))}, {"m": shares(list(better))}
    row = scoring.compare("m", table_a, table_b, resamples=4000, seed=0)
    assert row.low > 0 and row.high - row.low < 0.05
    alone = scoring.summarise(table_a, resamples=100, seed=0)["m"]
    assert alone["high"] - alone["low"] > 0.09


def run_folder(
    folder: Path,
    values: list[float],
    sha: str = "s",
    benchmark: str = "ifeval",
    judge: dict | None = None,
) -> Path:
    folder.mkdir(parents=True)
    table = {"prompt_strict": shares(values), "CSL/en": shares([3.0 * v for v in values])}
    scores = {
        "benchmark": benchmark,
        "headline": list(table),
        "data": {"sha256": sha},
        "judge": judge or {},
        "scores": scoring.summarise(table, resamples=100, seed=0),
    }
    (folder / "scores.json").write_text(json.dumps(scores))
    write_records(folder / "measures.jsonl", scoring.to_rows(table))
    return folder


def test_two_folders(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_folder(tmp_path / "a" / "ifeval", [0, 0, 1, 0, 0, 0] * 3)
    run_folder(tmp_path / "b" / "x", [1, 1, 1, 1, 1, 0] * 3)
    (tmp_path / "b" / "quads").mkdir()  # of another program: without measures
    (tmp_path / "b" / "quads" / "scores.json").write_text('{"group_accuracy": {}}')
    out = tmp_path / "out"
    arguments = [str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out), "--resamples", "500"]
    assert compare.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "B is better" in shown and "+66.7" in shown
    rows = json.loads((out / "compare.json").read_text())["differences"]["ifeval"]
    assert rows[0]["difference"] == pytest.approx(4 / 6) and rows[0]["only_b"] == 12
    assert (out / "compare.png").stat().st_size > 5000


def test_a_difference_of_few_items_is_not_called_better(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As in the comparison's tables: a bootstrap of few is too sure of itself."""
    a = run_folder(tmp_path / "a", [0] * 40)
    b = run_folder(tmp_path / "b", [1] * 5 + [0] * 35)
    assert compare.main([str(a), str(b), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "+12.5" in shown and "too few" in shown and "better" not in shown


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a = run_folder(tmp_path / "a", [0, 1])
    for other, message in (
        (run_folder(tmp_path / "b", [0, 1], sha="t"), "different data files"),
        (run_folder(tmp_path / "c", [0, 1], benchmark="trace"), "no benchmark in common"),
        (run_folder(tmp_path / "d", [0, 1], judge={"model": "m"}), "scored by code, .* by m"),
        (tmp_path / "nothing", "no scores.json"),
    ):
        assert compare.main([str(a), str(other), "--out", str(tmp_path / "o")]) == 2
        assert re.search(message, capsys.readouterr().err)
    run_folder(tmp_path / "two" / "x", [1])
    run_folder(tmp_path / "two" / "y", [1])
    with pytest.raises(ValueError, match="both .* hold ifeval"):
        scoring.outputs(tmp_path / "two")


def test_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a = run_folder(tmp_path / "a", [0, 1, 1])
    b = run_folder(tmp_path / "b", [0, 0, 1])
    out = tmp_path / "out"
    assert compare.main(["--bars", f"one={a}", f"two={b}", str(b), "--out", str(out)]) == 0
    assert "66.7" in capsys.readouterr().out
    assert (out / "bars.png").stat().st_size > 5000
    assert compare.main(["--bars", f"one={a}", f"one={b}", "--out", str(out)]) == 2
    assert "two runs are called one" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main([str(a)])
    assert "1 folders; expected A and B" in capsys.readouterr().err
