"""Other projects' files: preference sets, read row by row, and seeds.

Texts may be strings or lists of messages ({"role", "content"} or {"from", "value"}).
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from iopo.construct.tasks import digest
from iopo.data import checks
from iopo.data.rows import Pair, read_turns
from iopo.files import Place, given_records, iter_records

log = logging.getLogger(__name__)

PROMPT_KEYS = ("prompt", "instruction", "question", "x")
FURTHER_KEYS = ("input", "query")  # Alpaca's, on a line below; alone, they are the prompt
DIALOGUES = ("conversations", "messages")


def preferences(source: str | Path) -> Iterator[Pair | str]:
    """Rows of a preference set (prompt, chosen, rejected), or why a row cannot be used.

    Alpaca's `input` is joined to its instruction. Without a prompt, it is taken from the dialogue
    or from the first turn of `chosen`. Dialogues of several turns, and rows that hold more of a
    prompt (history, tools, images), are skipped: a member is one prompt and one response.
    """
    for place, row, fault in iter_records(source):
        if fault is None and isinstance(row, dict):
            yield _pair(row)
            continue
        log.warning("%s: skipped: %s", place, fault or "expected an object")
        if fault is None:
            yield "no object"
        else:
            yield "not JSON" if row is None else "half of a surrogate pair"


def _pair(row: Mapping[str, Any]) -> Pair | str:
    chosen, rejected = (_turns(row.get(key), "assistant") for key in ("chosen", "rejected"))
    if not chosen or not rejected:
        return "no chosen or no rejected"
    asked: str | None = None
    system: str | None = None
    prompt = _prompt(row) or next((row[key] for key in DIALOGUES if row.get(key)), None)
    if prompt:
        turns = _turns(prompt, "user")
        if [role for role, _ in turns if role != "system"] != ["user"]:
            return "several turns"
        asked, system = dict(turns)["user"], dict(turns).get("system")
    if isinstance(row.get("system"), str):
        system = row["system"].strip() or system
    answers = []
    for side in (chosen, rejected):
        turns = [(role, text) for role, text in side if role != "system"]
        if [role for role, _ in turns] not in (["assistant"], ["user", "assistant"]):
            return "several turns"
        if len(turns) == 2:
            asked = asked or turns[0][1]
            if turns[0][1] != asked:
                return "the two sides answer different prompts"
        system = system or dict(side).get("system")
        answers.append(turns[-1][1])
    if asked is None:
        return "no prompt"
    right, wrong = answers
    if unread := checks.lost(row, ["\n".join((asked, system or "", right, wrong))]):
        return f"{unread[0]!r} is part of the prompt"
    if not (asked and right and wrong):
        return "empty text"
    if right == wrong:
        return "chosen = rejected"
    row_id = str(row.get("id") or digest(asked, right, wrong))
    return Pair(row_id, asked, right, wrong, system or None)


def _turns(value: object, speaker: str) -> list[tuple[str, str]]:
    """(role, text without blanks around it) of messages or a text; empty if it is neither."""
    return [(role, text.strip()) for role, text in read_turns(value, speaker)[0]]


def _prompt(row: Mapping[str, Any]) -> Any:
    """A row's text, or messages, under any of its names; two texts become two lines."""
    prompt = next((row[key] for key in PROMPT_KEYS if row.get(key)), None)
    more = [row[key] for key in FURTHER_KEYS if isinstance(row.get(key), str) and row[key].strip()]
    if prompt is not None and not isinstance(prompt, str):
        return prompt
    return "\n".join(text for text in (prompt, *more) if text)


def read_seeds(path: str | Path) -> list[dict[str, Any]]:
    """Simple instructions for the TRACE pipeline, as {"id", "instruction"}.

    A .txt file holds one a line; other files hold rows with `instruction` (or `prompt`,
    `question`, `x`), Alpaca's `input` joined to it, and maybe `id`, which else is made from the
    text and, on repetition, the row. Raises ValueError on a row that cannot be read, has no text or
    holds more of a prompt, and on an id given twice.
    """
    path = Path(path)
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 (byte {error.start} of it)") from error
        numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
        rows = [(Place(path, n), {"instruction": line}) for n, line in numbered]
    else:
        rows = given_records(path)
    found: dict[str, dict[str, Any]] = {}
    for number, (place, row) in enumerate(rows, 1):
        text = _prompt(row)
        text = text.strip() if isinstance(text, str) else ""
        if not text:
            raise ValueError(f"{place}: keys {sorted(row)}; expected text in 'instruction'")
        if unread := checks.lost(row, [text]):
            raise ValueError(
                f"{place}: {unread[0]!r} is part of the prompt and would be lost: "
                f"{checks.PROMPT_PARTS[unread[0]]}, or delete it"
            )
        row_id = str(row["id"]) if row.get("id") is not None else digest(text)
        if row_id in found:
            if row.get("id") is not None:
                raise ValueError(f"{place}: id {row_id!r} occurs twice")
            row_id = f"{row_id}-{number}"
        found[row_id] = {"id": row_id, "instruction": text}
    if not found:
        raise ValueError(f"{path}: holds no instructions")
    return list(found.values())
