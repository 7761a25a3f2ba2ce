"""Read a judge's reply, or say why it cannot be read. Never guess a score.

A reply is third-party text and may quote the answer it judges, which may hold scores of its own.
So the last verdict counts, not the first; the `robust` format also carries a word that the judged
answer cannot know.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

MAX_CHARS = 40_000  # of a reply, counted from its end: work on a hostile reply stays small


class Unreadable(ValueError):
    """The reply holds no valid verdict; the message says what is wrong, for the judge to mend."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """Scores by constraint, in order, 0 .. maximum; and the judge's own overall score, if any."""

    scores: tuple[float, ...]
    overall: float | None = None


_YES = {"yes", "true", "是", "1"}
_NO = {"no", "false", "否", "0"}
# "overall score", whatever decoration is between the words and the number.
_OVERALL = re.compile(
    r"(?:constraints?\s+)?overall\s+score|总体得分|总体评分|总体分数|总得分|总评分|总分|综合得分|综合评分",
    re.IGNORECASE,
)
# Every repetition is bounded: a reply of a million blanks must not stop the program.
_DECORATION = r"[\s*_`#\"'“”>|]{0,20}"
_AFTER_LABEL = re.compile(
    rf"{_DECORATION}(?:[:：=]|is|为|是)?{_DECORATION}"
    r"\[{0,2}[\s*]{0,5}(?P<number>-?[0-9]{1,9}(?:\.[0-9]{1,9})?)"
    r"[\s*]{0,5}(?:[/／][\s*]{0,5}(?P<of>[0-9]{1,9}))?",
    re.IGNORECASE,
)
_NO_VALUE = object()
_FINE = re.compile(r"fine[\s_-]*grained\s+scores?|细粒度(?:得分|评分|分数)", re.IGNORECASE)


def parse_indexed(text: str, *, count: int, maximum: int, token: str) -> Parsed:
    """The `robust` format: {"check": token, "constraints": [{"id", "score"}], "overall"}.

    The last JSON object that carries the token counts. Every id 1 .. count must be there once;
    ids and scores may be strings ("3", "8/10"). Raises Unreadable.
    """
    verdicts = [row for row in json_objects(text[-MAX_CHARS:]) if "constraints" in row]
    ours = [row for row in verdicts if row.get("check") == token]
    if not ours:
        check = f'"check": "{token}" and ' if verdicts else ""
        raise Unreadable(f'no JSON object with {check}"constraints"')
    row = ours[-1]
    entries = row["constraints"]
    if not isinstance(entries, list):
        raise Unreadable('"constraints" is not a list')
    scores: dict[int, float] = {}
    for entry in entries:
        if not isinstance(entry, dict) or "id" not in entry or "score" not in entry:
            raise Unreadable('an entry of "constraints" lacks "id" or "score"')
        if isinstance(entry["id"], bool) or not re.fullmatch(r"\s*[0-9]{1,4}\s*", str(entry["id"])):
            raise Unreadable(f"{entry['id']!r} is not a constraint number")
        number = int(entry["id"])
        if number in scores:
            raise Unreadable(f"constraint {number} is scored more than once")
        scores[number] = _score(entry["score"], maximum)
    if sorted(scores) != list(range(1, count + 1)):
        raise Unreadable(f"scored constraints {sorted(scores)}; expected each of 1 to {count} once")
    overall = row.get("overall") if maximum == 10 else None  # not asked for on yes or no
    return Parsed(
        scores=tuple(scores[i] for i in range(1, count + 1)),
        overall=None if overall is None else _score(overall, maximum),
    )


def parse_trace(text: str, *, count: int) -> Parsed:
    """TRACE's published format: a "Fine Grained Score" list of {constraint: n}, an overall [[n]].

    Constraint texts need not match, only their number must: judges shorten them. Two readable
    lists that differ are refused, for one may be a quotation, and so is a last one that is no JSON,
    for what came before it may be one. The last overall score is taken; a missing one is None,
    since the metric does not use it. Raises Unreadable.
    """
    text = text[-MAX_CHARS:]
    values = [_json_after(text, label.end()) for label in _FINE.finditer(text)]
    values = [value for value in values if value is not _NO_VALUE]
    if not values or values[-1] is None:
        raise Unreadable('no JSON list after "Fine Grained Score"')
    scores = _fine_scores(values[-1], count)
    for value in values[:-1]:
        try:
            other = _fine_scores(value, count)
        except Unreadable:
            continue  # the format repeated, or a draft
        if other != scores:
            raise Unreadable("two different lists of fine-grained scores")
    return Parsed(scores, _overall(text))


def parse_lines(text: str, *, count: int) -> Parsed:
    """CFBench's published format: one line for each criterion, in order, that ends in 0 or 1.

    Only the number and order of the verdicts count, not the echo of the criterion.
    Raises Unreadable.
    """
    text = text[-MAX_CHARS:]
    ending = re.compile(r"(?:^|[\t 　:：|\[*`])([01])[\]*`| ]{0,10}$")
    found = [ending.search(line.strip()[-200:]) for line in text.splitlines()]
    verdicts = [match.group(1) for match in found if match]
    if len(verdicts) != count:
        raise Unreadable(f"{len(verdicts)} lines end in 0 or 1; expected {count}")
    return Parsed(tuple(float(v) for v in verdicts))


def parse_yes_no(text: str, *, count: int) -> Parsed:
    """ComplexBench's published format: one YES or NO (是 or 否).

    Read from an "Answer:" label if there is one (the last), else from a first word that stands
    alone, else from the one of YES and NO that the reply holds. Refused where it says both: a label
    that repeats the choice, a first word and the other one later. Raises Unreadable.
    """
    assert count == 1, "questions are asked one by one in this format"
    text = text[-MAX_CHARS:]
    label = r"(?:answer|答案)[\s*]*[:：][\s*]*(yes|no|是|否)(?![a-z])([是否]|\s*(?:or\b|/|或))?"
    labelled = re.findall(label, text, re.IGNORECASE)
    if labelled:
        word, other = labelled[-1]
        if other:
            raise Unreadable("the answer repeats the choice; expected YES or NO")
        return Parsed((_yes_no(word),))
    # "No flaw can be found" is no NO
    first = re.match(
        r"[\s*`\"'“]*(yes|no|是|否)的?(?=[ \t]*(?:[^\w\s/]|\n|$))", text, re.IGNORECASE
    )
    words = set(re.findall(r"\b(YES|NO)\b", text))
    if first:
        words.add(first.group(1).upper())
    if len(words) != 1:
        raise Unreadable("expected YES or NO")
    return Parsed((_yes_no(words.pop()),))


def json_objects(text: str) -> list[dict[str, Any]]:
    """All JSON objects of a text that are not inside another, in order."""
    decoder = json.JSONDecoder(strict=False)  # line breaks inside a string are no ambiguity
    found = []
    position = text.find("{")
    while position >= 0:
        try:
            row, end = decoder.raw_decode(text, position)
            found.append(row)
        except ValueError:
            end = position + 1
        except RecursionError:
            raise Unreadable("the reply nests JSON too deeply") from None
        position = text.find("{", end)
    return found


def _json_after(text: str, start: int) -> Any:
    """The list or object that begins near `start`, keys kept as pairs; None for one that is no
    JSON, _NO_VALUE if none begins there."""
    opening = re.compile(r"[\[{]").search(text, start)
    # More than decoration between label and value: the label was only mentioned.
    if opening is None or len(re.sub(r"[\s*_`:：\"'“”#=]|json", "", text[start : opening.start()])):
        return _NO_VALUE
    decoder = json.JSONDecoder(object_pairs_hook=list, strict=False)
    try:
        return decoder.raw_decode(text, opening.start())[0]
    except ValueError:
        return None
    except RecursionError:
        raise Unreadable("the reply nests JSON too deeply") from None


def _fine_scores(value: Any, count: int) -> tuple[float, ...]:
    """Scores of [{text: n, text: n}], [{text: n}, {text: n}] or {text: n}, objects as pairs."""
    pairs: list[Any] = []
    for entry in value if isinstance(value, list) else [value]:
        # {..} alone decodes to a list of pairs already, [{..}] to a list of such lists.
        pairs.extend(entry if isinstance(entry, list) else [entry])
    if not all(isinstance(pair, tuple) for pair in pairs):
        raise Unreadable("the fine-grained scores are not of the form [{constraint: score, ...}]")
    if len(pairs) != count:
        raise Unreadable(f"{len(pairs)} fine-grained scores; expected {count}")
    return tuple(_score(score, 10) for _, score in pairs)


def _overall(text: str) -> float | None:
    value = None
    for label in _OVERALL.finditer(text):
        found = _AFTER_LABEL.match(text, label.end())
        if found is None:
            continue
        if found["of"] not in (None, "10"):
            raise Unreadable(f"the overall score is out of {found['of']}; expected 0 to 10")
        value = _score(found["number"], 10)
    return value


def _score(value: Any, maximum: int) -> float:
    """A number in 0 .. maximum; a value outside is refused, never clamped or rescaled."""
    if maximum == 1 and isinstance(value, bool | str):
        return _yes_no(str(value))
    number = value
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(-?[0-9]+(?:\.[0-9]+)?)\s*(?:[/／]\s*([0-9]+))?\s*", value)
        number = float(found[1]) if found and found[2] in (None, str(maximum)) else None
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise Unreadable(f"{value!r} is not a score from 0 to {maximum}")
    if not 0 <= number <= maximum:
        raise Unreadable(f"the score {number:g} is outside 0 to {maximum}")
    if maximum == 1 and number not in (0, 1):
        raise Unreadable(f"the score {number:g} is neither 0 nor 1")
    return float(number)


def _yes_no(word: str) -> float:
    word = word.strip().lower()
    if word in _YES:
        return 1.0
    if word in _NO:
        return 0.0
    raise Unreadable(f"{word[:40]!r} is neither yes nor no")
