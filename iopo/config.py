"""The typed schema of conf/ and every check that needs neither data nor weights.

Hydra composes YAML into these dataclasses, so a misspelt key or a wrong type fails by name. The
checks run in __post_init__, when train.py turns the composed config into objects; below train.py
and evaluate.py nothing imports Hydra. Comments on the keys, with units, are in conf/*.yaml.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from iopo.objectives import OBJECTIVES, SMOOTHED_LINKS, Link, Options

HELDOUT_MEASURES = ("loss", "group_accuracy", "x_preference", "y_preference")  # of any objective

Dtype = StrEnum("Dtype", ["auto", "bf16", "fp32", "fp64"])
QuadRows = StrEnum("QuadRows", ["both", "first"])
Layout = StrEnum("Layout", ["shared", "plain"])
Overlong = StrEnum("Overlong", ["drop", "truncate", "error"])
Schedule = StrEnum("Schedule", ["cosine", "linear", "constant"])
ReferenceSource = StrEnum("ReferenceSource", ["auto", "cache", "live", "adapter_off"])
Wandb = StrEnum("Wandb", ["off", "offline", "online"])
Checkpointing = StrEnum("Checkpointing", ["none", "every_k", "selective", "full", "auto"])
Resume = StrEnum("Resume", ["auto", "must", "never"])
Device = StrEnum("Device", ["auto", "cpu", "cuda"])


def _require(ok: bool, key: str, found: Any, expected: str) -> None:
    if not ok:
        raise ValueError(f"{key}: found {found!r}, expected {expected}")


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise ValueError(message)


def _at_least(section: Any, name: str, low: int, *keys: str) -> None:
    """Numbers of a section, or null where its type allows that."""
    for key in keys:
        value = getattr(section, key)
        _require(value is None or value >= low, f"{name}.{key}", value, f"{low} or more")


@dataclass
class LoraConfig:
    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = "all-linear"

    def __post_init__(self):
        _require(self.rank >= 0, "model.lora.rank", self.rank, "0 (full fine-tuning) or more")
        _require(self.alpha > 0, "model.lora.alpha", self.alpha, "more than 0")
        _require(0 <= self.dropout < 1, "model.lora.dropout", self.dropout, "0 <= dropout < 1")


@dataclass
class ModelConfig:
    path: str | None = "demo"
    tiny: dict[str, Any] | None = None
    dtype: Dtype = Dtype.auto
    system: str | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self):
        expected = "a model folder, a hub id or 'demo' (or model.tiny, never both)"
        _require((self.path is None) != (self.tiny is None), "model.path", self.path, expected)


@dataclass
class DataConfig:
    train: str | None = None
    heldout: str | None = None
    quad_rows: QuadRows = QuadRows.both
    max_prompt_tokens: int = 1024
    max_response_tokens: int = 1024
    on_overlong: Overlong = Overlong.drop
    layout: Layout = Layout.shared
    limit_rows: int | None = None
    workers: int = 0
    cache_dir: str | None = None

    def __post_init__(self):
        _at_least(self, "data", 1, "max_prompt_tokens", "max_response_tokens", "limit_rows")


@dataclass
class ObjectiveConfig(Options):
    name: str = "iopo"

    def __post_init__(self):
        names = ", ".join(OBJECTIVES)
        _require(self.name in OBJECTIVES, "objective.name", self.name, f"one of {names}")
        _require(self.beta > 0, "objective.beta", self.beta, "more than 0 (the paper uses 0.1)")
        key, e = "objective.label_smoothing", self.label_smoothing
        _require(0 <= e < 0.5, key, e, "0 <= e < 0.5")
        if self.link is Link.exo:
            _require(e > 0, key, e, "more than 0 with objective.link=exo (for example 0.001)")
        if self.link not in SMOOTHED_LINKS:
            _require(e == 0, key, e, f"0: objective.link={self.link} has none")
        _require(0 < self.clip < 1, "objective.clip", self.clip, "0 < clip < 1")
        weights = ("gamma", "odds_weight", "sft_weight", "margin_per_constraint", "kl_weight")
        _at_least(self, "objective", 0, *weights)
        for option in fields(Options):
            value = getattr(self, option.name)
            users = [name for name, of in OBJECTIVES.items() if option.name in of.reads]
            _refuse(
                value != option.default and self.name not in users,
                f"objective.{option.name}={value} has no effect with objective.name={self.name}; "
                f"remove it (used by {', '.join(users)})",
            )


@dataclass
class OptimConfig:
    lr: float = 2e-5
    schedule: Schedule = Schedule.cosine
    warmup_ratio: float = 0.1
    epochs: int = 1
    max_steps: int | None = None
    global_batch_quads: int = 16
    micro_batch_quads: int | None = None
    tokens_per_microbatch: int | None = 1024
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_norm: float = 1.0

    def __post_init__(self):
        _require(self.lr > 0, "optim.lr", self.lr, "more than 0")
        _require(0 <= self.warmup_ratio < 1, "optim.warmup_ratio", self.warmup_ratio, "0 <= r < 1")
        _require(self.clip_norm > 0, "optim.clip_norm", self.clip_norm, "more than 0 (inf: off)")
        for key in ("adam_beta1", "adam_beta2"):
            beta = getattr(self, key)
            _require(0 <= beta < 1, f"optim.{key}", beta, "0 <= beta < 1")
        _at_least(self, "optim", 0, "weight_decay", "adam_eps")
        _at_least(self, "optim", 1, "epochs", "max_steps", "global_batch_quads")
        _at_least(self, "optim", 1, "micro_batch_quads", "tokens_per_microbatch")
        _refuse(
            (self.micro_batch_quads is None) == (self.tokens_per_microbatch is None),
            "expected exactly one of optim.micro_batch_quads and optim.tokens_per_microbatch; set "
            "the other to null",
        )


@dataclass
class ParallelConfig:
    device: Device = Device.auto
    processes: int | None = None
    shard_processes: int | None = None
    offload: bool = False
    checkpointing: Checkpointing = Checkpointing.none
    checkpoint_every_k: int = 2
    split_quads: bool = False
    compile: bool = False
    timeout_s: float = 1800.0

    def __post_init__(self):
        _at_least(self, "parallel", 1, "processes", "shard_processes", "checkpoint_every_k")
        _require(self.timeout_s > 0, "parallel.timeout_s", self.timeout_s, "more than 0 seconds")
        _refuse(
            self.checkpoint_every_k != 2 and self.checkpointing is not Checkpointing.every_k,
            f"parallel.checkpoint_every_k={self.checkpoint_every_k} has no effect with "
            f"parallel.checkpointing={self.checkpointing}; set that to every_k",
        )


@dataclass
class ReferenceConfig:
    source: ReferenceSource = ReferenceSource.auto
    path: str | None = None
    cache_dir: str | None = None
    recheck_rows: int = 4

    def __post_init__(self):
        _at_least(self, "reference", 0, "recheck_rows")


@dataclass
class CheckpointConfig:
    save_every_steps: int | None = None
    keep: int = 2
    best_metric: str | None = "group_accuracy"
    asynchronous: bool = True
    resume: Resume = Resume.auto

    def __post_init__(self):
        expected = "2 or more: with one, a crash inside a save would leave none"
        _require(self.keep >= 2, "checkpoint.keep", self.keep, expected)
        best, expected = self.best_metric, "null, or one of " + ", ".join(HELDOUT_MEASURES)
        _require(best in (None, *HELDOUT_MEASURES), "checkpoint.best_metric", best, expected)
        _at_least(self, "checkpoint", 1, "save_every_steps")


@dataclass
class EvaluationConfig:
    every_steps: int | None = None
    quads: int | None = None
    max_new_tokens: int = 128
    samples: int = 8
    batch_size: int = 50

    def __post_init__(self):
        _at_least(self, "evaluation", 1, "every_steps", "quads", "max_new_tokens", "batch_size")
        _at_least(self, "evaluation", 0, "samples")


@dataclass
class TrackerConfig:
    log_every_steps: int = 1
    wandb: Wandb = Wandb.off
    project: str = "iopo"
    tags: list[str] = field(default_factory=list)

    def __post_init__(self):
        _at_least(self, "tracker", 1, "log_every_steps")


@dataclass
class ExportConfig:
    model: bool = True
    merged: bool = False
    dtype: Dtype = Dtype.auto
    push_to_hub: str | None = None

    def __post_init__(self):
        name = self.push_to_hub
        fits = name is None or (name.count("/") == 1 and all(name.split("/")))
        _require(fits, "export.push_to_hub", name, "ORG/NAME")
        _refuse(
            name is not None and not self.any,
            "export.push_to_hub has nothing to push; set export.model or export.merged",
        )

    @property
    def any(self) -> bool:
        return self.model or self.merged


@dataclass
class PlanConfig:
    gpus: int = 8
    gpus_per_machine: int = 8
    gpu_gb: float = 80.0
    gpu_tflops: float = 450.0
    machine_gb_per_s: float = 300.0
    network_gb_per_s: float = 320.0
    prompt_tokens: int = 200
    response_tokens: int = 300
    group_responses: int = 8

    def __post_init__(self):
        for key in self.__dataclass_fields__:
            _require(getattr(self, key) > 0, f"plan_for.{key}", getattr(self, key), "more than 0")


@dataclass
class TrainConfig:
    run: str = "???"  # how OmegaConf spells "must be given"
    seed: int = 0
    plan: bool = False
    replay_step: int | None = None
    export_step: int | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    plan_for: PlanConfig = field(default_factory=PlanConfig)

    def __post_init__(self):
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        adapted, source = self.model.lora.rank > 0, self.reference.source
        name, objective = self.objective.name, OBJECTIVES[self.objective.name]
        on_quads = objective.rows.kind == "quad"
        _refuse(
            source is ReferenceSource.adapter_off and not adapted,
            "reference.source=adapter_off: there are no adapters; set model.lora.rank to 1 or "
            "more, or reference.source to cache or live",
        )
        _refuse(
            self.export.merged and not adapted,
            "export.merged=true has no effect at model.lora.rank=0, which exports the whole model",
        )
        _refuse(
            self.parallel.checkpointing is Checkpointing.auto and self.data.layout is Layout.plain,
            "parallel.checkpointing=auto knows the memory of data.layout=shared only; with plain "
            "expected none, every_k, selective or full",
        )
        _refuse(
            not adapted and self.model.lora != LoraConfig(),
            "model.lora: alpha, dropout and targets have no effect at model.lora.rank=0, which "
            "trains all weights; set the rank of the adapters",
        )
        of_name = f"has no effect with objective.name={name}, which"
        _refuse(
            self.data.quad_rows is QuadRows.first and objective.rows.kind not in ("pair", "sft"),
            f"data.quad_rows=first {of_name} takes whole {objective.rows.kind}s; remove it",
        )
        _refuse(
            source is not ReferenceSource.auto and not objective.reference,
            f"reference.source={source} {of_name} has no reference; remove it",
        )
        other = self.reference.path
        _refuse(
            other is not None and not objective.reference,
            f"reference.path={other} {of_name} has no reference; remove it",
        )
        _refuse(
            other is not None and source is ReferenceSource.adapter_off,
            f"reference.source=adapter_off is the base under the adapters, not {other}; set it to "
            "cache or live, or remove reference.path",
        )
        if self.parallel.split_quads:
            budget, dropout = self.optim.tokens_per_microbatch, self.model.lora.dropout
            so = "with parallel.split_quads=true"
            _require(on_quads, "objective.name", name, f"an objective on quads {so}: two prompts")
            _require(budget is not None, "optim.tokens_per_microbatch", None, f"a number {so}")
            expected = f"0 {so}: other elements would drop"
            _require(dropout == 0, "model.lora.dropout", dropout, expected)


def plain(cfg: Any) -> dict[str, Any]:
    """A config as JSON gives it back: dicts, lists and scalars, enums by their values."""
    return json.loads(json.dumps(asdict(cfg)))
