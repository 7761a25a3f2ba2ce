"""Changes to a prompt in free prose, where the wording of a constraint can be found by code.

A sentence is about a constraint if it has the words of its kind (prose_rules.ABOUT) and its number
or its quoted words. What cannot be found is not changed, and the reason is given.
"""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

from iopo.constraints.wording import COMMON_WORDS
from iopo.construct.cousins import NEUTRAL_WORDS, Asked, contradict, distractors
from iopo.construct.cousins.prose_rules import (
    ABOUT,
    ADDS,
    CONTINUES,
    COUNTED,
    NUMBER_WORDS,
    POINTS_BACK,
    RULE_OPENING,
    RULES,
    TIMES,
)
from iopo.construct.proposals import CLOSINGS

_END = re.compile(r"\n+|[.!?]+[\"”)]*(?:\s+|$)|\"")
_ABBREVIATION = re.compile(
    r"(?:\bi\.e|\be\.g|\betc|\bP\.(?:P\.)?S|\bMrs?|\bDr|\bvs|\bSt|\b[A-Z])\.$"
)
# Parts that no rule may change: quotes, examples, markup.
_FIXED = re.compile(
    r"\"[^\"\n]*\"|“[^”\n]*”|(?<!\w)'[^'\n]*'(?!\w)|\[[^\]\n]*\]|<<[^\n]*?>>"
    r"|\*[^*\n]+\*|i\.e\.?,?[^.\n]*|such as:? \*[^\n]*|http\S+"
)
_MASK = 0xE000  # the first private-use character
RULE_SHARE = 0.85  # of the rules that fit a sentence: further draws give other wordings
_LETTERS = ("eationshr", "ldcumfpgwyb", "vkjxqz")  # by how common they are in English
_OTHER_MARKS = {
    "postscript_marker": {"P.S.": "P.P.S", "P.P.S": "P.S."},
    "section_spliter": {"SECTION": "PART", "Section": "Part"},
}
_NUMBERS = ("num_words num_sentences num_paragraphs num_highlights num_sections num_bullets "
            "num_placeholders capital_frequency frequency let_frequency").split()  # fmt: skip


class Span(NamedTuple):
    start: int
    end: int

    def of(self, text: str) -> str:
        return text[self.start : self.end]


def sentence_spans(text: str) -> list[Span]:
    """Sentences and lines, with the marks that end them; quoted ones do not end the sentence."""
    spans, start, quoted = [], 0, False
    for match in _END.finditer(text):
        mark = match.group()
        if mark == '"':
            quoted = not quoted
            continue
        if mark[0] == "\n":
            end, quoted = match.start(), False
        else:
            closes = mark.count('"') % 2 == 1
            if quoted and not closes:
                continue
            quoted = quoted != closes
            end = match.start() + len(mark.rstrip())
            goes_on = match.end() < len(text) and text[match.end()].islower() and "\n" not in mark
            if quoted or goes_on or _ABBREVIATION.search(text, start, end):
                continue
        if text[start:end].strip():
            spans.append(Span(start, end))
        start = match.end()
    if text[start:].strip():
        spans.append(Span(start, len(text)))
    return spans


class Prose:
    """A prompt of IFEval's form; each change gives another, or says why it cannot be made."""

    def __init__(self, asked: Asked):
        self.asked = asked
        self.prompt = asked.prompt
        self.constraints = asked.constraints
        self.spans = sentence_spans(asked.prompt)
        pairs = zip(asked.ids, asked.kwargs, strict=True)
        self.about = [self._sentences(*pair) for pair in pairs]  # of each constraint

    def _sentences(self, name: str, given: dict[str, Any]) -> list[Span]:
        about = re.compile(ABOUT.get(name, r"(?!)"), re.IGNORECASE)
        return [
            span
            for span in self.spans
            if about.search(span.of(self.prompt)) and _has(span.of(self.prompt), name, given)
        ]

    # --- the four changes ---

    def reworded(self, rng: random.Random) -> Asked | str:
        """Each sentence about a constraint with other phrases of the same meaning."""
        spans = sorted(set(chain.from_iterable(self.about)), reverse=True)
        if not spans:
            return "no sentence found that is about a constraint"
        for share in (RULE_SHARE, 1):  # all rules, where the draw took none
            text = self.prompt
            for span in spans:
                said = _reworded(span.of(text), self._words(), share, rng)
                text = _put(text, span, said)
            if text != self.prompt:
                return replace(self.asked, prompt=text)
        return "no rule for its words"

    def _words(self) -> list[str]:
        """The constraints' own words, which no rule may change."""
        given = chain.from_iterable(kwargs.items() for kwargs in self.asked.kwargs)
        values = [value for key, value in given if not key.endswith("relation")]
        lists = [value if isinstance(value, list) else [value] for value in values]
        return [word for found in lists for word in found if isinstance(word, str)]

    def reordered(self, rng: random.Random) -> Asked | str:
        """Sentences that are constraints and nothing else in other places; one alone goes first."""
        units = list(self._units())
        if not units:
            return "no sentence that is a constraint and nothing else"
        text = self.prompt
        if len(units) == 1:
            (unit,) = units
            before, after = text[: unit.start].rstrip(" "), text[unit.end :]
            held = POINTS_BACK.search(unit.of(text)) or ADDS.match(after.lstrip())
            if not before.strip() or held:
                return "its only constraint cannot stand first"
            return replace(self.asked, prompt=f"{unit.of(text)} {(before + after).strip()}")
        order = rng.sample(units, len(units))
        if order == units:
            order = order[1:] + order[:1]
        for place, unit in reversed(list(zip(units, order, strict=True))):
            text = text[: place.start] + unit.of(self.prompt) + text[place.end :]
        return replace(self.asked, prompt=text)

    def _units(self) -> Iterator[Span]:
        """Sentences, with those that go on with them, that may trade places."""
        about: dict[Span, str] = {}  # of a sentence: what others about the same things say
        for name, spans in zip(self.asked.ids, self.about, strict=True):
            if len(spans) == 1:
                about[spans[0]] = f"{about.get(spans[0], '(?!)')}|{ABOUT[name]}"
        for place, span in enumerate(self.spans):
            if span not in about or not RULE_OPENING.match(span.of(self.prompt)):
                continue
            later = place + 1
            while later < len(self.spans) and CONTINUES.match(self.spans[later].of(self.prompt)):
                later += 1
            unit = Span(span.start, self.spans[later - 1].end)
            text = unit.of(self.prompt)
            ended = text[-1] in '.!?"”' and "\n" not in text and not text.endswith("P.S.")
            after = [s.of(self.prompt) for s in self.spans[later : later + 1] if s not in about]
            if ended and not any(re.search(about[span], s, re.IGNORECASE) for s in after):
                yield unit

    def distractor(self, rng: random.Random) -> Asked | str:
        """One more constraint below the prompt, which is not checked."""
        new = next(distractors(self.prompt, self.constraints, rng), None)
        if new is None:
            return "no constraint is compatible with its own"
        return replace(self.asked, prompt=f"{self.prompt.rstrip()}\n\n{new.render('en', rng)}")

    def parameter(self, rng: random.Random) -> Asked | str:
        """Another number, word, letter or phrase in one constraint and in its sentence."""
        for i in rng.sample(range(len(self.asked.ids)), len(self.asked.ids)):
            for change in (_number, _word, _letter, _phrase):
                found = self._changed(i, change, rng)
                if found is not None:
                    return found
        return "no number or word of a constraint found once"

    def _changed(self, i: int, change: "Change", rng: random.Random) -> Asked | None:
        name = self.asked.ids[i]
        if len(self.about[i]) != 1 or self.asked.ids.count(name) > 1:
            return None
        made = change(self.prompt, self.about[i][0], name, self.asked.kwargs[i], rng)
        if made is None:
            return None
        prompt, given = made
        kwargs = (*self.asked.kwargs[:i], given, *self.asked.kwargs[i + 1 :])
        found = Asked(prompt, self.asked.ids, kwargs)
        new = found.constraints[i]
        others = [*self.constraints[:i], *self.constraints[i + 1 :]]
        return None if any(contradict(new, other) for other in others) else found


# --- what a sentence has -------------------------------------------------------------------------


def _number_forms(value: int) -> str:
    """A pattern of a number in digits or as a word."""
    words = [NUMBER_WORDS[value]] if value < len(NUMBER_WORDS) else []
    words += [word for word, number in TIMES.items() if number == value]
    return "|".join([rf"(?<![\d.,]){value}(?![\d,]|\.\d)", *(rf"\b{word}\b" for word in words)])


def _near(value: int) -> str:
    """A number of the kwargs as prompts say it: "more than 30" is 31 at least."""
    return "|".join(_number_forms(v) for v in (value, value - 1, value + 1) if v > 0)


def _has(sentence: str, name: str, given: dict[str, Any]) -> bool:
    """Whether the sentence has the number or the words of the kwargs."""
    for key, value in given.items():
        if key in _NUMBERS and name in COUNTED and value is not None:
            none = name == "keywords:letter_frequency" and value <= 1
            if not none and not re.search(_near(value), sentence, re.IGNORECASE):
                return False
        elif key in ("keywords", "forbidden_words"):
            if not all(_places(sentence, word) for word in value):
                return False
        elif key in ("keyword", "end_phrase", "first_word", "letter"):
            if value and not _places(sentence, value.strip()):
                return False
    return True


def _places(text: str, word: str) -> list[Span]:
    """Where a word or phrase stands as a whole, in any case."""
    pattern = rf"(?<!\w){re.escape(word)}(?!\w)"
    return [Span(*match.span()) for match in re.finditer(pattern, text, re.IGNORECASE)]


# --- other words ---------------------------------------------------------------------------------


def _reworded(sentence: str, words: list[str], share: float, rng: random.Random) -> str:
    fixed: list[str] = []

    def mask(match: re.Match[str]) -> str:
        fixed.append(match.group())
        return chr(_MASK + len(fixed) - 1)

    text = _FIXED.sub(mask, sentence)
    for word in words:
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", mask, text, flags=re.IGNORECASE)
    for pattern, others in RULES:
        new = rng.choice(others)
        if (match := pattern.search(text)) and rng.random() < share:
            said = match.expand(new)
            said = said[:1].upper() + said[1:] if match.group()[:1].isupper() else said
            text = text[: match.start()] + said + text[match.end() :]
    for at in reversed(range(len(fixed))):
        text = text.replace(chr(_MASK + at), fixed[at])
    return text[:1].upper() + text[1:] if sentence[:1].isupper() else text


# --- other parameters ----------------------------------------------------------------------------

Made = tuple[str, dict[str, Any]] | None  # the prompt and the kwargs
Change = Callable[[str, Span, str, dict[str, Any], random.Random], Made]


def _put(prompt: str, span: Span, new: str) -> str:
    return prompt[: span.start] + new + prompt[span.end :]


def _once(prompt: str, within: Span, pattern: str) -> re.Match[str] | None:
    """The only match in the prompt, if it stands within the span."""
    found = list(re.finditer(pattern, prompt, re.IGNORECASE))
    inside = len(found) == 1 and within.start <= found[0].start() and found[0].end() <= within.end
    return found[0] if inside else None


def _number(prompt: str, span: Span, name: str, given: dict[str, Any], rng: random.Random) -> Made:
    """Another number, by the same difference in the prompt and in the kwargs."""
    key = next((key for key in _NUMBERS if given.get(key) is not None), None)
    if key is None or name not in COUNTED or _shown_by_example(prompt, name):
        return None
    match = _once(prompt, span, _near(given[key]))
    if match is None:
        return None
    said = match.group().lower()
    after, before = prompt[match.end() : span.end], prompt[span.start : match.start()]
    if re.match(r"\s*(?:-|–|to|or|and)\s*\d", after) or re.search(
        r"\bbetween\s*$|\d\s*(?:-|–|to|or|and)\s*$", before
    ):
        return None  # a range
    counted = re.match(rf"\+?(?: or (?:more|less|fewer))?{COUNTED[name]}", after, re.IGNORECASE)
    if said not in TIMES and counted is None:
        return None
    old = TIMES.get(said) or (int(said) if said.isdigit() else NUMBER_WORDS.index(said))
    new = 3 - old if said in TIMES else _other_number(old, rng)
    if new is None or given[key] + new - old < 1:
        return None
    if said in TIMES:
        text = {1: "once", 2: "twice"}[new]
    else:
        text = str(new) if said.isdigit() or new >= len(NUMBER_WORDS) else NUMBER_WORDS[new]
    return _put(prompt, Span(*match.span()), text), given | {key: given[key] + new - old}


def _other_number(old: int, rng: random.Random) -> int | None:
    """A number as round as the old one, at most half as much away from it; None below two."""
    step = next(unit for unit in (100, 50, 10, 5, 1) if old % unit == 0 and 2 * unit <= max(2, old))
    others = [old + step * n for n in (-2, -1, 1, 2)]
    fitting = [new for new in others if new >= 2 and abs(new - old) <= max(1, old / 2)]
    return rng.choice(fitting) if old >= 2 and fitting else None


def _shown_by_example(prompt: str, name: str) -> bool:
    """Whether the prompt has a layout with as many parts as the number says."""
    marks = {
        "detectable_format:number_bullet_lists": r"^[ \t]*[*-] ",
        "length_constraints:number_paragraphs": r"^[ \t]*\*\*\*[ \t]*$",
    }
    return name in marks and len(re.findall(marks[name], prompt, re.MULTILINE)) > 1


def _word(prompt: str, span: Span, name: str, given: dict[str, Any], rng: random.Random) -> Made:
    """Another keyword, forbidden word or first word."""
    key = next(
        (k for k in ("keywords", "forbidden_words", "keyword", "first_word") if given.get(k)), None
    )
    if key is None:
        return None
    words = given[key] if isinstance(given[key], list) else [given[key]]
    for at in rng.sample(range(len(words)), len(words)):
        places = _places(prompt, words[at].strip())
        if len(places) != 1 or not span.start <= places[0].start < span.end:
            continue
        bank = COMMON_WORDS if key == "forbidden_words" else NEUTRAL_WORDS
        bank = [word for word in bank if not _places(prompt, word)]
        new, old = rng.choice(bank), places[0].of(prompt)
        said = new.upper() if old.isupper() and len(old) > 1 else new
        changed = [*words[:at], new, *words[at + 1 :]]
        value = changed if isinstance(given[key], list) else new
        return _put(prompt, places[0], said), given | {key: value}
    return None


def _letter(prompt: str, span: Span, name: str, given: dict[str, Any], rng: random.Random) -> Made:
    """Another letter, about as common."""
    letter = (given.get("letter") or "").strip().lower()
    group = next((letters for letters in _LETTERS if letter and letter in letters), "")
    match = _once(prompt, span, rf"\bletter ([\"'“]?){re.escape(letter)}(?![\w])")
    if not group or match is None or len(re.findall(r"\bletter\b", span.of(prompt))) > 1:
        return None
    new = rng.choice([other for other in group if other != letter])
    return _put(prompt, Span(match.end() - 1, match.end()), new), given | {"letter": new}


def _phrase(prompt: str, span: Span, name: str, given: dict[str, Any], rng: random.Random) -> Made:
    """Another closing phrase, postscript marker or section word."""
    key = next((k for k in ("end_phrase", *_OTHER_MARKS) if given.get(k)), None)
    if key is None or "after the word" in prompt:  # such as: no words after the word "with"
        return None
    old = given[key].strip()
    if key == "end_phrase":
        asks = old.endswith("?")
        others = [p for p in CLOSINGS if p.endswith("?") == asks and p.lower() != old.lower()]
        new = rng.choice(others)
        places = _places(prompt, old)
    else:
        new = _OTHER_MARKS[key].get(old, "")
        pattern = (
            r"(?<![\w.])P\.\s?(?:P\.\s?)?S\.?" if key == "postscript_marker" else re.escape(old)
        )
        places = [Span(*match.span()) for match in re.finditer(pattern, prompt)]
    if len(places) != 1 or not span.start <= places[0].start < span.end or not new:
        return None
    return _put(prompt, places[0], new), given | {key: new}
