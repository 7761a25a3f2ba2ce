"""Reading the replies of the TRACE pipeline's steps, or saying why they cannot be read."""

import re
from typing import Any

from iopo.construct.trace.taxonomy import MOST_CONSTRAINTS, Dimension, named
from iopo.evaluation.judge.parse import Unreadable, json_objects
from iopo.files import HALF_PAIR

NOTHING = "NULL"  # stands for a missing input or for no constraints, as in the paper
MAX_CHARS = 100_000  # of a reply, counted from its end
_NUMBER = re.compile(r"^\s*(?:\d{1,2}[.)、．]|[-*•])\s*")


class Rejected(ValueError):
    """The row goes no further: its reply can be read and says, or shows, that it is no good."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def json_object(text: str, *keys: str) -> dict[str, Any]:
    """The last JSON object in the text that has one of the keys. Raises Unreadable."""
    found = [row for row in json_objects(text[-MAX_CHARS:]) if any(key in row for key in keys)]
    if not found:
        raise Unreadable(f"no JSON object with {' or '.join(map(repr, keys))}")
    return found[-1]


def verdict(text: str, key: str) -> tuple[bool, str]:
    """(true or false, reason) of {"reason", key}. Raises Unreadable."""
    row = json_object(text, key)
    if not isinstance(row[key], bool):
        raise Unreadable(f"{key!r} is {row[key]!r}; expected true or false")
    return row[key], str(row.get("reason", ""))[:300]


def fields(text: str, dimensions: tuple[Dimension, ...]) -> dict[str, Any]:
    """description, constraints and input of an instruction that was taken apart.

    Raises Unreadable; Rejected on a refusal, no constraints, or text that stands in two fields.
    """
    row = json_object(text, "description", "reject")
    if "description" not in row:
        raise Rejected("not fit to be taken apart", str(row["reject"])[:300])
    description = filled(row["description"], "description")
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise Unreadable(f"'input' is {type(given).__name__}; expected text or null")
    empty = given is None or given.strip() in ("", NOTHING)
    text_in = None if empty else filled(given, "input")
    found = constraints(row.get("constraints"), dimensions)
    for text in (*(constraint["text"] for constraint in found), text_in):
        if text is not None and _plain(text) in _plain(description):
            raise Rejected("stands in two fields", text[:300])
    return {"description": description, "constraints": found, "input": text_in}


def constraints(value: object, dimensions: tuple[Dimension, ...]) -> list[dict[str, Any]]:
    """[{"text", "type"}] with numbers removed; type is None where the taxonomy lacks it.

    Raises Unreadable; Rejected on none, on more than 15, on one that occurs twice.
    """
    if value in (None, NOTHING):
        value = []
    if not isinstance(value, list):
        raise Unreadable(f"'constraints' is {type(value).__name__}; expected a list")
    found: list[dict[str, Any]] = []
    for entry in value:
        text = entry.get("text") if isinstance(entry, dict) else entry
        kind = entry.get("type") if isinstance(entry, dict) else None
        text = " ".join(_NUMBER.sub("", filled(text, "constraints")).split())
        found.append({"text": text, "type": named(kind, dimensions)})
    if not found:
        raise Rejected("no constraints")
    if len(found) > MOST_CONSTRAINTS:
        raise Rejected("too many constraints", str(len(found)))
    if len({_plain(c["text"]) for c in found}) < len(found):
        raise Rejected("a constraint occurs twice")
    return found


def filled(value: object, name: str = "response") -> str:
    """The text without blanks around it. Raises Unreadable where there is none, or half of a
    surrogate pair in it: training refuses rows of such a text, and they have no hash."""
    if not isinstance(value, str) or not value.strip():
        raise Unreadable(f"{name!r} holds no text")
    if HALF_PAIR.search(value):
        raise Unreadable(f"{name!r} holds half of a surrogate pair, which is not valid Unicode")
    return value.strip()


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .;。；")
