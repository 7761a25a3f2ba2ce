"""Rows of text: what quads, pairs, sft rows and groups are, and how files of them are read.

Every fault of a file is reported in one ValueError, before anything is tokenised or loaded.
Rows of TRL and of the authors' release are read as ours (columns.py).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from iopo.data import checks
from iopo.data.columns import Prompt, is_sharegpt, own_columns
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
    x1: Prompt
    y1: str
    x2: Prompt
    y2: str
    system: str | None = None
    c1: list[dict] | None = None
    c2: list[dict] | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """An instruction, a better and a worse answer."""

    id: str
    x: Prompt
    chosen: str
    rejected: str
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Sft:
    """An instruction and its answer."""

    id: str
    x: Prompt
    y: str
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """An instruction, responses that a policy sampled, equal ones too, and the reward of each."""

    id: str
    x: Prompt
    responses: list[str]
    rewards: list[float]
    system: str | None = None


Row = Quad | Pair | Sft | Group
T = TypeVar("T")
CLASSES: dict[str, type[Row]] = {"quad": Quad, "pair": Pair, "sft": Sft, "group": Group}


def read_rows(path: str | Path, kind: str | None = None) -> list[Row]:
    """The rows of a source (iopo/sources.py), in order.

    kind: "quad" | "pair" | "sft" | "group", or None for the kind of the file's first readable row;
    one file holds one kind, its groups of one size. A row without an id gets the first 16 hex
    digits of the sha256 of its texts.
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
        sharegpt = isinstance(decoded, dict) and is_sharegpt(decoded)
        row: Row | None = None
        faults = [f"the row is of type {type(decoded).__name__}, expected an object"]
        if isinstance(decoded, dict):
            ours, faults = own_columns(decoded)
            if kind is None:
                kind = "quad" if sharegpt else checks.kind_of(ours)
                good_row = checks.GOOD_ROW[kind or "quad"]
            if not faults:
                row, faults = _row(ours, kind)
        if faults and kind == "quad" and sharegpt:
            good_row = GOOD_SHAREGPT_ROW
        if row is not None and row.id in place_of_id:
            given = isinstance(decoded, dict) and decoded.get("id") is not None
            what = f"'id' {row.id!r} is that of" if given else "all texts are those of"
            faults.append(f"{what} {place_of_id[row.id]}, expected each row once")
        if isinstance(row, Group) and rows and isinstance(first := rows[0], Group):
            count, expected = len(row.responses), len(first.responses)
            if count != expected:
                where = f"as in {place_of_id[first.id]}"
                faults.append(f"'responses' has {count} texts, expected {expected} {where}")
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


def _row(decoded: dict[str, Any], kind: str | None) -> tuple[Row | None, list[str]]:
    """One row under our keys, or None and its faults."""
    if kind is None:
        found = ", ".join(sorted(decoded)) or "(none)"
        expected = "expected x1, y1, x2, y2 or x, chosen, rejected or x, y or x, responses, rewards"
        found = f"found the keys {found}, {expected}, or TRL's columns"
        return None, [f"the row is neither quad, pair, sft nor group; {found}"]
    if faults := checks.check_row(decoded, kind):
        return None, faults
    texts, options = checks.REQUIRED[kind], checks.OPTIONAL[kind]
    fields: dict[str, Any] = {key: decoded[key] for key in texts + options if key in decoded}
    if fields.get("id") is None:
        hashed = [fields.get(key) for key in (*texts, "system")]
        fields["id"] = sha256_text(json.dumps([text for text in hashed if text is not None]))[:16]
    return CLASSES[kind](**fields), []


def rows_for(kind: str, rows: Sequence[Row], quad_rows: str = "both") -> list[Row]:
    """The rows as an objective of `kind` ("quad" | "pair" | "sft" | "group") needs them.

    A quad becomes two pairs, (x1, y1 over y2) and (x2, y2 over y1), or two sft rows, (x1, y1) and
    (x2, y2); with quad_rows="first" only the first of each (the authors' DPO and SFT baselines).
    A pair becomes one sft row. Ids of derived rows end in /1 and /2.
    Raises ValueError where the rows hold less than the objective needs.
    """
    out: list[Row] = []
    for row in rows:
        if isinstance(row, CLASSES[kind]):
            out.append(row)
        elif isinstance(row, Quad) and kind in ("pair", "sft"):
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
