"""The page about data, the leak scorers, and the recipe `verified` with a stub for a model."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from iopo.construct import report, taxonomy
from iopo.construct.leaks import SideGuesser
from iopo.construct.responses import read_cache
from iopo.construct.verified import VerifiedRecipe, build_verified, whole_text
from iopo.construct.verify import verify

ROOT = Path(__file__).resolve().parents[1]
DEMO = [ROOT / "data" / "demo" / name for name in ("train.jsonl", "heldout.jsonl")]


def test_counts_are_those_of_the_rows():
    counts = report.count(DEMO)
    rows = [json.loads(line) for path in DEMO for line in path.open(encoding="utf-8")]
    kinds = Counter(c["kind"] for row in rows for c in row["c1"] + row["c2"])
    assert counts.rows == len(rows) and counts.kinds == kinds
    assert counts.types.total() == counts.dimensions.total() == kinds.total()
    assert counts.numbers.total() == 2 * len(rows) == counts.x_chars.total()
    assert sum(n * k for k, n in counts.numbers.items()) == kinds.total()
    assert counts.dimensions["Exclusion"] == kinds["forbid_words"]


def test_kinds_belong_to_dimensions_of_the_taxonomy():
    from iopo.constraints import KINDS

    assert set(report.DIMENSION_OF) >= set(KINDS)
    assert set(report.DIMENSION_OF.values()) <= {d.dimension for d in taxonomy.read()}


def test_page_escapes_what_others_wrote(tmp_path):
    row = json.loads(DEMO[0].open(encoding="utf-8").readline())
    row["y1"] = "<script>alert(1)</script>"
    row["c1"] = [{"kind": "judged", "params": {"type": "Theme"}, "text": "t"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert report.main([str(path), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "Theme" in page
    path.write_text('{"x1": 3}\n')
    assert report.main([str(path), "--out", str(tmp_path / "r.html")]) == 2


def test_side_guesser_finds_a_leak_and_no_other():
    rng = random.Random(0)
    words = "a few plain words that stand in any order and mean nothing at all".split()
    fair, leaking = SideGuesser(), SideGuesser()
    for _ in range(500):
        texts = [" ".join(rng.choices(words, k=rng.randint(5, 20))) for _ in (1, 2)]
        fair.add(*texts)
        leaking.add("Certainly! " + texts[0], texts[1])
    assert abs(fair.y_only()) < 3 and abs(fair.length_only()) < 3
    assert leaking.y_only() > 10 and leaking.length_only() > 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Bees make honey from nectar. They also dance. And",
            "Bees make honey from nectar. They also dance.",
        ),
        (
            "- Bees make honey every day.\n- They also dance.\n- ",
            "- Bees make honey every day.\n- They also dance.",
        ),
        (
            "1. Bees make honey every day.\n2. They dance.\n3.",
            "1. Bees make honey every day.\n2. They dance.",
        ),
        (
            "Bees make honey every day. They dance well. Then bees make honey every day.",
            "Bees make honey every day. They dance well.",
        ),
    ],
)  # fmt: skip
def test_whole_text_keeps_lines(text, expected):
    assert whole_text(text) == (expected, None)


def test_whole_text_says_what_is_wrong():
    assert whole_text("As an AI I can not say what bees are doing.")[1] == "refusal"
    assert (
        whole_text("Bees make honey and then")[1]
        == whole_text("Bees.")[1]
        == ("too short before it breaks off or repeats itself")
    )
    assert whole_text("Été is the French word for the season of summer.")[1] == "not ascii"


def stub_sampler(prompts, seed):
    """Texts of every form, some of which follow what a prompt asks for."""
    rng = random.Random(seed)
    nouns = "river garden teacher village engine letter market window kitchen mountain".split()
    found = []
    for prompt in prompts:
        parts = []
        for _ in range(rng.randint(1, 5)):
            a, b, c = rng.sample(nouns, 3)
            joint = rng.choice((", near the", " and the", " beyond the"))
            number = rng.randint(10, 99)
            parts.append(
                f"The {a} keeps {number} things{joint} {b} of every {c}{rng.choice('..!?')}"
            )
        form = rng.random()
        joined = "\n- ".join(["", *parts]).strip() if form < 0.2 else " ".join(parts)
        if form > 0.8:
            joined = "\n\n".join(parts)
        if "lowercase" in prompt:
            joined = joined.lower()
        found.append((joined, "stop"))
    return found


def test_verified_recipe_end_to_end(tmp_path):
    recipe = VerifiedRecipe(
        out=str(tmp_path / "a"), responses=str(tmp_path / "responses.jsonl"), samples_per_task=2,
        follow_candidates=40, train_quads=120, heldout_quads=20, heldout_kinds_quads=10,
    )  # fmt: skip
    (tmp_path / "a").mkdir()
    said = build_verified(recipe, stub_sampler, lambda line: None)
    files = [tmp_path / "a" / f"{split}.jsonl" for split in ("train", "heldout", "heldout_kinds")]
    found, summary = verify(files)
    assert found == [] and summary.rows > 100
    assert summary.sources["edit"] <= 0.2 * summary.rows
    rows = [json.loads(line) for path in files[:2] for line in path.open(encoding="utf-8")]
    kinds = Counter(c["kind"] for row in rows for c in row["c1"] + row["c2"])
    assert len(kinds) >= 12 and not {"numbered_items", "sections", "highlights"} & set(kinds)
    assert "| relabel | accepted |" in said and (tmp_path / "a" / "report.html").exists()

    def no_model(prompts, seed):
        raise AssertionError("all responses are in the cache")

    before = [path.read_text() for path in files]
    assert build_verified(recipe, no_model, lambda line: None) == said
    assert [path.read_text() for path in files] == before
    assert len(read_cache(tmp_path / "responses.jsonl")) > 1000
