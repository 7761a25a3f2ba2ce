"""How much a step of the planned run processes: from the data, or from assumed lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from iopo import objectives
from iopo.config import TrainConfig
from iopo.data.batching import (
    Batching,
    first_fit,
    micro_batches_of_ranks,
    plan_steps,
    token_counts,
    tokens,
)
from iopo.data.example import Example
from iopo.data.layout import build_shared
from iopo.files import cache_root
from iopo.training.inputs import load_inputs
from iopo.training.plan.trace import attended_pairs
from iopo.training.split import Splitting, by_prompt

STEPS_LOOKED_AT, RANKS_LOOKED_AT = 50, 8  # rank 0 gets the longest example of a step


@dataclass(frozen=True)
class Work:
    """A step and its largest micro-batch.

    source: where the lengths come from, in words.
    heaviest: the examples of the forward with the most tokens: of a micro-batch, or the part of one
        that is split.
    longest: tokens of the longest single example: no micro-batch can be smaller.
    longest_part: tokens of the longest prompt with its responses: no split quad's forward can be.
    micro_batches: per rank and step, at most.
    split: share of the tokens that are in split micro-batches.
    tokens, rows, pairs: means per example; processed tokens, response rows, attended pairs.
    steps: optimizer steps of the run; None if the data is not here.
    """

    source: str
    heaviest: list[Example]
    longest: int
    longest_part: int
    micro_batches: int
    split: float
    tokens: float
    rows: float
    pairs: float
    steps: int | None


def work(
    cfg: TrainConfig,
    batching: Batching,
    splitting: Splitting | None,
    examples: Sequence[Example] | None = None,
) -> Work:
    """The work of a step on batching.ranks ranks, by the lengths of the data if it can be read.

    examples: the training data, if it is at hand.
    """
    if examples is not None:
        return _from_data(cfg, batching, splitting, examples)
    missing = _missing(cfg)
    if missing is None:
        return _from_data(cfg, batching, splitting, load_inputs(cfg).train)
    return _assumed(cfg, batching, splitting, missing)


def example_of(rows: objectives.Rows, prompt_tokens: int, response_tokens: int) -> Example:
    """An example of these rows with prompts and responses of equal lengths, all token 0."""
    prompt = np.zeros(prompt_tokens, np.int32)
    response = np.zeros(response_tokens, np.int32)
    under = tuple((response,) * count for count in rows.responses)
    return Example("planned", (prompt,) * len(under), under)


def _missing(cfg: TrainConfig) -> str | None:
    """What keeps the lengths of the data from being known on this machine; None if nothing."""
    if cfg.data.train is None or not Path(cfg.data.train).is_file():
        return f"{cfg.data.train} is not here"
    if cfg.model.tiny is not None:
        return None
    demo = cfg.model.path == "demo" and (cache_root() / "smollm2-135m-instruct").is_dir()
    if demo or Path(str(cfg.model.path)).expanduser().is_dir():
        return None
    return f"the tokenizer of {cfg.model.path} is not here"


def _assumed(
    cfg: TrainConfig, batching: Batching, splitting: Splitting | None, missing: str
) -> Work:
    """Every example of the assumed lengths; the heaviest micro-batch may be the longest allowed."""
    kind = objectives.OBJECTIVES[cfg.objective.name].rows
    prompt, response = cfg.plan_for.prompt_tokens, cfg.plan_for.response_tokens
    usual = example_of(kind, prompt, response)
    longest = example_of(kind, cfg.data.max_prompt_tokens, cfg.data.max_response_tokens)
    share = -(-batching.global_batch_quads // batching.ranks)
    per_batch, longest_per_batch = (_per_batch(batching, e, share) for e in (usual, longest))
    choices = [[usual] * per_batch, [longest] * longest_per_batch]
    parts = [_forward(rows, splitting) for rows in choices]
    return Work(
        source=f"assumed: prompts of {prompt} tokens, responses of {response} ({missing})",
        heaviest=max(parts, key=_total),
        longest=tokens(longest, "shared"),
        longest_part=_total(_longest_part([longest])),
        micro_batches=-(-share // per_batch),
        split=float(parts[0] is not choices[0]),
        **_means([usual]),
        steps=None,
    )


def _forward(rows: list[Example], splitting: Splitting | None) -> list[Example]:
    """What is processed at once of a micro-batch: all of it, or its longest part if it is split."""
    above = splitting is not None and max(token_counts(rows, "shared")) > splitting.budget
    return _longest_part(rows) if above else rows


def _longest_part(rows: Sequence[Example]) -> list[Example]:
    return max(by_prompt(rows), key=_total)


def _total(rows: Sequence[Example]) -> int:
    return int(sum(token_counts(rows, "shared")))


def _per_batch(batching: Batching, example: Example, share: int) -> int:
    """Equal examples in the fullest micro-batch of a rank that has `share` of them."""
    if batching.micro_batch_quads is not None:
        return min(share, batching.micro_batch_quads)
    assert batching.tokens_per_microbatch is not None  # checked in Batching
    costs = token_counts([example], batching.layout).repeat(share)
    bins = first_fit(costs, range(share), batching.tokens_per_microbatch, batching.layout)
    return max(map(len, bins))


def _from_data(
    cfg: TrainConfig,
    batching: Batching,
    splitting: Splitting | None,
    examples: Sequence[Example],
) -> Work:
    """The lengths of the data; micro-batches as they will be, in the first steps."""
    tokens_N = token_counts(examples, batching.layout)
    steps = plan_steps(len(examples), batching, cfg.optim.epochs, cfg.optim.max_steps)
    heaviest = _forward([examples[int(tokens_N.argmax())]], splitting)
    count = seen = apart = 0
    for step in range(min(steps, STEPS_LOOKED_AT)):
        for rank, batches in enumerate(micro_batches_of_ranks(tokens_N, batching, step)):
            if rank >= RANKS_LOOKED_AT:
                break
            count = max(count, len(batches))
            turns = (
                splitting.split_microbatches(tokens_N, batching, step, rank) if splitting else set()
            )
            for i, batch in enumerate(batches):
                rows = [examples[j] for j in batch or ()]
                seen += _total(rows)
                apart += _total(rows) if i in turns else 0
                heaviest = max(heaviest, _forward(rows, splitting) if rows else [], key=_total)
    return Work(
        source=f"{cfg.data.train}: {len(examples)} examples",
        heaviest=heaviest,
        longest=int(tokens_N.max()),
        longest_part=max(_total(_longest_part([example])) for example in examples),
        micro_batches=count,
        split=apart / seen,
        **_means(examples),
        steps=steps,
    )


def _means(examples: Sequence[Example]) -> dict[str, float]:
    total = rows = pairs = 0
    for example in examples:
        batch = build_shared([example])
        assert batch.attention is not None
        total += batch.input_ids.numel()
        rows += len(batch.rows_R)
        pairs += attended_pairs(batch.attention)
    n = len(examples)
    return {"tokens": total / n, "rows": rows / n, "pairs": pairs / n}
