"""What a row must look like, as a list of faults: one sentence each, without file or line."""

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from iopo.data.columns import text_of

OPTIONAL = {
    "quad": ("id", "system", "c1", "c2"), "pair": ("id", "system"), "sft": ("id", "system"),
    "group": ("id", "system"),
}  # fmt: skip
# The two texts of each tuple must differ, or the row asks for nothing.
DIFFERENT: dict[str, tuple[tuple[str, str], ...]] = {
    "quad": (("x1", "x2"), ("y1", "y2")), "pair": (("chosen", "rejected"),), "sft": (), "group": (),
}  # fmt: skip
GOOD_ROW: dict[str, dict[str, Any]] = {
    "quad": {
        "x1": "Name a fruit. Use capital letters only.",
        "y1": "APPLE",
        "x2": "Name a fruit. Use small letters only.",
        "y2": "apple",
    },
    "pair": {"x": "Name a fruit.", "chosen": "An apple.", "rejected": "A chair."},
    "sft": {"x": "Name a fruit.", "y": "An apple."},
    "group": {"x": "Name a fruit.", "responses": ["An apple.", "A chair."], "rewards": [1.0, 0.0]},
}
REQUIRED = {kind: tuple(row) for kind, row in GOOD_ROW.items()}
# Names other projects give to our keys: a hint only, never read as if they were ours.
ALIASES = {
    "x": ("prompt", "instruction", "question"),
    "y": ("response", "output", "answer", "completion"),
    "system": ("system_prompt",),
    "c1": ("constraints1",),
    "c2": ("constraints2",),
}
# Keys of other formats (Alpaca, ShareGPT, TRL) that hold part of the prompt, and what to do.
_JOIN, _TURNS, _TEXT = "join it to the prompt", "write its turns into the prompt", "text only here"
_WRITE = "write it into the prompt or 'system'"
PROMPT_PARTS = {
    **dict.fromkeys(("prompt", "instruction", "question", "input", "query", "context"), _JOIN),
    **dict.fromkeys(("history", "messages", "conversations"), _TURNS),
    **dict.fromkeys(("tools", "functions", "documents", "chat_template_kwargs"), _WRITE),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _TEXT),
}


def lost(row: Mapping[str, object], used: Sequence[str]) -> list[str]:
    """The keys of PROMPT_PARTS whose texts would be dropped.

    used: for each prompt, all texts of the row that are used with it; a key that only repeats some
    of them, or is empty, is not lost.
    """
    return [
        key
        for key in PROMPT_PARTS
        if row.get(key)
        and any(text not in all_of_it for text in _texts(row[key]) for all_of_it in used)
    ]


def _texts(value: object) -> list[str]:
    """The texts in a value: of messages their contents; anything else as its JSON."""
    if isinstance(value, list):
        return [text for part in value for text in _texts(part)]
    if isinstance(value, dict) and {"role", "from"} & value.keys():
        value = value.get("content", value.get("value"))
    text = value.strip() if isinstance(value, str) else json.dumps(value) if value else ""
    return [text] if text else []


def kind_of(row: Mapping[str, object]) -> str | None:
    """The kind whose required keys the row shares most of; None when none fits or two fit alike."""
    shared = {kind: sum(key in row for key in keys) for kind, keys in REQUIRED.items()}
    best = max(shared.values())
    kinds = [kind for kind, count in shared.items() if count == best]
    return kinds[0] if best > 0 and len(kinds) == 1 else None


def check_row(row: Mapping[str, object], kind: str) -> list[str]:
    """All faults of one decoded row of `kind` (a key of GOOD_ROW); empty when it is good.

    Keys that belong to no kind and look like none of ours (`task`, `source`, `gen`, ...) are fine.
    """
    wanted = REQUIRED[kind] + OPTIONAL[kind]
    typos = {key: ours for key in row if (ours := _meant(key, wanted, row)) is not None}
    faults = [f"unknown key {key!r} (did you mean {ours!r}?)" for key, ours in typos.items()]
    missing = [key for key in REQUIRED[kind] if key not in row and key not in typos.values()]
    keys = ", ".join([*sorted(row)[:12], *(["..."] if len(row) > 12 else [])]) or "(none)"
    faults += [f"{key!r} is missing; found the keys {keys}" for key in missing]
    texts = {
        key: text_of(value) for key in wanted if isinstance(value := row.get(key), str | tuple)
    }
    beside = [text for key, text in texts.items() if not key.startswith("x")]
    beside += _texts(row["responses"]) if kind == "group" and "responses" in row else []
    used = ["\n".join((text, *beside)) for key, text in texts.items() if key.startswith("x")]
    faults += [
        f"{key!r} ({_short(row[key])}) is part of the prompt and would be lost: "
        f"{PROMPT_PARTS[key]}, or delete it"
        for key in lost(row, used or [""])
        if key not in typos
    ]
    if kind == "group" and {"responses", "rewards"} <= row.keys():
        faults += _group_faults(row["responses"], row["rewards"])
    for key in (*REQUIRED[kind], "id", "system"):
        if key in ("responses", "rewards"):
            continue
        if key in row and (row[key] is not None or key in REQUIRED[kind]):
            faults += _text_faults(key, row[key])
    for first, second in DIFFERENT[kind]:
        # Most chat templates strip white space, so texts that differ only there become equal tokens
        one, other = row.get(first), row.get(second)
        if type(one) is type(other) and _stripped(one) == _stripped(other) not in ("", None):
            faults.append(
                f"{first!r} and {second!r} are equal ({_short(row[first])}), expected two texts "
                "that differ in more than white space"
            )
    for key in ("c1", "c2"):
        if kind == "quad" and row.get(key) is not None:
            faults += _constraint_faults(key, row[key])
    return faults


def _meant(key: str, wanted: tuple[str, ...], row: Mapping[str, object]) -> str | None:
    """Our key that an unknown `key` was probably meant to be, if any."""
    if key in wanted:
        return None
    plain = re.sub("[-_ ]", "", key.lower().strip())
    if plain in wanted:
        return plain
    for ours, aliases in ALIASES.items():
        if key.lower() in aliases and ours in wanted and ours not in row:
            return ours
    close = difflib.get_close_matches(key.lower(), wanted, n=1, cutoff=0.8)
    return close[0] if close and len(key) > 3 else None  # "id" and "x1" are near everything


def _stripped(value: object) -> object:
    """A text without blanks around it, or turns of such texts; None of anything else."""
    if isinstance(value, tuple):
        return tuple((role, text.strip()) for role, text in value)
    return value.strip() if isinstance(value, str) else None


def _text_faults(key: str, value: object) -> list[str]:
    if isinstance(value, tuple):
        empty = [n for n, (_, text) in enumerate(value) if not text.strip()]
        return [f"{key!r}: turn {n} is empty, expected text" for n in empty]
    if not isinstance(value, str):
        return [f"{key!r} is {_json_type(value)} ({_short(value)}), expected a string"]
    if not value.strip():
        return [f"{key!r} is empty, expected text"]
    return []


def _group_faults(responses: object, rewards: object) -> list[str]:
    faults = []
    texts = responses if isinstance(responses, list) else []
    if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        expected = "expected a list of two texts or more"
        faults.append(f"'responses' is {_json_type(responses)} ({_short(responses)}), {expected}")
    numbers: list[Any] = rewards if isinstance(rewards, list) else [None]
    if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        expected = "expected a list of finite numbers"
        faults.append(f"'rewards' is {_json_type(rewards)} ({_short(rewards)}), {expected}")
    if not faults and len(texts) != len(numbers):
        faults.append(f"{len(texts)} 'responses' have {len(numbers)} 'rewards', expected one each")
    return faults


def _constraint_faults(key: str, value: object) -> list[str]:
    expected = 'expected a list of {"kind": string, "params": object, "text": string}'
    if not isinstance(value, list):
        return [f"{key!r} is {_json_type(value)}, {expected}"]
    for number, constraint in enumerate(value):
        given = constraint if isinstance(constraint, dict) else {}
        if [type(given.get(name)) for name in ("kind", "params", "text")] != [str, dict, str]:
            return [f"{key!r}[{number}] is {_short(constraint)}, {expected}"]
    return []


def _json_type(value: object) -> str:
    names = {
        type(None): "null", str: "a string", bool: "a boolean", int: "a number",
        float: "a number", list: "a list", dict: "an object",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
