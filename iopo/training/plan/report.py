"""plan=true: memory per GPU, FLOPs and communication of a step, without weights and without a GPU.

The architecture comes from a config file, the costs of a micro-batch from the training code run on
the meta device (trace.py), the lengths from the data or from plan_for (lengths.py), the rest is
arithmetic (cost.py). docs/scaling.md reads the tables.
"""

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from iopo.config import Checkpointing, Layout, TrainConfig
from iopo.data.example import Example
from iopo.training.inputs import load_inputs
from iopo.training.plan import cost, lengths
from iopo.training.plan.cost import Sizes, Transfer
from iopo.training.plan.description import PlannedRun, describe
from iopo.training.plan.lengths import Work
from iopo.training.plan.trace import Trace, meta_policy, trace

GB = 1e9
# What parallel.checkpointing=auto chooses from. every_k is not among them: it recomputes more than
# `selective` for about the same memory.
LADDER = (Checkpointing.none, Checkpointing.selective, Checkpointing.full)
HEADROOM = 0.9  # of the memory is what `auto` fills: a plan knows no allocator and no NCCL buffers
SMALLEST_BUDGET = 2048  # tokens of a micro-batch below which a GPU has too little to do


@dataclass(frozen=True)
class Plan:
    """What plan_report found. memory: bytes on one GPU by purpose. flops: of one step on all GPUs.

    refused: peak bytes of the kinds of checkpointing that `auto` found too large, and did not take.
    examples: the training data, if it is on this machine.
    """

    cfg: TrainConfig
    run: PlannedRun
    sizes: Sizes
    work: Work
    trace: Trace
    memory: dict[str, float]
    flops: dict[str, float]
    transfers: list[Transfer]
    refused: dict[Checkpointing, float]
    examples: Sequence[Example] | None

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.cfg.plan_for.gpu_gb * GB

    @property
    def seconds(self) -> float:
        """Of a step's arithmetic."""
        return sum(self.flops.values()) / self.run.ranks / (self.cfg.plan_for.gpu_tflops * 1e12)

    def __str__(self) -> str:
        parts = (_head(self), _memory(self), _flops(self), _transfers(self))
        return "\n\n".join("\n".join(part) for part in parts)


def plan_report(cfg: TrainConfig, examples: Sequence[Example] | None = None) -> Plan:
    """Plan a run of `cfg` on the GPUs that cfg.plan_for describes (CPUs with device=cpu).

    examples: the training data; without it, it is read if it is on this machine.
    Raises ValueError for the plain layout, whose attention is not modelled, for ranks that do not
    divide the batch, and for a model whose config is not known.
    """
    if cfg.data.layout is Layout.plain:
        raise ValueError("plan: found data.layout=plain, expected shared, the one that is modelled")
    run = describe(cfg)
    if examples is None and (missing := lengths.missing_for_lengths(cfg.data, cfg.model)):
        work = lengths.assumed_work(run, missing)
    else:
        examples = examples or load_inputs(cfg).train
        work = lengths.data_work(run, examples)
    auto = cfg.parallel.checkpointing is Checkpointing.auto
    kinds = LADDER if auto else (cfg.parallel.checkpointing,)
    refused: dict[Checkpointing, float] = {}
    for kind in kinds:
        parallel = replace(cfg.parallel, checkpointing=kind)
        policy = meta_policy(cfg.model, parallel, run.dtype)
        sizes = cost.sizes_of(policy, run.dtype)
        traced = trace(policy, work.heaviest, run.device_type)
        memory = cost.gpu_memory(run, sizes, traced, work.split > 0)
        peak = sum(memory.values())
        if peak <= HEADROOM * cfg.plan_for.gpu_gb * GB or kind is kinds[-1]:
            break
        refused[kind] = peak
    return Plan(
        cfg=replace(cfg, parallel=parallel),
        run=run,
        sizes=sizes,
        work=work,
        trace=traced,
        memory=memory,
        flops=cost.step_flops(run, work, traced),
        transfers=cost.communication(run, sizes, work.micro_batches),
        refused=refused,
        examples=examples,
    )


def advice(plan: Plan) -> list[str]:
    """Two changes, tried one after the other by planning them, that would make the run fit."""
    found: list[str] = []
    for changes in _changes(plan):
        cfg = deepcopy(plan.cfg)
        for key, value in changes.items():
            section, name = key.split(".")
            setattr(getattr(cfg, section), name, value)
        tried = plan_report(cfg, plan.examples)
        if tried.fits:
            words = [f"{key}={str(value).lower()}" for key, value in changes.items()]
            if "plan_for.gpus" in changes:  # the last one
                words[-1] = f"on {changes['plan_for.gpus']} GPUs"
            found.append(f"{' '.join(words)}: {tried.peak / GB:.1f} GB")
        if len(found) == 2:
            break
    nothing = "nothing tried here fits: train adapters (model.lora.rank=8), or a smaller model"
    return found or [nothing]


def _changes(plan: Plan) -> Iterator[dict[str, Any]]:
    """Cheapest first: smaller micro-batches, recomputing activations, sharding, more GPUs."""
    parallel, optim, work, ranks = plan.cfg.parallel, plan.cfg.optim, plan.work, plan.run.ranks
    checkpointing, budget = "parallel.checkpointing", "optim.tokens_per_microbatch"
    present, tokens = parallel.checkpointing, optim.tokens_per_microbatch
    # Half and a quarter of the budget; less than the longest example would change nothing.
    tried = {max((tokens or 0) // part, work.longest, SMALLEST_BUDGET) for part in (2, 4)}
    smaller = sorted((value for value in tried if value < (tokens or 0)), reverse=True)
    at = LADDER.index(present) if present in LADDER else 0
    for kind in (present, *LADDER[at + 1 :]):
        change: dict[str, Any] = {} if kind is present else {checkpointing: kind}
        if change:
            yield change
        yield from (change | {budget: value} for value in smaller)
    full = {checkpointing: Checkpointing.full}
    part = max(work.longest_part, SMALLEST_BUDGET)
    may_split = len(plan.run.rows.responses) == 2 and plan.cfg.model.lora.dropout == 0
    if may_split and not parallel.split_quads and tokens and part < work.longest:
        yield full | {"parallel.split_quads": True, budget: part}
    if ranks > 1 and not plan.run.sharded:
        yield full | {"parallel.shard_processes": ranks}
    for more in (2 * ranks, 4 * ranks, 8 * ranks):
        if optim.global_batch_quads % more == 0 and parallel.shard_processes is None:
            yield full | {"plan_for.gpus": more}
    if ranks > 1:
        yield full | {"parallel.offload": True}


def _head(plan: Plan) -> Iterator[str]:
    cfg, sizes, run, work = plan.cfg, plan.sizes, plan.run, plan.work
    how = f"LoRA rank {cfg.model.lora.rank}" if cfg.model.lora.rank else "full fine-tuning"
    name = cfg.model.path or "model.tiny"
    counts = f"{sizes.total / 1e9:.3f} B parameters, {sizes.trained / 1e6:.1f} M trained"
    yield f"{name}: {counts} ({how})"
    machines = -(-run.ranks // cfg.plan_for.gpus_per_machine)
    shares = "every rank holds the model"
    if run.sharded:
        copies = f", {run.replicas} copies" if run.replicas > 1 else ""
        shares = f"{run.shard} ranks divide the model{copies}"
    yield f"{run.ranks} GPUs on {machines} machine{'s' * (machines > 1)}: {shares}"
    yield f"lengths {work.source}"
    of_run = f"; {work.steps} steps" if work.steps else ""
    yield (
        f"a step: {cfg.optim.global_batch_quads} examples of {work.tokens:,.0f} processed tokens "
        f"({work.rows:,.0f} scored), {work.micro_batches} micro-batches per GPU{of_run}"
    )
    too_large = [f"{kind.value} {peak / GB:.1f} GB" for kind, peak in plan.refused.items()]
    why = f" (auto; too large: {', '.join(too_large)})" if too_large else ""
    yield (
        f"the largest forward: {len(work.heaviest)} examples, {plan.trace.tokens:,} tokens; "
        f"checkpointing {cfg.parallel.checkpointing.value}{why}"
    )
    if work.split:
        yield f"split by prompt: quads with {work.split:.0%} of the tokens"


def _table(title: str, units: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """units: heads of the columns of numbers, and of each row its numbers: 9 characters each."""
    yield f"{title:<44}{units}"
    yield from (f"  {name:<42}{numbers}" for name, numbers in rows)


def _memory(plan: Plan) -> Iterator[str]:
    rows = plan.memory | {"at most": plan.peak}
    if plan.cfg.parallel.offload:
        on_machine = min(plan.run.ranks, plan.cfg.plan_for.gpus_per_machine)
        held = on_machine * sum(cost.states(plan.run, plan.sizes).values())
        rows["host memory of a machine (offload)"] = held
    numbers = ((name, f"{value / GB:>9.2f}") for name, value in rows.items())
    yield from _table("memory of a GPU", f"{'GB':>9}", numbers)
    limit, peak = plan.cfg.plan_for.gpu_gb, plan.peak / GB
    if plan.fits:
        yield f"  fits: {limit - peak:.1f} GB of {limit:g} GB stay free"
        return
    yield f"  does NOT fit: {peak - limit:.1f} GB more than {limit:g} GB. What would help:"
    yield from (f"    {line}" for line in advice(plan))


def _flops(plan: Plan) -> Iterator[str]:
    rows = plan.flops | {"total": sum(plan.flops.values())}
    numbers = ((name, f"{value / 1e12:>9,.1f}") for name, value in rows.items())
    yield from _table("FLOPs of a step, all GPUs", f"{'10^12':>9}", numbers)
    yield f"  {plan.seconds:.2f} s a step at {plan.cfg.plan_for.gpu_tflops:g} TFLOP/s per GPU"


def _transfers(plan: Plan) -> Iterator[str]:
    numbers = (
        (f"{t.what} ({t.path})", f"{t.bytes / GB:>9.2f}{t.seconds:>9.3f}") for t in plan.transfers
    )
    yield from _table("communication of a GPU per step", f"{'GB':>9}{'s':>9}", numbers)
    if not plan.transfers:
        yield "  none"
        return
    times = sum(t.seconds for t in plan.transfers) / plan.seconds
    if times > 1:
        yield f"  communication takes {times:.1f} times the arithmetic and bounds the step"
    else:
        yield f"  {times:.0%} of the arithmetic: can be hidden behind it"
