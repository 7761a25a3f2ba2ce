"""Cousins keep or change what is checked as their change says; bad input is refused by name."""

import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from iopo.constraints import follows, from_name, make
from iopo.construct.cousins import Asked, fit_together
from iopo.construct.cousins.__main__ import build, main
from iopo.construct.cousins.prose import Prose, sentence_spans
from iopo.construct.cousins.prose_rules import NUMBER_WORDS, REWORDINGS
from iopo.evaluation.benchmarks import ifeval
from iopo.files import read_records, write_records

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("IOPO_SHARED_DATA", ROOT.parent / "shared" / "data"))
QUADS = ROOT / "data" / "verified" / "heldout.jsonl"
NO_COMMA = ("punctuation:no_comma", {})


def groups(path):
    """(the prompt's row, its cousins) for each prompt of a file of cousins."""
    of = {}
    for row in read_records(path):
        of.setdefault(row["cousin_of"], []).append(row)
    return [(group[0], group[1:]) for group in of.values()]


def checked(row):
    return list(zip(row["instruction_id_list"], row["kwargs"], strict=True))


RELATIONS = {
    ">=": "at least|no fewer than|a minimum of", "<": "(?<!no )(?:less|fewer) than|under",
    "<=": "at most|no more than", ">": "(?<!no )more than|over", "=": "exactly|precisely",
}  # fmt: skip


def amounts(text):
    """All numbers of a text, in digits or words, each with its relation."""
    text = text.lower().replace("once", "one").replace("twice", "two")
    number = rf"(\d+|\b(?:{'|'.join(NUMBER_WORDS[1:])})\b)( times?)?( or more)?"
    found = []
    for match in re.finditer(number, text):
        before = text[: match.start()]
        relation = next((r for r, p in RELATIONS.items() if re.search(rf"\b(?:{p}) $", before)), "")
        if match[3]:
            assert not relation
            relation = ">="
        found.append((relation, NUMBER_WORDS.index(match[1]) if match[1].isalpha() else match[1]))
    return Counter(map(str, found))


def spelled(value):
    """A parameter's value as prompts may say it."""
    if isinstance(value, int):
        near = [value - 1, value, value + 1]
        words = {1: "once", 2: "twice"}
        return [str(n) for n in near] + [
            word for n in near for word in (*NUMBER_WORDS[n : n + 1], words.get(n, "")) if word
        ]
    return [value]


@pytest.fixture(scope="module")
def prose_file(tmp_path_factory):
    data = SHARED / "ifeval" / "input_data.jsonl"
    if not data.is_file():
        pytest.skip(f"{data} is not there; set IOPO_SHARED_DATA to the folder that holds ifeval/")
    out = tmp_path_factory.mktemp("cousins") / "ifeval.jsonl"
    table = build(data, out, 4, 0)
    assert "left out\n  not 41: its answer must repeat the prompt word for word" in table
    return out


@pytest.fixture(scope="module")
def quad_file(tmp_path_factory):
    out = tmp_path_factory.mktemp("cousins") / "quads.jsonl"
    build(QUADS, out, 4, 0)
    return out


def test_every_prompt_of_ifeval_has_its_cousins_and_they_keep_their_promise(prose_file):
    found = groups(prose_file)
    assert len(ifeval.load(prose_file)) == 2500, "the benchmark reads the file"
    assert len(found) == 500 and all(len(cousins) == 4 for _, cousins in found)
    having = Counter(c for _, cousins in found for c in {row["change"] for row in cousins})
    assert having["distractor"] == 500 and having["reworded"] > 430
    assert having["reordered"] > 210 and having["parameter"] > 270
    for prompt, cousins in found:
        old = prompt["prompt"]
        assert prompt["change"] == "none"
        assert len({old, *(row["prompt"] for row in cousins)}) == 5
        for row in cousins:
            new, change = row["prompt"], row["change"]
            if change == "parameter":
                one_parameter(prompt, row)
                continue
            assert checked(row) == checked(prompt)
            if change == "reworded":  # the same numbers and the constraints' own words
                assert amounts(new) == amounts(old), new
                for name, given in checked(row):
                    for key in {"keywords", "forbidden_words", "keyword", "end_phrase"} & {*given}:
                        words = [given[key]] if isinstance(given[key], str) else given[key]
                        for word in words:
                            whole = rf"(?<!\w){re.escape(word)}(?!\w)"
                            said = [len(re.findall(whole, t, re.I)) for t in (old, new)]
                            assert said[1] >= said[0], (name, word, new)
            elif change == "reordered":
                words = (sorted(re.findall(r"\w+", text.lower())) for text in (old, new))
                assert next(words) == [w for w in next(words)] or re.search(r"\balso\b", old, re.I)
            else:
                assert new.startswith(old.rstrip() + "\n\n"), "one more line, and nothing else"


def one_parameter(prompt, row):
    """One value differs, in the kwargs and in the prompt, and the new one is said there."""
    pairs = [(a, b) for a, b in zip(checked(prompt), checked(row), strict=True) if a != b]
    ((name, old), (other, new)) = pairs[0]
    assert len(pairs) == 1 and name == other and from_name(name, new) != from_name(name, old)
    keys = [key for key in old if old[key] != new[key]]
    assert len(keys) == 1
    before, after = old[keys[0]], new[keys[0]]
    if isinstance(before, list):
        ((before, after),) = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert any(word.lower() in row["prompt"].lower() for word in spelled(after)), row["prompt"]
    same = os.path.commonprefix([prompt["prompt"], row["prompt"]])
    tail = os.path.commonprefix([prompt["prompt"][::-1], row["prompt"][::-1]])
    changed = len(prompt["prompt"]) - len(same) - len(tail)
    assert changed <= max(map(len, spelled(before))), "nothing else is touched"


def test_cousins_of_quads_are_followed_by_a_known_response(quad_file):
    """Where the checker is the same, the quad's own response follows it."""
    quads = {row["id"]: row for row in read_records(QUADS)}
    found = groups(quad_file)
    assert len(found) == 400 and len(ifeval.load(quad_file)) == 2000
    changes = Counter(row["change"] for _, cousins in found for row in cousins)
    assert all(changes[change] >= 390 for change in ifeval.CHANGES) and changes.total() == 1600
    for prompt, cousins in found:
        name, side = prompt["cousin_of"].rsplit("-x", 1)
        quad = quads[name]
        assert prompt["prompt"] == quad[f"x{side}"]
        texts = {c["text"] for c in quad[f"c{side}"]}
        for row in cousins:
            rules = [from_name(*pair) for pair in checked(row)]
            listed = set(re.findall(r"^\d+\. (.+)$", row["prompt"], re.M))
            kept = len(texts & listed)
            if row["change"] == "parameter":
                assert sum(a != b for a, b in zip(checked(prompt), checked(row), strict=True)) == 1
                assert kept >= len(texts) - 1
                continue
            assert checked(row) == checked(prompt)
            assert all(follows(rules, quad[f"y{side}"]))
            if row["change"] == "reworded":
                assert not kept
                for rule in rules:
                    said = {t.format(**rule.blanks("en")) for t in rule.paraphrases("en")}
                    assert said & listed
            else:
                assert kept == len(texts)
                assert len(listed) == kept + (row["change"] == "distractor")


def test_the_same_seed_gives_the_same_file_and_another_seed_another(tmp_path):
    write_records(tmp_path / "in.jsonl", read_records(QUADS)[:5])
    outs = [tmp_path / f"{n}.jsonl" for n in range(3)]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        build(tmp_path / "in.jsonl", out, 6, seed)
    texts = [out.read_text(encoding="utf-8") for out in outs]
    assert texts[0] == texts[1] != texts[2]
    assert all(len(cousins) == 6 for _, cousins in groups(outs[0])), "more than the four changes"


def prose(prompt, *checks):
    ids, kwargs = zip(*checks, strict=True)
    return Prose(Asked(prompt, ids, kwargs))


@pytest.mark.parametrize(
    ("prompt", "checks", "change", "expected"),
    [
        (
            'Write a song. Do not use any commas. The word "at least 3" is fine.',
            [NO_COMMA],
            "reworded",
            r"Write a song\. (Avoid commas|Leave out all commas|Use no commas)\. The word.*fine\.",
        ),
        (
            "Write a 300+ word plan.",
            [("length_constraints:number_words", {"relation": "at least", "num_words": 300})],
            "parameter",
            r"Write a (100|200|400|500)\+ word plan\.",
        ),
        (  # 31 at least is "more than 30" in the prompt: both move by the same
            "Tell it. Use more than 30 sentences.",
            [
                (
                    "length_constraints:number_sentences",
                    {"relation": "at least", "num_sentences": 31},
                )
            ],
            "parameter",
            r"Tell it\. Use more than (20|40|10|50) sentences\.",
        ),
        (  # the same number twice: which is the constraint's is not known
            "Name 5 towns. Use at least 5 sentences.",
            [("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 5})],
            "parameter",
            "no number or word of a constraint found once",
        ),
        (  # a range
            "Tell it. Use 5 to 9 sentences.",
            [("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 5})],
            "parameter",
            "no number or word of a constraint found once",
        ),
        (
            "Write a haiku. Do not use any commas.",
            [NO_COMMA],
            "reordered",
            r"Do not use any commas\. Write a haiku\.",
        ),
        (
            "Write a haiku and do not use any commas.",
            [NO_COMMA],
            "reordered",
            "no sentence that is a constraint and nothing else",
        ),
        (
            "Write a poem. The poem should have no commas.",
            [NO_COMMA],
            "reworded",
            "no rule for its words",
        ),
        (
            "Write it in lines.",
            [NO_COMMA],
            "reworded",
            "no sentence found that is about a constraint",
        ),
    ],
)
def test_changes_in_prose(prompt, checks, change, expected):
    for seed in range(5):
        found = getattr(prose(prompt, *checks), change)(random.Random(seed))
        text = found if isinstance(found, str) else found.prompt
        assert re.fullmatch(expected, text), text
    if change == "parameter" and isinstance(found, Asked):
        moved = [int(re.search(r"\d+", text)[0]) for text in (prompt, found.prompt)]
        key = next(key for key in found.kwargs[0] if key.startswith("num"))
        assert found.kwargs[0][key] - checks[0][1][key] == moved[1] - moved[0]


def test_sentences_end_outside_quotes_and_abbreviations():
    text = 'End with "Is it? Yes." now. Use <<title>>, i.e. <<a>>. Add a P.S. Then stop\nA line'
    found = [span.of(text) for span in sentence_spans(text)]
    assert found == [
        'End with "Is it? Yes." now.',
        "Use <<title>>, i.e. <<a>>.",
        "Add a P.S. Then stop",
        "A line",
    ]


def test_no_rule_of_rewording_can_be_undone_into_another_number():
    for pattern, others in REWORDINGS:
        groups_in = re.compile(pattern).groups
        for other in others:
            assert all(int(n) <= groups_in for n in re.findall(r"\\(\d)", other)), pattern


@pytest.mark.parametrize(
    ("first", "second", "fits"),
    [
        (make("forbid_words", words=["also"]), make("keywords", words=["also"]), False),
        (make("forbid_words", words=["also"]), make("end_phrase", phrase="So also I."), False),
        (make("forbid_words", words=["also"]), make("words", relation="at most", number=9), True),
        (make("exclamations", relation="exactly", number=0),
         make("end_phrase", phrase="Hi!"), False),
        (make("include_words", words=["garden"]),
         make("letter_frequency", relation="exactly", number=0, letter="g"), False),
        (make("include_words", words=["garden"]),
         make("letter_frequency", relation="at least", number=9, letter="g"), True),
        (make("highlights", relation="at least", number=1), make("layout", style="json"), False),
    ],
)  # fmt: skip
def test_what_fits_together(first, second, fits):
    assert fit_together(first, second) is fits and fit_together(second, first) is fits


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{\n", "in.jsonl:1: the row is not JSON"),
        ('{"prompt": "a"}\n{"key": 1}\n', "in.jsonl:2: found keys ['key']; expected key, prompt"),
        (
            '{"key": 1, "prompt": "a", "instruction_id_list": ["x:y"], "kwargs": []}\n',
            "as many kwargs",
        ),
        (
            '{"key": 1, "prompt": "a", "instruction_id_list": ["x:y"], "kwargs": [{}]}\n',
            "not 1: unknown IFEval instruction id 'x:y'",
        ),
        ('{"cousin_of": 1}\n', "in.jsonl:1: is a cousin already"),
        ('{"c1": [], "c2": [], "x1": "a"}\n', "expected a quad with id, x1"),
        (
            '{"key": 1, "prompt": "a", "instruction_id_list": ["x:y"], "kwargs": [{}]}\n' * 2,
            "in.jsonl:2: the key 1 is there more than once",
        ),
        ("", "no prompt with a cousin in it"),
    ],
)
def test_bad_input_is_refused_by_name(content, message, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(content, encoding="utf-8")
    assert main([str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_that_is_not_there_and_a_k_of_none(tmp_path, capsys):
    assert main([str(tmp_path / "no.jsonl"), "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "no.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(QUADS), "--out", str(tmp_path / "out.jsonl"), "--k", "0"])
    assert "--k is 0; expected 1 or more" in capsys.readouterr().err


def test_what_is_left_out_is_counted(tmp_path, capsys):
    rows = read_records(QUADS)[:2]
    rows[1]["x2"] = "Its list is not here."
    rows[1]["c1"][0] = {"kind": "judged", "params": {}, "text": rows[1]["c1"][0]["text"]}
    write_records(tmp_path / "in.jsonl", rows)
    assert main([str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "2 prompts, 8 cousins: 2 have 4" in said
    assert "not 1: its constraints do not stand as a numbered list" in said
    assert "not 1: unknown constraint kind 'judged'" in said
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["change"] == "none"
