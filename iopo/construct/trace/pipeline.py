"""TRACE's construction with any OpenAI-compatible server: simple instructions in, quads out.

Each stage reads one JSON Lines file and writes `<stage>.jsonl`, `<stage>.dropped.jsonl` and its
line of `counts.json`. Every raw reply is kept in `replies.jsonl` under its content, so a stage may
be run alone, killed and run again: nothing is asked twice, and outputs are in the order of inputs.
"""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from iopo.constraints.text import after_thinking
from iopo.construct import importers
from iopo.construct.trace import taxonomy
from iopo.construct.trace.config import TraceRecipe
from iopo.construct.trace.replies import Rejected, Unreadable
from iopo.construct.trace.stages import STAGES, Ask, Context, Row, Stage, language_of
from iopo.evaluation.endpoint import Endpoint, ReplyCache, RequestFailed, run_together
from iopo.evaluation.judge import cost as plan
from iopo.evaluation.judge import engine as judge
from iopo.evaluation.judge.prompts import Question
from iopo.files import read_records, write_records, write_text

log = logging.getLogger(__name__)


NO_REPLY = "no reply"  # the one reason to drop a row that is worth another run
TRAINING_FILES = {"sft": "score", "pairs": "worse", "quads": "cells"}  # name -> stage


class Servers:
    """Who is asked. The judge is the writer's server where it has none of its own."""

    def __init__(self, recipe: TraceRecipe, cache: ReplyCache):
        self.judge_section = recipe.judge_section()
        self.writer = Endpoint(recipe.endpoint, cache)
        own = recipe.judge.base_url is not None
        self.judge = Endpoint(self.judge_section, cache) if own else self.writer


def run(recipe: TraceRecipe) -> dict[str, Any]:
    """Run the stages asked for. Returns counts by stage, as in counts.json.

    Raises ValueError on a config, seeds or missing input that cannot be used, and EndpointError
    when the server cannot be used; replies so far are kept, and a later run goes on from them.
    """
    unknown = [name for name in recipe.stages if name not in STAGES]
    if unknown:
        raise ValueError(f"recipe.stages: unknown {unknown}; stages are {list(STAGES)}")
    stages = [stage for stage in STAGES.values() if stage.name in (recipe.stages or STAGES)]
    context = Context(recipe, taxonomy.read())
    out = Path(recipe.out)
    out.mkdir(parents=True, exist_ok=True)
    cache = ReplyCache(out / "replies.jsonl")
    try:
        if not recipe.plan:
            return asyncio.run(_run_stages(stages, context, cache))
        for stage in stages:
            if stage.source is None or (out / f"{stage.source}.jsonl").exists():
                log.info(_estimate(stage, _input(stage, recipe), context, cache))
            else:
                log.info(f"{stage.name}: not known before '{stage.source}' has run")
        return {}
    finally:
        cache.close()


async def _run_stages(
    stages: Sequence[Stage], context: Context, cache: ReplyCache
) -> dict[str, Any]:
    recipe = context.recipe
    servers = Servers(recipe, cache)
    endpoints = {servers.writer, servers.judge}
    out = Path(recipe.out)
    counts_file = out / "counts.json"
    counts = json.loads(counts_file.read_text(encoding="utf-8")) if counts_file.exists() else {}
    try:
        for stage in stages:
            rows = _input(stage, recipe)
            log.info(_estimate(stage, rows, context, cache))
            results = await _run_stage(stage, rows, context, servers)
            counts[stage.name] = _write(out, stage.name, rows, results)
            write_text(counts_file, json.dumps(counts, ensure_ascii=False, indent=1) + "\n")
        for name, source in TRAINING_FILES.items():  # as far as their stages have run
            if (out / f"{source}.jsonl").exists():
                rows = read_records(out / f"{source}.jsonl")
                if name == "sft":
                    rows = [{"id": row["id"], "x": row["x1"], "y": row["y1"]} for row in rows]
                write_records(out / f"{name}.jsonl", rows)
    finally:
        for endpoint in endpoints:
            await endpoint.close()
    sent = sum(endpoint.usage.requests for endpoint in endpoints)
    log.info(f"{sent} requests sent, {len(cache)} replies kept in {recipe.out}/replies.jsonl")
    return counts


async def _run_stage(
    stage: Stage, rows: Sequence[Row], context: Context, servers: Servers
) -> list[Row | Rejected]:
    """What became of every row, in order."""
    results: list[Row | Rejected] = [Rejected(NO_REPLY)] * len(rows)

    async def one(place: int, row: Row) -> None:
        try:
            answers = [await _answer(ask, context, servers) for ask in stage.asks(row, context)]
            results[place] = stage.finish(row, answers, context)
        except Rejected as error:
            results[place] = error.with_traceback(None)  # or it would keep its frame's objects
        except Unreadable as error:
            results[place] = Rejected("unreadable reply", str(error))
        except RequestFailed as error:
            results[place] = Rejected(NO_REPLY, str(error))

    await run_together([one(place, row) for place, row in enumerate(rows)])
    seen: set[str] = set()
    for place, result in enumerate(results):
        if stage.unique is not None and isinstance(result, dict):
            if result[stage.unique] in seen:
                results[place] = Rejected("repeated")
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
        request = replace(ask.request, seed=(ask.request.seed or 0) + attempt)
        reply = await servers.writer.ask(request)
        try:
            if reply.finish_reason == "length":
                raise Unreadable("cut off at max_tokens")
            return ask.read(after_thinking(reply.text))
        except Unreadable as error:
            problem = str(error)
    raise Unreadable(problem)


def _input(stage: Stage, recipe: TraceRecipe) -> list[Row]:
    """The rows a stage reads. Raises ValueError where they have not been made."""
    if stage.source is not None:
        path = Path(recipe.out) / f"{stage.source}.jsonl"
        if not path.exists():
            raise ValueError(
                f"{path} is not there; run stage '{stage.source}' before '{stage.name}'"
            )
        return read_records(path)
    if recipe.seeds is None:
        raise ValueError(
            "recipe.seeds is not set; expected a .txt file of instructions, one a line, or a "
            '.jsonl file of {"instruction": ...}'
        )
    rows = importers.read_seeds(recipe.seeds)
    for row in rows:
        auto = recipe.language == "auto"
        row["language"] = language_of(row["instruction"]) if auto else recipe.language
    return rows


def _write(
    out: Path, name: str, rows: Sequence[Row], results: Sequence[Row | Rejected]
) -> dict[str, Any]:
    """Write what passed and what did not; returns the counts, which add up to the input."""
    kept = [result for result in results if isinstance(result, dict)]
    dropped = [
        {"id": row["id"], "reason": result.reason, "detail": result.detail}
        for row, result in zip(rows, results, strict=True)
        if isinstance(result, Rejected)
    ]
    write_records(out / f"{name}.dropped.jsonl", dropped)
    write_records(out / f"{name}.jsonl", kept)
    reasons = dict(sorted(Counter(row["reason"] for row in dropped).items()))
    counts: dict[str, Any] = {"in": len(rows), "out": len(kept), "dropped": reasons}
    if rows and "operation" in rows[0]:  # delete and add seldom pass all four cells: say how seldom
        counts["operations_in"] = dict(sorted(Counter(r["operation"] for r in rows).items()))
        counts["operations_out"] = dict(sorted(Counter(r["operation"] for r in kept).items()))
    said = ", ".join(f"{n} {reason}" for reason, n in reasons.items()) or "none"
    again = " (run again to ask once more)" if NO_REPLY in reasons else ""
    log.info(f"{name}: {len(kept)} of {len(rows)} passed; dropped: {said}{again}")
    return counts


def _estimate(stage: Stage, rows: Sequence[Row], context: Context, cache: ReplyCache) -> str:
    """What the stage is about to send, from the texts alone; replies in the cache cost nothing."""
    section = context.recipe.judge_section()
    sent = cached = prompt = completion = 0
    for ask in (ask for row in rows for ask in stage.asks(row, context)):
        if isinstance(ask, Question):
            request = judge.first_request(ask, section)
            reply = plan.REPLY_TOKENS + plan.REPLY_TOKENS_PER_CRITERION * len(ask.criteria)
        else:
            request, reply = ask.request, ask.reply_tokens
        if cache.get(request.key) is not None:
            cached += 1
            continue
        sent, completion = sent + 1, completion + reply
        prompt += plan.tokens(request.messages[0]["content"])
    cost = plan.cost_usd(section, prompt, completion)
    return (
        f"{stage.name}: {len(rows)} rows, {sent} requests to send ({cached} cached), about "
        f"{prompt} prompt and {completion} completion tokens"
        + ("" if cost is None else f", {cost:.2f} USD at the judge's prices")
    )
