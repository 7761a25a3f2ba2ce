"""From a config to a policy on its device."""

import torch

from iopo import objectives
from iopo.config import Checkpointing, Device, Dtype, ParallelConfig, TrainConfig
from iopo.data.batching import Batching, plan_steps, token_counts
from iopo.logprobs import LogProbs
from iopo.model import load, lora
from iopo.model.attention import SHARED
from iopo.model.parallel import BlockOptions, TrainModel, make_mesh, prepare
from iopo.training import optim
from iopo.training.inputs import Inputs
from iopo.training.launch.placement import RankInfo
from iopo.training.loop import Job
from iopo.training.seeds import stream_seed
from iopo.training.split import Splitting

TORCH_DTYPE = {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32, Dtype.fp64: torch.float64}


def backend(cfg: TrainConfig) -> str:
    """gloo (CPU) or nccl. Raises ValueError if CUDA is asked for and there is none."""
    if cfg.parallel.device is Device.cuda and not torch.cuda.is_available():
        raise ValueError("parallel.device: found cuda, but torch sees no CUDA device; use cpu")
    cuda = cfg.parallel.device is not Device.cpu and torch.cuda.is_available()
    return "nccl" if cuda else "gloo"


def processes(cfg: TrainConfig) -> int:
    """Ranks on this machine: as configured, else one per GPU, or one on the CPU."""
    if cfg.parallel.processes is not None:
        return cfg.parallel.processes
    return torch.cuda.device_count() if backend(cfg) == "nccl" else 1


def compute_dtype(cfg: TrainConfig, device_type: str) -> torch.dtype:
    """The dtype of forward and backward; parameters that train are kept in fp32 at least."""
    if cfg.model.dtype is Dtype.auto:
        return load.default_dtype(device_type)
    return TORCH_DTYPE[cfg.model.dtype]


def batching(cfg: TrainConfig, world_size: int) -> Batching:
    """How examples become steps; raises ValueError if the ranks do not divide the batch."""
    return Batching(
        global_batch_quads=cfg.optim.global_batch_quads,
        ranks=world_size,
        seed=cfg.seed,
        layout=cfg.data.layout.value,
        micro_batch_quads=cfg.optim.micro_batch_quads,
        tokens_per_microbatch=cfg.optim.tokens_per_microbatch,
    )


def make_job(cfg: TrainConfig, inputs: Inputs, ranks: RankInfo) -> Job:
    """What stays the same through the run on this rank."""
    batches = batching(cfg, ranks.world_size)
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


def splitting(cfg: TrainConfig, world_size: int) -> Splitting | None:
    """How quads above the token budget are split; None if they run whole."""
    if not cfg.parallel.split_quads:
        return None
    assert cfg.optim.tokens_per_microbatch is not None  # checked in the config
    sharded = shards(cfg, world_size)
    once = cfg.model.lora.rank > 0 and not sharded and cfg.objective.sft_weight == 0
    direction = objectives.OBJECTIVES[cfg.objective.name].direction if once else None
    return Splitting(cfg.optim.tokens_per_microbatch, sharded, direction)


def load_model(cfg: TrainConfig, inputs: Inputs, dtype: torch.dtype) -> LogProbs:
    """The starting weights: model.path (or model.tiny) with model.adapter merged in."""
    if inputs.model_path is None:
        assert cfg.model.tiny is not None
        model = load.tiny_causal_lm(cfg.model.tiny, seed=0, dtype=dtype, attention=SHARED)
    else:
        model = load.load_causal_lm(inputs.model_path, dtype, attention=SHARED)
    if cfg.model.adapter is not None:
        lora.load_adapter(model, cfg.model.adapter)
        lora.merge_lora(model)
        model.requires_grad_(True)  # loading an adapter froze them
    # A layout without shared segments runs the model's stock attention, as a plain trainer does.
    if cfg.data.layout.value == "plain":
        model.set_attn_implementation("sdpa")
    return LogProbs(model)


def adapt(cfg: TrainConfig, policy: LogProbs) -> None:
    """Put the configured adapters, if any, on the policy, in place, and set it to training."""
    c = cfg.model.lora
    if c.rank > 0:
        lora.add_lora(
            policy.causal_lm,
            rank=c.rank,
            alpha=c.alpha,
            dropout=c.dropout,
            targets=c.targets,
            generator=torch.Generator().manual_seed(stream_seed(cfg.seed, "lora")),
        )
    policy.train()


def shards(cfg: TrainConfig, world_size: int) -> bool:
    """Whether parameters are divided over the ranks, or every rank holds the model.

    A LoRA base is replicated unless sharding is asked for: it fits, and gathers cost more.
    """
    asked = cfg.parallel.shard_processes is not None or cfg.parallel.offload
    return world_size > 1 and (cfg.model.lora.rank == 0 or asked)


def check_sharding(cfg: TrainConfig, world_size: int) -> None:
    """Raises ValueError for a sharding that so many processes cannot have."""
    p = cfg.parallel
    if p.offload and world_size == 1:
        raise ValueError(
            "parallel.offload=true keeps sharded weights in host memory, and one process has none; "
            "remove it, or run two processes or more"
        )
    if p.shard_processes is not None and world_size % p.shard_processes:
        raise ValueError(
            f"parallel.shard_processes is {p.shard_processes}, which does not divide the "
            f"{world_size} processes"
        )


def block_options(parallel: ParallelConfig) -> BlockOptions:
    """What the configuration does to each block. `auto` must have been resolved before."""
    kind = parallel.checkpointing
    assert kind is not Checkpointing.auto, "resolve_checkpointing comes first"
    every = {Checkpointing.none: 0, Checkpointing.every_k: parallel.checkpoint_every_k}
    selective = kind is Checkpointing.selective
    return BlockOptions(every.get(kind, 1), selective, parallel.compile)


def make_policy(cfg: TrainConfig, inputs: Inputs, ranks: RankInfo) -> TrainModel:
    """The policy at its starting weights, adapted, placed and sharded as configured."""
    dtype = compute_dtype(cfg, ranks.device.type)
    wide = dtype if torch.finfo(dtype).bits >= 32 else torch.float32
    use_lora = cfg.model.lora.rank > 0
    policy = load_model(cfg, inputs, dtype if use_lora else wide)
    adapt(cfg, policy)
    shard = shards(cfg, ranks.world_size)
    p = cfg.parallel
    return prepare(
        policy,
        device=ranks.device,
        dtype=dtype,
        mesh=make_mesh(ranks.device.type, p.shard_processes) if shard else None,
        offload=p.offload,
        block_options=block_options(cfg.parallel),
    )


def policy_of(train_model: TrainModel) -> LogProbs:
    """The module inside, by its type (FSDP2 makes it a subclass of itself)."""
    assert isinstance(train_model.model, LogProbs)
    return train_model.model
