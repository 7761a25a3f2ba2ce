"""What the plan of a run needs from its config, in one place."""

from dataclasses import dataclass

import torch
from transformers import AutoConfig, PretrainedConfig

from iopo import objectives
from iopo.config import (
    DataConfig,
    Device,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
    ReferenceSource,
    TrainConfig,
)
from iopo.data.batching import Batching
from iopo.model import load
from iopo.training.inputs import batching
from iopo.training.policy import compute_dtype, shards
from iopo.training.split import Splitting, splitting


@dataclass(frozen=True)
class PlannedRun:
    """A run as its costs see it, on the machines of `machine`.

    shard: ranks that divide one copy of the model, 1 if every rank holds a whole one.
    reference: where the reference log-probs of a step come from; None without a reference.
    offload: the lasting states are in host memory.
    """

    machine: PlanConfig
    data: DataConfig
    optim: OptimConfig
    lora: LoraConfig
    rows: objectives.Rows
    reference: ReferenceSource | None
    batching: Batching
    splitting: Splitting | None
    sharded: bool
    shard: int
    offload: bool
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
        """Whether a split quad goes through the model once: training/split.py."""
        return self.splitting is not None and self.splitting.direction is not None


def describe(cfg: TrainConfig) -> PlannedRun:
    """The run of `cfg` on plan_for.gpus ranks.

    Raises ValueError for ranks that do not divide the batch or into shards, and for offload on one.
    """
    ranks, parallel, lora = cfg.plan_for.gpus, cfg.parallel, cfg.model.lora
    batches = batching(cfg.optim, cfg.data.layout, cfg.seed, ranks)
    sharded = shards(lora, parallel, ranks)
    shard = (parallel.shard_processes or ranks) if sharded else 1
    if ranks % shard:
        raise ValueError(
            f"parallel.shard_processes is {shard}, which does not divide plan_for.gpus={ranks}"
        )
    if parallel.offload and not sharded:
        raise ValueError(
            "parallel.offload needs a sharded model: plan_for.gpus is 1, expected more"
        )
    kind = objectives.OBJECTIVES[cfg.objective.name]
    reference = cfg.reference.source
    if reference is ReferenceSource.auto:
        reference = ReferenceSource.cache
    device_type = "cpu" if parallel.device is Device.cpu else "cuda"
    return PlannedRun(
        machine=cfg.plan_for,
        data=cfg.data,
        optim=cfg.optim,
        lora=lora,
        rows=kind.rows,
        reference=reference if kind.reference else None,
        batching=batches,
        splitting=splitting(cfg.objective, cfg.optim, lora, parallel, ranks),
        sharded=sharded,
        shard=shard,
        offload=parallel.offload,
        device_type=device_type,
        dtype=compute_dtype(cfg.model, device_type),
    )


def architecture(cfg: ModelConfig) -> PretrainedConfig:
    """The config of model.path or model.tiny."""
    if cfg.tiny is None:
        return load.architecture(str(cfg.path))
    keys = dict(cfg.tiny)
    return AutoConfig.for_model(keys.pop("model_type"), **keys)
