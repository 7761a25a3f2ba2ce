"""Other projects' files: preference sets, read row by row, and seeds.

Texts may be strings or lists of messages ({"role", "content"} or {"from", "value"}). A row that
cannot be used is not an error: it is a `Skipped` with the reason, for the caller to count.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iopo.construct.tasks import digest
from iopo.data.rows import Pair
from iopo.files import iter_records, read_records

log = logging.getLogger(__name__)

PROMPT_KEYS = ("prompt", "instruction", "question", "x")
SKIPPED_TURNS = "several turns"


@dataclass(frozen=True, slots=True)
class Skipped:
    """Why a row is not used."""

    line: int
    reason: str


def preferences(path: Path) -> Iterator[Pair | Skipped]:
    """Rows of a preference set: prompt, chosen, rejected, as strings or messages.

    Without a prompt, it is taken from the first turn of `chosen`. Dialogues of several turns are
    skipped: a member is one prompt and one response.
    """
    for line, row, fault in iter_records(path):
        if fault is not None:
            log.warning("%s:%d: skipped: %s", path, line, fault)
            yield Skipped(line, "not JSON")
        elif isinstance(row, dict):
            yield _pair(line, row)
        else:
            yield Skipped(line, "no object")


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
    row_id = str(row.get("id") or digest(asked, chosen, rejected))
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


def read_seeds(path: str | Path) -> list[dict[str, Any]]:
    """Simple instructions for the TRACE pipeline, as {"id", "instruction"}.

    A .txt file holds one a line; other files hold rows with `instruction` (or `prompt`,
    `question`, `x`) and maybe `id`. A row without an id gets one from its text; where the text
    occurs again, with the row's number after it.
    Raises ValueError on a row without text and on an id given twice.
    """
    path = Path(path)
    if path.suffix == ".txt":
        lines = path.read_text(encoding="utf-8-sig").split("\n")
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
        row_id = str(row["id"]) if row.get("id") is not None else digest(text)
        if row_id in found:
            if row.get("id") is not None:
                raise ValueError(f"{path}: row {number}: id {row_id!r} occurs twice")
            row_id = f"{row_id}-{number}"
        found[row_id] = {"id": row_id, "instruction": text}
    if not found:
        raise ValueError(f"{path}: holds no instructions")
    return list(found.values())
