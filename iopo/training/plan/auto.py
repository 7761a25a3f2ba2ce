"""parallel.checkpointing=auto: the least recomputation whose planned memory is there.

Decided once, before the weights load, by rank 0 for all ranks; said, and written to
RUN/memory.json. A run that goes on keeps what it began with: recomputing changes no bit of a
result, but its time and its memory are then those of the same run.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from iopo.config import Checkpointing, Device, TrainConfig
from iopo.files import write_text
from iopo.model.host_memory import available_ram
from iopo.training.inputs import Inputs
from iopo.training.launch.placement import RankInfo
from iopo.training.plan.report import GB, HEADROOM, architecture, evaluate

FILE = "memory.json"


@dataclass(frozen=True)
class Choice:
    """What RUN/memory.json holds. GB are 10^9 bytes on one rank.

    too_large_gb: planned memory of the kinds that were passed over, by name.
    tokens: of the largest micro-batch. ranks, micro_batch: what the choice was made for.
    """

    checkpointing: str
    planned_gb: float
    free_gb: float
    too_large_gb: dict[str, float]
    tokens: int
    ranks: int
    micro_batch: list[int | None]

    def __str__(self) -> str:
        passed = "".join(f"; {kind} {gb:.2f} GB" for kind, gb in self.too_large_gb.items())
        fits = self.planned_gb <= HEADROOM * self.free_gb
        return (
            f"parallel.checkpointing=auto: {self.checkpointing}, {self.planned_gb:.2f} GB planned "
            f"for {self.tokens} tokens{passed}; {self.free_gb:.2f} GB are free on a rank"
            + ("" if fits else f", MORE THAN {HEADROOM:.0%} of it: plan=true says what to change")
        )


def resolve_checkpointing(
    cfg: TrainConfig, inputs: Inputs, ranks: RankInfo, run: Path, say: Callable[[str], None]
) -> TrainConfig:
    """`cfg` with `auto` replaced by the choice; as it is if it does not say auto.

    Every rank calls it, before the policy is made; all get the same answer.
    """
    if cfg.parallel.checkpointing is not Checkpointing.auto:
        return cfg
    free = torch.tensor(free_bytes(ranks), dtype=torch.int64, device=ranks.device)
    if ranks.world_size > 1:
        dist.all_reduce(free, dist.ReduceOp.MIN)
    answer: list[str | None] = [None]
    if ranks.is_main:
        choice = _recorded(run, cfg, ranks)
        if choice is None:
            choice = _choose(cfg, inputs, ranks, free.item() / GB)
            write_text(run / FILE, json.dumps(asdict(choice), indent=1) + "\n")
        say(str(choice))
        answer = [choice.checkpointing]
    if ranks.world_size > 1:
        dist.broadcast_object_list(answer, device=ranks.device)
    kind = Checkpointing(str(answer[0]))
    return replace(cfg, parallel=replace(cfg.parallel, checkpointing=kind))


def free_bytes(ranks: RankInfo) -> int:
    """What this rank may take: free memory of its GPU, or its share of the host's."""
    if ranks.device.type == "cuda":
        return torch.cuda.mem_get_info(ranks.device)[0]
    return available_ram() // ranks.local_world_size


def _recorded(run: Path, cfg: TrainConfig, ranks: RankInfo) -> Choice | None:
    """The choice that the run began with; None if it has none for as many ranks and tokens."""
    if not (run / FILE).exists():
        return None
    choice = Choice(**json.loads((run / FILE).read_text()))
    same = (choice.ranks, choice.micro_batch) == (ranks.world_size, _micro_batch(cfg))
    return choice if same else None


def _micro_batch(cfg: TrainConfig) -> list[int | None]:
    return [cfg.optim.micro_batch_quads, cfg.optim.tokens_per_microbatch]


def _choose(cfg: TrainConfig, inputs: Inputs, ranks: RankInfo, free_gb: float) -> Choice:
    here = replace(
        cfg.plan_for,
        gpus=ranks.world_size,
        gpus_per_machine=ranks.local_world_size,
        gpu_gb=free_gb,
    )
    device = replace(cfg.parallel, device=Device(ranks.device.type))
    plan = evaluate(replace(cfg, plan_for=here, parallel=device), architecture(cfg), inputs.train)
    return Choice(
        checkpointing=plan.cfg.parallel.checkpointing.value,
        planned_gb=plan.peak / GB,
        free_gb=free_gb,
        too_large_gb={kind.value: peak / GB for kind, peak in plan.refused.items()},
        tokens=plan.trace.tokens,
        ranks=ranks.world_size,
        micro_batch=_micro_batch(cfg),
    )
