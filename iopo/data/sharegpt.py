"""The file format of the authors' release (ShareGPT messages), turned into the keys of a quad.

One row is one quad. `conversations` holds x1 and x2 as two human turns, `chosen` is y1, and
`rejected` is y2: the right answer to x2, not a bad answer (released code,
data/processors/pairwise.py; the release itself cannot load this file, because its converter refuses
two human turns in a row).
"""

from collections.abc import Mapping

GOOD_ROW = {
    "conversations": [
        {"from": "human", "value": "Name a fruit. Use capital letters only."},
        {"from": "human", "value": "Name a fruit. Use small letters only."},
    ],
    "chosen": {"from": "gpt", "value": "APPLE"},
    "rejected": {"from": "gpt", "value": "apple"},
}


def is_sharegpt(row: Mapping[str, object]) -> bool:
    """True for rows in the released format, by their `conversations` key."""
    return "conversations" in row


def to_quad(row: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """The row under the keys of a quad, and the faults that stopped parts of it from moving.

    A leading turn from `system` becomes the system prompt of both instructions. Dialogues of
    several turns (2(2T-1) messages for T turns) are refused: a member is one prompt, one response.
    """
    quad = {key: row[key] for key in ("id", "system", "c1", "c2") if key in row}
    turns, faults = _turns(row["conversations"])
    if faults:
        return quad, faults
    if turns and turns[0][0] == "system":
        if "system" in row:
            faults.append("a system prompt stands both in 'system' and in 'conversations'")
        quad["system"] = turns.pop(0)[1]
    roles = [role for role, _ in turns]
    if roles == ["human", "human"]:
        quad["x1"], quad["x2"] = turns[0][1], turns[1][1]
    else:
        faults.append(_wrong_turns(roles))
    for key, name in (("chosen", "y1"), ("rejected", "y2")):
        if key not in row:
            faults.append(f"{key!r} ({name}) is missing")
            continue
        reply, reply_faults = _turns([row[key]])
        faults += [f"{key!r}: {fault}" for fault in reply_faults]
        if reply and reply[0][0] != "gpt":
            faults.append(f"{key!r} is from {reply[0][0]!r}, expected 'gpt'")
        elif reply:
            quad[name] = reply[0][1]
    return quad, faults


def _turns(messages: object) -> tuple[list[tuple[str, object]], list[str]]:
    """(role, text) of each message, or a fault."""
    if not isinstance(messages, list):
        return [], [f"'conversations' is {type(messages).__name__}, expected a list of messages"]
    turns: list[tuple[str, object]] = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
            found = sorted(message) if isinstance(message, dict) else type(message).__name__
            return [], [f'message {number} is {found}, expected {{"from": ..., "value": ...}}']
        turns.append((str(message["from"]), message["value"]))
    return turns, []


def _wrong_turns(roles: list[str]) -> str:
    found = f"'conversations' has the turns {roles}, expected two human turns (x1 and x2)"
    if roles == ["human"]:
        return found + "; one turn is an ordinary preference pair: give it as x, chosen, rejected"
    if len(roles) > 2 and len(roles) % 4 == 2:
        return (
            found + "; dialogues of several turns are not supported, because a member is one prompt"
            " and one response: render the earlier turns into x1 and x2"
        )
    return found
