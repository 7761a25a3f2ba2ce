"""Going on where a run folder's newest complete checkpoint left off."""

import logging
from pathlib import Path
from typing import Any

import torch

from iopo.config import Resume, TrainConfig, plain
from iopo.model.parallel import TrainModel
from iopo.training import setup
from iopo.training.checkpoint.folders import COMPLETE_FILE, read_state
from iopo.training.checkpoint.resume import check_resume, truncate_metrics
from iopo.training.checkpoint.tensors import load_state
from iopo.training.checkpoint.writer import latest, latest_intact
from iopo.training.inputs import Inputs
from iopo.training.launch.placement import RankInfo
from iopo.training.launch.run_folder import read_complete
from iopo.training.reference import sources as references

log = logging.getLogger(__name__)


def fingerprint(cfg: TrainConfig, inputs: Inputs, world_size: int) -> dict[str, Any]:
    """What a checkpoint must agree with: the config, and hashes of what the run stands on."""
    device = "cuda" if setup.backend(cfg.parallel) == "nccl" else "cpu"
    reference = references.manifest(cfg.model, cfg.data, inputs, device).hash()
    identity = {
        "data": inputs.data_hash,
        "tokenizer": inputs.tokenizer_hash,
        "reference and starting weights": reference,
    }
    return {"config": plain(cfg), "identity": identity, "world_size": world_size}


def refuse_or_note(run: Path, now: dict, *, resume: Resume) -> list[str]:
    """Before anything is written: may this run folder be resumed by this config?

    Returns sentences for the person. Raises ValueError, naming keys, if it may not, if there is a
    checkpoint and checkpoint.resume is never, and if there is none and it is must.
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
        raise ValueError(
            f"{run} has checkpoints, but none of them is intact:\n  "
            + "\n  ".join(remarks)
            + f"\nPut one back from a copy, or delete {run / 'checkpoints'} to begin at step 1"
        )


def restore(
    run: Path,
    train_model: TrainModel,
    optimizer: torch.optim.Optimizer,
    ranks: RankInfo,
) -> int:
    """Load the newest intact checkpoint, if any, and return the number of steps done.

    metrics.jsonl is cut to that step, so that no step stands in it twice. Every rank calls it.
    Raises ValueError if there are checkpoints, and all of them are damaged.
    """
    folder, remarks = latest_intact(run)
    step = 0
    if folder is None:
        _refuse_if_all_damaged(run, remarks)
    for remark in remarks:
        log.info(remark)
    if folder is not None:
        saved = read_state(folder)
        step = saved["step"]
        same_world = saved["world_size"] == ranks.world_size
        load_state(
            folder, train_model.parameters, optimizer, rank=ranks.rank, same_world=same_world
        )
        train_model.refresh()
        log.info(f"resuming from {folder}: step {step} is done, the starting weights are ignored")
    if ranks.is_main:
        # Without a checkpoint nothing counts: the run begins again, and so does its record.
        cut = truncate_metrics(run / "metrics.jsonl", step if folder is not None else -1)
        if cut and folder is None:
            log.info(f"{run} holds no complete checkpoint: beginning again at step 1")
        elif cut:
            log.info(
                f"{cut} rows of metrics.jsonl are of later steps, which are now made again: cut"
            )
    return step
