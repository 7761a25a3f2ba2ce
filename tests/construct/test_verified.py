"""The recipe `verified`: with a stub for a model, and the committed set data/verified."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from iopo.construct.summary import deviations
from iopo.construct.tasks import read_tasks
from iopo.construct.verified import (
    VerifiedRecipe,
    bare_jobs,
    beginning,
    build_verified,
    split_of,
    whole_text,
)
from iopo.construct.verify import verify
from iopo.files import read_records

FOLDER = Path(__file__).resolve().parents[2] / "data" / "verified"
SPLITS = ("train", "heldout", "heldout_kinds")
NEVER_TRAINED = {"numbered_items", "highlights", "sections", "closing_note"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Bees make honey from nectar. They also dance. And",
            "Bees make honey from nectar. They also dance.",
        ),
        (
            "<think>\nHow do BEES live?\n</think>\n\nBees make honey from nectar. They also dance.",
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
    unfinished = "too short before it breaks off or repeats itself"
    assert whole_text("Bees make honey and then")[1] == whole_text("Bees.")[1] == unfinished
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


def test_end_to_end(tmp_path):
    recipe = VerifiedRecipe(
        out=str(tmp_path / "a"), responses=str(tmp_path / "responses.jsonl"), samples_per_task=2,
        follow_candidates=40, train_quads=120, heldout_quads=20, heldout_kinds_quads=10,
    )  # fmt: skip
    said = build_verified(recipe, stub_sampler)
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
    assert build_verified(recipe, no_model) == said
    assert [path.read_text() for path in files] == before
    assert len(read_records(tmp_path / "responses.jsonl")) > 1000


def test_beginning_is_a_part_that_stands_alone():
    prose = "Bees make honey from flowers all day. They also dance for one another. Nobody knows."
    lines = "- Bees make honey from flowers all summer.\n- They also dance for one another."
    for seed in range(20):
        rng = random.Random(seed)
        for text in (prose, lines):
            start = beginning(text, rng)
            if start is not None:
                assert text.startswith(start) and start.endswith(".") and start < text
    alone = "Bees make honey from flowers all summer long, and then."
    assert beginning(alone, random.Random(0)) is None


def test_few_samples_have_all_forms_and_held_out_kinds_fewer():
    tasks = read_tasks()
    jobs = bare_jobs(tasks, 4)
    held = sum(split_of(task) == "heldout_kinds" for task in tasks)
    assert len(jobs) == 4 * len(tasks) - held
    assert list(bare_jobs(tasks, 5))[: len(jobs)] == list(jobs)


# --- the committed set ---


@pytest.fixture(scope="module")
def committed():
    return {s: [json.loads(r) for r in (FOLDER / f"{s}.jsonl").open()] for s in SPLITS}


def test_committed_set_is_as_promised(committed):
    found, summary = verify([FOLDER / f"{split}.jsonl" for split in SPLITS])
    assert found == []
    assert summary.sources["relabel"] + summary.sources["follow"] >= 1500
    assert summary.sources["edit"] <= 0.2 * summary.rows
    assert abs(deviations(summary.together)) < 3 and abs(deviations(summary.longer)) < 3
    assert deviations(summary.guesser.guesses) < 3
    for split in ("train", "heldout"):
        kinds = Counter(c["kind"] for row in committed[split] for c in row["c1"] + row["c2"])
        assert len(kinds) >= 15 and max(kinds.values()) <= 0.15 * kinds.total()
        assert not NEVER_TRAINED & set(kinds)
    rare = {c["kind"] for row in committed["heldout_kinds"] for c in row["c1"] + row["c2"]}
    assert rare == NEVER_TRAINED
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 10e6


def test_committed_files_are_what_the_command_makes(tmp_path):
    def no_model(prompts, seed):
        raise AssertionError(f"the cache lacks an answer to {prompts[0]!r}")

    recipe = VerifiedRecipe(out=str(tmp_path), responses=str(FOLDER / "responses.jsonl"))
    build_verified(recipe, no_model)
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_text() == (FOLDER / f"{split}.jsonl").read_text()
