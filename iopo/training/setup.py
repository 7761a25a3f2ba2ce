"""From a config to a policy on its device, its optimizer and its reference."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from iopo import objectives
from iopo.config import Checkpointing, Device, Dtype, ReferenceSource, TrainConfig
from iopo.data.batching import Batching, pass_micro_batches, plan_steps, token_counts
from iopo.data.formats import MEMBERS
from iopo.data.layout import Batch
from iopo.data.tokenize import Example
from iopo.logprobs import LogProbs
from iopo.model import load, lora
from iopo.model.attention import SHARED
from iopo.model.demo import cache_root
from iopo.model.parallel import Prepared, make_mesh, prepare
from iopo.reference import Cache, CachedReference, Manifest, fill, recheck
from iopo.training import optim
from iopo.training.inputs import Inputs
from iopo.training.loop import Job, Reference
from iopo.training.placement import Ranks
from iopo.training.seeds import stream_seed

FORWARD_TOKENS = 2  # times the tokens of a training micro-batch, where nothing is kept for backward
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


def make_job(cfg: TrainConfig, inputs: Inputs, ranks: Ranks) -> Job:
    """What stays the same through the run on this rank."""
    batches = batching(cfg, ranks.world_size)
    plan = plan_steps(len(inputs.train), batches, cfg.optim.epochs, cfg.optim.max_steps)
    o = cfg.objective
    return Job(
        objective=o.name,
        options=objectives.Options(
            beta=o.beta,
            link=o.link.value,
            label_smoothing=o.label_smoothing,
            gamma=o.gamma,
            odds_weight=o.odds_weight,
            sft_weight=o.sft_weight,
            margin_per_constraint=o.margin_per_constraint,
        ),
        batching=batches,
        examples=inputs.train,
        heldout=inputs.heldout,
        tokens_N=token_counts(inputs.train, batches.layout),
        steps=plan.steps,
        lr_at=lambda step: optim.lr_at(step, plan.steps, cfg.optim),
        clip_norm=cfg.optim.clip_norm,
        rank=ranks.rank,
        device=ranks.device,
    )


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


def checkpoint_every(cfg: TrainConfig) -> int:
    """Recompute the activations of every k-th decoder block in backward; 0 for none."""
    every = {Checkpointing.none: 0, Checkpointing.full: 1}
    return every.get(cfg.parallel.checkpointing, cfg.parallel.checkpoint_every_k)


def make_policy(cfg: TrainConfig, inputs: Inputs, ranks: Ranks) -> Prepared:
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
        checkpoint_every=checkpoint_every(cfg),
        compile_blocks=p.compile,
    )


def policy_of(prepared: Prepared) -> LogProbs:
    """The module inside, by its type (FSDP2 makes it a subclass of itself)."""
    assert isinstance(prepared.model, LogProbs)
    return prepared.model


def manifest(cfg: TrainConfig, inputs: Inputs, device_type: str) -> Manifest:
    """What names the reference log-probs of this run; see iopo/reference.py."""
    if inputs.model_path is None:
        weights = "tiny " + repr(sorted((cfg.model.tiny or {}).items()))
    else:
        weights = load.weights_hash(inputs.model_path)
    if cfg.model.adapter is not None:
        weights += " adapter " + load.weights_hash(cfg.model.adapter)
    d = cfg.data
    return Manifest(
        weights=weights,
        tokenizer=inputs.tokenizer_hash,
        data=inputs.data_hash,
        truncation=f"{d.max_prompt_tokens} {d.max_response_tokens} {d.on_overlong.value}",
        dtype=str(compute_dtype(cfg, device_type)),
        layout=d.layout.value,
        attention=SHARED if d.layout.value == "shared" else "sdpa",
        kernel=f"linear_logprob {device_type}",
    )


def make_reference(
    cfg: TrainConfig,
    inputs: Inputs,
    job: Job,
    ranks: Ranks,
    prepared: Prepared,
    say: Callable[[str], None],
    alive: Callable[[], None],
) -> Reference | None:
    """The reference, built while `prepared` still holds the starting weights; None if not needed.

    Call it before a checkpoint is loaded: a reference is never taken from trained weights. Every
    rank calls it together.
    """
    if not objectives.KINDS[cfg.objective.name].reference:
        return None
    source = cfg.reference.source
    policy = policy_of(prepared)
    adapted = bool(lora.adapters(policy))
    if source is ReferenceSource.adapter_off:
        check_adapter_off(policy, adapted)

        def adapter_off(rows: Sequence[Example], batch: Batch) -> Tensor:
            with torch.no_grad(), lora.adapter_off(policy):
                return policy(batch)

        return Reference(adapter_off, "adapter_off", "the base under the adapters", 1e-6)
    if source is ReferenceSource.live:
        frozen = _frozen_copy(cfg, inputs, ranks)

        def live(rows: Sequence[Example], batch: Batch) -> Tensor:
            with torch.no_grad():
                return frozen(batch)

        return Reference(live, "live", "a frozen copy of the starting weights", 1e-6)
    return _cached(cfg, inputs, job, prepared, say, alive)


def check_adapter_off(policy: LogProbs, adapted: bool) -> None:
    """Refuse "adapter off" where the base is not the reference."""
    if not adapted:
        raise ValueError(
            "reference.source=adapter_off needs adapters; set model.lora.rank, or use cache or live"
        )
    if not lora.starts_at_zero(policy):
        raise ValueError(
            "reference.source=adapter_off: the adapters do not start at zero, so the model without "
            "them is not where training starts; use reference.source=cache or live"
        )


def _frozen_copy(cfg: TrainConfig, inputs: Inputs, ranks: Ranks) -> LogProbs:
    dtype = compute_dtype(cfg, ranks.device.type)
    frozen = load_model(cfg, inputs, dtype).requires_grad_(False).eval()
    shard = ranks.world_size > 1 and cfg.model.lora.rank == 0
    mesh = make_mesh(ranks.device.type, cfg.parallel.shard_processes) if shard else None
    prepare(frozen, device=ranks.device, dtype=dtype, mesh=mesh, offload=cfg.parallel.offload)
    return frozen


def _cached(
    cfg: TrainConfig,
    inputs: Inputs,
    job: Job,
    prepared: Prepared,
    say: Callable[[str], None],
    alive: Callable[[], None],
) -> Reference:
    root = Path(cfg.reference.cache_dir or cache_root() / "reference")
    cache = Cache(root, manifest(cfg, inputs, job.device.type))
    alone = dataclasses.replace(job.batching, ranks=1)
    if alone.tokens_per_microbatch is not None:  # without gradients, a forward needs little memory
        more = FORWARD_TOKENS * alone.tokens_per_microbatch
        alone = dataclasses.replace(alone, tokens_per_microbatch=more)

    def score(rows: Sequence[Example]) -> Tensor:
        with torch.no_grad():
            return prepared.model(job.build(rows))

    def batches(rows: Sequence[Example]) -> list[list[int]]:
        groups = pass_micro_batches(token_counts(rows, alone.layout), alone, 0)
        return [list(group) for group in groups if group]

    def progress(done: int, total: int) -> None:
        alive()
        if done == total or done % max(1, total // 10) == 0:
            say(f"reference: {done} of {total} batches")

    members = objectives.KINDS[cfg.objective.name].members
    rows = fill(cache, job.examples, members, score, batches, progress)
    if job.heldout:
        rows = rows | fill(cache, job.heldout, len(MEMBERS), score, batches, progress)
    reference = CachedReference(rows, str(cache.folder))
    bf16 = compute_dtype(cfg, job.device.type) is torch.bfloat16
    few = job.examples[: cfg.reference.recheck_rows]
    if few:
        longest = max(len(r) for e in few for responses in e.responses for r in responses)
        # bf16 rounds differently in batches of other shapes, by some 0.03 nats a token at random
        tolerance = 0.5 + 0.05 * math.sqrt(longest) if bf16 else 1e-2
        difference = recheck(reference, few, score, tolerance)
        say(f"reference: {len(few)} cached rows scored again, differ by {difference:.2g} nats")
    return Reference(
        lambda rows, batch: reference(rows), "cache", str(cache.folder), 0.1 if bf16 else 1e-6
    )
