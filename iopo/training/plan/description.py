"""What the plan of a run needs from its config, in one place."""

from dataclasses import dataclass, replace

import torch

from iopo import objectives
from iopo.config import Device, ReferenceSource, TrainConfig
from iopo.data.batching import Batching
from iopo.model import load
from iopo.training.inputs import batching
from iopo.training.policy import check_sharding, shards
from iopo.training.split import Splitting, splitting


@dataclass(frozen=True)
class PlannedRun:
    """A run as its costs see it, on the machines of cfg.plan_for.

    shard: ranks that divide one copy of the model, 1 if every rank holds a whole one.
    reference: where the reference log-probs come from (auto: the cache); None without a reference.
    """

    cfg: TrainConfig
    rows: objectives.Rows
    reference: ReferenceSource | None
    batching: Batching
    splitting: Splitting
    sharded: bool
    shard: int
    device_type: str
    dtype: torch.dtype

    @property
    def ranks(self) -> int:
        return self.batching.ranks

    @property
    def replicas(self) -> int:
        return self.ranks // self.shard

    @property
    def splits_once(self) -> bool:
        """Whether a split quad goes through the model once (split.py)."""
        return self.splitting.direction is not None


def describe(cfg: TrainConfig) -> PlannedRun:
    """The run of `cfg` on plan_for.gpus ranks; raises ValueError if it cannot run on so many."""
    ranks, parallel = cfg.plan_for.gpus, cfg.parallel
    check_sharding(parallel, ranks)
    sharded = shards(cfg.model.lora, parallel, ranks)
    kind = objectives.OBJECTIVES[cfg.objective.name]
    rows = kind.rows
    if rows.kind == "group":  # as many as the data says, if it is here
        rows = replace(rows, responses=(cfg.plan_for.group_responses,))
    device_type = "cpu" if parallel.device is Device.cpu else "cuda"
    return PlannedRun(
        cfg=cfg,
        rows=rows,
        reference=cfg.reference.source if kind.reference else None,
        batching=batching(cfg.optim, cfg.data.layout, cfg.seed, ranks),
        splitting=splitting(cfg, ranks),
        sharded=sharded,
        shard=(parallel.shard_processes or ranks) if sharded else 1,
        device_type=device_type,
        dtype=load.compute_dtype(cfg.model.dtype, device_type),
    )
