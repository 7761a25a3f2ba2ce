"""Tasks, sampling, quadruples, the command, and verify on a file with planted faults."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from iopo.constraints import make
from iopo.constraints.answers import hollow
from iopo.construct import quadruples, verify
from iopo.construct.proposals import SEEN_KINDS
from iopo.construct.prose import ends_a_sentence
from iopo.construct.quadruples import Balance, Candidate, four_cells
from iopo.construct.responses import model_sampler, sample_all
from iopo.construct.summary import deviations
from iopo.construct.tasks import Task, instruction, read_tasks
from iopo.construct.verified import split_of
from iopo.evaluation.config import ModelSection
from iopo.files import read_records, write_records

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data" / "verified"


@pytest.fixture(scope="module")
def train():
    return answering(read_records(DATA / "train.jsonl"))[:400]


def answering(rows):
    """Those whose responses answer."""
    return [r for r in rows if not (hollow(r["y1"], r["x1"]) or hollow(r["y2"], r["x2"]))]


@pytest.fixture(scope="module")
def heldout():
    return read_records(DATA / "heldout.jsonl")


# --- what holds for every set of quads ---


def test_blanked_constraints_leave_nothing_to_prefer(train, heldout):
    """Without its constraints x1 is x2, so any scorer ties and sits at chance."""
    for row in train + heldout:
        blanked = []
        for x, c in ((row["x1"], row["c1"]), (row["x2"], row["c2"])):
            for n, constraint in enumerate(c, start=1):
                x = x.replace(f"{n}. {constraint['text']}\n", "").replace(
                    f"\n{n}. {constraint['text']}", ""
                )
            blanked.append(x)
        assert blanked[0] == blanked[1]


@pytest.mark.parametrize(
    "scorer",
    [
        lambda x, y: len(y),
        lambda x, y: -abs(len(y) - 200),
        lambda x, y: y.count(","),
        lambda x, y: len(x),
    ],
    ids=["long", "medium", "commas", "x only"],
)
def test_one_sided_scorers_tie_on_group_accuracy(train, scorer):
    for row in train:
        cells = [scorer(row[x], row[y]) for x, y in (("x1", "y1"), ("x1", "y2"))]
        cells += [scorer(row[x], row[y]) for x, y in (("x2", "y2"), ("x2", "y1"))]
        assert cells[0] + cells[2] == cells[1] + cells[3]


def test_sides_are_in_random_order(train):
    longer = sum(len(row["y1"]) > len(row["y2"]) for row in train)
    shorter = sum(len(row["y1"]) < len(row["y2"]) for row in train)
    assert abs(longer - shorter) < 3 * (longer + shorter) ** 0.5


# --- tasks and responses ---


def test_bank_of_tasks(tmp_path):
    tasks = read_tasks()
    assert len(tasks) >= 500
    texts = {}
    for task in tasks:  # tasks on one input are on one side
        texts.setdefault(task.input, set()).add(split_of(task))
    assert all(len(sides) == 1 for text, sides in texts.items() if text is not None)
    path = tmp_path / "tasks.txt"
    path.write_text("Write.\nRead. # Inputs: A book.\nWrite.\n")
    with pytest.raises(ValueError, match=r"tasks.txt:3: repeats line 1"):
        read_tasks(path)


def test_instruction_is_laid_out_as_trace():
    text = instruction(Task("Summarize.", "A text."), ["Use no commas.", "Be brief."])
    assert text == "Summarize.\n1. Use no commas.\n2. Be brief.\n# Inputs:\nA text."
    assert instruction(Task("Explain."), ["Be brief."]) == "Explain.\n1. Be brief."


def test_sampling_continues_after_a_kill(tmp_path):
    jobs = {f"job-{n}": f"prompt {n}" for n in range(120)}
    asked = []

    def sampler(prompts, seed):
        asked.append(len(prompts))
        return [(f"{p} {seed}", "length" if p.endswith("7") else "stop") for p in prompts]

    whole = sample_all(jobs, tmp_path / "whole.jsonl", sampler, seed=3)
    assert [key for key, (_, ended) in whole.items() if not ended] == [
        f"job-{n}" for n in range(7, 120, 10)
    ]
    lines = (tmp_path / "whole.jsonl").read_text()
    torn = tmp_path / "torn.jsonl"
    torn.write_text(lines[: len(lines) * 2 // 3])  # ends inside a line of the second chunk
    asked.clear()
    assert sample_all(jobs, torn, sampler, seed=3) == whole
    assert asked == [50, 20]
    assert torn.read_text() == lines
    asked.clear()
    sample_all(jobs, torn, sampler, seed=3)
    assert asked == [] and len(read_records(torn)) == 120
    with pytest.raises(ValueError, match="start a new cache file"):
        sample_all({"job-0": "another prompt"}, torn, sampler)
    with pytest.raises(ValueError, match="lacks responses to 'new'.*recipe.model_path"):
        sample_all({"new": "new"}, torn, model_sampler(ModelSection(None), 8, 1.0, 1.0))


# --- quadruples ---

FIRST = "The old mill was empty for years. Students repaired it, and it grinds flour again."
SECOND = "A mill stands by the river. It makes bread possible for the whole village today!"
TASK = Task("Describe an old mill.")


def test_every_accepted_draft_has_the_four_cells():
    accepted = 0
    for seed in range(150):
        balance, rng = Balance(most_share=1.0), random.Random(seed)
        draft = quadruples.edit(TASK, FIRST, SECOND, SEEN_KINDS, balance, rng)
        if isinstance(draft, str):
            continue
        accepted += 1
        cells = four_cells(draft.c1, draft.y1, draft.c2, draft.y2)
        assert cells == (True, False, True, False)
        assert all(1 <= len(c) <= 3 for c in (draft.c1, draft.c2))
        row = quadruples.to_row(draft, "train")
        assert all(c["text"] in row["x1"] for c in row["c1"])
        assert row["match"] == [1, 0, 1, 0]
    assert accepted > 15


def test_relaxing_is_no_quad():
    """y1 stays right for x2 if x2 only asks for less: the draft must not pass."""
    strict = (
        make("commas", relation="exactly", number=0),
        make("words", relation="at most", number=20),
    )
    loose = strict[:1]
    short, longer = (
        "The mill is an old one that grinds wheat.",
        "It is old and it grinds our wheat.",
    )
    draft = Candidate(
        TASK, strict, short, loose, f"{longer} {short} It stands by the river.", "edit"
    )
    assert four_cells(draft.c1, draft.y1, draft.c2, draft.y2) == (True, False, True, True)
    assert quadruples._fault(draft, "broken") == "follows both"


SMALL = "the mill is an old one that grinds our wheat."


def test_follow_keeps_what_fits():
    low, high = make("case", style="lower"), make("case", style="upper")
    draft = Candidate(TASK, (low,), "old.", (high,), "OLD.", "edit")
    kept = quadruples.follow(draft, SMALL, SMALL.upper())
    assert (kept.y1, kept.y2, kept.source) == (SMALL, SMALL.upper(), "follow")
    assert quadruples.follow(draft, SMALL.title(), SMALL.upper()) == "not followed"
    assert quadruples.follow(draft, SMALL[:-1], SMALL.upper()) == "unfinished"
    assert quadruples.follow(draft, "a mill.", SMALL.upper()) == "no answer: too_short"


def test_followed_takes_the_first_pair_that_fits():
    low, high = make("case", style="lower"), make("case", style="upper")
    draft = Candidate(TASK, (low,), "", (high,), "", "follow")
    jobs = quadruples.follow_jobs(draft, 0) | quadruples.follow_jobs(draft, 1)
    assert len(jobs) == 4
    texts = [SMALL.title(), SMALL.upper(), SMALL, SMALL.title()]  # two instructions, then again
    answers = dict(zip(jobs, texts, strict=True))
    found = quadruples.followed(draft, answers, 2)
    assert (found.y1, found.y2) == (SMALL, SMALL.upper())
    row = quadruples.to_row(found, "train")
    assert [row["x1"], row["x2"]] == list(jobs.values())[:2]
    del answers[list(jobs)[2]]  # was cut off
    assert quadruples.followed(draft, answers, 2) == "not followed"
    del answers[list(jobs)[0]]
    assert quadruples.followed(draft, answers, 2) == "cut off"


@pytest.mark.parametrize("arguments", [[], ["+recipe=relabel", "recipe.name=cook"]])
def test_the_command_without_a_known_recipe_lists_them(arguments):
    command = [sys.executable, "-m", "iopo.construct", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert "expected one of ['audit', 'ifseeds', 'relabel', 'trace', 'verified']" in done.stderr
    assert "+recipe=relabel recipe.source=FILE.jsonl" in done.stderr


# --- verify ---


def plant(rows):
    """Put 40 faults of 10 kinds into the rows; returns {(line, fault)}."""
    expected = set()

    def touch(line, fault):
        expected.add((line + 1, fault))
        return rows[line]

    for n in range(4):
        row = touch(n, "x1y1")  # y1 breaks one of its own constraints as well
        row["c1"] = [
            *row["c1"],
            {"kind": "include_words", "params": {"words": ["zebu"]}, "text": ""},
        ]
        row["match"] = [0, 0, 1, 0]
        row = touch(10 + n, "x2y1")  # x2 asks for something that y1 also does
        row["c2"] = [{"kind": "words", "params": {"relation": "at least", "number": 1}, "text": ""}]
        row["match"] = [1, 0, 1, 1]
        row = touch(20 + n, "match")
        row["match"] = [1, 1, 1, 0]
        touch(30 + n, "id")["id"] = rows[100 + n]["id"]
        row = touch(40 + n, "empty")
        row["y2"] = " \n"
        row = touch(50 + n, "truncated")
        row["y1"] = row["y1"].rstrip('.!?")]}*') + " and then the"
        row = touch(60 + n, "y1=y2")
        row["y1"] = row["y2"]
        row = touch(70 + n, "x1=x2")
        row["x2"], row["c2"] = row["x1"], row["c1"]
        row = touch(80 + n, "wording")
        row["c1"] = [
            {**row["c1"][0], "text": "Something the instruction does not say."},
            *row["c1"][1:],
        ]
        row = touch(90 + n, "keys")
        del row["x2"]
    return expected


def test_verify_finds_every_planted_fault_and_no_other(tmp_path, train):
    planted = json.loads(json.dumps(train[:200]))
    expected = plant(planted)
    path = tmp_path / "planted.jsonl"
    write_records(path, planted)
    found, summary = verify.verify([path])
    # an id is found at its second use, which is the untouched row further down
    expected = {(line + 70, f) if f == "id" else (line, f) for line, f in expected}
    assert len(expected) == 40
    assert sorted((v.place.line, v.fault) for v in found) == sorted(expected)
    assert summary.rows == 196


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"c1": 3}, "constraint"),
        ({"c2": [None]}, "constraint"),
        ({"c1": [{"kind": [], "params": {}}]}, "constraint"),
        ({"match": 3}, "match"),
        ({"match": [1, 0, 1]}, "match"),
        ({"y1": None}, "keys"),
        ({"y1": "\ud800 это ответ."}, "json"),
    ],
)
def test_verify_survives_strange_rows(tmp_path, train, change, fault):
    path = tmp_path / "strange.jsonl"
    path.write_text(json.dumps({**train[0], **change}) + "\n" + "[" * 100_000 + "\n[1]\n")
    found, _ = verify.verify([path])
    places = [(v.place.line, v.fault) for v in found]
    assert (1, fault) in places
    assert [place for place in places if place[0] > 1] == [(2, "json"), (3, "keys")]
    row = json.loads(json.dumps(train[0]))
    row["c1"][0]["text"] = 7
    path.write_text(json.dumps(row) + "\n")
    assert [v.fault for v in verify.verify([path])[0]] == ["wording"]


def test_verify_compares_with_benchmarks_and_other_files(tmp_path, train, capsys):
    bench = tmp_path / "bench.jsonl"
    prompt = " ".join(train[3]["y1"].split()[:20])
    bench.write_text(
        json.dumps({"prompt": "a b c"}) + "\n" + json.dumps({"turns": [prompt]}) + "\n"
    )
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    write_records(one, train[:5])
    write_records(two, [{**train[9], "task": train[0]["task"], "y1": train[0]["y1"]}])
    found, _ = verify.verify([one], [bench])
    assert {(v.place.line, v.fault) for v in found} >= {(4, "overlap")}
    assert all(v.fault == "overlap" and "bench.jsonl:2" in v.detail for v in found)
    as_list = tmp_path / "bench.json"  # a list with a byte order mark
    as_list.write_text(json.dumps([{"a": prompt}], indent=1), encoding="utf-8-sig")
    found, _ = verify.verify([one], [as_list])
    assert {(v.place.line, v.fault) for v in found} >= {(4, "overlap")}
    found, _ = verify.verify([one, two])
    assert {v.fault for v in found} >= {"task", "response"}
    assert verify.main([str(one)]) == 0
    assert verify.main([str(one), str(two)]) == 1
    assert "two.jsonl:1: [task]" in capsys.readouterr().out
    bench.write_text('{"a": 1}\n{oops\n')
    assert verify.main([str(one), "--against", str(bench)]) == 2
    assert "bench.jsonl:2: the row is not JSON" in capsys.readouterr().err


def test_verify_warns_when_lengths_tell(tmp_path, train):
    def ordered(row):
        long_x, short_x = sorted((row["x1"], row["x2"]), key=len, reverse=True)
        long_y, short_y = sorted((row["y1"], row["y2"]), key=len, reverse=True)
        return {"x1": long_x, "y1": long_y, "x2": short_x, "y2": short_y}

    path = tmp_path / "leaks.jsonl"
    write_records(path, [ordered(row) for row in train[:60]])
    _, summary = verify.verify([path])
    assert deviations(summary.together) > 3 and "warning" in verify.report(summary)


def test_ends_a_sentence():
    assert all(map(ends_a_sentence, ("Yes.", 'He said "no."', "(All of it.)", "**Done!**", "{a}")))
    assert not any(map(ends_a_sentence, ("And then the", "and, so", "")))
