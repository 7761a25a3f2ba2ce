"""parallel.checkpointing=auto: the least recomputation whose planned memory is free.

Decided at every start, before the weights load, by rank 0 for all ranks; logged, and written to
RUN/memory.json. A resumed run may choose otherwise: recomputing changes no bit of a result.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from iopo.config import Checkpointing, Device, TrainConfig
from iopo.files import write_text
from iopo.model.host_memory import available_ram
from iopo.training.inputs import Inputs
from iopo.training.launch.placement import RankInfo
from iopo.training.plan.report import GB, HEADROOM, plan_report

FILE = "memory.json"
log = logging.getLogger(__name__)


def resolve_checkpointing(
    cfg: TrainConfig, inputs: Inputs, ranks: RankInfo, run: Path
) -> TrainConfig:
    """`cfg` with `auto` replaced by the choice. Every rank calls it and gets the same answer."""
    if cfg.parallel.checkpointing is not Checkpointing.auto:
        return cfg
    free = torch.tensor(free_bytes(ranks), dtype=torch.int64, device=ranks.device)
    if ranks.world_size > 1:
        dist.all_reduce(free, dist.ReduceOp.MIN)
    answer: list[str | None] = [None]
    if ranks.is_main:
        size = {"gpus": ranks.world_size, "gpus_per_machine": ranks.local_world_size}
        here = replace(
            cfg,
            plan_for=replace(cfg.plan_for, **size, gpu_gb=free.item() / GB),
            parallel=replace(cfg.parallel, device=Device(ranks.device.type)),
        )
        plan = plan_report(here, inputs.train)
        # GB are 10^9 bytes of one rank, tokens those of a micro-batch.
        choice = {
            "checkpointing": plan.cfg.parallel.checkpointing.value,
            "planned_gb": plan.peak / GB,
            "too_large_gb": {kind.value: peak / GB for kind, peak in plan.refused.items()},
            "tokens": plan.trace.tokens,
            "free_gb": free.item() / GB,
        }
        write_text(run / FILE, json.dumps(choice, indent=1) + "\n")
        log.info(_sentence(choice))
        answer = [choice["checkpointing"]]
    if ranks.world_size > 1:
        dist.broadcast_object_list(answer, device=ranks.device)
    kind = Checkpointing(str(answer[0]))
    return replace(cfg, parallel=replace(cfg.parallel, checkpointing=kind))


def _sentence(choice: dict[str, Any]) -> str:
    too_large = "".join(f"; {kind} {gb:.2f} GB" for kind, gb in choice["too_large_gb"].items())
    planned, free = choice["planned_gb"], choice["free_gb"]
    more = f", MORE THAN {HEADROOM:.0%} of it: plan=true says what to change"
    return (
        f"parallel.checkpointing=auto: {choice['checkpointing']}, {planned:.2f} GB planned "
        f"for {choice['tokens']} tokens{too_large}; {free:.2f} GB are free on a rank"
        f"{more if planned > HEADROOM * free else ''}"
    )


def free_bytes(ranks: RankInfo) -> int:
    """What this rank may take: free memory of its GPU, or its share of the host's."""
    if ranks.device.type == "cuda":
        return torch.cuda.mem_get_info(ranks.device)[0]
    return available_ram() // ranks.local_world_size
