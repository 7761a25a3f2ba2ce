"""plan=true: memory per GPU, FLOPs and communication of a step, without weights and without a GPU.

The architecture comes from a config file, the costs of a micro-batch from the training code run on
the meta device (plan_trace), the lengths from the data or from plan_for (plan_work), the rest is
arithmetic (plan_cost). docs/scaling.md reads the tables.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import AutoConfig, PretrainedConfig

from iopo import objectives
from iopo.config import Checkpointing, Device, TrainConfig
from iopo.data.example import Example
from iopo.model import load
from iopo.training.inputs import batching
from iopo.training.plan import cost as plan_cost
from iopo.training.plan.cost import Layout, Sizes, Transfer
from iopo.training.plan.lengths import Work, work
from iopo.training.plan.trace import Trace, meta_policy, trace
from iopo.training.policy import compute_dtype
from iopo.training.split import splitting

GB = 1e9
# What parallel.checkpointing=auto chooses from. every_k is not among them: it recomputes more than
# `selective` for about the same memory.
LADDER = (Checkpointing.none, Checkpointing.selective, Checkpointing.full)
HEADROOM = 0.9  # of the memory is what `auto` fills: a plan knows no allocator and no NCCL buffers
SMALLEST_BUDGET = 2048  # tokens of a micro-batch below which a GPU has too little to do


@dataclass(frozen=True)
class Plan:
    """What plan_report found. memory: bytes on one GPU by purpose. host: bytes per machine.

    flops: of one step on all GPUs. advice: changes that make it fit, best first; empty if it does.
    refused: peak bytes of the kinds of checkpointing that `auto` found too large; cfg has the one
        that it took.
    """

    cfg: TrainConfig
    sizes: Sizes
    layout: Layout
    work: Work
    trace: Trace
    memory: dict[str, float]
    host: float
    flops: dict[str, float]
    transfers: list[Transfer]
    advice: list[str]
    refused: dict[Checkpointing, float]

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.cfg.plan_for.gpu_gb * GB

    def __str__(self) -> str:
        return "\n".join([*_head(self), "", *_memory(self), "", *_speed(self)])


def plan_report(cfg: TrainConfig) -> Plan:
    """Plan a run of `cfg` on the GPUs that cfg.plan_for describes (CPUs with device=cpu).

    Raises ValueError for the plain layout, whose attention is not modelled, for ranks that do not
    divide the batch, and for a model without a config at hand.
    """
    if cfg.data.layout.value == "plain":
        raise ValueError(
            "plan: found data.layout=plain, expected shared; only that one is modelled"
        )
    config = architecture(cfg)
    plan = evaluate(cfg, config)
    return plan if plan.fits else replace(plan, advice=list(_advice(plan, config)))


def architecture(cfg: TrainConfig) -> PretrainedConfig:
    """The config of model.path or model.tiny."""
    if cfg.model.tiny is None:
        return load.architecture(str(cfg.model.path))
    keys = dict(cfg.model.tiny)
    return AutoConfig.for_model(keys.pop("model_type"), **keys)


def evaluate(
    cfg: TrainConfig, config: PretrainedConfig, examples: Sequence[Example] | None = None
) -> Plan:
    """The plan without advice. config: of the model. examples: the training data, if at hand."""
    ranks = cfg.plan_for.gpus
    batches = batching(cfg.optim, cfg.data.layout, cfg.seed, ranks)
    split = splitting(cfg.objective, cfg.optim, cfg.model.lora, cfg.parallel, ranks)
    amount = work(cfg, batches, split, examples)
    layout = plan_cost.layout_of(cfg, ranks)
    if cfg.parallel.offload and not layout.sharded:
        raise ValueError(
            "parallel.offload needs a sharded model: plan_for.gpus is 1, expected more"
        )
    if cfg.parallel.checkpointing is not Checkpointing.auto:
        return _costs(cfg, config, amount, layout)
    refused: dict[Checkpointing, float] = {}
    for kind in LADDER:
        plan = _costs(_with_checkpointing(cfg, kind), config, amount, layout)
        if plan.peak <= HEADROOM * cfg.plan_for.gpu_gb * GB or kind is LADDER[-1]:
            break
        refused[kind] = plan.peak
    return replace(plan, refused=refused)


def _with_checkpointing(cfg: TrainConfig, kind: Checkpointing) -> TrainConfig:
    return replace(cfg, parallel=replace(cfg.parallel, checkpointing=kind))


def _costs(cfg: TrainConfig, config: PretrainedConfig, amount: Work, layout: Layout) -> Plan:
    device_type = "cpu" if cfg.parallel.device is Device.cpu else "cuda"
    dtype = compute_dtype(cfg.model, device_type)
    policy = meta_policy(cfg, config, dtype)
    sizes = plan_cost.sizes_of(policy, dtype)
    traced = trace(policy, amount.heaviest, device_type)
    host = 0.0
    if cfg.parallel.offload:
        on_machine = min(layout.ranks, cfg.plan_for.gpus_per_machine)
        host = on_machine * sum(plan_cost.states(cfg, sizes, layout).values())
    return Plan(
        cfg=cfg,
        sizes=sizes,
        layout=layout,
        work=amount,
        trace=traced,
        memory=plan_cost.gpu_memory(cfg, sizes, layout, traced, split=amount.split > 0),
        host=host,
        flops=plan_cost.step_flops(cfg, layout, amount, traced),
        transfers=plan_cost.communication(cfg, sizes, layout, amount.micro_batches),
        advice=[],
        refused={},
    )


def _advice(plan: Plan, config: PretrainedConfig) -> Iterator[str]:
    """Changes, tried one after the other by planning them, that would make the run fit."""
    found = 0
    for what, cfg in _changes(plan):
        tried = evaluate(cfg, config)
        if tried.fits:
            yield f"{what}: {tried.peak / GB:.1f} GB"
            found += 1
        if found == 2:
            return
    if not found:
        yield "nothing tried here fits: train adapters (model.lora.rank=8), or a smaller model"


def _changes(plan: Plan) -> Iterator[tuple[str, TrainConfig]]:
    """Cheapest first: smaller micro-batches, recomputing activations, sharding, more GPUs."""
    cfg, parallel = plan.cfg, plan.cfg.parallel
    smaller = _smaller_budgets(cfg.optim.tokens_per_microbatch, plan.work.longest)
    at = LADDER.index(parallel.checkpointing) if parallel.checkpointing in LADDER else 0
    for kind in (parallel.checkpointing, *LADDER[at + 1 :]):
        with_it = _with_checkpointing(cfg, kind)
        words = f"parallel.checkpointing={kind.value}"
        if kind is not parallel.checkpointing:
            yield words, with_it
        for value in smaller:
            key = f"optim.tokens_per_microbatch={value}"
            optim = replace(cfg.optim, tokens_per_microbatch=value)
            both = key if kind is parallel.checkpointing else f"{words} {key}"
            yield both, replace(with_it, optim=optim)
    full = replace(parallel, checkpointing=Checkpointing.full)
    budget = max(plan.work.longest_part, SMALLEST_BUDGET)
    if budget < plan.work.longest and cfg.optim.tokens_per_microbatch and _may_split(cfg):
        optim = replace(cfg.optim, tokens_per_microbatch=budget)
        words = "parallel.checkpointing=full parallel.split_quads=true"
        with_split = replace(cfg, parallel=replace(full, split_quads=True), optim=optim)
        yield f"{words} optim.tokens_per_microbatch={budget}", with_split
    ranks = cfg.plan_for.gpus
    if ranks > 1 and not plan.layout.sharded:
        words = f"parallel.checkpointing=full parallel.shard_processes={ranks}"
        yield words, replace(cfg, parallel=replace(full, shard_processes=ranks))
    for more in (2 * ranks, 4 * ranks, 8 * ranks):
        if cfg.optim.global_batch_quads % more == 0 and parallel.shard_processes is None:
            plan_for = replace(cfg.plan_for, gpus=more)
            yield (
                f"parallel.checkpointing=full on {more} GPUs",
                replace(cfg, parallel=full, plan_for=plan_for),
            )
    if ranks > 1:
        yield (
            "parallel.checkpointing=full parallel.offload=true",
            replace(cfg, parallel=replace(full, offload=True)),
        )


def _may_split(cfg: TrainConfig) -> bool:
    two_prompts = len(objectives.OBJECTIVES[cfg.objective.name].rows.responses) == 2
    return two_prompts and cfg.model.lora.dropout == 0 and not cfg.parallel.split_quads


def _smaller_budgets(budget: int | None, longest: int) -> list[int]:
    """Half and a quarter of the budget; less than the longest example would change nothing."""
    if budget is None:
        return []
    tried = {max(budget // part, longest, SMALLEST_BUDGET) for part in (2, 4)}
    return sorted((value for value in tried if value < budget), reverse=True)


def _head(plan: Plan) -> Iterator[str]:
    cfg, sizes, layout, amount = plan.cfg, plan.sizes, plan.layout, plan.work
    how = f"LoRA rank {cfg.model.lora.rank}" if cfg.model.lora.rank else "full fine-tuning"
    name = cfg.model.path or "model.tiny"
    counts = f"{sizes.total / 1e9:.3f} B parameters, {sizes.trained / 1e6:.1f} M trained"
    yield f"{name}: {counts} ({how})"
    machines = -(-layout.ranks // cfg.plan_for.gpus_per_machine)
    shares = "every rank holds the model"
    if layout.sharded:
        shares = f"{layout.shard} ranks divide the model" + (
            f", {layout.replicas} copies" if layout.replicas > 1 else ""
        )
    yield f"{layout.ranks} GPUs on {machines} machine{'s' * (machines > 1)}: {shares}"
    yield f"lengths {amount.source}"
    of_run = f"; {amount.steps} steps" if amount.steps else ""
    yield (
        f"a step: {cfg.optim.global_batch_quads} examples of {amount.tokens:,.0f} processed tokens "
        f"({amount.rows:,.0f} scored), {amount.micro_batches} micro-batches per GPU{of_run}"
    )
    too_large = [f"{kind.value} {peak / GB:.1f} GB" for kind, peak in plan.refused.items()]
    why = f" (auto; too large: {', '.join(too_large)})" if too_large else ""
    yield (
        f"the largest forward: {len(amount.heaviest)} examples, {plan.trace.tokens:,} tokens; "
        f"checkpointing {cfg.parallel.checkpointing.value}{why}"
    )
    if amount.split:
        yield f"split by prompt: quads with {amount.split:.0%} of the tokens"


def _memory(plan: Plan) -> Iterator[str]:
    limit = plan.cfg.plan_for.gpu_gb
    yield f"{'memory of a GPU':<44}{'GB':>9}"
    for name, value in plan.memory.items():
        yield f"  {name:<42}{value / GB:>9.2f}"
    yield f"  {'at most':<42}{plan.peak / GB:>9.2f}"
    if plan.host:
        yield f"  {'host memory of a machine (offload)':<42}{plan.host / GB:>9.2f}"
    if plan.fits:
        yield f"  fits: {limit - plan.peak / GB:.1f} GB of {limit:g} GB stay free"
        return
    over = plan.peak / GB - limit
    yield f"  does NOT fit: {over:.1f} GB more than {limit:g} GB. What would help:"
    for line in plan.advice:
        yield f"    {line}"


def _speed(plan: Plan) -> Iterator[str]:
    total, assumed = sum(plan.flops.values()), plan.cfg.plan_for
    yield f"{'FLOPs of a step, all GPUs':<44}{'10^12':>9}"
    for name, value in plan.flops.items():
        yield f"  {name:<42}{value / 1e12:>9,.1f}"
    yield f"  {'total':<42}{total / 1e12:>9,.1f}"
    seconds = total / plan.layout.ranks / (assumed.gpu_tflops * 1e12)
    yield f"  {seconds:.2f} s a step at {assumed.gpu_tflops:g} TFLOP/s per GPU"
    yield ""
    yield f"{'communication of a GPU per step':<44}{'GB':>9}{'s':>9}"
    for t in plan.transfers:
        yield f"  {t.what + ' (' + t.path + ')':<42}{t.bytes / GB:>9.2f}{t.seconds:>9.3f}"
    if not plan.transfers:
        yield "  none"
        return
    waiting = sum(t.seconds for t in plan.transfers)
    if waiting > seconds:
        times = waiting / seconds
        yield f"  communication takes {times:.1f} times the arithmetic and bounds the step"
    else:
        yield f"  {waiting / seconds:.0%} of the arithmetic: can be hidden behind it"
