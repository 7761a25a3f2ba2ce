"""From answers to a judge's verdicts: ask for all items, and say what it took."""

import asyncio
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from iopo.evaluation.config import JudgeSection
from iopo.evaluation.endpoint import Endpoint, EndpointError, ReplyCache
from iopo.evaluation.items import Item
from iopo.evaluation.judge import cost as plan
from iopo.evaluation.judge import engine as judge
from iopo.evaluation.judge.prompts import VERSION, Question
from iopo.evaluation.responses import Say


def judge_items(
    section: JudgeSection,
    module: ModuleType,
    items: list[Item],
    texts: dict[str, str],
    out: Path,
    say: Say,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(verdicts of the judge in the items' order, what was asked and used).

    texts: answers by item id. Items without a question are scored by the benchmark's own code.
    Raises EndpointError when the judge cannot be used; its replies so far are in the cache.
    """
    asked = {i.id: module.questions(i, texts.get(i.id, "")) for i in items}
    questions = [question for group in asked.values() for question in group]
    cache = ReplyCache(section.cache or out / "judge.jsonl")
    say(f"judging {len(questions)} answers; {len(cache)} replies are there already")
    try:
        judgements, usage = asyncio.run(_ask_judge(section, questions, cache, say))
    finally:
        cache.close()
    by_id = {judgement.id: judgement for judgement in judgements}
    verdicts = []
    for item in items:
        if asked[item.id]:
            row = {"by": "judge", **asdict(by_id[item.id])}
        else:
            scores = module.by_code(item, texts.get(item.id, ""))
            row = {"by": "code", "id": item.id, "status": "judged", "scores": scores}
        verdicts.append(row)
    status = Counter(row["status"] for row in verdicts)
    info = {
        "model": section.model,
        "style": section.style.value,
        "prompt_version": VERSION,
        "status": dict(status),
        "answers_cut": sum(row.get("cut", False) for row in verdicts),
        "unparsed": {r["id"]: r["reason"] for r in verdicts if r["scores"] is None},
        "usage": usage,
    }
    for kind in ("unparsed", "failed"):
        if status[kind]:
            say(f"note: {status[kind]} judgements {kind}; see scores.json and verdicts.jsonl")
    cost = plan.cost_usd(section, usage["prompt_tokens"], usage["completion_tokens"])
    say(
        f"judge: {usage['requests']} requests, {usage['cached']} from the cache, "
        f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens"
        + ("" if cost is None else f", {cost:.2f} USD")
    )
    return verdicts, info


def require_judge(section: JudgeSection, benchmark: str) -> None:
    """Raise ValueError where the config names no judge."""
    if section.base_url is None or section.model is None:
        raise ValueError(
            f"{benchmark} needs a judge: set judge.base_url and judge.model "
            "(plan=true shows what it will cost)"
        )


async def _ask_judge(
    section: JudgeSection, questions: list[Question], cache: ReplyCache, say: Say
) -> tuple[list[judge.Judgement], dict[str, Any]]:
    endpoint = Endpoint(section, cache)
    started = last = time.monotonic()

    def on_done(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last > 5:
            last = now
            say(f"{done} of {total} judged, {done / (now - started):.1f}/s")

    try:
        found = await judge.judge_all(endpoint, questions, section, on_done)
    except EndpointError as error:
        raise EndpointError(f"{error} ({len(cache)} replies are kept in the cache)") from error
    finally:
        await endpoint.close()
    return found, asdict(endpoint.usage)
