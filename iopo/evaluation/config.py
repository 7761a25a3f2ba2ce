"""Schema of conf/evaluate.yaml: what may be set, its unit, and what is refused.

Plain dataclasses: evaluate.py gives them to Hydra, everything below gets them as typed objects.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum, auto
from typing import Any

BOOTSTRAP = 2000  # resamples


def _require(section: Any, names: str, ok: Callable[[float], bool], expected: str) -> None:
    """Raise ValueError for the first of the named values that is set and not ok."""
    for name in names.split():
        value = getattr(section, name)
        if value is not None and not ok(value):
            raise ValueError(f"{name} is {value}; expected {expected}")


class Style(StrEnum):
    """Wording and reply format of the judge's prompt."""

    paper = auto()  # as the authors published (TRACE, CFBench, ComplexBench)
    robust = auto()  # JSON by constraint number, fenced answer: the one to trust


@dataclass
class BenchmarkSection:
    name: str = "???"  # set by +benchmark=NAME
    reference: str | None = None  # quads only: a model folder to measure margins against
    base: str | None = None  # quads only: who says if an answer is on task; null: the model itself
    scored: int | None = None  # quads only: how many are scored by log-prob; 0: none; None: all
    controls: bool = True  # quads only: score blanked and shuffled instructions too

    def __post_init__(self) -> None:
        _require(self, "scored", lambda n: n >= 0, "0 or more, or null for all")
        if self.scored == 0 and (self.controls or self.reference is not None):
            raise ValueError(
                "benchmark.scored=0 leaves no log-probs for benchmark.controls and "
                "benchmark.reference; set the one to false and the other to null"
            )


DTYPES = ("auto", "bf16", "fp32", "fp64")  # by name: torch would cost every scoring seconds


@dataclass
class DataSection:
    path: str | None = None  # benchmark file; none: $IOPO_DATA_DIR/<benchmark>/<file name>


@dataclass
class ModelSection:
    path: str | None = None  # folder in Hugging Face's format
    adapter: str | None = None  # folder of a PEFT adapter on that model
    dtype: str = "auto"  # auto: bf16 on CUDA and on CPUs that multiply it fast, else fp32
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    # variables of the chat template, such as {enable_thinking: false}; a server is sent them too
    template_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype: found {self.dtype}, expected one of {DTYPES}")


@dataclass
class EndpointSection:
    """An OpenAI-compatible server, and how hard to press it."""

    base_url: str | None = None  # such as http://localhost:8000/v1
    model: str | None = None  # the name the server knows it by
    api_key_env: str = "OPENAI_API_KEY"  # the variable's name; the key itself is never written
    concurrency: int = 16  # requests under way at once
    requests_per_minute: int | None = None
    timeout_s: float = 180.0  # for one request, from sending to the last byte
    max_retries: int = 6  # of one request, on 408, 409, 429, 5xx, lost connections, broken replies
    backoff_s: float = 1.0  # the n-th wait is drawn from 0 .. backoff_s * 2^n, at most 60 s
    max_requests: int | None = None  # stop after so many, retries included
    extra: dict[str, Any] = field(default_factory=dict)  # added to each request as it is

    def __post_init__(self) -> None:
        _require(self, "concurrency timeout_s backoff_s", lambda n: n > 0, "a number above 0")
        _require(self, "max_retries", lambda n: n >= 0, "0 or more")
        limits = "requests_per_minute max_requests"
        _require(self, limits, lambda n: n >= 1, "1 or more, or null for no limit")


@dataclass
class GenerateSection(EndpointSection):
    """How responses are made. base_url null: by transformers in this process."""

    system_prompt: str | None = None  # null: as the benchmark has it
    temperature: float = 0.0  # 0: greedy
    max_new_tokens: int = 1024
    batch_size: int = 16  # prompts at once, in process only
    seed: int | None = 0  # of sampling; no server is sent it at temperature 0; null: never

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed is None and self.base_url is None:
            raise ValueError(
                "generate.seed=null leaves the draws to a server (generate.base_url); in process "
                "expected a number"
            )
        _require(self, "temperature", lambda n: n >= 0, "0 or more")
        _require(self, "max_new_tokens batch_size", lambda n: n >= 1, "1 or more")


@dataclass
class JudgeSection(EndpointSection):
    """Who scores what code cannot check, and how it is asked."""

    style: Style = Style.robust
    structured: bool = True  # style=robust: ask the server for JSON by schema; go on if it refuses
    per_criterion: bool = False  # one call for each constraint: dearer, and less can go wrong
    temperature: float = 0.0
    max_tokens: int | None = 4096  # null: leave it out (set extra.max_completion_tokens instead)
    parse_retries: int = 2  # further attempts after a reply that cannot be read
    max_response_chars: int = 50_000  # longer answers are cut before judging, and counted
    cache: str | None = None  # file of raw replies; null: judge.jsonl in the output folder
    usd_per_million_prompt_tokens: float | None = None  # for the estimate and the bill
    usd_per_million_completion_tokens: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "parse_retries", lambda n: n >= 0, "0 or more")


@dataclass
class ResponsesSection:
    path: str | None = None  # rows {"key", "id" or "prompt", "response"}: scored, none generated


@dataclass
class EvaluateConfig:
    benchmark: BenchmarkSection = field(default_factory=BenchmarkSection)
    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    generate: GenerateSection = field(default_factory=GenerateSection)
    judge: JudgeSection = field(default_factory=JudgeSection)
    responses: ResponsesSection = field(default_factory=ResponsesSection)
    out: str | None = None  # null: runs/evaluate/<benchmark>/<model>
    limit: int | None = None  # only so many items (prompts with their cousins), spread evenly
    plan: bool = False  # print requests, tokens and cost, then stop; no server or model is touched
    bootstrap: int = BOOTSTRAP  # resamples behind each interval
    seed: int = 0  # of the bootstrap

    def __post_init__(self) -> None:
        _require(self, "bootstrap limit", lambda n: n >= 1, "1 or more")
        sources = {
            "model.path": self.model.path,
            "generate.base_url": self.generate.base_url,
            "responses.path": self.responses.path,
        }
        given = [name for name, value in sources.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are all set; expected one source of responses")
        if not given and not self.plan:
            raise ValueError(f"nothing to score; set one of {', '.join(sources)}")
        if self.model.adapter is not None and self.model.path is None:
            raise ValueError("model.adapter is set without model.path; set the model it belongs to")
        options = self.model.template_options
        if options and self.responses.path is not None:
            raise ValueError("model.template_options has no effect with responses.path; remove it")
        if options and self.generate.base_url is not None:
            extra = self.generate.extra
            if extra.get("chat_template_kwargs", options) != options:
                raise ValueError(
                    "model.template_options would replace generate.extra.chat_template_kwargs; "
                    "remove one"
                )
            self.generate.extra = extra | {"chat_template_kwargs": options}
        if self.generate.base_url is not None and self.generate.model is None:
            raise ValueError("generate.base_url is set without generate.model; name the model")
