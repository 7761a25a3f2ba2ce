"""Whether a run folder may go on with the config it is given now, and going on."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from iopo.config import Resume, TrainConfig, plain
from iopo.files import weights_hash
from iopo.model.identity import differing
from iopo.model.load import dtype_name
from iopo.model.parallel import TrainModel
from iopo.objectives import OBJECTIVES, Options
from iopo.progress import progress
from iopo.redact import redact_values
from iopo.training import setup
from iopo.training.checkpoint.folders import (
    COMPLETE_FILE,
    latest,
    latest_intact,
    read_state,
    step_of,
)
from iopo.training.checkpoint.tensors import load_state
from iopo.training.inputs import Inputs
from iopo.training.launch.run_folder import read_complete
from iopo.training.reference.sources import inputs_of_other, manifest

log = logging.getLogger(__name__)

# Keys that change neither the objective nor the data nor the reference nor the model. All others
# refuse a resume: a key that is added later must be put here by someone who thought about it.
HARMLESS = (
    *("run", "plan", "plan_for", "replay_step", "export_step"),
    *("parallel", "checkpoint", "evaluation", "tracker", "export"),
    *("data.cache_dir", "data.workers", "reference.cache_dir", "reference.recheck_rows"),
)
OLD_IDENTITY = {"reference and starting weights"}  # before its parts were named
# Harmless to what is learned, but not without a trace.
CONSEQUENCES = dict.fromkeys(
    ("optim.epochs", "optim.max_steps"), "the learning-rate schedule now ends elsewhere"
) | dict.fromkeys(
    ("optim.micro_batch_quads", "optim.tokens_per_microbatch", "parallel.split_quads"),
    "other sums of the same numbers: equal up to rounding only",
)


def fingerprint(cfg: TrainConfig, inputs: Inputs, world_size: int) -> dict[str, Any]:
    """What a checkpoint must agree with: the config, and what the run stands on, part by part.

    {"config": nested dict, "identity": the reference's manifest, "world_size": int}, as JSON holds
    it, without secrets.
    """
    device = "cuda" if setup.backend(cfg.parallel) == "nccl" else "cpu"
    config = plain(cfg)  # with the dtype that auto stands for here: another machine may differ
    config["model"]["dtype"] = dtype_name(cfg.model.dtype, device)
    identity = manifest(cfg.model, cfg.data, inputs, device)
    if (path := cfg.reference.path) is not None:
        identity["reference weights"] = weights_hash(inputs_of_other(inputs, path).model_path or "")
    whole = {"config": config, "identity": identity, "world_size": world_size}
    return redact_values(whole)


def check_resume(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Sentences on harmless differences between a checkpoint's state.json and the present run.

    saved: from `read_state`. current: from `fingerprint`.
    Raises ValueError naming every key that alters the objective, the data, the reference or the
    model.
    """
    notes: list[str] = []
    refused: list[str] = []
    began, is_now = saved["identity"], current["identity"]
    if began.keys() >= OLD_IDENTITY:
        refused.append(
            "an earlier version of iopo saved it, and did not name config.json and others"
        )
    else:
        refused += [
            f"the {what} is not the one the run began with: {began.get(what)} -> {is_now.get(what)}"
            for what in differing(began, is_now)
        ]
    old, new = flatten(saved["config"]), flatten(current["config"])
    # Options that the objective does not read are at their defaults, and were before they existed.
    reads = OBJECTIVES[current["config"]["objective"]["name"]].reads
    unread = {f"objective.{of.name}" for of in fields(Options) if of.name not in reads}
    for key in sorted((old.keys() | new.keys()) - unread):
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
        changes = "\n  ".join(refused)
        raise ValueError(
            "this run cannot be resumed with another objective, data, reference or model:\n  "
            f"{changes}\nSet these back, or start a new run folder"
        )
    if saved["world_size"] != current["world_size"]:
        notes.append(
            f"{saved['world_size']} -> {current['world_size']} processes: same quads in the same "
            "order, but bitwise equality is given up and random streams begin anew"
        )
    return notes


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def refuse_or_note(run: Path, now: dict, *, resume: Resume) -> list[str]:
    """Before anything is written: may this config resume this run folder? Sentences to show.

    Raises ValueError, naming keys, if it may not, if there is a checkpoint and checkpoint.resume is
    never, and if there is none and it is must.
    """
    folder, remarks = latest(run)
    if folder is None:
        _refuse_if_all_damaged(run, remarks)
        if resume is Resume.must:
            found = "; ".join(remarks) or "nothing to resume"
            raise ValueError(
                f"{run} holds no complete checkpoint and checkpoint.resume is must ({found}); give "
                "run= the folder of the run that is to go on"
            )
        return []
    if resume is Resume.never:
        raise ValueError(
            f"{run} holds {folder.name} and checkpoint.resume is never; choose another run="
        )
    return check_resume(read_state(folder), now)


def is_finished(run: Path, now: dict, steps: int) -> bool:
    """Whether the run in this folder reached its end, and `steps`, what is asked for now.

    Raises ValueError, naming keys, if it reached it with another objective, data, reference or
    model; and if more steps are asked for than it made, but it left no checkpoint to go on from.
    """
    ended = read_complete(run)
    if ended is None:
        return False
    check_resume(ended, now)
    if steps <= ended["step"]:
        return True
    if latest(run)[0] is None:
        raise ValueError(
            f"{run} ended after {ended['step']} steps and left no checkpoint, so it cannot go on "
            f"to {steps} (checkpoint.save_every_steps was null); choose another run="
        )
    return False


def _refuse_if_all_damaged(run: Path, remarks: list[str]) -> None:
    """A run that was saved is never begun again in silence: someone must decide that."""
    if any((run / "checkpoints").glob(f"step-*/{COMPLETE_FILE}")):
        found = "\n  ".join(remarks)
        raise ValueError(
            f"{run} has checkpoints, but none of them is intact:\n  {found}\nPut one back from a "
            f"copy, or delete {run / 'checkpoints'} to begin at step 1"
        )


def restore(run: Path, model: TrainModel, optimizer: torch.optim.Optimizer, *, main: bool) -> int:
    """Load the newest intact checkpoint, if any, and return the number of steps done.

    metrics.jsonl is cut to that step, so that no step stands in it twice. Every rank calls it.
    Raises ValueError if there are checkpoints, and all of them are damaged.
    """
    with progress(None, f"checking the checkpoints of {run}"):
        folder, remarks = latest_intact(run)
    for remark in remarks:
        log.info(remark)
    if folder is None:
        _refuse_if_all_damaged(run, remarks)
        done, kept = 0, -1  # nothing counts: the run begins again, and so does its record
    else:
        done = kept = load_checkpoint(folder, model, optimizer)
        log.info(f"resuming from {folder}: step {done} is done, the starting weights are ignored")
    if main and (cut := truncate_metrics(run / "metrics.jsonl", kept)):
        log.info(f"{cut} rows of metrics.jsonl are of steps that are now made again: cut")
    return done


def load_checkpoint(folder: Path, model: TrainModel, optimizer: torch.optim.Optimizer) -> int:
    """Fill model, optimizer and generators as load_state does; returns the number of steps done."""
    with progress(None, f"loading {folder}"):
        load_state(folder, model.parameters, optimizer)
    model.refresh()
    return step_of(folder)


def truncate_metrics(path: Path, step: int) -> int:
    """Cut the rows after `step`, and a half-written last line, off the end of a metrics.jsonl.

    Returns the number of lines cut; 0 for a file that does not exist.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = list(
        takewhile(lambda line: line.endswith(b"\n") and json.loads(line)["step"] <= step, lines)
    )
    if len(kept) < len(lines):
        os.truncate(path, sum(map(len, kept)))
    return len(lines) - len(kept)
