"""The page about data, and the leak scorers."""

import json
import random
from collections import Counter
from pathlib import Path

from iopo.constraints import KINDS
from iopo.construct import report
from iopo.construct.summary import Summary, deviations, measured
from iopo.construct.trace import taxonomy

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "data" / "verified" / f"{name}.jsonl" for name in ("heldout", "heldout_kinds")]


def test_counts_are_those_of_the_rows():
    counts = report.count(FILES)
    rows = [json.loads(line) for path in FILES for line in path.open(encoding="utf-8")]
    kinds = Counter(c["kind"] for row in rows for c in row["c1"] + row["c2"])
    assert counts.rows == len(rows) and counts.kinds == kinds
    assert counts.dimensions.total() == kinds.total()
    assert counts.constraints.total() == 2 * len(rows) == counts.x_chars.total()
    assert sum(n * k for k, n in counts.constraints.items()) == kinds.total()
    assert counts.dimensions["Exclusion"] == kinds["forbid_words"]


def test_kinds_belong_to_dimensions_of_the_taxonomy():
    assert {cls.dimension for cls in KINDS.values()} <= {d.dimension for d in taxonomy.read()}


def test_page_escapes_what_others_wrote(tmp_path):
    row = json.loads(FILES[0].open(encoding="utf-8").readline())
    row["y1"] = "<script>alert(1)</script>"
    row["c1"] = [{"kind": "judged", "params": {"type": "Theme"}, "text": "t"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert report.main([str(path), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "Theme" in page
    assert "<h2>Kinds</h2>" in page and '<td>judged<td class="n">1<' in page
    path.write_text('{"x1": 3}\n')
    assert report.main([str(path), "--out", str(tmp_path / "r.html")]) == 2


def test_side_guesser_finds_a_leak_and_no_other():
    rng = random.Random(0)
    words = "a few plain words that stand in any order and mean nothing at all".split()
    fair, leaking = Summary(), Summary()
    for _ in range(500):
        texts = [" ".join(rng.choices(words, k=rng.randint(5, 20))) for _ in (1, 2)]
        row = {"x1": "", "x2": "", "y1": texts[0], "y2": texts[1]}
        fair.add(measured(row, [[], []]))
        leaking.add(measured({**row, "y1": "Certainly! " + texts[0]}, [[], []]))
    assert abs(deviations(fair.guesser.guesses)) < 3 and abs(deviations(fair.longer)) < 3
    assert deviations(leaking.guesser.guesses) > 10 and deviations(leaking.longer) > 3
