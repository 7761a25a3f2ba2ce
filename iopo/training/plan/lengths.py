"""How much a step of the planned run processes: from the data, or from assumed lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from iopo.config import DataConfig, ModelConfig
from iopo.data.batching import micro_batches, part_counts, plan_steps, token_counts
from iopo.data.example import Example
from iopo.data.layout import build_shared
from iopo.data.rows import spread
from iopo.model.demo_model import demo_folder
from iopo.objectives import Rows
from iopo.sources import files_of
from iopo.training.plan.description import PlannedRun
from iopo.training.plan.trace import attended_pairs
from iopo.training.split import Splitting, by_prompt

STEPS_LOOKED_AT, RANKS_LOOKED_AT = 50, 8  # rank 0 gets the longest example of a step
MEANS_OF = 5000  # examples, evenly over the file


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


def example_of(rows: Rows, prompt_tokens: int, response_tokens: int) -> Example:
    """An example of these rows with prompts and responses of equal lengths, all token 0."""
    prompt = np.zeros(prompt_tokens, np.int32)
    response = np.zeros(response_tokens, np.int32)
    under = tuple((response,) * count for count in rows.responses)
    return Example("planned", (prompt,) * len(under), under)


def missing_for_lengths(data: DataConfig, model: ModelConfig) -> str | None:
    """What keeps the lengths of the data from being known on this machine; None if nothing."""
    try:
        files_of(data.train or "")
    except FileNotFoundError:
        return f"{data.train} is not here"
    demo = model.path == "demo" and demo_folder().is_dir()
    known = demo or model.tiny is not None or Path(str(model.path)).expanduser().is_dir()
    return None if known else f"the tokenizer of {model.path} is not here"


def assumed_work(run: PlannedRun, missing: str) -> Work:
    """The work of a step whose examples all have the lengths of plan_for; its heaviest micro-batch
    may be one of the longest examples allowed. missing: why the data's lengths are not known."""
    prompt, response = run.cfg.plan_for.prompt_tokens, run.cfg.plan_for.response_tokens
    usual = example_of(run.rows, prompt, response)
    longest = example_of(run.rows, run.cfg.data.max_prompt_tokens, run.cfg.data.max_response_tokens)
    share = -(-run.batching.global_batch_quads // run.ranks)

    def fullest(example: Example) -> list[Example]:
        """The fullest micro-batch of a rank whose examples are all like this one."""
        limit, budget = run.batching.micro_batch_quads, run.batching.tokens_per_microbatch
        if limit is None:
            assert budget is not None  # checked in the config
            limit = max(1, budget // _total([example]))
        return [example] * min(share, limit)

    batch, largest = fullest(usual), fullest(longest)
    return Work(
        source=f"assumed: prompts of {prompt} tokens, responses of {response} ({missing})",
        heaviest=max((_forward(rows, run.splitting) for rows in (batch, largest)), key=_total),
        longest=_total([longest]),
        longest_part=_total(_longest_part([longest])),
        micro_batches=-(-share // len(batch)),
        split=float(_total([usual]) > run.splitting.budget),
        **_means([usual]),
        steps=None,
    )


def _forward(rows: list[Example], splitting: Splitting) -> list[Example]:
    """What is processed at once of a micro-batch: all of it, or its longest part if it is split."""
    above = max(token_counts(rows, "shared")) > splitting.budget
    return _longest_part(rows) if above else rows


def _longest_part(rows: Sequence[Example]) -> list[Example]:
    return max(by_prompt(rows), key=_total)


def _total(rows: Sequence[Example]) -> int:
    return int(sum(token_counts(rows, "shared")))


def data_work(run: PlannedRun, examples: Sequence[Example]) -> Work:
    """The work of a step by the lengths of the data; micro-batches as in the first steps."""
    splitting, batching = run.splitting, run.batching
    tokens_N = token_counts(examples, batching.layout)
    steps = plan_steps(len(examples), batching, run.cfg.optim.epochs, run.cfg.optim.max_steps)
    heaviest = _forward([examples[int(tokens_N.argmax())]], splitting)
    count = seen = apart = 0
    for step in range(min(steps, STEPS_LOOKED_AT)):
        of_ranks = micro_batches(tokens_N, batching, step)[:RANKS_LOOKED_AT]
        for rank, batches in enumerate(of_ranks):
            count = max(count, len(batches))
            split = splitting.split_microbatches(tokens_N, batching, step, rank)
            for i, batch in enumerate(batches):
                rows = [examples[j] for j in batch or ()]
                seen += _total(rows)
                apart += _total(rows) if i in split else 0
                heaviest = max(heaviest, _forward(rows, splitting) if rows else [], key=_total)
    return Work(
        source=f"{run.cfg.data.train}: {len(examples)} examples",
        heaviest=heaviest,
        longest=int(tokens_N.max()),
        longest_part=int(part_counts(examples).max()),
        micro_batches=count,
        split=apart / seen,
        **_means(spread(examples, MEANS_OF)),
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
