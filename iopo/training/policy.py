"""From sections of the config to a policy on its device: weights, adapters, dtype, sharding."""

from pathlib import Path

import torch

from iopo.agreement import check_weights
from iopo.config import Checkpointing, Layout, LoraConfig, ModelConfig, ParallelConfig, TrainConfig
from iopo.logprobs import LogProbs
from iopo.model import load, lora
from iopo.model.parallel import BlockOptions, TrainModel, make_mesh, prepare
from iopo.training.inputs import Inputs, attention_of
from iopo.training.launch.placement import RankInfo
from iopo.training.seeds import stream_seed


def make_policy(
    cfg: TrainConfig, inputs: Inputs, ranks: RankInfo, *, frozen: bool = False
) -> TrainModel:
    """The policy at its starting weights, adapted, placed and sharded as configured.

    frozen: the starting weights alone, without adapters and gradients.
    Raises ValueError if the model's log-probs are not those of its own logits (iopo.agreement).
    """
    dtype, p = load.compute_dtype(cfg.model.dtype, ranks.device.type), cfg.parallel
    loaded = dtype
    if cfg.model.lora.rank == 0 and not frozen:  # what trains is kept in fp32 at least
        loaded = torch.promote_types(dtype, torch.float32)
    # Once for all ranks: each would take as much host memory as the whole model.
    load_or_not = load_model if ranks.is_main else blank_model
    policy = load_or_not(cfg.model, inputs.model_path, cfg.data.layout, loaded)
    if ranks.is_main and not frozen:
        check_weights(policy.causal_lm, inputs.train, where=str(inputs.model_path or "model.tiny"))
    if frozen:
        policy.requires_grad_(False).eval()
    else:
        adapt(policy, cfg.model.lora, cfg.seed)
    sharded = shards(cfg.model.lora, p, ranks.world_size)
    return prepare(
        policy,
        device=ranks.device,
        dtype=dtype,
        mesh=make_mesh(ranks.device.type, p.shard_processes) if sharded else None,
        offload=p.offload,
        # a frozen copy computes bit by bit as the policy does, and has no backward to recompute for
        block_options=BlockOptions(compile=p.compile) if frozen else block_options(p),
    )


def load_model(cfg: ModelConfig, path: Path | None, layout: Layout, dtype: torch.dtype) -> LogProbs:
    """The starting weights: those in `path` (None: of model.tiny) with model.adapter merged in."""
    attention = attention_of(layout)
    if path is None:
        assert cfg.tiny is not None
        model = load.tiny_causal_lm(cfg.tiny, seed=0, dtype=dtype, attention=attention)
    else:
        model = load.load_causal_lm(path, dtype, attention=attention)
    if cfg.adapter is not None:
        lora.load_adapter(model, cfg.adapter)
        lora.merge_lora(model)
        model.requires_grad_(True)  # loading an adapter froze them
    return LogProbs(model)


def blank_model(
    cfg: ModelConfig, path: Path | None, layout: Layout, dtype: torch.dtype
) -> LogProbs:
    """What load_model gives, without values."""
    if path is None:
        config, where = load.config_of_tiny(cfg.tiny or {}), "model.tiny"
    else:
        config, where = load.read_config(path), str(path)
    return LogProbs(load.meta_causal_lm(config, dtype, attention_of(layout), where=where))


def adapt(policy: LogProbs, cfg: LoraConfig, seed: int) -> None:
    """Put the configured adapters, if any, on the policy, in place, and set it to training."""
    if cfg.rank > 0:
        lora.add_lora(
            policy.causal_lm,
            rank=cfg.rank,
            alpha=cfg.alpha,
            dropout=cfg.dropout,
            targets=cfg.targets,
            generator=torch.Generator().manual_seed(stream_seed(seed, "lora")),
        )
    policy.train()


def shards(lora: LoraConfig, parallel: ParallelConfig, world_size: int) -> bool:
    """Whether parameters are divided over the ranks, or every rank holds the model.

    A LoRA base is replicated unless sharding is asked for: it fits, and gathers cost more.
    """
    asked = parallel.shard_processes is not None or parallel.offload
    return world_size > 1 and (lora.rank == 0 or asked)


def check_sharding(cfg: ParallelConfig, world_size: int) -> None:
    """Raises ValueError for a sharding that is not possible on so many processes."""
    if cfg.offload and world_size == 1:
        raise ValueError(
            "parallel.offload=true keeps sharded weights in host memory, and one process has none; "
            "remove it, or run two processes or more"
        )
    if cfg.shard_processes is not None and world_size % cfg.shard_processes:
        raise ValueError(
            f"parallel.shard_processes is {cfg.shard_processes}, which does not divide the "
            f"{world_size} processes"
        )


def block_options(cfg: ParallelConfig) -> BlockOptions:
    """What is recomputed and compiled of each block; `auto` must have been resolved before."""
    kind = cfg.checkpointing
    assert kind is not Checkpointing.auto, "resolve_checkpointing comes first"
    every = {Checkpointing.none: 0, Checkpointing.every_k: cfg.checkpoint_every_k}
    return BlockOptions(every.get(kind, 1), kind is Checkpointing.selective, cfg.compile)
