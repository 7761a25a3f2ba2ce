"""Have answers scored by a language model: ask, read, ask again, and count what stays unparsed."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from iopo.evaluation.config import JudgeSection, Style
from iopo.evaluation.endpoint import Endpoint, Reply, Request, RequestFailed, run_together
from iopo.evaluation.judge import parse as judge_parse
from iopo.evaluation.judge import passages
from iopo.evaluation.judge import prompts as judge_prompts
from iopo.evaluation.judge.parse import Parsed, Unreadable
from iopo.evaluation.judge.prompts import Question

REPAIR_TEMPERATURE = 0.3  # a judge at temperature 0 would repeat its unreadable reply
QUOTED_CHARS = 4000  # of an unreadable reply, when it is shown back to the judge
CUT_MARK = "\n[... the rest of the answer was cut ...]"

_PAPER: dict[str, Callable[[Question], str]] = {
    "trace": judge_prompts.paper_trace,
    "lines": judge_prompts.paper_lines,
    "list": judge_prompts.paper_list,
    "yes_no": judge_prompts.paper_yes_no,
}


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


@dataclass(frozen=True, slots=True)
class Part:
    """A question that is asked in one request, and which criteria of the whole it holds."""

    places: list[int]
    question: Question


def prompt(question: Question, style: Style) -> str:
    """The text that is sent to the judge."""
    if _rule(question) is not None:
        return passages.prompt(question, style)
    if style is Style.robust:
        return judge_prompts.robust(question)
    return _PAPER[question.format](question)


def parse(question: Question, style: Style, reply: Reply) -> Parsed:
    """The scores in a reply. Raises Unreadable, also when the reply was cut off."""
    if reply.finish_reason == "length":
        raise Unreadable("the reply was cut off at the token limit")
    rule = _rule(question)
    if rule is not None:
        return Parsed((float(rule.holds(passages.parse(question, style, reply.text))),))
    count = len(question.criteria)
    if style is Style.robust:
        return judge_parse.parse_indexed(
            reply.text,
            count=count,
            maximum=question.maximum,
            token=judge_prompts.token(question),
        )
    parsers: dict[str, Callable[..., Parsed]] = {
        "trace": judge_parse.parse_trace,
        "lines": judge_parse.parse_lines,
        "list": judge_parse.parse_list,
        "yes_no": judge_parse.parse_yes_no,
    }
    return parsers[question.format](reply.text, count=count)


def _rule(question: Question) -> judge_prompts.PassageRule | None:
    """The rule of a question with one criterion that code scores (see `split`)."""
    return question.rules[0] if len(question.rules) == 1 else None


def first_request(question: Question, section: JudgeSection) -> Request:
    """The request that opens a question."""
    structured = section.structured and section.style is Style.robust
    coded = _rule(question) is not None
    schema = passages.schema if coded else judge_prompts.robust_schema
    form = "passages" if coded else question.format
    return Request(
        model=section.model or "",
        messages=({"role": "user", "content": prompt(question, section.style)},),
        temperature=section.temperature,
        max_tokens=section.max_tokens,
        extra=section.extra,
        version=f"{form}-{section.style.value}-{judge_prompts.VERSION}",
        response_format=schema(question) if structured else None,
    )


def next_request(question: Question, request: Request, reply: Reply, problem: str) -> Request:
    """The request after an unreadable reply: the reply and its fault, at a higher temperature."""
    return dataclasses.replace(
        request,
        messages=(
            request.messages[0],
            {"role": "assistant", "content": reply.text[:QUOTED_CHARS]},
            {"role": "user", "content": judge_prompts.repair(problem)},
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
    for attempt in range(section.parse_retries + 1):
        try:
            reply = await endpoint.ask(request)
        except RequestFailed as error:
            return Judgement(question.id, "failed", None, None, str(error), tuple(keys), cut)
        keys.append(reply.key)
        try:
            parsed = parse(question, section.style, reply)
        except Unreadable as error:
            problem = str(error)
            if attempt < section.parse_retries:
                request = next_request(question, request, reply, problem)
            continue
        return Judgement(question.id, "judged", parsed.scores, parsed.overall, "", tuple(keys), cut)
    return Judgement(question.id, "unparsed", None, None, problem, tuple(keys), cut)


def prepare(question: Question, section: JudgeSection) -> tuple[Question, bool]:
    """The question as it is asked: an answer beyond `max_response_chars` is cut, and marked."""
    if len(question.response) <= section.max_response_chars:
        return question, False
    response = question.response[: section.max_response_chars] + CUT_MARK
    return dataclasses.replace(question, response=response), True


def split(question: Question, *, per_criterion: bool, style: Style) -> list[Part]:
    """What is really asked, with the places of its criteria in the question.

    One part, or one for each criterion; a criterion that code scores is always a part of its own.
    Raises ValueError if criteria that cannot be asked for one by one are to be.
    """
    count = len(question.criteria)
    coded = {place for place, rule in enumerate(question.rules) if rule is not None}
    judged = [place for place in range(count) if place not in coded]
    one_only = style is Style.paper and question.format == "yes_no"
    # the constraints of the published list format have no text of their own to ask for
    together = style is Style.paper and question.format == "list"
    if per_criterion and together:
        raise ValueError(
            "judge.per_criterion: FollowBench's published prompt asks for all constraints at once; "
            "set judge.style=robust, or leave per_criterion out"
        )
    apart = per_criterion or one_only
    groups = [[place] for place in (range(count) if apart else sorted(coded))]
    if judged and not apart:
        groups.insert(0, judged)
    if len(groups) == 1:
        return [Part(groups[0], question)]
    return [
        Part(
            places,
            dataclasses.replace(
                question,
                id=f"{question.id}#{places[0] + 1}",
                criteria=tuple(question.criteria[p] for p in places),
                rules=(question.rules[places[0]],) if places[0] in coded else (),
            ),
        )
        for places in groups
    ]


def merge(question: Question, parts: list[Part], found: list[Judgement]) -> Judgement:
    """One judgement from those of its parts; unparsed parts leave the whole unparsed."""
    if len(found) == 1:
        return dataclasses.replace(found[0], id=question.id)
    bad = [j for j in found if j.scores is None]
    replies = tuple(key for j in found for key in j.replies)
    cut = any(j.cut for j in found)
    if bad:
        status = "failed" if any(j.status == "failed" for j in bad) else "unparsed"
        reason = f"{len(bad)} of {len(found)} parts: {bad[0].reason}"
        return Judgement(question.id, status, None, None, reason, replies, cut)
    scores = [0.0] * len(question.criteria)
    for part, judgement in zip(parts, found, strict=True):
        for place, score in zip(part.places, judgement.scores or (), strict=True):
            scores[place] = score
    return Judgement(question.id, found[0].status, tuple(scores), None, "", replies, cut)


async def judge_all(
    endpoint: Endpoint,
    questions: list[Question],
    section: JudgeSection,
    on_done: Callable[[int, int], None],
) -> list[Judgement]:
    """Judge all, in the order given. `on_done(done, total)` is called after each.

    Raises EndpointError when the server cannot be used; replies so far stay in the cache.
    """
    results: dict[str, Judgement] = {}

    async def one(question: Question) -> None:
        parts = split(question, per_criterion=section.per_criterion, style=section.style)
        found = [await judge_one(endpoint, part.question, section) for part in parts]
        results[question.id] = merge(question, parts, found)
        on_done(len(results), len(questions))

    await run_together([one(question) for question in questions])
    return [results[question.id] for question in questions]
