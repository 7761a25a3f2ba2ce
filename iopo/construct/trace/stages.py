"""The stages of the TRACE pipeline: what each asks about a row, and what it makes of the replies.

A stage is two pure functions: `asks(row)` and `finish(row, answers)`. Sections and appendices are
those of arXiv 2411.06208v3. Rows grow from stage to stage; `finish` raises Rejected to drop one.

The prompts are text files in `prompt_texts/`, one a step and language, which a reader may edit.
`{name}` is a blank; `{{` and `}}` are braces. What fills a blank was written by others: it stands
between tags with a mark that it cannot know.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from iopo.constraints.text import han_characters
from iopo.construct import taxonomy
from iopo.construct.tasks import Task, instruction, quad_row
from iopo.construct.taxonomy import Dimension
from iopo.construct.trace import replies
from iopo.construct.trace.config import TraceRecipe
from iopo.construct.trace.replies import NOTHING, Rejected
from iopo.evaluation.endpoint import Request
from iopo.evaluation.judge.prompts import Question
from iopo.files import sha256_text

Row = dict[str, Any]
FULL_SCORE = 10.0
PROMPTS = Path(__file__).with_name("prompt_texts")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request, and how its reply is read: a value, or Unreadable, or Rejected."""

    request: Request
    read: Callable[[str], Any]
    reply_tokens: int  # a guess, for the estimate


Ask = Prompt | Question  # a Question goes to the judge; its answer is a Judgement with scores


@dataclass(frozen=True, slots=True)
class Context:
    """What every stage knows."""

    recipe: TraceRecipe
    dimensions: tuple[Dimension, ...]

    def rng(self, stage: str, row: Row) -> random.Random:
        """A stream of its own for each row and stage: order and drops of others change nothing."""
        return random.Random(f"{self.recipe.seed}/{stage}/{row['id']}")

    def prompt(self, text: str, read: Callable[[str], Any], reply_tokens: int) -> Prompt:
        request = Request(
            model=self.recipe.endpoint.model or "",
            messages=({"role": "user", "content": text},),
            temperature=self.recipe.temperature,
            max_tokens=self.recipe.max_tokens,
            seed=self.recipe.seed,
            extra=self.recipe.endpoint.extra,
        )
        return Prompt(request, read, reply_tokens)


@dataclass(frozen=True, slots=True)
class Stage:
    """One step. unique: the row key of which each value may pass once."""

    name: str
    source: str | None  # the stage whose rows it reads; None: the seeds
    asks: Callable[[Row, Context], list[Ask]]
    finish: Callable[[Row, list[Any], Context], Row]
    unique: str | None = None


def language_of(text: str) -> str:
    """zh if at least a quarter of the characters that are not blank are Chinese, else en."""
    letters = sum(not c.isspace() for c in text)
    return "zh" if 4 * han_characters(text) >= max(1, letters) else "en"


@lru_cache(maxsize=32)
def _template(name: str, language: str) -> str:
    return (PROMPTS / f"{name}.{language}.txt").read_text(encoding="utf-8").strip()


def fill(name: str, language: str, **blanks: object) -> str:
    """The prompt with its blanks filled, and with a mark made from all of them."""
    mark = sha256_text(repr((name, sorted(blanks.items()))))[:12]
    return _template(name, language).format(mark=mark, **blanks)


def operation_text(name: str, language: str) -> str:
    """What add, delete or revise means, in a sentence."""
    lines = dict(line.split(": ", 1) for line in _template("operations", language).splitlines())
    return lines[name]


def menu(dimensions: Sequence[Dimension], language: str) -> str:
    return "\n".join(dimension.line(language) for dimension in dimensions)


def texts(constraints: list[Row]) -> list[str]:
    return [constraint["text"] for constraint in constraints]


def written(row: Row, constraints: list[Row]) -> str:
    """The instruction in TRACE's layout."""
    return instruction(Task(row["description"], row["input"]), texts(constraints))


def _fields(row: Row, constraints: list[Row]) -> dict[str, str]:
    return {
        "description": row["description"],
        "constraints": "\n".join(f"{n}. {t}" for n, t in enumerate(texts(constraints), 1))
        or NOTHING,
        "input": row["input"] or NOTHING,
    }


# --- expansion (B.1), structuring (B.2), quality control (B.3, B.4) ---


def _ask_expand(row: Row, context: Context) -> list[Ask]:
    rng = context.rng("expand", row)
    number = taxonomy.draw_number(rng)
    dimensions = taxonomy.draw_menu(context.dimensions, number, rng)
    text = fill(
        "expand",
        row["language"],
        instruction=row["instruction"],
        number=number,
        dimensions=menu(dimensions, row["language"]),
    )
    return [context.prompt(text, replies.instruction, 250)]


def _finish_expand(row: Row, answers: list[Any], context: Context) -> Row:
    if answers[0] == row["instruction"]:
        raise Rejected("not changed")
    return {**row, "expanded": answers[0]}


def _ask_structure(row: Row, context: Context) -> list[Ask]:
    text = fill(
        "structure",
        row["language"],
        instruction=row["expanded"],
        dimensions=menu(context.dimensions, row["language"]),
    )
    return [context.prompt(text, lambda r: replies.fields(r, context.dimensions), 350)]


def _finish_structure(row: Row, answers: list[Any], context: Context) -> Row:
    row = {**row, **answers[0]}
    return {**row, "x1": written(row, row["constraints"])}


def _ask_check(row: Row, context: Context) -> list[Ask]:
    fields = _fields(row, row["constraints"])
    return [
        context.prompt(
            fill(name, row["language"], **fields),
            lambda reply, key=key: replies.verdict(reply, key),  # type: ignore[misc]
            40,
        )
        for name, key in (("complete", "complete"), ("redundant", "redundant"))
    ]


def _finish_check(row: Row, answers: list[Any], context: Context) -> Row:
    (complete, lacks), (redundant, repeats) = answers
    if not complete:
        raise Rejected("not complete", lacks)
    if redundant:
        raise Rejected("redundant", repeats)
    return row


# --- responses and their scores (B.5), the worse answer of the DPO pairs (C) ---


def _ask_response(x: str) -> Callable[[Row, Context], list[Ask]]:
    return lambda row, context: [context.prompt(row[x], replies.answer, 400)]


def _finish_response(y: str, other: str | None) -> Callable[[Row, list[Any], Context], Row]:
    def finish(row: Row, answers: list[Any], context: Context) -> Row:
        if other is not None and answers[0] == row[other]:
            raise Rejected(f"{y} = {other}")
        return {**row, y: answers[0]}

    return finish


def question(row: Row, constraints: list[Row], response: str) -> Question:
    """Whether a response follows these constraints of the row's task."""
    task = Task(row["description"], row["input"])
    return Question(
        id=row["id"],
        task=instruction(task, []),
        criteria=tuple(texts(constraints)),
        response=response,
        maximum=10,
        format="trace",
    )


def _ask_score(c: str, y: str) -> Callable[[Row, Context], list[Ask]]:
    return lambda row, context: [question(row, row[c], row[y])]


def _finish_score(key: str) -> Callable[[Row, list[Any], Context], Row]:
    def finish(row: Row, answers: list[Any], context: Context) -> Row:
        if answers[0].overall == 0:
            raise Rejected("overall score 0", "irrelevant, wrong in its facts or harmful")
        scores = answers[0].scores
        low = [str(i) for i, score in enumerate(scores, 1) if score < FULL_SCORE]
        if low:
            raise Rejected("not a full score", f"constraints {', '.join(low)} of {len(scores)}")
        return {**row, key: list(scores)}

    return finish


def _ask_worse(row: Row, context: Context) -> list[Ask]:
    fields = _fields(row, row["constraints"])
    text = fill("worse", row["language"], **fields, answer=row["y1"])
    return [context.prompt(text, replies.answer, 400)]


def _finish_worse(row: Row, answers: list[Any], context: Context) -> Row:
    if answers[0] == row["y1"]:
        raise Rejected("the answer was not changed")
    return {"id": row["id"], "x": row["x1"], "chosen": row["y1"], "rejected": answers[0]}


# --- x2 and y2 (D), and all four cells ---


def _ask_revise(row: Row, context: Context) -> list[Ask]:
    operation = _operation(row, context)
    text = fill(
        "revise",
        row["language"],
        **_fields(row, row["constraints"]),
        answer=row["y1"],
        operation=operation_text(operation, row["language"]),
        dimensions=menu(context.dimensions, row["language"]),
    )

    def read(reply: str) -> list[Row]:
        value = replies.json_object(reply, "constraints")["constraints"]
        return replies.constraints(value, context.dimensions)

    return [context.prompt(text, read, 250)]


def _operation(row: Row, context: Context) -> str:
    names, chances = zip(*sorted(context.recipe.operations.items()), strict=True)
    return context.rng("revise", row).choices(names, chances)[0]


def _finish_revise(row: Row, answers: list[Any], context: Context) -> Row:
    if sorted(texts(answers[0])) == sorted(texts(row["constraints"])):
        raise Rejected("x1 = x2")
    row = {**row, "operation": _operation(row, context), "constraints2": answers[0]}
    return {**row, "x2": written(row, answers[0])}


def _ask_cells(row: Row, context: Context) -> list[Ask]:
    return [
        question(row, row["constraints"], row["y2"]),
        question(row, row["constraints2"], row["y1"]),
    ]


def _finish_cells(row: Row, answers: list[Any], context: Context) -> Row:
    """Both mismatched members must clearly break a constraint. The paper does not score them."""
    mismatched = [judgement.scores for judgement in answers]
    for scores, y, x in zip(mismatched, ("y2", "y1"), ("x1", "x2"), strict=True):
        if min(scores) == FULL_SCORE:
            raise Rejected(f"{y} fits {x}")
        if min(scores) > context.recipe.mismatch_at_most:
            raise Rejected(f"{y} nearly fits {x}", f"scores {list(scores)}")
    task = Task(row["description"], row["input"])
    recipe = context.recipe
    return {
        **quad_row(task, row["x1"], row["y1"], row["x2"], row["y2"]),
        "c1": [_judged(c) for c in row["constraints"]],
        "c2": [_judged(c) for c in row["constraints2"]],
        "source": "trace",
        "match": [1, 0, 1, 0],
        "scores": [row["scores1"], list(mismatched[0]), row["scores2"], list(mismatched[1])],
        "operation": row["operation"],
        "seed_id": row["id"],
        "gen": {"model": recipe.endpoint.model, "judge": recipe.judge_section().model},
    }


def _judged(constraint: Row) -> Row:
    """In the row format of constraints; code cannot check this kind, verify counts it."""
    return {"kind": "judged", "params": {"type": constraint["type"]}, "text": constraint["text"]}


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("expand", None, _ask_expand, _finish_expand, unique="instruction"),
        Stage("structure", "expand", _ask_structure, _finish_structure, unique="x1"),
        Stage("check", "structure", _ask_check, _finish_check),
        Stage("respond", "check", _ask_response("x1"), _finish_response("y1", None)),
        Stage("score", "respond", _ask_score("constraints", "y1"), _finish_score("scores1")),
        Stage("worse", "score", _ask_worse, _finish_worse),
        Stage("revise", "score", _ask_revise, _finish_revise),
        Stage("respond2", "revise", _ask_response("x2"), _finish_response("y2", "y1")),
        Stage("score2", "respond2", _ask_score("constraints2", "y2"), _finish_score("scores2")),
        Stage("cells", "score2", _ask_cells, _finish_cells, unique="id"),
    )
}
