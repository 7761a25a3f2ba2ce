"""parallel.checkpointing=auto: the least recomputation whose planned memory is free.

Decided at every start, before the weights load, by rank 0 for all ranks; logged, and written to
RUN/memory.json. A resumed run may choose otherwise: recomputing changes no bit of a result.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from iopo.config import Checkpointing, Device, TrainConfig
from iopo.files import write_text
from iopo.model.host_memory import available_ram
from iopo.progress import progress
from iopo.training.inputs import Inputs
from iopo.training.launch.placement import RankInfo, from_rank_0
from iopo.training.plan.report import GB, HEADROOM, plan_report

FILE = "memory.json"
log = logging.getLogger(__name__)


def resolve_checkpointing(
    cfg: TrainConfig, inputs: Inputs, ranks: RankInfo, run: Path
) -> TrainConfig:
    """`cfg` with `auto` replaced by the choice. Every rank calls it and gets the same answer."""
    if cfg.parallel.checkpointing is not Checkpointing.auto:
        return cfg
    least = torch.tensor(free_bytes(ranks), dtype=torch.int64, device=ranks.device)
    if ranks.world_size > 1:
        dist.all_reduce(least, dist.ReduceOp.MIN)
    free = least.item() / GB
    size = {"gpus": ranks.world_size, "gpus_per_machine": ranks.local_world_size}

    def choose() -> Checkpointing:
        here = replace(
            cfg,
            plan_for=replace(cfg.plan_for, **size, gpu_gb=free),
            parallel=replace(cfg.parallel, device=Device(ranks.device.type)),
        )
        with progress(None, "planning the memory of a step"):
            plan = plan_report(here, inputs.train)
        kind, planned = plan.cfg.parallel.checkpointing, plan.peak / GB
        too_large = {larger.value: peak / GB for larger, peak in plan.refused.items()}
        # GB are 10^9 bytes of one rank, tokens those of a micro-batch.
        choice = {"checkpointing": kind.value, "planned_gb": planned, "too_large_gb": too_large}
        choice |= {"tokens": plan.trace.tokens, "free_gb": free}
        write_text(run / FILE, json.dumps(choice, indent=1) + "\n")
        others = "".join(f"; {name} {gb:.2f} GB" for name, gb in too_large.items())
        more = f", MORE THAN {HEADROOM:.0%} of it: plan=true says what to change"
        log.info(
            f"parallel.checkpointing=auto: {kind}, {planned:.2f} GB planned for "
            f"{plan.trace.tokens} tokens{others}; {free:.2f} GB are free on a rank"
            f"{more if planned > HEADROOM * free else ''}"
        )
        return kind

    return replace(cfg, parallel=replace(cfg.parallel, checkpointing=from_rank_0(choose)))


def free_bytes(ranks: RankInfo) -> int:
    """What this rank may take: free memory of its GPU, or its share of the host's."""
    if ranks.device.type == "cuda":
        return torch.cuda.mem_get_info(ranks.device)[0]
    return available_ram() // ranks.local_world_size
