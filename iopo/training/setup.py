"""From a config to a run: the one place that puts inputs, policy, reference and optimizer together.

Used by training, by the reference fill, by replay and by the export of a checkpoint.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from iopo import objectives
from iopo.config import Device, ParallelConfig, ReferenceSource, TrainConfig
from iopo.data.batching import plan_steps, token_counts
from iopo.model.parallel import TrainModel
from iopo.redact import redact
from iopo.training import optim
from iopo.training.inputs import Inputs, batching, load_inputs
from iopo.training.launch.placement import RankInfo
from iopo.training.loop import Job, Reference
from iopo.training.plan.auto import resolve_checkpointing
from iopo.training.policy import make_policy
from iopo.training.reference import (
    Cache,
    adapter_off,
    cache_folder,
    cached,
    inputs_of_other,
    live,
    manifest,
)
from iopo.training.split import splitting

REFUSED = 2  # exit code: config or data refused


@dataclass
class Run:
    """What the optimizer steps of a run need, on one rank."""

    inputs: Inputs
    job: Job
    model: TrainModel
    reference: Reference | None
    optimizer: torch.optim.Optimizer


def build_run(cfg: TrainConfig, ranks: RankInfo, *, with_reference: bool = True) -> Run:
    """A run before its first step and before any checkpoint is loaded: the reference is the
    starting weights, or those of reference.path. Every rank calls it. with_reference: False where
    no step will be taken."""
    inputs = load_inputs(cfg)
    job = make_job(cfg, inputs, ranks)
    cfg = resolve_checkpointing(cfg, inputs, ranks, Path(cfg.run))
    model = make_policy(cfg, inputs, ranks)
    reference = None
    if with_reference and objectives.OBJECTIVES[cfg.objective.name].reference:
        of, own = inputs, cfg.model
        if (other := cfg.reference.path) is not None:
            of = inputs_of_other(inputs, other)
            own = replace(own, path=other, tiny=None, adapter=None)
        source, of_own = cfg.reference.source, replace(cfg, model=own)
        if source is ReferenceSource.adapter_off:
            reference = adapter_off(model)
        elif source is ReferenceSource.live:
            reference = live(make_policy(of_own, of, ranks, frozen=True))
        else:
            names = manifest(own, cfg.data, of, ranks.device.type)
            cache = Cache(cache_folder(cfg.reference), names)
            scorer = model if other is None else make_policy(of_own, of, ranks, frozen=True)
            reference = cached(cache, job, scorer, cfg.reference.recheck_rows)
    optimizer = optim.make_optimizer(model.parameters, cfg.optim)
    return Run(inputs, job, model, reference, optimizer)


def make_job(cfg: TrainConfig, inputs: Inputs, ranks: RankInfo) -> Job:
    """What stays the same through the run on this rank."""
    batches = batching(cfg.optim, cfg.data.layout, cfg.seed, ranks.world_size)
    steps = plan_steps(len(inputs.train), batches, cfg.optim.epochs, cfg.optim.max_steps)
    return Job(
        objective=cfg.objective.name,
        options=cfg.objective,
        batching=batches,
        examples=inputs.train,
        heldout=inputs.heldout,
        tokens_N=token_counts(inputs.train, batches.layout),
        steps=steps,
        lr_at=lambda step: optim.lr_at(step, steps, cfg.optim),
        clip_norm=cfg.optim.clip_norm,
        rank=ranks.rank,
        device=ranks.device,
        splitting=splitting(cfg, ranks.world_size),
    )


def backend(cfg: ParallelConfig) -> str:
    """gloo (CPU) or nccl. Raises ValueError if CUDA is asked for and there is none."""
    if cfg.device is Device.cuda and not torch.cuda.is_available():
        raise ValueError("parallel.device: found cuda, but torch sees no CUDA device; use cpu")
    cuda = cfg.device is not Device.cpu and torch.cuda.is_available()
    return "nccl" if cuda else "gloo"


def launch_options(cfg: ParallelConfig) -> dict[str, Any]:
    """The keyword arguments of `launch`; by default one process per GPU, or one on a CPU."""
    kind = backend(cfg)
    processes = cfg.processes or (torch.cuda.device_count() if kind == "nccl" else 1)
    return {"processes": processes, "backend": kind, "timeout_s": cfg.timeout_s}


def refuse(error: Exception) -> int:
    """Print why a config or data is refused: one message, no traceback. Returns the exit code."""
    print(f"refused: {redact(str(error))}", file=sys.stderr, flush=True)
    return REFUSED
