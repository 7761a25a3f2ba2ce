"""Rows of text: what a quad, a pair and an sft row are, and how files of them are read and checked.

Every fault of a file is reported in one ValueError, before anything is tokenised or loaded.

Rows of the authors' release (ShareGPT messages) are read as quads: `conversations` holds x1 and x2
as two human turns, `chosen` is y1, and `rejected` is y2, the right answer to x2 and not a bad
answer (released code, data/processors/pairwise.py; the release itself cannot load this file,
because its converter refuses two human turns in a row).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from iopo.data import checks
from iopo.files import Place, iter_records, sha256_text, shortened
from iopo.sources import files_of

MAX_LISTED = 20  # bad rows shown of one file; the rest is counted
NO_FILE = """no such file.
The paper's training set was never released. To get rows:
  - build quads with any instruction-tuned model: iopo/construct, docs/data.md;
  - turn a preference set (two answers to a prompt) into quads: iopo/construct, relabel;
  - give the authors' ShareGPT JSON as it is, if you have such a file;
  - write JSONL rows yourself, data/README.md shows them;
  - or train on the quads in data/verified."""
GOOD_SHAREGPT_ROW = {
    "conversations": [
        {"from": "human", "value": "Name a fruit. Use capital letters only."},
        {"from": "human", "value": "Name a fruit. Use small letters only."},
    ],
    "chosen": {"from": "gpt", "value": "APPLE"},
    "rejected": {"from": "gpt", "value": "apple"},
}


@dataclass(frozen=True, slots=True)
class Quad:
    """Two instructions and their right answers: y1 is wrong for x2, y2 is wrong for x1.

    c1, c2: constraints of x1 and x2 as {"kind", "params", "text"}, where known.
    """

    id: str
    x1: str
    y1: str
    x2: str
    y2: str
    system: str | None = None
    c1: list[dict] | None = None
    c2: list[dict] | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """An instruction, a better and a worse answer."""

    id: str
    x: str
    chosen: str
    rejected: str
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Sft:
    """An instruction and its answer."""

    id: str
    x: str
    y: str
    system: str | None = None


Row = Quad | Pair | Sft
T = TypeVar("T")
CLASSES: dict[str, type[Quad] | type[Pair] | type[Sft]] = {"quad": Quad, "pair": Pair, "sft": Sft}


def read_rows(path: str | Path, kind: str | None = None) -> list[Row]:
    """The rows of a source (iopo/sources.py), in order.

    kind: "quad" | "pair" | "sft", or None for the kind of the file's first readable row; one file
    holds one kind. A row without an id gets the first 16 hex digits of the sha256 of its texts.
    Raises ValueError that lists every bad row with its place, what was found and a good row.
    """
    try:
        files_of(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: {NO_FILE}") from error
    rows: list[Row] = []
    bad: list[str] = []
    place_of_id: dict[str, Place] = {}
    good_row: dict = checks.GOOD_ROW[kind or "quad"]
    for place, decoded, fault in iter_records(path):
        if fault is not None:
            bad.append(f"{place}: {fault}")
            continue
        sharegpt = isinstance(decoded, dict) and "conversations" in decoded
        if isinstance(decoded, dict) and kind is None:
            kind = "quad" if sharegpt else checks.kind_of(decoded)
            good_row = checks.GOOD_ROW[kind or "quad"]
        row, faults = _row(decoded, kind)
        if faults and kind == "quad" and sharegpt:
            good_row = GOOD_SHAREGPT_ROW
        if row is not None and row.id in place_of_id:
            given = isinstance(decoded, dict) and decoded.get("id") is not None
            what = f"'id' {row.id!r} is that of" if given else "all texts are those of"
            faults.append(f"{what} {place_of_id[row.id]}, expected each row once")
        if row is None or faults:
            bad.append(f"{place}: {'; '.join(faults)}")
            continue
        place_of_id[row.id] = place
        rows.append(row)
    if bad:
        raise ValueError(
            f"{path}: {len(bad)} of {len(bad) + len(rows)} rows cannot be used\n  "
            + "\n  ".join(shortened(bad, MAX_LISTED))
            + f"\nA good row: {json.dumps(good_row, ensure_ascii=False)}\n"
            "Mend or delete these lines; data/README.md describes the formats."
        )
    if not rows:
        raise ValueError(f"{path}: holds no rows, expected JSON objects; see data/README.md")
    return rows


def _row(decoded: object, kind: str | None) -> tuple[Row | None, list[str]]:
    """One row object, or None and its faults."""
    if not isinstance(decoded, dict):
        return None, [f"the row is of type {type(decoded).__name__}, expected an object"]
    if "system" in decoded:
        decoded = {**decoded, "system": given_system(decoded["system"])}
    if kind is None:
        found = ", ".join(sorted(decoded)) or "(none)"
        expected = "expected x1, y1, x2, y2 or x, chosen, rejected or x, y"
        return None, [f"the row is neither quad, pair nor sft; found the keys {found}, {expected}"]
    faults: list[str] = []
    if kind == "quad" and "conversations" in decoded:
        decoded, faults = _from_sharegpt(decoded)
    if not faults:
        faults = checks.check_row(decoded, kind)
    if faults:
        return None, faults
    texts, options = checks.REQUIRED[kind], checks.OPTIONAL[kind]
    fields: dict[str, Any] = {key: decoded[key] for key in texts + options if key in decoded}
    if fields.get("id") is None:
        hashed = [fields.get(key) for key in (*texts, "system")]
        fields["id"] = sha256_text(json.dumps([text for text in hashed if text is not None]))[:16]
    return CLASSES[kind](**fields), []


def _from_sharegpt(row: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """The row under the keys of a quad, and the faults that stopped parts of it from moving.

    A leading turn from `system` becomes the system prompt of both instructions. Dialogues of
    several turns (2(2T-1) messages for T turns) are refused: a member is one prompt, one response.
    """
    moved = ("conversations", "chosen", "rejected")
    quad = {key: value for key, value in row.items() if key not in moved}
    turns, fault = read_turns(row["conversations"])
    if fault is not None:
        return quad, [f"'conversations': {fault}"]
    faults: list[str] = []
    if turns and turns[0][0] == "system":
        leading = given_system(turns.pop(0)[1])
        if leading is not None and row.get("system") is not None:
            faults.append("a system prompt stands both in 'system' and in 'conversations'")
        elif leading is not None:
            quad["system"] = leading
    roles = [role for role, _ in turns]
    if roles == ["user", "user"]:
        quad["x1"], quad["x2"] = turns[0][1], turns[1][1]
    else:
        fault = f"'conversations' has the turns {roles}, expected two user turns (x1 and x2)"
        if roles == ["user"]:
            fault += "; one turn is an ordinary preference pair: give it as x, chosen, rejected"
        if len(roles) > 2 and len(roles) % 4 == 2:
            fault += "; dialogues of several turns are not supported: render them into x1 and x2"
        faults.append(fault)
    for key, name in (("chosen", "y1"), ("rejected", "y2")):
        if key not in row:
            faults.append(f"{key!r} ({name}) is missing")
            continue
        reply, fault = read_turns(row[key])
        if fault is not None:
            faults.append(f"{key!r}: {fault}")
        elif [role for role, _ in reply] != ["assistant"]:
            found = [role for role, _ in reply]
            faults.append(f"{key!r} has the turns {found}, expected one of the assistant")
        else:
            quad[name] = reply[0][1]
    return quad, faults


ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}  # names of others for ours


def read_turns(
    messages: object, speaker: str | None = None
) -> tuple[list[tuple[str, str]], str | None]:
    """(role, text) of each message, and what is wrong with them, if anything: then no turns.

    messages: a message or a list of them, {"role", "content"} or {"from", "value"}; with a
    `speaker`, a text is one turn of theirs. Roles are system, user, assistant and what else is
    there (tool, ...); human, gpt and model are read as ours.
    """
    if isinstance(messages, str) and speaker is not None:
        return [(speaker, messages)], None
    listed = [messages] if isinstance(messages, dict) else messages
    if not isinstance(listed, list) or not listed:
        what = "empty" if listed == [] else type(listed).__name__
        return [], f"found {what}, expected a list of messages"
    turns: list[tuple[str, str]] = []
    for number, message in enumerate(listed):
        given = message if isinstance(message, dict) else {}
        given = {key: value for key, value in given.items() if value is not None}
        role, text = given.get("role", given.get("from")), given.get("content", given.get("value"))
        if not isinstance(role, str) or not isinstance(text, str):
            found = sorted(message) if isinstance(message, dict) else type(message).__name__
            expected = '{"from": ..., "value": ...} or {"role": ..., "content": ...}, both texts'
            return [], f"message {number} is {found}, expected {expected}"
        turns.append((ROLES.get(role, role), text))
    return turns, None


def given_system(value: Any) -> Any:
    """A row's system prompt; None for an empty one, which other formats write for none."""
    return None if isinstance(value, str) and not value.strip() else value


def rows_for(kind: str, rows: Sequence[Row], quad_rows: str = "both") -> list[Row]:
    """The rows as an objective of `kind` ("quad" | "pair" | "sft") needs them.

    A quad becomes two pairs, (x1, y1 over y2) and (x2, y2 over y1), or two sft rows, (x1, y1) and
    (x2, y2); with quad_rows="first" only the first of each (the authors' DPO and SFT baselines).
    A pair becomes one sft row. Ids of derived rows end in /1 and /2.
    Raises ValueError where the rows hold less than the objective needs.
    """
    out: list[Row] = []
    for row in rows:
        if isinstance(row, CLASSES[kind]):
            out.append(row)
        elif isinstance(row, Quad):
            halves = ((row.x1, row.y1, row.y2), (row.x2, row.y2, row.y1))
            for n, (x, y, other) in enumerate(halves if quad_rows == "both" else halves[:1], 1):
                pair = Pair(f"{row.id}/{n}", x, y, other, row.system)
                out.append(pair if kind == "pair" else Sft(pair.id, x, y, row.system))
        elif isinstance(row, Pair) and kind == "sft":
            out.append(Sft(row.id, row.x, row.chosen, row.system))
        else:
            raise ValueError(
                f"row {row.id!r} is of kind {type(row).__name__.lower()!r}, but the objective "
                f"needs {kind!r} rows: give a file of those, or choose another objective"
            )
    return out


def spread(rows: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` rows, evenly over their order, which often sorts them; the same each time."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]
