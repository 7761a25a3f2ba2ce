"""Quadruples, the committed demo set, and verify on a file with planted faults."""

import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from iopo.constraints import from_dict, make
from iopo.construct import __main__ as construct_main
from iopo.construct import demo, proposals, quadruples, verify
from iopo.construct.__main__ import build
from iopo.construct.prose import ends_a_sentence, whole_sentences
from iopo.construct.quadruples import Candidate, Choice, Rejection, four_cells
from iopo.construct.responses import Job, read_cache, sample_all
from iopo.construct.tasks import Task, instruction, read_tasks

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data" / "demo"


def rows(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").open(encoding="utf-8")]


@pytest.fixture(scope="module")
def train():
    return rows("train")


@pytest.fixture(scope="module")
def heldout():
    return rows("heldout")


# --- the committed set ---


def test_demo_set_passes_verify():
    found, summary = verify.verify([DATA / "train.jsonl", DATA / "heldout.jsonl"])
    assert [str(violation) for violation in found] == []
    assert abs(summary.length_leak()) < 1


def test_demo_set_is_as_promised(train, heldout):
    assert len(train) >= 600 and len(heldout) >= 200
    kinds = Counter(c["kind"] for row in train for c in row["c1"] + row["c2"])
    assert len(kinds) >= 10
    assert max(kinds.values()) <= 0.15 * sum(kinds.values())
    assert all(1 <= len(side) <= 3 for row in train for side in (row["c1"], row["c2"]))
    splits = Counter(row["split"] for row in heldout)
    assert set(splits) == {"seen", "unseen_params", "unseen_kinds"}
    assert splits["unseen_kinds"] >= 60


def test_splits_hold_what_they_say(train, heldout):
    def constraints(rows, split):
        chosen = [row for row in rows if row["split"] == split]
        return [from_dict(c) for row in chosen for c in row["c1"] + row["c2"]]

    trained = constraints(train, "train")
    kinds = {c.kind for c in trained}
    assert not any(proposals.held_out(c) for c in trained)
    assert {c.kind for c in constraints(heldout, "seen")} <= kinds
    assert not any(proposals.held_out(c) for c in constraints(heldout, "seen"))
    assert all(proposals.held_out(c) for c in constraints(heldout, "unseen_params"))
    assert not set(trained) & set(constraints(heldout, "unseen_params"))
    assert not kinds & {c.kind for c in constraints(heldout, "unseen_kinds")}
    tasks = {row["task"] for row in train}
    assert not tasks & {row["task"] for row in heldout}


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


def test_committed_files_are_what_the_command_makes(train, heldout):
    cfg = OmegaConf.load(ROOT / "conf" / "construct.yaml")
    cfg.responses = str(DATA / "responses.jsonl")
    made = build(cfg)
    assert made[0].rows() == train
    assert made[1].rows() == heldout


# --- tasks and responses ---


def test_bank_of_tasks(tmp_path):
    tasks = read_tasks()
    assert len(tasks) >= 500
    texts = {}
    for task in tasks:  # tasks on one input are on one side
        texts.setdefault(task.input, set()).add(demo.is_heldout(task))
    assert all(len(sides) == 1 for text, sides in texts.items() if text is not None)
    path = tmp_path / "tasks.txt"
    path.write_text("Write.\nRead. # Inputs: A book.\nWrite.\n")
    with pytest.raises(ValueError, match=r"tasks.txt:3: repeats line 1"):
        read_tasks(path)


def test_instruction_is_laid_out_as_trace():
    text = instruction(Task("Summarize.", "A text."), ["Use no commas.", "Be brief."])
    assert text == "Summarize.\n1. Use no commas.\n2. Be brief.\n# Inputs:\nA text."
    assert instruction(Task("Explain."), ["Be brief."]) == "Explain.\n1. Be brief."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One fine day a small dog ran home. It was", ("One fine day a small dog ran home.",)),
        ('"A bright lamp for all of your winter evenings."', None),
        ("I'm sorry, but I cannot help you with this one today.", "refusal"),
        ("Here are **bold** words in a line of some length.", "markup"),
        ("First this happens here.\nThen that happens there, later.", "several lines"),
        ("Été is the French word for the season of summer.", "not ascii"),
        ("A dog. A cat.", "too short"),
        ("The dog ran to the park and the dog ran to the lake.", "repeats itself"),
    ],
)
def test_whole_sentences(text, expected):
    found = whole_sentences(text, 50)
    assert found == (expected or ("A bright lamp for all of your winter evenings.",))


def test_sampling_continues_after_a_kill(tmp_path):
    jobs = [Job(f"job-{n}", f"prompt {n}") for n in range(120)]
    asked = []

    def sampler(prompts, seed):
        asked.append(len(prompts))
        return [(f"{prompt} {seed}", "stop") for prompt in prompts]

    whole = sample_all(jobs, tmp_path / "whole.jsonl", sampler, seed=3)
    lines = (tmp_path / "whole.jsonl").read_text()
    torn = tmp_path / "torn.jsonl"
    torn.write_text(lines[: len(lines) * 2 // 3])  # ends inside a line of the second chunk
    asked.clear()
    assert sample_all(jobs, torn, sampler, seed=3) == whole
    assert asked == [50, 20]
    assert torn.read_text() == lines
    asked.clear()
    sample_all(jobs, torn, sampler, seed=3)
    assert asked == [] and len(read_cache(torn)) == 120
    with pytest.raises(ValueError, match="start a new cache file"):
        sample_all([Job("job-0", "another prompt")], torn, sampler)


# --- quadruples ---

FIRST = "The old mill was empty for years. Students repaired it, and it grinds flour again."
SECOND = "A mill stands by the river. It makes bread possible for the whole village today!"
TASK = Task("Describe an old mill.")


def choice(kinds=proposals.SEEN_KINDS):
    return Choice(kinds, lambda constraint: True, lambda kind: 1.0)


@pytest.mark.parametrize("source", [quadruples.relabel, quadruples.edit])
def test_every_accepted_draft_has_the_four_cells(source):
    accepted = 0
    for seed in range(150):
        draft = source(TASK, FIRST, SECOND, choice(), random.Random(seed))
        if isinstance(draft, Rejection):
            continue
        accepted += 1
        cells = four_cells(draft.c1, draft.y1, draft.c2, draft.y2)
        assert cells == (True, False, True, False)
        assert all(1 <= len(c) <= 3 for c in (draft.c1, draft.c2))
        row = quadruples.to_row(draft, "train")
        assert all(c["text"] in row["x1"] for c in row["c1"])
        assert row["match"] == [1, 0, 1, 0]
    assert accepted > (100 if source is quadruples.relabel else 15)


def test_relabel_leaves_the_responses_alone():
    draft = quadruples.relabel(TASK, FIRST, SECOND, choice(), random.Random(0))
    assert {draft.y1, draft.y2} == {FIRST, SECOND}


def test_relaxing_is_no_quad():
    """y1 stays right for x2 if x2 only asks for less: the draft must not pass."""
    strict = (
        make("commas", relation="exactly", number=0),
        make("words", relation="at most", number=20),
    )
    loose = strict[:1]
    draft = Candidate(TASK, strict, "A short answer.", loose, "A longer answer " * 9 + ".", "edit")
    assert four_cells(draft.c1, draft.y1, draft.c2, draft.y2) == (True, False, True, True)
    assert quadruples._checked(draft, random.Random(0)).reason == "follows both"


def test_follow_keeps_what_fits():
    low, high = make("case", style="lower"), make("case", style="upper")
    draft = Candidate(TASK, (low,), "old.", (high,), "OLD.", "edit")
    kept = quadruples.follow(draft, "a mill.", "A MILL.")
    assert (kept.y1, kept.y2, kept.source) == ("a mill.", "A MILL.", "follow")
    assert quadruples.follow(draft, "A mill.", "A MILL.").reason == "not followed"
    assert quadruples.follow(draft, "a mill", "A MILL.").reason == "unfinished"


def test_follow_end_to_end_with_a_stub(tmp_path, monkeypatch):
    """A sampler that answers with the draft's own responses gives quads of source follow."""
    wanted = {}
    real = demo.follow_candidates

    def candidates(*args):
        drafts = real(*args)
        for draft in drafts:
            prompts = demo._plain_instructions(draft)
            wanted.update(zip(prompts, (draft.y1, draft.y2), strict=True))
        return drafts

    monkeypatch.setattr(construct_main, "follow_candidates", candidates)
    monkeypatch.setattr(construct_main, "TRAIN", replace(demo.TRAIN, quads=10))
    monkeypatch.setattr(construct_main, "HELDOUT", ())
    monkeypatch.setattr(
        construct_main,
        "transformers_sampler",
        lambda path, **kwargs: lambda prompts, seed: [(wanted[p], "stop") for p in prompts],
    )
    cfg = OmegaConf.load(ROOT / "conf" / "construct.yaml")
    cfg.responses = str(tmp_path / "responses.jsonl")
    cfg.follow_candidates, cfg.model_path = 4, "stub"
    shutil.copy(DATA / "responses.jsonl", cfg.responses)
    train, _, tally, _ = build(cfg)
    rows = train.rows()
    followed = [row for row in rows if row["source"] == "follow"]
    assert 2 <= len(followed) <= 4 and len(rows) == 10
    assert all(row["x1"] in wanted and row["match"] == [1, 0, 1, 0] for row in followed)
    assert tally.outcomes["follow", "accepted"] == 4


def test_reserved_parameters():
    def reserved(kind, **params):
        return proposals.held_out(make(kind, **params))

    assert reserved("sentences", relation="exactly", number=4)
    assert not reserved("sentences", relation="exactly", number=3)
    assert not reserved("commas", relation="exactly", number=0)
    assert reserved("wrapped", style="curly braces") and not reserved("case", style="lower")
    words = [
        proposals.held_out(make("last_word", word=w)) for w in "sea sun oak elm ash fir".split()
    ]
    assert words == [
        proposals.held_out(make("first_word", word=w)) for w in "sea sun oak elm ash fir".split()
    ]


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
    demo.write_rows(path, planted)
    found, summary = verify.verify([path])
    # an id is found at its second use, which is the untouched row further down
    expected = {(line + 70, f) if f == "id" else (line, f) for line, f in expected}
    assert len(expected) == 40
    assert sorted((v.line, v.fault) for v in found) == sorted(expected)
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
        ({"y1": "\ud800 это ответ."}, "language"),
    ],
)
def test_verify_survives_strange_rows(tmp_path, train, change, fault):
    path = tmp_path / "strange.jsonl"
    path.write_text(json.dumps({**train[0], **change}) + "\n" + "[" * 100_000 + "\n[1]\n")
    found, _ = verify.verify([path])
    assert (1, fault) in {(v.line, v.fault) for v in found}
    assert [(v.line, v.fault) for v in found if v.line > 1] == [(2, "json"), (3, "keys")]
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
    demo.write_rows(one, train[:5])
    demo.write_rows(two, [{**train[9], "task": train[0]["task"], "y1": train[0]["y1"]}])
    found, _ = verify.verify([one], [bench])
    assert {(v.line, v.fault) for v in found} >= {(4, "overlap")}
    assert all(v.fault == "overlap" and "bench.jsonl:2" in v.detail for v in found)
    found, _ = verify.verify([one, two])
    assert {v.fault for v in found} >= {"task", "response"}
    assert verify.main([str(one)]) == 0
    assert verify.main([str(one), str(two)]) == 1
    assert "two.jsonl:1: [task]" in capsys.readouterr().out


def test_verify_warns_when_lengths_tell(tmp_path, train):
    def ordered(row):
        long_x, short_x = sorted((row["x1"], row["x2"]), key=len, reverse=True)
        long_y, short_y = sorted((row["y1"], row["y2"]), key=len, reverse=True)
        return {"x1": long_x, "y1": long_y, "x2": short_x, "y2": short_y}

    path = tmp_path / "leaks.jsonl"
    demo.write_rows(path, [ordered(row) for row in train[:60]])
    _, summary = verify.verify([path])
    assert summary.length_leak() > 3 and "warning" in verify.report(summary)


def test_ends_a_sentence():
    assert all(map(ends_a_sentence, ("Yes.", 'He said "no."', "(All of it.)", "**Done!**", "{a}")))
    assert not any(map(ends_a_sentence, ("And then the", "and, so", "")))
