"""Going on where a run folder's newest complete checkpoint left off."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from iopo.config import TrainConfig, plain
from iopo.model.parallel import Prepared
from iopo.training import references, setup
from iopo.training.checkpoint import latest, latest_intact
from iopo.training.checkpoint_files import read_state
from iopo.training.checkpoint_tensors import load_state
from iopo.training.inputs import Inputs
from iopo.training.placement import Ranks
from iopo.training.resume import check_resume, truncate_metrics


def facts(cfg: TrainConfig, inputs: Inputs, world_size: int) -> dict[str, Any]:
    """What a checkpoint must agree with: the config, and hashes of what the run stands on."""
    device = "cuda" if setup.backend(cfg) == "nccl" else "cpu"
    reference = references.manifest(cfg, inputs, device).hash()
    identity = {
        "data": inputs.data_hash,
        "tokenizer": inputs.tokenizer_hash,
        "reference and starting weights": reference,
    }
    return {"config": plain(cfg), "identity": identity, "world_size": world_size}


def refuse_or_note(run: Path, now: dict, *, resume: bool) -> list[str]:
    """Before anything is written: may this run folder be resumed by this config?

    Returns sentences for the person. Raises ValueError, naming keys, if it may not, or if there is
    a checkpoint and checkpoint.resume is off.
    """
    folder, _ = latest(run)
    if folder is None:
        return []
    if not resume:
        raise ValueError(
            f"{run} holds {folder.name} and checkpoint.resume is false; choose another run="
        )
    return check_resume(read_state(folder), now)


def restore(
    run: Path,
    prepared: Prepared,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    say: Callable[[str], None],
) -> int:
    """Load the newest intact checkpoint, if any, and return the number of steps done.

    metrics.jsonl is cut to that step, so that no step stands in it twice. Every rank calls it.
    """
    folder, remarks = latest_intact(run)
    for remark in remarks:
        say(remark)
    step = 0
    if folder is not None:
        saved = read_state(folder)
        step = saved["step"]
        same_world = saved["world_size"] == ranks.world_size
        load_state(folder, prepared.parameters, optimizer, rank=ranks.rank, same_world=same_world)
        prepared.refresh()
        say(f"resuming from {folder}: step {step} is done, the starting weights are ignored")
    if ranks.is_main:
        # Without a checkpoint nothing counts: the run begins again, and so does its record.
        truncate_metrics(run / "metrics.jsonl", step if folder is not None else -1)
    return step
