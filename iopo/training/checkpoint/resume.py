"""Whether a run may go on with the config it is given now, and where its metrics must end."""

import json
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from iopo.redact import redact

# Keys that change neither the objective nor the data nor the reference nor the model. All others
# refuse a resume: a key that is added later must be put here by someone who thought about it.
HARMLESS = (
    "run",
    "plan",
    "plan_for",
    "replay_step",
    "export_step",
    "parallel",
    "checkpoint",
    "evaluation",
    "tracker",
    "export",
    "data.cache_dir",
    "data.workers",
    "reference.cache_dir",
    "reference.recheck_rows",
)
# Harmless to what is learned, but not without a trace.
CONSEQUENCES = {
    "optim.epochs": "the learning-rate schedule now ends elsewhere",
    "optim.max_steps": "the learning-rate schedule now ends elsewhere",
    "optim.micro_batch_quads": "other sums of the same numbers: equal up to rounding only",
    "optim.tokens_per_microbatch": "other sums of the same numbers: equal up to rounding only",
    "parallel.split_quads": "other sums of the same numbers: equal up to rounding only",
}


def check_resume(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Sentences on harmless differences between a checkpoint's state.json and the present run.

    saved: from `read_state`. current: {"config": nested dict, "identity": {what: hash},
        "world_size": int}; identity names what the run stands on (data, reference, tokenizer).
    Raises ValueError naming every key that alters the objective, the data, the reference or the
    model.
    """
    current = plain(current)
    notes: list[str] = []
    refused: list[str] = []
    for what in sorted(saved["identity"].keys() | current["identity"].keys()):
        before, now = saved["identity"].get(what), current["identity"].get(what)
        if before != now:
            refused.append(f"the {what} is not the one the run began with: {before} -> {now}")
    old, new = flatten(saved["config"]), flatten(current["config"])
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        change = f"{key}: {before!r} -> {now!r}"
        if key in CONSEQUENCES:
            notes.append(f"{change} ({CONSEQUENCES[key]})")
        elif any(key == name or key.startswith(name + ".") for name in HARMLESS):
            notes.append(change)
        else:
            refused.append(change)
    if refused:
        raise ValueError(
            "this run cannot be resumed with another objective, data, reference or model:\n  "
            + "\n  ".join(refused)
            + "\nSet these back, or start a new run folder"
        )
    if saved["world_size"] != current["world_size"]:
        notes.append(
            f"{saved['world_size']} -> {current['world_size']} processes: same quads in the same "
            "order, but bitwise equality is given up and random streams begin anew"
        )
    return notes


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """`facts` as state.json holds them: enums by value, tuples as lists, secrets redacted."""

    def convert(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, Path):
            return str(value)
        raise TypeError(f"{value!r} has no place in state.json")

    return json.loads(redact(json.dumps(facts, default=convert)))


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def truncate_metrics(path: Path, step: int) -> int:
    """Cut a jsonl file of rows with a "step" after the last row of `step` or before.

    What a killed run wrote after its last checkpoint goes, also a half-written last line; the
    steps will be made again. Returns the number of lines cut; 0 for a file that does not exist.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = 0
    for line in lines:
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        kept += 1
    if kept < len(lines):
        os.truncate(path, sum(map(len, lines[:kept])))
    return len(lines) - kept
