"""What is measured quickly equals what plain patterns measure, on many generated texts."""

import re
from unittest import mock

from hypothesis import example, given, settings
from hypothesis import strategies as st

from iopo.constraints import KINDS, keywords, make
from iopo.constraints import text as cut
from iopo.constraints.answers import ECHO_WORDS, MOST_ECHOED, MOST_FORM_WORDS, hollow, size
from iopo.construct.contrast import KINDS as DRAWN
from iopo.construct.contrast import measured, unmentioned

BITS = (
    "water Water WATER river's rock'n'roll 'tis dogs' a''b'''c _x_ x_y 7up U2 I B J. Dr. No. e.g. "
    "p.m. the The of and one's answer comma sentences, . ! ? ?! ... .) !” … 。 ！” ？ ？」 ， , : "
    "so： - * ** # ## 1. 2) 3、 • [a] [[b]] <<c>> == *d* **e** **e**: ( ) “ ” ’ it’s 苹果 好 の は "
    "É ß İ ſ K ǅ 9 10th so: <think> </think> word Words LIST NO what"
).split()
SPACES = ["", " ", " ", " ", "  ", "\t", "\n", "\n\n", "\n \n", "\r\n", "\x1c"]
pieces = st.tuples(st.sampled_from(BITS), st.sampled_from(SPACES))
texts = st.lists(pieces, min_size=5, max_size=40).map(lambda all: "".join(map("".join, all)))
ascii_texts = texts.map(lambda text: text.encode("ascii", "ignore").decode())
either = texts | ascii_texts | st.text(max_size=30)
many = settings(max_examples=200, deadline=None)

UNSPACED = f"{cut.CJK}\u3040-\u30ff"
SENTENCE_END = r"(?<![.!?…])[.!?…]++[\"'”’)\]*]*+(?=\s|$)|[。！？]+[”’」』）]*"
SHORT = r"\b(Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|p|pp|approx|e\.g|i\.e|a\.m|p\.m|U\.S|[A-HJ-Z])\.$"


def words(text):
    return tuple(word.lower() for word in re.findall(r"\w+", text))


def lower_words(text):
    letter = rf"[^\W\d_{cut.CJK}]"
    apostrophe = "'" if text.lower().isascii() else "['’]"
    return tuple(re.findall(rf"{letter}+(?:{apostrophe}{letter}+)*", text.lower()))


def tokens(text):
    return tuple(re.findall(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+", text.lower()))


def sentences(text):
    found = []
    for line in re.sub(r"(?m)^[ \t]*(?:[-*•+]|\d+[.)、]|#+)[ \t]+", "", text).split("\n"):
        start, whole = 0, len(line.rstrip())
        for end in (match.end() for match in re.finditer(SENTENCE_END, line)):
            near = line[max(start, end - 7) - 1 if max(start, end - 7) else 0 : end]
            number = re.search(r"\bNo\.$", near) and re.match(r"\s*\d", line[end:])
            if end < whole and (number or re.search(SHORT, near)):
                continue
            found.append(line[start:end].strip())
            start = end
        found.append(line[start:].strip())
    return tuple(sentence for sentence in found if re.search(r"\w", sentence))


def uses(text, word):
    return len(cut.word_spans(text, word))


TWINS = {
    "words": words,
    "lower_words": lower_words,
    "tokens": tokens,
    "token_set": lambda text: frozenset(tokens(text)),
    "word_set": lambda text: frozenset(re.findall(r"\w+", text.lower())),
    "sentences": sentences,
    "uses": uses,
}
COUNTS = {
    "words": r"\w+",
    "numbered_items": r"(?m)^[ \t]*\d+[.)] ",
    "placeholders": r"\[.*?\]",
    "capital_words": r"\b[A-Z]{2,}\b",
    "commas": "[,，]",
    "questions": "[?？]",
    "exclamations": "[!！]",
}


@many
@given(either)
def test_cuts_equal_plain_patterns(text):
    for name in ("words", "lower_words", "tokens", "token_set", "word_set", "sentences"):
        assert getattr(cut, name)(text) == TWINS[name](text), name
    for word in {*words(text), *lower_words(text), "water", "x", "s"}:
        assert cut.uses(text, word) == uses(text, word), word


@many
@given(either)
@example("Say NO.")
def test_counts_equal_plain_patterns(text):
    for kind, pattern in COUNTS.items():
        number = len(re.findall(pattern, text))
        assert make(kind, relation="exactly", number=number).check(text), kind


@many
@given(either, either)
def test_every_kind_measures_the_same_with_plain_cuts(text, other):
    def all_measured():
        keywords._content_words.cache_clear()
        kinds = [c for c in KINDS.values() if c.__module__ != "iopo.constraints.ifeval"]
        drawn = dict.fromkeys(kind for kinds in DRAWN.values() for kind in kinds)
        return [c.measure(text) for c in kinds], [measured(k, text, other) for k in drawn]

    fast = all_measured()
    with mock.patch.multiple(cut, **TWINS):
        assert all_measured() == fast
    keywords._content_words.cache_clear()


def slowly_hollow(text, prompt):
    """`hollow` without rules, each reason by its definition."""
    text = cut.after_thinking(text)
    if not text.strip():
        return ("empty",)
    heading = (
        r"(?m)^[ \t]*(?:#{1,6}[^.!?。！？\n]*|\*\*[^*.!?。！？\n]*\*\*:?|<<.*>>|\[\[.*\]\]|==.*=="
        r"|.*[:：])[ \t]*$"
    )
    found = tokens(text)
    unspaced = [token for token in found if re.fullmatch(f"[{UNSPACED}]", token)]
    n = 6 if 2 * len(unspaced) > len(found) else 4
    grams = [found[i : i + n] for i in range(len(found) - n + 1)]
    lines = {line for line in sentences(text) if size(line) >= ECHO_WORDS}
    given = f" {' '.join(tokens(prompt))} "
    echoed = sum(size(line) for line in lines if f" {' '.join(tokens(line))} " in given)
    form = (
        r"(answer|response|reply|sentence|word|phrase|comma|paragraph|line|bullet|point|letter|"
        r"title|lowercase|uppercase|capital|exact|exactly|instruction|prompt|constraint)s?"
    )
    about = sum(re.fullmatch(form, token) is not None for token in found)
    about += len(re.findall("回答|回复|句子|段落|逗号|词语|开头|结尾|要求", text))
    reasons = {
        "too_short": size(re.sub(heading, "", text)) < 8,
        "repetitive": bool(grams) and 1 - len(set(grams)) / len(grams) > 0.2,
        "echo": echoed / max(1, size(text)) > MOST_ECHOED,
        "restates": about > MOST_FORM_WORDS * size(text),
    }
    return tuple(name for name, is_so in reasons.items() if is_so)


@many
@given(either, either)
@example("Here are the reasons for the answer\nand the others：", "")
def test_hollow_says_what_its_definitions_say(text, prompt):
    for asked in (prompt, f"{prompt}\n{text}"):
        reasons = tuple(reason for reason in hollow(text, asked) if reason != "no_prose")
        assert reasons == slowly_hollow(text, asked)


@many
@given(ascii_texts)
def test_kinds_of_which_a_prompt_speaks_are_found_in_any_case(prompt):
    kinds = ["words", "lines", "bullets", "layout", "commas"]
    spoken = {
        "words": r"words?\b", "lines": r"lines?\b", "bullets": "bullet|list",
        "layout": "list|table|json|bullet|format|markdown",
    }  # fmt: skip
    left = [k for k in kinds if k not in spoken or not re.search(spoken[k], prompt, re.I)]
    assert unmentioned(kinds, prompt) == left
