"""TRACE's construction with any OpenAI-compatible server: simple instructions in, quads out.

Each stage reads one JSON Lines file and writes `<stage>.jsonl`, `<stage>.dropped.jsonl` and its
line of `counts.json`. Every raw reply is kept in `replies.jsonl` under its content, so a stage may
be run alone, killed and run again: nothing is asked twice, and outputs are in the order of inputs.
"""

import asyncio
import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iopo.construct import importers, taxonomy
from iopo.construct.trace.config import TraceRecipe
from iopo.construct.trace.replies import Rejected, Unreadable
from iopo.construct.trace.stages import STAGES, Ask, Context, Row, Stage, language_of
from iopo.evaluation.config import JudgeSection
from iopo.evaluation.endpoint import Endpoint, ReplyCache, RequestFailed, run_together
from iopo.evaluation.judge import cost as plan
from iopo.evaluation.judge import engine as judge
from iopo.evaluation.judge.prompts import Question
from iopo.files import read_records, write_records, write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Drop:
    """A row that goes no further. `no reply` alone is worth another run."""

    reason: str
    detail: str = ""


NO_REPLY = "no reply"


@dataclass(frozen=True, slots=True)
class Servers:
    """Who is asked. The judge may be the same server as the writer."""

    writer: Endpoint
    judge: Endpoint
    judge_section: JudgeSection

    async def close(self) -> None:
        await self.writer.close()
        if self.judge is not self.writer:
            await self.judge.close()


def run(recipe: TraceRecipe) -> dict[str, Any]:
    """Run the stages asked for. Returns counts by stage, as in counts.json.

    Raises ValueError on a config, seeds or missing input that cannot be used, and EndpointError
    when the server cannot be used; replies so far are kept, and a later run goes on from them.
    """
    stages = chosen(recipe)
    out = Path(recipe.out)
    context = Context(recipe, taxonomy.read())
    out.mkdir(parents=True, exist_ok=True)
    cache = ReplyCache(out / "replies.jsonl")
    try:
        if recipe.plan:
            for stage in stages:
                _show_plan(stage, context, cache)
            return {}
        return asyncio.run(_run_stages(stages, context, cache))
    finally:
        cache.close()


def chosen(recipe: TraceRecipe) -> list[Stage]:
    """The stages asked for, in pipeline order. Raises ValueError on an unknown one."""
    unknown = [name for name in recipe.stages if name not in STAGES]
    if unknown:
        raise ValueError(f"recipe.stages: unknown {unknown}; stages are {list(STAGES)}")
    return [stage for stage in STAGES.values() if not recipe.stages or stage.name in recipe.stages]


async def _run_stages(
    stages: Sequence[Stage], context: Context, cache: ReplyCache
) -> dict[str, Any]:
    recipe = context.recipe
    section = recipe.judge_section()
    writer = Endpoint(recipe.endpoint, cache)
    own_judge = recipe.judge.base_url is not None
    servers = Servers(writer, Endpoint(section, cache) if own_judge else writer, section)
    out = Path(recipe.out)
    counts_file = out / "counts.json"
    counts = json.loads(counts_file.read_text(encoding="utf-8")) if counts_file.exists() else {}
    try:
        for stage in stages:
            rows = _input(stage, recipe)
            log.info(_estimate(stage, rows, context, cache))
            results = await _run_stage(stage, rows, context, servers)
            counts[stage.name] = _write(stage, rows, results, recipe)
            log.info(_counts_line(stage.name, counts[stage.name]))
            write_text(counts_file, json.dumps(counts, ensure_ascii=False, indent=1) + "\n")
        _write_training_files(out)
    finally:
        await servers.close()
    sent = writer.usage.requests + (servers.judge.usage.requests if own_judge else 0)
    log.info(f"{sent} requests sent, {len(cache)} replies kept in {recipe.out}/replies.jsonl")
    return counts


async def _run_stage(
    stage: Stage, rows: Sequence[Row], context: Context, servers: Servers
) -> list[Row | Drop]:
    """What became of every row, in order."""
    results: list[Row | Drop] = [Drop(NO_REPLY)] * len(rows)

    async def one(place: int, row: Row) -> None:
        try:
            answers = [await _answer(ask, context, servers) for ask in stage.asks(row, context)]
            results[place] = stage.finish(row, answers, context)
        except Rejected as error:
            results[place] = Drop(error.reason, error.detail)
        except Unreadable as error:
            results[place] = Drop("unreadable reply", str(error))
        except RequestFailed as error:
            results[place] = Drop(NO_REPLY, str(error))

    await run_together([one(place, row) for place, row in enumerate(rows)])
    seen: set[str] = set()
    for place, result in enumerate(results):
        if stage.unique is not None and isinstance(result, dict):
            if result[stage.unique] in seen:
                results[place] = Drop("repeated")
            seen.add(result[stage.unique])
    return results


async def _answer(ask: Ask, context: Context, servers: Servers) -> Any:
    """The value of a reply, or a judgement that has scores.

    Raises Unreadable when no attempt gave a reply of the form asked for, Rejected, RequestFailed.
    """
    if isinstance(ask, Question):
        judgement = await judge.judge_one(servers.judge, ask, servers.judge_section)
        if judgement.status == "failed":
            raise RequestFailed(judgement.reason)
        if judgement.scores is None:
            raise Unreadable(f"judge: {judgement.reason}")
        return judgement
    problem = ""
    for attempt in range(context.recipe.attempts):
        request = dataclasses.replace(ask.request, seed=(ask.request.seed or 0) + attempt)
        reply = await servers.writer.ask(request)
        try:
            if reply.finish_reason == "length":
                raise Unreadable("cut off at max_tokens")
            return ask.read(reply.text)
        except Unreadable as error:
            problem = str(error)
    raise Unreadable(problem)


def _input(stage: Stage, recipe: TraceRecipe) -> list[Row]:
    """The rows a stage reads. Raises ValueError where they have not been made."""
    if stage.source is None:
        if recipe.seeds is None:
            raise ValueError(
                "recipe.seeds is not set; expected a .txt file of instructions, one a line, or a "
                '.jsonl file of {"instruction": ...}'
            )
        seeds = importers.read_seeds(recipe.seeds)
        language = recipe.language
        return [
            {
                **seed,
                "language": language_of(seed["instruction"]) if language == "auto" else language,
            }
            for seed in seeds
        ]
    path = Path(recipe.out) / f"{stage.source}.jsonl"
    if not path.exists():
        raise ValueError(f"{path} is not there; run stage '{stage.source}' before '{stage.name}'")
    return read_records(path)


def _write(
    stage: Stage, rows: Sequence[Row], results: Sequence[Row | Drop], recipe: TraceRecipe
) -> dict[str, Any]:
    """Write what passed and what did not; returns the counts, which add up to the input."""
    out = Path(recipe.out)
    kept = [result for result in results if isinstance(result, dict)]
    dropped = [
        {"id": row["id"], "reason": result.reason, "detail": result.detail}
        for row, result in zip(rows, results, strict=True)
        if isinstance(result, Drop)
    ]
    write_records(out / f"{stage.name}.dropped.jsonl", dropped)
    write_records(out / f"{stage.name}.jsonl", kept)
    reasons = Counter(row["reason"] for row in dropped)
    counts: dict[str, Any] = {
        "in": len(rows),
        "out": len(kept),
        "dropped": dict(sorted(reasons.items())),
    }
    if rows and "operation" in rows[0]:  # delete and add seldom pass all four cells: say how seldom
        counts["operations_in"] = dict(sorted(Counter(r["operation"] for r in rows).items()))
        counts["operations_out"] = dict(sorted(Counter(r["operation"] for r in kept).items()))
    return counts


def _write_training_files(out: Path) -> None:
    """sft.jsonl, pairs.jsonl and quads.jsonl, as far as their stages have run."""
    scored, worse, cells = (out / f"{name}.jsonl" for name in ("score", "worse", "cells"))
    if scored.exists():
        rows = [{"id": r["id"], "x": r["x1"], "y": r["y1"]} for r in read_records(scored)]
        write_records(out / "sft.jsonl", rows)
    for source, name in ((worse, "pairs"), (cells, "quads")):
        if source.exists():
            write_records(out / f"{name}.jsonl", read_records(source))


def _requests(ask: Ask, section: JudgeSection) -> tuple[Any, str, int]:
    """(first request, its text, guessed tokens of the reply)."""
    if isinstance(ask, Question):
        request = judge.first_request(ask, section)
        reply = plan.REPLY_TOKENS + plan.REPLY_TOKENS_PER_CRITERION * len(ask.criteria)
    else:
        request, reply = ask.request, ask.reply_tokens
    return request, request.messages[0]["content"], reply


def _estimate(stage: Stage, rows: Sequence[Row], context: Context, cache: ReplyCache) -> str:
    """What the stage is about to send, from the texts alone; replies in the cache cost nothing."""
    section = context.recipe.judge_section()
    sent = cached = prompt = completion = 0
    for row in rows:
        for ask in stage.asks(row, context):
            request, text, reply = _requests(ask, section)
            if cache.get(request.key) is not None:
                cached += 1
                continue
            sent, prompt, completion = sent + 1, prompt + plan.tokens(text), completion + reply
    cost = plan.cost_usd(section, prompt, completion)
    line = (
        f"{stage.name}: {len(rows)} rows, {sent} requests to send ({cached} cached), about "
        f"{prompt} prompt and {completion} completion tokens"
    )
    return line if cost is None else f"{line}, {cost:.2f} USD at the judge's prices"


def _show_plan(stage: Stage, context: Context, cache: ReplyCache) -> None:
    source = None if stage.source is None else Path(context.recipe.out) / f"{stage.source}.jsonl"
    if source is not None and not source.exists():
        log.info(f"{stage.name}: not known before '{stage.source}' has run")
    else:
        log.info(_estimate(stage, _input(stage, context.recipe), context, cache))


def _counts_line(name: str, counts: dict[str, Any]) -> str:
    reasons = ", ".join(f"{n} {reason}" for reason, n in counts["dropped"].items())
    again = " (run again to ask once more)" if NO_REPLY in counts["dropped"] else ""
    return f"{name}: {counts['out']} of {counts['in']} passed; dropped: {reasons or 'none'}{again}"
