"""Memory of a rank, FLOPs and communication of a step: arithmetic on sizes and a trace.

Letters: P parameters, of which t are trained and f frozen; S ranks that divide a copy of the model,
N all ranks, w and c bytes of a wide number (4) and of one of the computation (2 in bf16).
"""

from dataclasses import dataclass

import torch

from iopo import objectives
from iopo.config import PlanConfig, ReferenceSource, TrainConfig
from iopo.model.parallel import TrainModel, blocks
from iopo.training.plan.lengths import Work
from iopo.training.plan.trace import Trace
from iopo.training.policy import shards
from iopo.training.split import splitting

GATHERED_BLOCKS = 3  # FSDP2: the block that computes, the next one, and the next one's buffer
REDUCED_BLOCKS = 2  # FSDP2: the block whose gradients leave, and the one before it


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: trained and frozen, of the largest block and of all outside blocks."""

    trained: int
    frozen: int
    block_trained: int
    block_frozen: int
    root_trained: int
    root_frozen: int
    wide: int  # bytes of a trained parameter
    compute: int  # bytes of a parameter in forward and backward

    @property
    def total(self) -> int:
        return self.trained + self.frozen

    @property
    def block(self) -> int:
        return self.block_trained + self.block_frozen

    @property
    def root(self) -> int:
        return self.root_trained + self.root_frozen


@dataclass(frozen=True)
class Layout:
    """How the ranks share the model. shard: ranks that divide one copy, 1 if replicated."""

    ranks: int
    shard: int
    sharded: bool

    @property
    def replicas(self) -> int:
        return self.ranks // self.shard


@dataclass(frozen=True)
class Transfer:
    """Bytes that a rank sends and receives in a step for one purpose, and the time on its path."""

    what: str
    bytes: float
    seconds: float
    path: str


def sizes_of(policy: TrainModel, dtype: torch.dtype) -> Sizes:
    """Count the parameters of a policy made by plan_trace.meta_policy."""
    inner = blocks(policy.model)
    counts = [_count(block) for block in inner]
    trained, frozen = _count(policy.model)
    inside = [sum(column) for column in zip(*counts, strict=True)]
    return Sizes(
        trained=trained,
        frozen=frozen,
        block_trained=max(t for t, _ in counts),
        block_frozen=max(f for _, f in counts),
        root_trained=trained - inside[0],
        root_frozen=frozen - inside[1],
        wide=max(4, dtype.itemsize),
        compute=dtype.itemsize,
    )


def _count(module: torch.nn.Module) -> tuple[int, int]:
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in module.parameters()) - trained


def layout_of(cfg: TrainConfig, ranks: int) -> Layout:
    """As policy.make_policy decides. Raises ValueError if shard_processes does not divide ranks."""
    sharded = shards(cfg.model.lora, cfg.parallel, ranks)
    shard = (cfg.parallel.shard_processes or ranks) if sharded else 1
    if ranks % shard:
        raise ValueError(
            f"parallel.shard_processes is {shard}, which does not divide plan_for.gpus={ranks}"
        )
    return Layout(ranks, shard, sharded)


def gpu_memory(
    cfg: TrainConfig, sizes: Sizes, layout: Layout, trace: Trace, *, split: bool = False
) -> dict[str, float]:
    """Bytes on one GPU at the worst moment of a step, by purpose; their sum is the peak.

    trace: of the largest forward. split: there are quads that are split.
    """
    w, c, t = sizes.wide, sizes.compute, sizes.trained
    rows: dict[str, float] = {} if cfg.parallel.offload else states(cfg, sizes, layout)
    held = sum(rows.values())
    rows["activations"] = trace.saved_bytes
    rows["working memory"] = trace.peak_bytes - trace.saved_bytes
    if split and splits_once(cfg, layout):
        rows["gradients of a split quad"] = w * t
    if layout.sharded:
        rows["gathered weights"] = c * (sizes.root + GATHERED_BLOCKS * sizes.block)
        leaving = (REDUCED_BLOCKS * w + c) * sizes.block_trained + w * sizes.root_trained
        rows["gradients on their way"] = leaving
        at_end = held + c * sizes.root + 2 * w * sizes.root_trained
    else:
        at_end = held + (w * t if layout.ranks > 1 else 0)  # buckets of the all-reduce
    rows["reduction after backward"] = max(0.0, at_end - sum(rows.values()))
    return {name: value for name, value in rows.items() if value}


def states(cfg: TrainConfig, sizes: Sizes, layout: Layout) -> dict[str, float]:
    """Bytes per rank that last through the run; in host memory with parallel.offload."""
    w, c, t, f = sizes.wide, sizes.compute, sizes.trained, sizes.frozen
    rows: dict[str, float] = {"weights": (w * t + c * f) / layout.shard}
    if not layout.sharded and cfg.model.lora.rank == 0 and c < w:
        rows["weights to compute with"] = c * t
    rows["gradients"] = w * t / layout.shard
    rows["optimizer (two moments)"] = 2 * w * t / layout.shard
    if reference_source(cfg) is ReferenceSource.live:
        # policy.make_policy divides a frozen copy only beside a policy that trains whole
        divided = layout.shard if cfg.model.lora.rank == 0 else 1
        rows["live reference"] = c * (t + f if cfg.model.lora.rank == 0 else f) / divided
    return rows


def splits_once(cfg: TrainConfig, layout: Layout) -> bool:
    """Whether a split quad goes through the model once: training/split.py."""
    how = splitting(cfg.objective, cfg.optim, cfg.model.lora, cfg.parallel, layout.ranks)
    return how is not None and how.direction is not None


def reference_source(cfg: TrainConfig) -> ReferenceSource | None:
    """Where reference log-probs come from in a step; None if the objective has no reference."""
    if not objectives.OBJECTIVES[cfg.objective.name].reference:
        return None
    source = cfg.reference.source
    return ReferenceSource.cache if source is ReferenceSource.auto else source


def step_flops(cfg: TrainConfig, layout: Layout, work: Work, trace: Trace) -> dict[str, float]:
    """FLOPs of one step on all ranks together, by part.

    The trace gives the price of a token (trunk), a pair of query and key (attention) and a response
    row (head); the work says how many of them an average example has.
    """
    amounts = {
        "trunk": work.tokens / trace.tokens,
        "attention": work.pairs / trace.pairs,
        "head": work.rows / trace.rows,
    }
    examples = cfg.optim.global_batch_quads
    parts = {
        part: examples * amount * (trace.forward[part] + trace.backward[part])
        for part, amount in amounts.items()
    }
    once = examples * sum(amounts[part] * trace.forward[part] for part in amounts)
    if work.split and not splits_once(cfg, layout):
        parts["split quads, first pass"] = work.split * once
    if reference_source(cfg) in (ReferenceSource.live, ReferenceSource.adapter_off):
        parts["reference"] = once
    return parts


def communication(
    cfg: TrainConfig, sizes: Sizes, layout: Layout, micro_batches: int
) -> list[Transfer]:
    """What a rank sends (and receives as much) in a step, by ring algorithms.

    replicated   all-reduce of gradients          2 (N-1)/N w t
    sharded      gathers, every micro-batch       (S-1)/S c (2 P_blocks + P_rest)
                 reduce-scatter, every micro-batch  (S-1)/S w t
                 all-reduce over replicas (HSDP)  2 (N/S-1)/(N/S) w t / S
    """
    plan, w, c, t = cfg.plan_for, sizes.wide, sizes.compute, sizes.trained
    if not layout.sharded:
        if layout.ranks == 1:
            return []
        volume = 2 * _others(layout.ranks) * w * t
        return [_transfer("all-reduce of gradients", volume, layout.ranks, plan)]
    gathered = _others(layout.shard) * c * (2 * (sizes.total - sizes.root) + sizes.root)
    if reference_source(cfg) is ReferenceSource.live and cfg.model.lora.rank == 0:
        gathered += _others(layout.shard) * c * sizes.total
    scattered = _others(layout.shard) * w * t
    transfers = [
        _transfer("gathers of weights", micro_batches * gathered, layout.shard, plan),
        _transfer("reduce-scatter of gradients", micro_batches * scattered, layout.shard, plan),
    ]
    if layout.replicas > 1:
        volume = 2 * _others(layout.replicas) * w * t / layout.shard
        # every GPU of a machine has a group of its own, and they share the machine's network
        sharing = min(layout.shard, plan.gpus_per_machine)
        seconds = volume * sharing / (plan.network_gb_per_s * 1e9)
        transfers.append(Transfer("all-reduce over replicas", volume, seconds, "network"))
    return transfers


def _others(ranks: int) -> float:
    return (ranks - 1) / ranks


def _transfer(what: str, volume: float, ranks: int, plan: PlanConfig) -> Transfer:
    """In a ring over machines each byte that a rank passes on crosses a machine's border once per
    machine, so the network of a machine bounds the volume per rank."""
    inside = ranks <= plan.gpus_per_machine
    speed = plan.machine_gb_per_s
    if not inside:
        speed = min(speed, plan.network_gb_per_s)
    return Transfer(what, volume, volume / (speed * 1e9), "machine" if inside else "network")
