"""IFEval's scorer against the golden verdicts, and against texts whose verdict is plain to see."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iopo.constraints import IFEVAL_IDS, from_ifeval, loose_variants
from iopo.constraints import text as cut
from iopo.evaluation.benchmarks import ifeval
from iopo.evaluation.scoring import summarise

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("IOPO_SHARED_DATA", ROOT.parent / "shared" / "data")) / "ifeval"
VARIANTS = {"identity": str, "lower": str.lower, "upper": str.upper}
# (strict prompts, strict instructions, loose prompts, loose instructions)
TOTALS = {
    "identity": (417, 698, 431, 714),
    "lower": (375, 649, 385, 663),
    "upper": (372, 646, 385, 662),
}


def rows(name):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not there; set IOPO_SHARED_DATA to the folder that holds ifeval/")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_verdicts(variant):
    golden = {
        row["key"]: row for row in rows("official_verdicts.jsonl") if row["variant"] == variant
    }
    items = ifeval.load(DATA / "input_data.jsonl")
    answers = rows("gpt4_responses.jsonl")
    changed = {str(row["key"]): VARIANTS[variant](row["response"]) for row in answers}
    assert len(golden) == 541 and set(changed) == {item.id for item in items}
    verdicts = [ifeval.by_code(item, changed[item.id]) for item in items]
    wrong = [
        (row["key"], mode)
        for row in verdicts
        for mode in ("strict", "loose")
        if "".join("01"[held] for held in row[mode]) != golden[row["key"]][mode]
    ]
    assert wrong == []
    table = ifeval.BENCHMARK.measures(items, verdicts)
    found = summarise(table, resamples=50, seed=0)
    prompts, instructions = 541, 834
    counts = [found["prompt_strict"], found["instruction_strict"]]
    counts += [found["prompt_loose"], found["instruction_loose"]]
    scaled = [
        round(estimate["value"] * n)
        for estimate, n in zip(counts, (prompts, instructions) * 2, strict=True)
    ]
    assert tuple(scaled) == TOTALS[variant]


def item(key, *instructions):
    ids, kwargs = zip(*instructions, strict=True)
    row = {"key": key, "prompt": "Do it.", "instruction_id_list": list(ids), "kwargs": list(kwargs)}
    return ifeval.Item(str(key), (), row)


@pytest.mark.parametrize(
    "name, kwargs, good, bad",
    [
        ("keywords:existence", {"keywords": ["Sun", "moon"]}, "sunny MOON", "sun"),
        (
            "keywords:frequency",
            {"keyword": "a", "frequency": 2, "relation": "less than"},
            "cat",
            "cat at",
        ),
        ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "the CAT."),
        (
            "keywords:letter_frequency",
            {"letter": "#", "let_frequency": 2, "let_relation": "at least"},
            "#a #b",
            "#a b",
        ),
        (
            "length_constraints:number_sentences",
            {"num_sentences": 3, "relation": "less than"},
            "Dr. No came. He left.",
            "One. Two. Three.",
        ),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
        (
            "length_constraints:number_words",
            {"num_words": 3, "relation": "at least"},
            "a b c",
            "a b",
        ),
        (
            "length_constraints:nth_paragraph_first_word",
            {"first_word": "Hi", "num_paragraphs": 2, "nth_paragraph": 2},
            "one\n\n'Hi, you",
            "Hi\n\none",
        ),
        ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a b"),
        ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "x\nP. P.S. y", "P.S. x"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n** b"),
        ("detectable_format:constrained_response", {}, "Well. My answer is no.", "my answer is no"),
        (
            "detectable_format:number_highlighted_sections",
            {"num_highlights": 2},
            "*a* and *b*",
            "*a* and * *",
        ),
        (
            "detectable_format:multiple_sections",
            {"section_spliter": "Day", "num_sections": 2},
            "Day 1 x Day 2 y",
            "Day 1 x day 2",
        ),
        ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
        ("detectable_format:title", {}, "<<Joy>>\nx", "<< >>\n<x>"),
        ("combination:two_responses", {}, "a\n******\nb", "a******a"),
        (
            "combination:repeat_prompt",
            {"prompt_to_repeat": "Say Hi."},
            " say hi. Hi!",
            "Hi! Say Hi.",
        ),
        ("startend:end_checker", {"end_phrase": "The End."}, '"x the end."', "The end. x"),
        ("startend:quotation", {}, ' "x" ', '"'),
        ("change_case:english_capital", {}, "THIS IS A PLAIN ENGLISH SENTENCE.", "Not this one."),
        ("change_case:english_lowercase", {}, "this is a plain english sentence.", "Not this one."),
        (
            "change_case:capital_word_frequency",
            {"capital_frequency": 2, "capital_relation": "at least"},
            "I said NO",
            "i said NO",
        ),
        ("punctuation:no_comma", {}, "a b", "a, b"),
        (
            "language:response_language",
            {"language": "de"},
            "Das ist ein ganz gewöhnlicher deutscher Satz.",
            "This is an ordinary sentence.",
        ),
    ],
)
def test_each_kind_by_hand(name, kwargs, good, bad):
    one = item(1, (name, kwargs))
    assert ifeval.by_code(one, good)["strict"] == [True]
    assert ifeval.by_code(one, bad)["strict"] == [False]


def test_all_25_kinds_are_known_and_no_other():
    assert len(IFEVAL_IDS) == 25
    with pytest.raises(ValueError, match="keywords:key_sentences.*known ids"):
        from_ifeval("keywords:key_sentences", {})


def test_an_id_twice_has_two_verdicts():
    low = ("length_constraints:number_words", {"num_words": 2, "relation": "at least"})
    high = ("length_constraints:number_words", {"num_words": 4, "relation": "at least"})
    assert ifeval.by_code(item(19, low, high), "a b c")["strict"] == [True, False]


def test_none_arguments_are_ignored_and_missing_ones_raise():
    assert from_ifeval("punctuation:no_comma", {"num_words": None}).check("x")
    with pytest.raises(ValueError, match="'num_words' is missing"):
        from_ifeval("length_constraints:number_words", {"relation": "at least", "num_words": None})
    with pytest.raises(ValueError, match="relation 'about'"):
        from_ifeval("length_constraints:number_words", {"relation": "about", "num_words": 3})


def test_empty_responses_fail_and_count():
    items = [item(1, ("punctuation:no_comma", {})), item(2, ("punctuation:no_comma", {}))]
    verdicts = [ifeval.by_code(one, text) for one, text in zip(items, (" \n ", ""), strict=True)]
    assert [row["strict"] for row in verdicts] == [[False], [False]]
    assert len(ifeval.BENCHMARK.measures(items, verdicts)["prompt_loose"]) == 2


def test_loose_variants():
    text = "Sure:\n*a*\nBye"
    assert loose_variants(text) == [
        "Sure:\n*a*\nBye", "Sure:\na\nBye", "*a*\nBye", "a\nBye",
        "Sure:\n*a*", "Sure:\na", "*a*", "a",
    ]  # fmt: skip
    assert loose_variants("*") == ["*"]
    bullets = item(1, ("detectable_format:json_format", {}))
    assert ifeval.by_code(bullets, "Here you are:\n{}\nBye")["loose"] == [True]


def test_load_names_the_bad_item(tmp_path):
    good = item(1, ("punctuation:no_comma", {})).row
    path = tmp_path / "input_data.jsonl"
    for bad in (
        {**good, "instruction_id_list": ["new:kind"]},
        {**good, "kwargs": []},
        {**good, "instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["("]}]},
    ):
        path.write_text(json.dumps(good) + "\n" + json.dumps({**bad, "key": 7}))
        with pytest.raises(ValueError, match="item 7"):
            ifeval.load(path)
    path.write_text(json.dumps(good) + "\n" + json.dumps(good))
    with pytest.raises(ValueError, match="more than once"):
        ifeval.load(path)


@settings(deadline=None)
@given(st.text(alphabet="*- \n\tab", max_size=40))
def test_bullets_equal_the_published_patterns(text):
    stars = re.findall(r"^\s*\*[^\*].*$", text, flags=re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, flags=re.MULTILINE)
    assert cut.bullets(text) == len(stars) + len(dashes)


@settings(deadline=None)
@given(st.text(alphabet="<>[]a \n", max_size=30))
def test_spans_equal_the_published_patterns(text):
    titles = [t.lstrip("<").rstrip(">").strip() for t in re.findall(r"<<[^\n]+>>", text)]
    title = from_ifeval("detectable_format:title", {})
    assert title.check(text) == any(titles)
    placeholders = from_ifeval("detectable_content:number_placeholders", {"num_placeholders": 1})
    assert placeholders.count(text) == len(re.findall(r"\[.*?\]", text))


@settings(deadline=None)
@given(st.text(alphabet="* ab\n", max_size=40))
def test_divided_paragraphs_equal_a_direct_reading(text):
    parts = re.split(r"\s?\*\*\*\s?", text)
    count, valid = len(parts), True
    for i, part in enumerate(parts):
        if not part.strip():
            count -= 1
            valid = valid and i in (0, len(parts) - 1)
    for n in range(4):
        rule = from_ifeval("length_constraints:number_paragraphs", {"num_paragraphs": n})
        assert rule.check(text) == (valid and count == n)


@pytest.mark.parametrize(
    "unit", ["\n", "*", "<", "[", "-\n", "* \n", ".", ". ", "\\", "{", "a\n\n"]
)
def test_a_hostile_megabyte_is_scored(unit):
    text = unit * (1_000_000 // len(unit))
    cheap = [
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}),
        ("detectable_format:title", {}),
        ("detectable_format:json_format", {}),
        ("detectable_content:number_placeholders", {"num_placeholders": 3}),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 3}),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 3}),
    ]
    assert len(ifeval.by_code(item(1, *cheap), text)["strict"]) == len(cheap)


def test_importing_the_scorer_needs_no_optional_package():
    program = (
        "import sys, iopo.evaluation.benchmarks.ifeval, iopo.constraints\n"
        "print(sorted({'torch', 'nltk', 'langdetect', 'punkt', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(ImportError, match=r"iopo\[eval\]"):
        cut.detect_language.__wrapped__("some text")


def test_a_missing_package_is_said_before_any_answer(monkeypatch, tmp_path):
    monkeypatch.setitem(cut.PACKAGES, "no_such_module", "its-package")
    with pytest.raises(ValueError, match="ifeval needs its-package; pip install"):
        ifeval.load(tmp_path / "input_data.jsonl")
