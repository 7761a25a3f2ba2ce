"""Checkpoint folders on disk: which are whole, which is the latest, which may go.

checkpoints/step-00001200/
    __0_0.distcp, ...   tensors: parameters, optimizer state, generator states (one per rank)
    .metadata           index of the tensors
    state.json          step, config, hashes, world size, metrics: readable without torch
    COMPLETE            written last: size and sha256 of every file above
checkpoints/step-00001300.partial/   being written, or left by a crash: never read
"""

import json
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from iopo.files import sha256_file, write_text
from iopo.training.launch.placement import from_rank_0

COMPLETE_FILE = "COMPLETE"
STATE_FILE = "state.json"
_PARTIAL = ".partial"


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def partial_of(run_dir: Path, step: int) -> Path:
    folder = folder_of(run_dir, step)
    return folder.with_name(folder.name + _PARTIAL)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def read_state(folder: Path) -> dict[str, Any]:
    """The checkpoint's state.json."""
    return json.loads((folder / STATE_FILE).read_text())


def complete_folders(run_dir: Path) -> tuple[list[Path], list[str]]:
    """Folders with COMPLETE and files of the right sizes, oldest first; remarks on the others."""
    complete, remarks = [], []
    for folder in sorted((run_dir / "checkpoints").glob("step-*")):
        if folder.name.endswith(_PARTIAL):
            remarks.append(f"{folder} was being written when the run ended: ignored")
        elif not (folder / COMPLETE_FILE).exists():
            remarks.append(f"{folder} has no {COMPLETE_FILE} file: ignored")
        elif problem := find_damage(folder, sizes_only=True):
            remarks.append(f"{folder} is damaged ({problem}): ignored")
        else:
            complete.append(folder)
    return complete, remarks


def find_damage(folder: Path, *, sizes_only: bool, part: int = 0, parts: int = 1) -> str | None:
    """What differs from the sizes, or also the hashes, in COMPLETE; None if nothing does.

    part, parts: look at every parts-th file only, so that several processes can share the work.
    """
    recorded = json.loads((folder / COMPLETE_FILE).read_text())["files"]
    for name, expected in sorted(recorded.items())[part::parts]:
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
        if not sizes_only and sha256_file(path) != expected["sha256"]:
            return f"{name} has another sha256 than when it was written"
    return None


def latest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint, by its files' sizes, and remarks on those left out."""
    complete, remarks = complete_folders(run_dir)
    return (complete[-1] if complete else None), remarks


def latest_intact(run_dir: Path) -> tuple[Path | None, list[str]]:
    """As `latest`, but every byte is compared with its hash; all ranks call it and share the work.

    The one to resume from: a damaged newest checkpoint costs the steps since the one before it.
    """
    complete, remarks = from_rank_0(lambda: complete_folders(run_dir))
    rank, world = dist.get_rank(), dist.get_world_size()
    for folder in reversed(complete):
        damage = first_of_ranks(find_damage(folder, sizes_only=False, part=rank, parts=world))
        if damage is None:
            return folder, remarks
        remarks.append(f"{folder} is damaged ({damage}): ignored")
    return None, remarks


def first_of_ranks(problem: str | None, group: dist.ProcessGroup | None = None) -> str | None:
    """The problem of the lowest rank that has one, on every rank; None if none has."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=group)
    return next((p for p in problems if p is not None), None)


def publish(run_dir: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    """Turn the partial folder into the checkpoint of `step`: rename, then COMPLETE."""
    partial, folder = partial_of(run_dir, step), folder_of(run_dir, step)
    if folder.exists():  # an incomplete or damaged one, or one that this run went back behind
        remove(folder)
    partial.rename(folder)
    _sync_folder(folder.parent)
    text = json.dumps({"step": step, "files": files}, indent=1, sort_keys=True)
    write_text(folder / COMPLETE_FILE, text + "\n")
    _sync_folder(folder)


def prune(run_dir: Path, keep: int, best_metric: str | None) -> None:
    """Remove complete checkpoints but the newest `keep` and the best one.

    best_metric: the lowest loss or the highest of others, the later of equals; None: no best one.
    """
    complete, _ = complete_folders(run_dir)
    kept, scored = set(complete[-keep:]), []
    for folder in complete if best_metric is not None else []:
        value = read_state(folder)["metrics"].get(best_metric, math.nan)
        if math.isfinite(value):
            scored.append((-value if best_metric == "loss" else value, folder))
    if scored:
        kept.add(max(scored)[1])
    for folder in complete:
        if folder not in kept:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint; a crash on the way leaves it incomplete, never damaged."""
    (folder / COMPLETE_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder)


def discard(run_dir: Path, step: int) -> None:
    """Remove the checkpoint of `step`, if there is one, and the folder of checkpoints if empty."""
    folder = folder_of(run_dir, step)
    if folder.exists():
        remove(folder)
    with suppress(OSError):
        folder.parent.rmdir()


def _sync_folder(folder: Path) -> None:
    """Force a rename to disk: it is the folder's change, not the file's."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
