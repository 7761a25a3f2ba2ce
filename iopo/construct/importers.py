"""Other projects' files: their schemas, preference sets row by row, and seeds.

Texts may be strings or lists of messages ({"role", "content"} or {"from", "value"}).
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iopo.construct.tasks import digest
from iopo.data import checks
from iopo.data.columns import (
    Prompt,
    given_system,
    is_sharegpt,
    own_columns,
    read_turns,
    text_of,
)
from iopo.data.rows import Pair
from iopo.files import Place, given_records, iter_records

log = logging.getLogger(__name__)
Row = dict[str, Any]

PROMPT_KEYS = ("prompt", "instruction", "question", "x")
FURTHER_KEYS = ("input", "query")  # Alpaca's, on a line below; alone, they are the prompt
DIALOGUES = ("conversations", "messages")
SYSTEM_KEYS = ("system", *checks.ALIASES["system"])
_READ = {*PROMPT_KEYS, *FURTHER_KEYS, *DIALOGUES, "chosen", "rejected", "system", "id", "text"}


@dataclass(frozen=True)
class Schema:
    """A public set, recognised by its columns.

    unread: columns that are known and hold nothing of a prompt.
    """

    name: str
    columns: frozenset[str]
    unread: frozenset[str]


def _schema(name: str, columns: str, unread: str = "") -> Schema:
    return Schema(name, frozenset(columns.split()), frozenset(unread.split()))


SCHEMAS = (
    _schema(
        "tulu-3 persona instruction-following pairs", "prompt constraints chosen rejected",
        "constraints chonsen_model chosen_model rejected_model",
    ),
    _schema("Dolci-Instruct-DPO", "chosen rejected preference_type",
            "preference_type prompt_id chosen_model rejected_model"),
    _schema("tulu-3 preference mixture", "prompt chosen rejected source", "source"),
    _schema("UltraFeedback binarised", "prompt chosen rejected score_chosen score_rejected",
            "prompt_id score_chosen score_rejected"),
    _schema("HelpSteer3 preference", "context response1 response2 overall_preference",
            "domain language individual_preference"),
    _schema("RLVR-IFeval", "messages ground_truth constraint_type",
            "ground_truth dataset constraint_type constraint"),
    _schema("IF_multi_constraints_upto5", "key messages ground_truth constraint_type",
            "key ground_truth dataset constraint_type constraint"),
    _schema("MulDimIF", "conversations constraints constraint_pattern",
            "constraints constraint_pattern difficulty"),
    # functions is Python source of strangers: never run
    _schema("VerInstruct", "prompt checkers functions", "checkers functions"),
)  # fmt: skip


def schema_of(row: Mapping[str, Any]) -> Schema | None:
    """The public set whose columns the row has; the one with most, if several."""
    fitting = [schema for schema in SCHEMAS if schema.columns <= row.keys()]
    return max(fitting, key=lambda schema: len(schema.columns), default=None)


def name_of(row: Mapping[str, Any]) -> str:
    """The public set that the row is of, or the columns that are known."""
    schema = schema_of(row)
    known = ", ".join(sorted(row.keys() & _READ))
    return f"columns {known}" if schema is None else schema.name


def _without_unread(row: Row) -> Row:
    """The row without the columns of its set that hold nothing of a prompt."""
    schema = schema_of(row)
    return {key: v for key, v in row.items() if schema is None or key not in schema.unread}


def _announce(source: str | Path, row: Mapping[str, Any], read_as: str) -> None:
    """Say what a source is taken for, by its first row."""
    schema = schema_of(row)
    unread = frozenset[str]() if schema is None else schema.unread
    taken = _READ | (schema.columns if schema else frozenset())
    line = f"{source}: {name_of(row)}, read as {read_as}"
    if unread:
        line += f"; not read: {', '.join(sorted(unread & row.keys()))}"
    if unknown := sorted(row.keys() - taken - unread):
        line += f"; unknown columns: {', '.join(unknown)}"
    log.info("%s", line)


def preferences(source: str | Path) -> Iterator[Pair | str]:
    """Rows of a preference set (prompt, chosen, rejected), or why a row cannot be used.

    Alpaca's `input` is joined to its instruction; of HelpSteer3 the preferred response is `chosen`,
    the first where none is. Rows that hold more of a prompt (history, tools, images) are skipped.
    """
    announced = False
    for place, row, fault in iter_records(source):
        if fault is None and isinstance(row, dict):
            if not announced:
                _announce(source, row, "preferences")
                announced = True
            yield pair_of(row)
            continue
        log.warning("%s: skipped: %s", place, fault or "expected an object")
        if fault is None:
            yield "no object"
        else:
            yield "not JSON" if row is None else "half of a surrogate pair"


def pair_of(row: Row) -> Pair | str:
    """The pair of one row of a preference set, or why there is none."""
    row = _without_unread(row)
    if "response1" in row and "context" in row:
        row = _from_helpsteer(row)
    if not row.get("chosen") or not row.get("rejected"):
        return "no chosen or no rejected"
    if is_sharegpt(row) and len([r for r, _ in read_turns(row["conversations"])[0]]) % 2 == 0:
        return "conversations of x1 and x2: these are quads"
    row = _joined(row)
    ours, faults = own_columns(row)
    if faults:  # alike ones under one reason
        return re.sub(r"\[.*?\]|\d+", "...", faults[0])
    asked, right, wrong = _stripped(ours.get("x")), ours["chosen"], ours["rejected"]
    if not (isinstance(right, str) and isinstance(wrong, str)):
        return "no text"
    right, wrong = right.strip(), wrong.strip()
    if asked is None:
        return "no prompt"
    system = ours.get("system")
    if unread := checks.lost(ours, ["\n".join((text_of(asked), system or "", right, wrong))]):
        return f"{unread[0]!r} is part of the prompt"
    if not (text_of(asked).strip() and right and wrong):
        return "empty text"
    if right == wrong:
        return "chosen = rejected"
    row_id = str(ours.get("id") or digest(text_of(asked), right, wrong))
    return Pair(row_id, asked, right, wrong, system.strip() if system else None)


def _from_helpsteer(row: Row) -> Row:
    """overall_preference is below 0 where response1 is preferred, 0 where none is."""
    first, second = row.pop("response1"), row.pop("response2")
    if row.pop("overall_preference", 0) > 0:
        first, second = second, first
    return {**row, "prompt": row.pop("context"), "chosen": first, "rejected": second}


def _stripped(prompt: Prompt | None) -> Prompt | None:
    if isinstance(prompt, tuple):
        return tuple((role, text.strip()) for role, text in prompt)
    return prompt.strip() if isinstance(prompt, str) else None


def _joined(row: Row) -> Row:
    """The row with its prompt, whatever its name, under `prompt`; two texts become two lines."""
    at = next((key for key in PROMPT_KEYS if row.get(key)), None)
    if at is None and not any(row.get(key) for key in FURTHER_KEYS):
        at = next((key for key in DIALOGUES if row.get(key)), None)
    prompt = None if at is None else row[at]
    more = {key: row[key] for key in FURTHER_KEYS if isinstance(row.get(key), str)}
    if prompt is not None and not isinstance(prompt, str):
        more = {}
    rest = {key: value for key, value in row.items() if key not in (at, *more)}
    if isinstance(prompt, str) or more:
        texts = [text for text in (prompt, *more.values()) if text and text.strip()]
        prompt = "\n".join(texts)
    return rest if prompt is None else {**rest, "prompt": prompt}


def read_seeds(source: str | Path) -> list[dict[str, Any]]:
    """Simple instructions for the TRACE pipeline, as {"id", "instruction"}.

    A .txt file holds one a line; other sources hold rows with `instruction` (or `prompt`,
    `question`, `x`, or `messages` or `conversations` up to their last turn of the user, which must
    be their only one), Alpaca's `input` joined to it, and maybe `id`, which else is made from the
    text and, on repetition, the row. Raises ValueError on a row that cannot be read, has no text or
    holds more of a prompt, and on an id given twice.
    """
    if str(source).endswith(".txt"):
        path = Path(source)
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 (byte {error.start} of it)") from error
        numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
        rows = [(Place(path, n), {"instruction": line}) for n, line in numbered]
    else:
        rows = given_records(source)
        if rows:
            _announce(source, rows[0][1], "seeds")
    found: dict[str, dict[str, Any]] = {}
    for number, (place, row) in enumerate(rows, 1):
        try:
            text = instruction_of(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if not text:
            raise ValueError(f"{place}: keys {sorted(row)}; expected text in 'instruction'")
        row_id = str(row["id"]) if row.get("id") is not None else digest(text)
        if row_id in found:
            if row.get("id") is not None:
                raise ValueError(f"{place}: id {row_id!r} occurs twice")
            row_id = f"{row_id}-{number}"
        found[row_id] = {"id": row_id, "instruction": text}
    if not found:
        raise ValueError(f"{source}: holds no instructions")
    return list(found.values())


def instruction_of(row: Row) -> str:
    """The instruction of a seed; empty where there is none, or a dialogue.

    Raises ValueError where the row holds more of the prompt: a system prompt, context, history.
    """
    row = _without_unread(row)
    turns = read_turns(_joined(row).get("prompt"), "user")[0]
    roles = [role for role, _ in turns]
    if roles.count("user") != 1:
        return ""
    at = roles.index("user")  # what follows is an answer
    more = [key for key in SYSTEM_KEYS if given_system(row.get(key))]
    more += [role for role, text in turns[:at] if text.strip()]
    more += checks.lost(row, ["\n".join(text for _, text in turns[at:])])
    if more:
        raise ValueError(
            f"{more[0]!r} is part of the prompt and would be lost: "
            f"{checks.PROMPT_PARTS.get(more[0], 'join it to the prompt')}, or delete it"
        )
    return turns[at][1].strip()
