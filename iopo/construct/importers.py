"""Other projects' files, read as streams: preference sets, IFEval-schema rows, seeds.

Texts may be strings or lists of messages ({"role", "content"} or {"from", "value"}). A row that
cannot be used is not an error: it is a `Skipped` with the reason, for the caller to count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iopo.constraints import Constraint, from_ifeval
from iopo.data.rows import Pair
from iopo.files import read_records

PROMPT_KEYS = ("prompt", "instruction", "question", "x")
RESPONSE_KEYS = ("response", "output", "answer", "y")
SKIPPED_TURNS = "several turns"


@dataclass(frozen=True, slots=True)
class Skipped:
    """Why a row is not used."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class IfevalSeed:
    """A prompt that holds its constraints already, as IFEval's rows do, and maybe a response."""

    id: str
    instruction: str
    constraints: tuple[Constraint, ...]
    response: str | None = None


def stream(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | Skipped]]:
    """(line, row) of a .jsonl file without reading it whole; bad lines are Skipped.

    Raises ValueError for other file names: a .json list cannot be streamed.
    """
    if path.suffix != ".jsonl":
        raise ValueError(
            f"{path}: expected a .jsonl file; turn a JSON list into one with "
            "`python -c 'import json,sys; [print(json.dumps(r)) for r in json.load(sys.stdin)]'`"
        )
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:  # bad UTF-8 is a ValueError too
                yield number, Skipped(number, "not JSON")
                continue
            if not isinstance(row, dict):
                yield number, Skipped(number, "no object")
                continue
            yield number, row


def preferences(path: Path) -> Iterator[Pair | Skipped]:
    """Rows of a preference set: prompt, chosen, rejected, as strings or messages.

    Without a prompt, it is taken from the first turn of `chosen`. Dialogues of several turns are
    skipped: a member is one prompt and one response.
    """
    for number, row in stream(path):
        yield row if isinstance(row, Skipped) else _pair(number, row)


def _pair(number: int, row: Mapping[str, Any]) -> Pair | Skipped:
    prompt = next((row[key] for key in PROMPT_KEYS if row.get(key)), None)
    sides = [_turns(row.get(key)) for key in ("chosen", "rejected")]
    if any(side is None for side in sides):
        return Skipped(number, "no chosen or no rejected")
    system, asked = _prompt(prompt)
    if prompt is not None and asked is None:
        return Skipped(number, SKIPPED_TURNS)
    if isinstance(row.get("system"), str):
        system = row["system"]
    answers = []
    for side in sides:
        assert side is not None
        turns = [(role, text) for role, text in side if role != "system"]
        if [role for role, _ in turns] not in (["assistant"], ["user", "assistant"]):
            return Skipped(number, SKIPPED_TURNS)
        if len(turns) == 2:
            asked = asked or turns[0][1]
            if turns[0][1] != asked:
                return Skipped(number, "the two sides answer different prompts")
        system = system or next((text for role, text in side if role == "system"), None)
        answers.append(turns[-1][1])
    if asked is None:
        return Skipped(number, "no prompt")
    chosen, rejected = (text.strip() for text in answers)
    if not asked.strip() or not chosen or not rejected:
        return Skipped(number, "empty text")
    if chosen == rejected:
        return Skipped(number, "chosen = rejected")
    row_id = str(row.get("id") or _digest(asked, chosen, rejected))
    return Pair(row_id, asked.strip(), chosen, rejected, system)


def _prompt(value: object) -> tuple[str | None, str | None]:
    """(system prompt, the one user turn) of a prompt given as text or as messages."""
    if isinstance(value, str):
        return None, value
    turns = _turns(value) or []
    users = [text for role, text in turns if role == "user"]
    system = next((text for role, text in turns if role == "system"), None)
    return system, users[0] if len(users) == 1 and len(turns) - (system is not None) == 1 else None


def _turns(value: object) -> list[tuple[str, str]] | None:
    """(role, text) of messages; a string is one turn of the assistant. None: neither."""
    if isinstance(value, str):
        return [("assistant", value)]
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        return None
    found = []
    names = {"human": "user", "gpt": "assistant", "model": "assistant"}
    for message in messages:
        if not isinstance(message, dict):
            return None
        role = message.get("role", message.get("from"))
        text = message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(text, str):
            return None
        found.append((names.get(role, role), text))
    return found


def ifeval_seeds(path: Path) -> Iterator[IfevalSeed | Skipped]:
    """Rows of IFEval's schema: prompt, instruction_id_list, kwargs; a response where there is one.

    `kwargs` may be JSON text, as some sets have it.
    """
    for number, row in stream(path):
        if isinstance(row, Skipped):
            yield row
            continue
        prompt, ids, kwargs = (row.get(k) for k in ("prompt", "instruction_id_list", "kwargs"))
        try:
            if isinstance(kwargs, str):
                kwargs = json.loads(kwargs)
            if not isinstance(prompt, str) or not isinstance(ids, list) or not ids:
                raise ValueError("no prompt or no instruction_id_list")
            if not isinstance(kwargs, list) or len(kwargs) != len(ids):
                raise ValueError("kwargs do not fit instruction_id_list")
            made = tuple(from_ifeval(i, k or {}) for i, k in zip(ids, kwargs, strict=True))
        except ValueError as error:
            yield Skipped(number, str(error).split(":")[0][:80])
            continue
        response = next((row[key] for key in RESPONSE_KEYS if isinstance(row.get(key), str)), None)
        row_id = str(row.get("key") or row.get("id") or _digest(prompt))
        yield IfevalSeed(row_id, prompt, made, response)


def read_seeds(path: str | Path) -> list[dict[str, Any]]:
    """Simple instructions for the TRACE pipeline, as {"id", "instruction"}.

    A .txt file holds one a line; a .jsonl file holds objects with `instruction` (or `prompt`,
    `question`, `x`) and maybe `id`. A row without an id gets one from its text; where the text
    occurs again, with the row's number after it.
    Raises ValueError on a row without text and on an id given twice.
    """
    path = Path(path)
    if path.suffix == ".txt":
        lines = path.read_text(encoding="utf-8").split("\n")
        rows: list[dict[str, Any]] = [{"instruction": line} for line in lines if line.strip()]
    else:
        rows = read_records(path)
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, 1):
        text = next((row[key] for key in PROMPT_KEYS if isinstance(row.get(key), str)), "").strip()
        if not text:
            raise ValueError(
                f"{path}: row {number} has the keys {sorted(row)}; expected text in 'instruction'"
            )
        row_id = str(row["id"]) if row.get("id") is not None else _digest(text)
        if row_id in found:
            if row.get("id") is not None:
                raise ValueError(f"{path}: row {number}: id {row_id!r} occurs twice")
            row_id = f"{row_id}-{number}"
        found[row_id] = {"id": row_id, "instruction": text}
    if not found:
        raise ValueError(f"{path}: holds no instructions")
    return list(found.values())


def _digest(*texts: str) -> str:
    return hashlib.sha256("\x1f".join(texts).encode()).hexdigest()[:12]
