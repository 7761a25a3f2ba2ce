"""What may be set of rounds (conf/rounds.yaml), and what the stages of one round are told."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from iopo.construct.proposals import MOST_DRAWN
from iopo.evaluation.config import ModelSection
from iopo.files import write_text

TASKS, VLLM = "tasks", "vllm"
SERVERS = {VLLM: "vllm serve {model} --port {port}"}


@dataclass
class RoundsConfig:
    """Meaning and units: conf/rounds.yaml."""

    count: int = 3
    prompts: str = TASKS
    prompts_per_round: int = 64
    samples: int = 8
    most_constraints: int = MOST_DRAWN
    max_new_tokens: int = 512
    temperature: float = 0.8
    top_p: float = 0.95
    reward: str = "all"
    reference: str = "start"
    replay: float = 0.0
    stop_drop: float | None = 0.5
    heldout: list[str] = field(default_factory=list)
    seen: str | None = None
    limit: int | None = None
    serve: str | None = None
    serve_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        most = MOST_DRAWN
        self._require("count", self.count >= 1, "1 or more")
        self._require("prompts_per_round", self.prompts_per_round >= 1, "1 or more")
        even = self.samples >= 2 and self.samples % 2 == 0
        self._require("samples", even, "an even number, 2 or more")
        self._require("most_constraints", 1 <= self.most_constraints <= most, f"1 to {most}")
        self._require("max_new_tokens", self.max_new_tokens >= 1, "1 or more")
        expected = "more than 0: equal responses teach nothing"
        self._require("temperature", self.temperature > 0, expected)
        self._require("top_p", 0 < self.top_p <= 1, "0 < p <= 1")
        self._require("reward", self.reward in ("all", "share"), "all or share")
        self._require("reference", self.reference in ("start", "first"), "start or first")
        self._require("replay", 0 <= self.replay < 1, "0 <= share < 1")
        drop = self.stop_drop
        self._require("stop_drop", drop is None or 0 < drop < 1, "0 < share < 1, or null for never")
        self._require("limit", self.limit is None or self.limit >= 0, "0 or more, or null")
        self._require("serve_timeout_s", self.serve_timeout_s > 0, "more than 0 seconds")
        missing = [part for part in ("{model}", "{port}") if part not in (self.command or part)]
        expected = f"null, vllm, or a command with {' and '.join(missing)}"
        self._require("serve", not missing, expected)

    def _require(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ValueError(f"rounds.{name} is {getattr(self, name)!r}; expected {expected}")

    @property
    def command(self) -> str | None:
        """Of the server; None: there is none."""
        return SERVERS.get(self.serve or "", self.serve)


@dataclass(frozen=True)
class Round:
    """One round: what its stages need to know, kept in RUN/round-NN/round.json.

    number: from 1. kind: of the rows (objectives.Rows). policy: what the round starts from.
    """

    folder: str
    number: int
    kind: str
    seed: int
    policy: ModelSection
    system: str | None
    rounds: RoundsConfig

    def path(self, *parts: str) -> Path:
        return Path(self.folder, *parts)

    def write(self) -> None:
        """round.json."""
        self.path().mkdir(parents=True, exist_ok=True)
        write_text(self.path("round.json"), json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Self:
        found: dict[str, Any] = json.loads((folder / "round.json").read_text(encoding="utf-8"))
        found["policy"] = ModelSection(**found["policy"])
        found["rounds"] = RoundsConfig(**found["rounds"])
        return cls(**found)


def round_folder(run: Path, number: int) -> Path:
    """RUN/round-NN; 0 is the start."""
    return run / f"round-{number:02d}"
