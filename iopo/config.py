"""The typed schema of conf/ and every check that needs neither data nor weights.

Hydra composes YAML into these dataclasses, so a misspelt key or a wrong type fails by name. The
checks run in __post_init__, when train.py turns the composed config into objects; below train.py
and evaluate.py nothing imports Hydra. Comments on the keys, with units, are in conf/*.yaml.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

OBJECTIVES = (
    "iopo", "input_preference", "output_preference", "iopo_three", "dpo", "simpo", "orpo", "sft",
)  # fmt: skip
ON_QUADS, WITH_REFERENCE = OBJECTIVES[:4], OBJECTIVES[:5]

HELDOUT_MEASURES = ("loss", "group_accuracy", "x_preference", "y_preference")  # of any objective


class Link(Enum):
    sigmoid = "sigmoid"
    hinge = "hinge"
    ipo = "ipo"
    robust = "robust"
    exo = "exo"


class Dtype(Enum):
    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"
    fp64 = "fp64"


class Layout(Enum):
    shared = "shared"
    plain = "plain"


class Overlong(Enum):
    drop = "drop"
    truncate = "truncate"
    error = "error"


class Schedule(Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class ReferenceSource(Enum):
    auto = "auto"
    cache = "cache"
    live = "live"
    adapter_off = "adapter_off"


class Wandb(Enum):
    off = "off"
    offline = "offline"
    online = "online"


class Checkpointing(Enum):
    none = "none"
    every_k = "every_k"
    selective = "selective"
    full = "full"
    auto = "auto"


class Resume(Enum):
    auto = "auto"
    must = "must"
    never = "never"


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def _require(ok: bool, key: str, found: Any, expected: str) -> None:
    if not ok:
        raise ValueError(f"{key}: found {found!r}, expected {expected}")


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
    adapter: str | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self):
        _require(
            (self.path is None) != (self.tiny is None),
            "model.path",
            self.path,
            "a model folder, a hub id or 'demo' (or model.tiny, never both)",
        )


@dataclass
class DataConfig:
    train: str | None = None
    heldout: str | None = None
    quad_rows: str = "both"
    max_prompt_tokens: int = 1024
    max_response_tokens: int = 1024
    on_overlong: Overlong = Overlong.drop
    layout: Layout = Layout.shared
    limit_rows: int | None = None
    workers: int = 0
    cache_dir: str | None = None

    def __post_init__(self):
        _at_least(self, "data", 1, "max_prompt_tokens", "max_response_tokens", "limit_rows")
        _require(
            self.quad_rows in ("both", "first"), "data.quad_rows", self.quad_rows, "both or first"
        )


@dataclass
class ObjectiveConfig:
    name: str = "iopo"
    beta: float = 0.1
    link: Link = Link.sigmoid
    label_smoothing: float = 0.0
    gamma: float = 0.0
    odds_weight: float = 0.1
    sft_weight: float = 0.0
    margin_per_constraint: float = 0.0

    def __post_init__(self):
        _require(
            self.name in OBJECTIVES, "objective.name", self.name, "one of " + ", ".join(OBJECTIVES)
        )
        _require(self.beta > 0, "objective.beta", self.beta, "more than 0 (the paper uses 0.1)")
        key, e = "objective.label_smoothing", self.label_smoothing
        _require(0 <= e < 0.5, key, e, "0 <= e < 0.5")
        if self.link is Link.exo:
            _require(e > 0, key, e, "more than 0 with objective.link=exo (for example 0.001)")
        if self.link in (Link.hinge, Link.ipo):
            _require(e == 0, key, e, f"0: objective.link={self.link.value} has none")
        weights = ("gamma", "odds_weight", "sft_weight", "margin_per_constraint")
        _at_least(self, "objective", 0, *weights)
        self._refuse_idle_options()

    def _refuse_idle_options(self) -> None:
        """An option that the chosen objective does not read is an error, not a silent no-op."""
        uses = {
            "beta": (*WITH_REFERENCE, "simpo"),
            "gamma": ("simpo",),
            "odds_weight": ("orpo",),
            "sft_weight": (*WITH_REFERENCE, "simpo"),
            "margin_per_constraint": ON_QUADS,
            "link": WITH_REFERENCE,
            "label_smoothing": WITH_REFERENCE,
        }
        for key, objectives in uses.items():
            default = type(self).__dataclass_fields__[key].default
            if getattr(self, key) != default and self.name not in objectives:
                raise ValueError(
                    f"objective.{key}={getattr(self, key)} has no effect with "
                    f"objective.name={self.name}; remove it (used by {', '.join(objectives)})"
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
        _at_least(self, "optim", 1, "epochs", "max_steps", "global_batch_quads")
        _at_least(self, "optim", 1, "micro_batch_quads", "tokens_per_microbatch")
        _require(
            (self.micro_batch_quads is None) != (self.tokens_per_microbatch is None),
            "optim.micro_batch_quads",
            self.micro_batch_quads,
            "exactly one of optim.micro_batch_quads and optim.tokens_per_microbatch; set the "
            "other to null",
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
        if self.checkpoint_every_k != 2 and self.checkpointing is not Checkpointing.every_k:
            raise ValueError(
                f"parallel.checkpoint_every_k={self.checkpoint_every_k} has no effect with "
                f"parallel.checkpointing={self.checkpointing.value}; set that to every_k"
            )


@dataclass
class ReferenceConfig:
    source: ReferenceSource = ReferenceSource.auto
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
        adapted = self.model.lora.rank > 0
        if self.reference.source is ReferenceSource.adapter_off and not adapted:
            raise ValueError(
                "reference.source=adapter_off: there are no adapters (model.lora.rank is 0), "
                "expected model.lora.rank of 1 or more, or reference.source=cache or live"
            )
        if self.export.merged and not adapted:
            raise ValueError(
                "export.merged=true has no effect without adapters (model.lora.rank is 0); the "
                "export is the whole model already"
            )
        if self.parallel.checkpointing is Checkpointing.auto and self.data.layout is Layout.plain:
            raise ValueError(
                "parallel.checkpointing=auto plans the memory of a run, which is modelled for "
                "data.layout=shared only; with data.layout=plain expected none, every_k, selective "
                "or full"
            )
        if not adapted and self.model.lora != LoraConfig():
            raise ValueError(
                "model.lora: alpha, dropout and targets have no effect at model.lora.rank=0, which "
                "trains all weights; set the rank of the adapters"
            )
        if self.data.quad_rows == "first" and self.objective.name in ON_QUADS:
            raise ValueError(
                f"data.quad_rows=first has no effect with objective.name={self.objective.name}, "
                "which takes whole quads; remove it"
            )
        source = self.reference.source
        if source is not ReferenceSource.auto and self.objective.name not in WITH_REFERENCE:
            raise ValueError(
                f"reference.source={source.value} has no effect with "
                f"objective.name={self.objective.name}, which has no reference; remove it"
            )
        if self.parallel.split_quads:
            self._check_split_quads()

    def _check_split_quads(self) -> None:
        name, budget = self.objective.name, self.optim.tokens_per_microbatch
        dropout, so = self.model.lora.dropout, "with parallel.split_quads=true"
        expected = f"an objective on quads {so}: two prompts"
        _require(name in ON_QUADS, "objective.name", name, expected)
        _require(budget is not None, "optim.tokens_per_microbatch", None, f"a number {so}")
        _require(dropout == 0, "model.lora.dropout", dropout, f"0 {so}: other elements would drop")


def plain(cfg: Any) -> Any:
    """A config as dicts, lists and scalars, for JSON: enums become their values."""
    if is_dataclass(cfg):
        return {f.name: plain(getattr(cfg, f.name)) for f in fields(cfg)}
    if isinstance(cfg, Enum):
        return cfg.value
    if isinstance(cfg, dict):
        return {key: plain(value) for key, value in cfg.items()}
    if isinstance(cfg, list):
        return [plain(value) for value in cfg]
    return cfg
