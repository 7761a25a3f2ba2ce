"""Rows under other projects' column names, and prompts of several turns, as rows of our own.

TRL (https://huggingface.co/docs/trl/dataset_formats): prompt, chosen, rejected; prompt, completion;
messages; texts or lists of messages. Without a prompt it is what stands before the last message of
both sides. The authors' release: `conversations` holds x1 and x2, `chosen` is y1, and `rejected` is
y2, the right answer to x2 and not a bad answer (released code, data/processors/pairwise.py; the
release itself cannot load this file, because its converter refuses two human turns in a row).
"""

from collections.abc import Mapping
from typing import Any

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}  # names of others for ours
Turns = tuple[tuple[str, str], ...]  # (role, text)
# One user turn is a text. More turns end with one of the user; a first turn of the system is kept
# only where x1 and x2 have different ones.
Prompt = str | Turns


def text_of(prompt: Prompt) -> str:
    """All text of a prompt, a turn after the other."""
    return prompt if isinstance(prompt, str) else "\n".join(text for _, text in prompt)


def first_turn(prompt: Prompt) -> str:
    """The text of the user's first turn: dialogues that begin alike share it."""
    return prompt if isinstance(prompt, str) else next(t for role, t in prompt if role == "user")


def last_turn(prompt: Prompt) -> str:
    """The text of the last turn, which is the user's."""
    return prompt if isinstance(prompt, str) else prompt[-1][1]


def with_last(prompt: Prompt, text: str) -> Prompt:
    """The prompt with another text in its last turn."""
    return text if isinstance(prompt, str) else (*prompt[:-1], ("user", text))


def messages_of(prompt: Prompt) -> list[dict[str, str]]:
    """The turns of a prompt as messages."""
    turns = (("user", prompt),) if isinstance(prompt, str) else prompt
    return [{"role": role, "content": text} for role, text in turns]


def as_written(prompt: Prompt) -> str | list[dict[str, str]]:
    """The prompt as it stands in a file of rows."""
    return prompt if isinstance(prompt, str) else messages_of(prompt)


def read_prompt(value: object) -> Prompt | None:
    """The prompt that stands in a row of ours; None where it is none."""
    if isinstance(value, str):
        return value
    turns, fault = read_turns(value)
    return None if fault or _prompt_fault(turns) else _prompt(turns)


def read_turns(
    messages: object, speaker: str | None = None
) -> tuple[list[tuple[str, str]], str | None]:
    """(role, text) of each message, and what is wrong with them, if anything: then no turns.

    messages: a message or a list of them, {"role", "content"} or {"from", "value"}; with a
    `speaker`, a text is one turn of theirs. A content may be a list of parts that are texts. Roles
    are system, user, assistant and what else is there (tool, ...); human, gpt and model are read as
    ours.
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
        if given.get("tool_calls") or given.get("function_call"):
            return [], f"message {number} calls tools, which are not supported"
        if isinstance(text, list) and all(isinstance(part, dict) for part in text):
            if other := [str(p.get("type")) for p in text if p.get("type") != "text"]:
                return [], f"message {number} holds a part of type {other[0]!r}: text only here"
            text = "".join(str(part.get("text")) for part in text)
        if not isinstance(role, str) or not isinstance(text, str):
            found = sorted(message) if isinstance(message, dict) else type(message).__name__
            expected = '{"from": ..., "value": ...} or {"role": ..., "content": ...}, both texts'
            return [], f"message {number} is {found}, expected {expected}"
        turns.append((ROLES.get(role, role), text))
    return turns, None


def given_system(value: Any) -> Any:
    """A row's system prompt; None for an empty one, which other formats write for none."""
    return None if isinstance(value, str) and not value.strip() else value


def is_sharegpt(row: Mapping[str, object]) -> bool:
    """Whether the row is one of the authors' release."""
    return "conversations" in row and not {"x", "x1", "prompt"} & row.keys()


def own_columns(row: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The row under our keys, prompts as `Prompt`, and the faults that kept parts from moving."""
    out = dict(row)
    if "system" in out:
        out["system"] = given_system(out["system"])
    if is_sharegpt(row):
        return _from_sharegpt(out)
    if "x1" in row or "x2" in row:
        return _quad(out)
    if "responses" in row:  # of a group: only its prompt may be messages
        return _moved(out, "x", {}) if isinstance(row.get("x"), list) else (out, [])
    sources = {name: name for name in ("chosen", "rejected") if name in row}
    if not sources and (y := next((k for k in ("y", "completion", "messages") if k in row), None)):
        sources = {"y": y}
    at = next((key for key in ("x", "prompt") if key in row), None)
    columns = [key for key in (at, *sources.values()) if key is not None]
    foreign = {"prompt", "completion", "messages"} & {*columns}
    if not sources or not (foreign or any(isinstance(row[key], list | dict) for key in columns)):
        return out, []
    return _moved(out, at, sources)


def _moved(
    row: dict[str, Any], at: str | None, sources: dict[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """The row with `x` from the column `at` and replies (ours -> column), all texts or messages."""
    out = {key: value for key, value in row.items() if key not in (at, *sources.values())}
    if isinstance(out.get("id"), int) and not isinstance(out["id"], bool):
        out["id"] = str(out["id"])
    faults: list[str] = []
    prompts: list[list[tuple[str, str]]] = []  # what stands before each reply, where something does
    given: list[tuple[str, str]] | None = None
    if at is not None:
        given, fault = read_turns(row[at], "user")
        faults += [f"{at!r}: {fault}"] if fault else []
    for ours, column in sources.items():
        side, fault = read_turns(row[column], "assistant")
        roles = [role for role, _ in side]
        if fault:
            faults.append(f"{column!r}: {fault}")
        elif roles[-1] != "assistant":
            what = "there is no response: such prompts are seeds" if column == "messages" else ""
            faults.append(
                f"{column!r} has the turns {roles}, expected one of the assistant at the end"
                + (f"; {what}" if what else "")
            )
        else:
            out[ours] = side[-1][1]
            prompts.append(side[:-1])
    if faults:
        return out, faults
    plain = [[(role, text.strip()) for role, text in before] for before in prompts]
    if plain[1:] and plain[0] != plain[1] and (given is None or all(plain)):
        return out, ["'chosen' and 'rejected' differ before their last turn, expected one prompt"]
    before = next(filter(None, prompts), [])
    turns = before or given or []
    if given is not None and before and not _texts(given) <= _texts(before):
        if not _texts(before) <= _texts(given):
            column = next(iter(sources.values()))
            return out, [f"{at!r} is not what stands before the last turn of {column!r}"]
        turns = given
    systems = {text for role, text in (*turns, *(given or ())) if role == "system" and text.strip()}
    systems |= {row["system"]} if isinstance(row.get("system"), str) else set()
    if len(systems) > 1:
        return out, ["the row has several system prompts, expected one, at the start"]
    if systems:
        out["system"] = systems.pop()
    if turns:
        turns = turns[1:] if turns[0][0] == "system" else turns
        if fault := _prompt_fault(turns):
            return out, [f"{at or next(iter(sources.values()))!r} {fault}"]
        out["x"] = _prompt(turns)
    return out, []


def _texts(turns: list[tuple[str, str]]) -> set[str]:
    return {text.strip() for role, text in turns if role != "system"}


def _prompt(turns: list[tuple[str, str]]) -> Prompt:
    return turns[0][1] if [role for role, _ in turns] == ["user"] else tuple(turns)


def _prompt_fault(turns: list[tuple[str, str]]) -> str | None:
    """What keeps turns from being a prompt; they may begin with the system's."""
    roles = [role for role, _ in turns]
    if other := sorted({*roles} - {"system", "user", "assistant"}):
        return f"has turns of {', '.join(other)}: tools are not supported"
    if not roles or roles[-1] != "user" or "system" in roles[1:]:
        return f"has the turns {roles}, expected one of the user at the end, the system's first"
    return None


def _quad(row: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A quad whose prompts may be lists of messages, and its responses messages."""
    faults: list[str] = []
    prompts: dict[str, list[tuple[str, str]]] = {}
    for key in ("x1", "x2"):
        if not isinstance(row.get(key), list):
            continue
        turns, fault = read_turns(row[key])
        if fault or (fault := _prompt_fault(turns)):
            faults.append(f"{key!r} {fault}")
        else:
            prompts[key] = turns
    for key in ("y1", "y2"):
        if isinstance(row.get(key), list | dict):
            reply, fault = read_turns(row[key])
            if fault or [role for role, _ in reply] != ["assistant"]:
                faults.append(f"{key!r}: {fault or 'expected one message of the assistant'}")
            else:
                row[key] = reply[0][1]
    systems = [turns[0][1] if turns[0][0] == "system" else None for turns in prompts.values()]
    if any(systems) and row.get("system") is not None:
        faults.append("a system prompt stands both in 'system' and in a prompt")
    elif len(systems) == 2 and systems[0] == systems[1] and systems[0] is not None:
        row["system"] = given_system(systems[0])
        prompts = {key: turns[1:] for key, turns in prompts.items()}
    return row | {key: _prompt(turns) for key, turns in prompts.items()}, faults


def _from_sharegpt(row: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The row under the keys of a quad.

    A leading turn from `system` becomes the system prompt of both instructions. The first half of
    the turns is x1, the second x2: each begins and ends with a turn of the user.
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
    half = len(roles) // 2
    if roles and roles == 2 * (["user", "assistant"] * half)[:half] and half % 2:
        quad["x1"], quad["x2"] = _prompt(turns[:half]), _prompt(turns[half:])
    else:
        fault = f"'conversations' has the turns {roles}, expected two user turns (x1 and x2)"
        if roles == ["user"]:
            fault += "; one turn is an ordinary preference pair: give it as x, chosen, rejected"
        if len(roles) > 2:
            fault += " or two dialogues of one length, each from a user turn to a user turn"
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
