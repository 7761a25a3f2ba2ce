"""What may be set of the recipe `trace` (conf/recipe/trace.yaml), and what is refused."""

from dataclasses import dataclass, field, replace

from iopo.construct import require
from iopo.evaluation.config import EndpointSection, JudgeSection

LANGUAGES = ("en", "zh")
OPERATIONS = ("add", "delete", "revise")


@dataclass
class TraceRecipe:
    """The pipeline of the paper's section 4.1 and appendices B to D."""

    name: str = "trace"
    seeds: str | None = None  # simple instructions: .txt, one a line, or rows (see importers.py)
    out: str = "runs/trace"  # folder of all files, the replies among them
    stages: list[str] = field(default_factory=list)  # only these, in pipeline order; empty: all
    plan: bool = False  # estimate the stages whose input exists, then stop; nothing is sent
    language: str = "auto"  # of our prompts: en, zh, or auto: by the script of each seed
    seed: int = 0  # of all draws, and sent with each request
    temperature: float = 0.7  # of everything but judging
    max_tokens: int = 2048  # of one reply; a reply that is cut off is asked for again
    attempts: int = 2  # times that an unreadable reply is asked for, each with its own seed
    # How x2 is made: chances of each operation. The paper draws all three alike.
    operations: dict[str, float] = field(default_factory=lambda: dict.fromkeys(OPERATIONS, 1.0))
    # A response is wrong for the other instruction if some constraint there scores at most this.
    mismatch_at_most: float = 5.0
    endpoint: EndpointSection = field(default_factory=EndpointSection)
    judge: JudgeSection = field(default_factory=JudgeSection)  # base_url null: the endpoint itself

    def __post_init__(self) -> None:
        weights = self.operations.values()
        known = set(self.operations) <= set(OPERATIONS)
        fair = known and min(weights, default=-1) >= 0 and sum(weights) > 0
        languages = ("auto", *LANGUAGES)
        require(self, "operations", fair, f"chances of 0 or more, not all 0, for {OPERATIONS}")
        require(self, "language", self.language in languages, f"one of {languages}")
        require(self, "mismatch_at_most", 0 <= self.mismatch_at_most < 10, "0 <= score < 10")
        require(self, "attempts", self.attempts >= 1, "1 or more")
        require(self, "max_tokens", self.max_tokens >= 1, "1 or more")
        require(self, "temperature", self.temperature >= 0, "0 or more")

    def judge_section(self) -> JudgeSection:
        """The judge's settings, with the endpoint's address where it has none of its own."""
        if self.judge.base_url is not None:
            return self.judge
        return replace(
            self.judge,
            base_url=self.endpoint.base_url,
            model=self.endpoint.model,
            api_key_env=self.endpoint.api_key_env,
        )
