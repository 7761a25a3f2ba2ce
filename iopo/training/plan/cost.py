"""Memory of a rank, FLOPs and communication of a step: arithmetic on sizes and a trace.

Letters: P parameters, of which t are trained and f frozen; S ranks that divide a copy of the model,
N all ranks, w and c bytes of an accumulated number (4) and of a computed one (2 in bf16).
"""

from dataclasses import dataclass

import torch

from iopo.config import ReferenceSource
from iopo.model.parallel import TrainModel, blocks
from iopo.training.plan.description import PlannedRun
from iopo.training.plan.lengths import Work
from iopo.training.plan.trace import Trace

GATHERED_BLOCKS = 3  # FSDP2: the block that computes, the next one, and the next one's buffer
REDUCED_BLOCKS = 2  # FSDP2: the block whose gradients leave, and the one before it


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: of the model, of its largest block, of all outside blocks (root)."""

    trained: int
    frozen: int
    block: int
    block_trained: int
    root: int
    root_trained: int
    accum_bytes: int  # of a trained parameter
    compute_bytes: int  # of a parameter in forward and backward

    @property
    def total(self) -> int:
        return self.trained + self.frozen

    @property
    def start(self) -> int:
        """Of the starting weights, which have no adapters: all or none of them are trained."""
        return self.frozen or self.trained


@dataclass(frozen=True)
class Transfer:
    """Bytes that a rank sends and receives in a step for one purpose, and the time on its path."""

    what: str
    bytes: float
    seconds: float
    path: str


def sizes_of(policy: TrainModel, dtype: torch.dtype) -> Sizes:
    """Count the parameters of a policy made by trace.meta_policy."""
    counts = [_count(block) for block in blocks(policy.model)]
    total, trained = _count(policy.model)
    return Sizes(
        trained=trained,
        frozen=total - trained,
        block=max(n for n, _ in counts),
        block_trained=max(t for _, t in counts),
        root=total - sum(n for n, _ in counts),
        root_trained=trained - sum(t for _, t in counts),
        accum_bytes=max(4, dtype.itemsize),
        compute_bytes=dtype.itemsize,
    )


def _count(module: torch.nn.Module) -> tuple[int, int]:
    """All parameters, and those that are trained."""
    numbers = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in numbers), sum(n for n, trained in numbers if trained)


def gpu_memory(run: PlannedRun, sizes: Sizes, trace: Trace, split: bool) -> dict[str, float]:
    """Bytes on one GPU at the worst moment of a step, by purpose; their sum is the peak.

    trace: of the largest forward. split: there are quads that are split.
    """
    w, c, t = sizes.accum_bytes, sizes.compute_bytes, sizes.trained
    rows: dict[str, float] = {} if run.cfg.parallel.offload else states(run, sizes)
    at_end = sum(rows.values())
    rows["activations"] = trace.saved_bytes
    rows["working memory"] = trace.peak_bytes - trace.saved_bytes
    if split and run.splits_once:
        rows["gradients of a split quad"] = w * t
    if run.sharded:
        # a forward without backward leaves the root gathered: that of a live reference stays
        roots = 2 if run.reference is ReferenceSource.live else 1
        rows["gathered weights"] = c * (roots * sizes.root + GATHERED_BLOCKS * sizes.block)
        leaving = (REDUCED_BLOCKS * w + c) * sizes.block_trained + w * sizes.root_trained
        rows["gradients on their way"] = leaving
        at_end += roots * c * sizes.root + 2 * w * sizes.root_trained
    elif run.ranks > 1:
        at_end += w * t  # buckets of the all-reduce
    rows["reduction after backward"] = max(0.0, at_end - sum(rows.values()))
    return {name: value for name, value in rows.items() if value}


def states(run: PlannedRun, sizes: Sizes) -> dict[str, float]:
    """Bytes per rank that last through the run; in host memory with parallel.offload."""
    w, c, t, f = sizes.accum_bytes, sizes.compute_bytes, sizes.trained, sizes.frozen
    whole = run.cfg.model.lora.rank == 0
    rows: dict[str, float] = {"weights": (w * t + c * f) / run.shard}
    if not run.sharded and whole and c < w:
        rows["weights to compute with"] = c * t
    rows["gradients"] = w * t / run.shard
    rows["optimizer (two moments)"] = 2 * w * t / run.shard
    if run.reference is ReferenceSource.live:  # divided as the policy is
        rows["live reference"] = c * sizes.start / run.shard
    return rows


def step_flops(run: PlannedRun, work: Work, trace: Trace) -> dict[str, float]:
    """FLOPs of one step on all ranks together, by part.

    The trace gives the price of a token (trunk), a pair of query and key (attention) and a response
    row (head); the work says how many of them an average example has.
    """
    amounts = {
        "trunk": work.tokens / trace.tokens,
        "attention": work.pairs / trace.pairs,
        "head": work.rows / trace.rows,
    }
    examples = run.batching.global_batch_quads
    parts = {
        part: examples * amount * (trace.forward[part] + trace.backward[part])
        for part, amount in amounts.items()
    }
    once = examples * sum(amounts[part] * trace.forward[part] for part in amounts)
    if work.split and not run.splits_once:
        parts["split quads, first pass"] = work.split * once
    if run.reference in (ReferenceSource.live, ReferenceSource.adapter_off):
        parts["reference"] = once
    return parts


def communication(run: PlannedRun, sizes: Sizes, micro_batches: int) -> list[Transfer]:
    """What a rank sends (and receives as much) in a step, by ring algorithms.

    replicated   all-reduce of gradients          2 (N-1)/N w t
    sharded      gathers, every micro-batch       (S-1)/S c (2 P_blocks + P_rest)
                 reduce-scatter, every micro-batch  (S-1)/S w t
                 all-reduce over replicas (HSDP)  2 (N/S-1)/(N/S) w t / S

    In a ring over machines each byte that a rank passes on crosses a machine's border once per
    machine, so the network of a machine bounds the volume per rank.
    """
    machine, gradients = run.cfg.plan_for, sizes.accum_bytes * sizes.trained

    def transfer(what: str, volume: float, ranks: int) -> Transfer:
        """volume: of one rank without the factor (N-1)/N of a ring of `ranks`."""
        volume *= (ranks - 1) / ranks
        if ranks <= machine.gpus_per_machine:
            return Transfer(what, volume, volume / (machine.machine_gb_per_s * 1e9), "machine")
        speed = min(machine.machine_gb_per_s, machine.network_gb_per_s)
        return Transfer(what, volume, volume / (speed * 1e9), "network")

    if run.ranks == 1:
        return []
    if not run.sharded:
        return [transfer("all-reduce of gradients", 2 * gradients, run.ranks)]
    passes = 2 * sizes.total - sizes.root  # the root stays gathered from forward to backward
    if run.reference is ReferenceSource.live:
        passes += sizes.start - sizes.root
    elif run.reference is ReferenceSource.adapter_off:
        passes += sizes.total - sizes.root  # the policy's forward finds the root gathered
    gathered = micro_batches * sizes.compute_bytes * passes
    transfers = [
        transfer("gathers of weights", gathered, run.shard),
        transfer("reduce-scatter of gradients", micro_batches * gradients, run.shard),
    ]
    if run.replicas > 1:
        over = transfer("all-reduce over replicas", 2 * gradients / run.shard, run.replicas)
        # every GPU of a machine has a group of its own, and they share the machine's network
        sharing = min(run.shard, machine.gpus_per_machine)
        seconds = over.bytes * sharing / (machine.network_gb_per_s * 1e9)
        transfers.append(Transfer(over.what, over.bytes, seconds, "network"))
    return transfers
