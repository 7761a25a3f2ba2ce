"""Score answers by a language model: ask, read, ask again, and count what stays unparsed."""

import asyncio
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iopo.constraints.text import after_thinking
from iopo.evaluation.config import EvaluateConfig, JudgeSection, Style
from iopo.evaluation.endpoint import (
    Endpoint,
    EndpointError,
    Reply,
    ReplyCache,
    Request,
    RequestFailed,
    Usage,
    run_together,
)
from iopo.evaluation.items import Benchmark, Item, Question, Verdict
from iopo.evaluation.judge import parse as judge_parse
from iopo.evaluation.judge import prompts as judge_prompts
from iopo.evaluation.judge.cost import (
    ASSUMED_RESPONSE,
    REPLY_TOKENS,
    REPLY_TOKENS_PER_CRITERION,
    cost_usd,
    tokens,
)
from iopo.evaluation.judge.parse import Parsed, Unreadable
from iopo.progress import progress

REPAIR_TEMPERATURE = 0.3  # a judge at temperature 0 would repeat its unreadable reply
QUOTED_CHARS = 4000  # of an unreadable reply, when it is shown back to the judge
CUT_MARK = "\n[... the rest of the answer was cut ...]"
REPAIR = (
    "Your reply could not be used: {problem}. Judge again and keep to the format asked for, "
    "without anything else."
)

# The published formats: what is asked, and how the reply is read.
_PAPER: dict[str, tuple[Callable[[Question], str], Callable[..., Parsed]]] = {
    "trace": (judge_prompts.paper_trace, judge_parse.parse_trace),
    "lines": (judge_prompts.paper_lines, judge_parse.parse_lines),
    "yes_no": (judge_prompts.paper_yes_no, judge_parse.parse_yes_no),
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Judgement:
    """The outcome of one question.

    status: "judged"; "unparsed": no readable reply; "failed": no reply from the server;
    "empty": an empty answer, which follows nothing and is not shown to the judge.
    scores: by constraint, 0 .. maximum; None unless judged or empty.
    """

    id: str
    status: str
    scores: tuple[float, ...] | None
    overall: float | None = None
    reason: str = ""  # why it is unparsed or failed
    replies: tuple[str, ...] = ()  # keys of the raw replies, in the cache
    cut: bool = False  # the answer was too long and was cut for the judge


def prompt(question: Question, style: Style) -> str:
    """The text that is sent to the judge. Raises ValueError for a format without `paper` prompt."""
    if style is Style.robust:
        return judge_prompts.robust(question)
    if question.format not in _PAPER:
        raise ValueError("judge.style=paper: this benchmark has none; set judge.style=robust")
    return _PAPER[question.format][0](question)


def parse(question: Question, style: Style, reply: Reply) -> Parsed:
    """The scores in a reply. Raises Unreadable, also when the reply was cut off.

    Scores inside <think> are drafts and do not count.
    """
    if reply.finish_reason == "length":
        raise Unreadable("the reply was cut off at the token limit")
    text = after_thinking(reply.text)
    count = len(question.criteria)
    if style is Style.paper:
        return _PAPER[question.format][1](text, count=count)
    token = judge_prompts.token(question)
    return judge_parse.parse_indexed(text, count=count, maximum=question.maximum, token=token)


def first_request(question: Question, section: JudgeSection) -> Request:
    """The request that opens a question."""
    structured = section.structured and section.style is Style.robust
    return Request(
        model=section.model or "",
        messages=({"role": "user", "content": prompt(question, section.style)},),
        temperature=section.temperature,
        max_tokens=section.max_tokens,
        extra=section.extra,
        version=f"{question.format}-{section.style.value}-{judge_prompts.VERSION}",
        response_format=judge_prompts.robust_schema(question) if structured else None,
    )


def next_request(request: Request, reply: Reply, problem: str) -> Request:
    """The request after an unreadable reply: the reply and its fault, at a higher temperature."""
    return dataclasses.replace(
        request,
        messages=(
            request.messages[0],
            {"role": "assistant", "content": reply.text[:QUOTED_CHARS]},
            {"role": "user", "content": REPAIR.format(problem=problem)},
        ),
        temperature=max(request.temperature, REPAIR_TEMPERATURE),
        seed=(request.seed or 0) + 1,
    )


async def judge_one(endpoint: Endpoint, question: Question, section: JudgeSection) -> Judgement:
    """Ask until a reply can be read, at most 1 + parse_retries times."""
    question, cut = prepare(question, section)
    if not question.response.strip():
        return Judgement(question.id, "empty", (0.0,) * len(question.criteria), 0.0)
    request = first_request(question, section)
    keys: list[str] = []
    problem = ""
    for _ in range(section.parse_retries + 1):
        try:
            reply = await endpoint.ask(request)
        except RequestFailed as error:
            return Judgement(question.id, "failed", None, None, str(error), tuple(keys), cut)
        keys.append(reply.key)
        try:
            parsed = parse(question, section.style, reply)
        except Unreadable as error:
            problem = str(error)
            request = next_request(request, reply, problem)
            continue
        return Judgement(question.id, "judged", parsed.scores, parsed.overall, "", tuple(keys), cut)
    return Judgement(question.id, "unparsed", None, None, problem, tuple(keys), cut)


def prepare(question: Question, section: JudgeSection) -> tuple[Question, bool]:
    """The question as it is asked: an answer beyond `max_response_chars` is cut, and marked."""
    if len(question.response) <= section.max_response_chars:
        return question, False
    response = question.response[: section.max_response_chars] + CUT_MARK
    return dataclasses.replace(question, response=response), True


def split(question: Question, section: JudgeSection) -> list[Question]:
    """The questions that are asked in its place, each in one request: itself, or one a criterion.

    The published yes-or-no prompt holds one criterion only.
    """
    one_only = section.style is Style.paper and question.format == "yes_no"
    if len(question.criteria) == 1 or not (section.per_criterion or one_only):
        return [question]
    return [
        dataclasses.replace(question, id=f"{question.id}#{number}", criteria=(criterion,))
        for number, criterion in enumerate(question.criteria, 1)
    ]


def merge(name: str, found: list[Judgement]) -> Judgement:
    """One judgement from those of its parts; unparsed parts leave the whole unparsed."""
    if len(found) == 1:
        return dataclasses.replace(found[0], id=name)
    bad = [j for j in found if j.scores is None]
    replies = tuple(key for j in found for key in j.replies)
    cut = any(j.cut for j in found)
    if bad:
        status = "failed" if any(j.status == "failed" for j in bad) else "unparsed"
        reason = f"{len(bad)} of {len(found)} parts: {bad[0].reason}"
        return Judgement(name, status, None, None, reason, replies, cut)
    scores = tuple(score for j in found for score in j.scores or ())
    return Judgement(name, found[0].status, scores, None, "", replies, cut)


async def judge_all(
    questions: list[Question], section: JudgeSection, cache: ReplyCache | None
) -> tuple[list[Judgement], Usage]:
    """(judgements in the order of the questions, what was sent and received).

    Raises EndpointError when the server cannot be used; replies so far stay in the cache.
    """
    endpoint = Endpoint(section, cache)
    results: dict[str, Judgement] = {}
    show = progress(len(questions), "judged")

    async def one(question: Question) -> None:
        parts = split(question, section)
        found = [await judge_one(endpoint, part, section) for part in parts]
        results[question.id] = merge(question.id, found)
        show(len(results))

    try:
        await run_together([one(question) for question in questions])
    finally:
        await endpoint.close()
    return [results[question.id] for question in questions], endpoint.usage


def judge_items(
    section: JudgeSection, benchmark: Benchmark, items: list[Item], texts: dict[str, str], out: Path
) -> tuple[list[Verdict], dict[str, Any]]:
    """(verdicts of the judge in the items' order, what was asked and used).

    texts: answers by item id. Items without a question are scored by the benchmark's own code.
    Raises EndpointError when the judge cannot be used; its replies so far are in the cache.
    """
    asked = {i.id: benchmark.question(i, texts.get(i.id, "")) for i in items}
    questions = [question for question in asked.values() if question is not None]
    with ReplyCache(section.cache or out / "judge.jsonl") as cache:
        log.info("judging %d answers; %d replies are cached", len(questions), len(cache))
        judgements, usage = asyncio.run(judge_all(questions, section, cache))
    sent = [j for j in judgements if j.status != "empty"]
    if sent and all(j.status == "failed" for j in sent):
        raise EndpointError(
            f"all {len(sent)} requests to the judge failed, the first ({sent[0].id}) with: "
            f"{sent[0].reason}; nothing was scored: mend it and run the same command again"
        )
    by_id = {judgement.id: judgement for judgement in judgements}
    verdicts = [
        {"by": "judge", **dataclasses.asdict(by_id[item.id])}
        if item.id in by_id
        else benchmark.by_code(item, texts.get(item.id, ""))
        for item in items
    ]
    return verdicts, _summary(section, verdicts, usage)


def _summary(section: JudgeSection, verdicts: list[Verdict], usage: Usage) -> dict[str, Any]:
    status = Counter(row["status"] for row in verdicts)
    for kind in ("unparsed", "failed"):
        if status[kind]:
            log.info("note: %d judgements %s; see verdicts.jsonl", status[kind], kind)
    sent, received = usage.prompt_tokens, usage.completion_tokens
    cost = cost_usd(section, sent, received)
    shown = "" if cost is None else f", {cost:.2f} USD"
    made = f"{usage.requests} requests, {usage.cached} from the cache"
    log.info("judge: %s, %d + %d tokens%s", made, sent, received, shown)
    return {
        "model": section.model,
        "style": section.style.value,
        "prompt_version": judge_prompts.VERSION,
        "status": dict(status),
        "answers_cut": sum(row.get("cut", False) for row in verdicts),
        "unparsed": {r["id"]: r["reason"] for r in verdicts if r["scores"] is None},
        "usage": dataclasses.asdict(usage),
    }


def require_judge(section: JudgeSection, benchmark: str) -> None:
    """Raise ValueError where the config names no judge."""
    if section.base_url is None or section.model is None:
        raise ValueError(
            f"{benchmark} needs a judge: set judge.base_url and judge.model "
            "(plan=true shows what it will cost)"
        )


def plan(
    config: EvaluateConfig, benchmark: Benchmark, items: list[Item], texts: dict[str, str] | None
) -> dict[str, Any]:
    """What an evaluation will ask for and cost: logged and returned; nothing is sent or loaded.

    texts: answers by id; None: of an assumed length.
    """
    found: dict[str, Any] = {
        "items": len(items),
        "answers_to_make": 0 if texts is not None else len(items),
        "answer_prompt_tokens": sum(tokens(m["content"]) for i in items for m in i.messages),
    }
    if benchmark.judged:
        found |= _judge_plan(config.judge, benchmark, items, texts)
    for key, value in found.items():
        log.info("%s: %s", key.replace("_", " "), "not known" if value is None else value)
    if benchmark.judged and found["judge_cost_usd"] is None:
        log.info("set judge.usd_per_million_prompt_tokens and ..._completion_tokens for a cost")
    log.info("token counts are estimates from characters; re-asked replies come on top")
    return found


def _judge_plan(
    section: JudgeSection, benchmark: Benchmark, items: list[Item], texts: dict[str, str] | None
) -> dict[str, Any]:
    answers = [(i, ASSUMED_RESPONSE if texts is None else texts.get(i.id, "")) for i in items]
    questions = [benchmark.question(item, text) for item, text in answers]
    parts = [
        part
        for question in questions
        if question is not None and question.response.strip()
        for part in split(prepare(question, section)[0], section)
    ]
    sent = sum(tokens(prompt(part, section.style)) for part in parts)
    criteria = sum(len(part.criteria) for part in parts)
    received = REPLY_TOKENS * len(parts) + REPLY_TOKENS_PER_CRITERION * criteria
    cost = cost_usd(section, sent, received)
    return {
        "judge_requests": len(parts),
        "judge_prompt_tokens": sent,
        "judge_completion_tokens": received,
        "judge_cost_usd": None if cost is None else round(cost, 2),
    }
