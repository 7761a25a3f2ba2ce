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

from iopo.constraints.text import after_thinking, han_characters
from iopo.construct.tasks import Task, instruction, quad_row
from iopo.construct.trace import replies, taxonomy
from iopo.construct.trace.config import TraceRecipe
from iopo.construct.trace.replies import NOTHING, Rejected
from iopo.construct.trace.taxonomy import Dimension
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


def menu(dimensions: Sequence[Dimension], language: str) -> str:
    return "\n".join(dimension.line(language) for dimension in dimensions)


def texts(constraints: list[Row]) -> list[str]:
    return [constraint["text"] for constraint in constraints]


def task_of(row: Row) -> Task:
    return Task(row["description"], row["input"])


def _fields(row: Row) -> dict[str, str]:
    lines = [f"{n}. {text}" for n, text in enumerate(texts(row["constraints"]), 1)]
    return {
        "description": row["description"],
        "constraints": "\n".join(lines) or NOTHING,
        "input": row["input"] or NOTHING,
    }


# --- expansion (B.1), structuring (B.2), quality control (B.3, B.4) ---


def _ask_expand(row: Row, context: Context) -> list[Ask]:
    rng = context.rng("expand", row)
    number = taxonomy.draw_number(rng)
    dimensions = menu(taxonomy.draw_menu(context.dimensions, number, rng), row["language"])
    blanks = {"instruction": row["instruction"], "number": number, "dimensions": dimensions}
    text = fill("expand", row["language"], **blanks)

    def read(reply: str) -> str:
        return replies.filled(
            replies.json_object(reply, "instruction")["instruction"], "instruction"
        )

    return [context.prompt(text, read, 250)]


def _finish_expand(row: Row, answers: list[Any], context: Context) -> Row:
    if answers[0] == row["instruction"]:
        raise Rejected("not changed")
    return {**row, "expanded": answers[0]}


def _ask_structure(row: Row, context: Context) -> list[Ask]:
    listed = menu(context.dimensions, row["language"])
    text = fill("structure", row["language"], instruction=row["expanded"], dimensions=listed)
    return [context.prompt(text, lambda reply: replies.fields(reply, context.dimensions), 350)]


def _finish_structure(row: Row, answers: list[Any], context: Context) -> Row:
    row = {**row, **answers[0]}
    return {**row, "x1": instruction(task_of(row), texts(row["constraints"]))}


def _ask_check(row: Row, context: Context) -> list[Ask]:
    return [
        context.prompt(
            fill(name, row["language"], **_fields(row)),
            lambda reply, name=name: replies.verdict(reply, name),  # type: ignore[misc]
            40,
        )
        for name in ("complete", "redundant")
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
    return lambda row, context: [context.prompt(row[x], _said, 400)]


def _said(reply: str) -> str:
    return replies.filled(after_thinking(reply))


def _finish_response(y: str, other: str | None) -> Callable[[Row, list[Any], Context], Row]:
    def finish(row: Row, answers: list[Any], context: Context) -> Row:
        if other is not None and answers[0] == row[other]:
            raise Rejected(f"{y} = {other}")
        return {**row, y: answers[0]}

    return finish


def _ask_scores(*pairs: tuple[str, str]) -> Callable[[Row, Context], list[Ask]]:
    """Whether the response under the second key follows the constraints under the first."""
    return lambda row, context: [
        Question(
            id=row["id"],
            task=instruction(task_of(row), []),
            criteria=tuple(texts(row[constraints])),
            response=row[y],
            maximum=10,
            format="trace",
        )
        for constraints, y in pairs
    ]


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
    text = fill("worse", row["language"], **_fields(row), answer=row["y1"])
    return [context.prompt(text, _said, 400)]


def _finish_worse(row: Row, answers: list[Any], context: Context) -> Row:
    if answers[0] == row["y1"]:
        raise Rejected("the answer was not changed")
    return {"id": row["id"], "x": row["x1"], "chosen": row["y1"], "rejected": answers[0]}


# --- x2 and y2 (D), and all four cells ---


def _operation(row: Row, context: Context) -> str:
    names, chances = zip(*sorted(context.recipe.operations.items()), strict=True)
    return context.rng("revise", row).choices(names, chances)[0]


def _ask_revise(row: Row, context: Context) -> list[Ask]:
    language = row["language"]
    meanings = dict(s.split(": ", 1) for s in _template("operations", language).splitlines())
    text = fill(
        "revise",
        language,
        **_fields(row),
        answer=row["y1"],
        operation=meanings[_operation(row, context)],
        dimensions=menu(context.dimensions, language),
    )

    def read(reply: str) -> list[Row]:
        value = replies.json_object(reply, "constraints")["constraints"]
        return replies.constraints(value, context.dimensions)

    return [context.prompt(text, read, 250)]


def _finish_revise(row: Row, answers: list[Any], context: Context) -> Row:
    changed = texts(answers[0])
    if sorted(changed) == sorted(texts(row["constraints"])):
        raise Rejected("x1 = x2")
    row = {**row, "operation": _operation(row, context), "constraints2": answers[0]}
    return {**row, "x2": instruction(task_of(row), changed)}


def _finish_cells(row: Row, answers: list[Any], context: Context) -> Row:
    """Both mismatched members must clearly break a constraint. The paper does not score them."""
    recipe = context.recipe
    mismatched = [list(judgement.scores) for judgement in answers]
    for scores, y, x in zip(mismatched, ("y2", "y1"), ("x1", "x2"), strict=True):
        if min(scores) == FULL_SCORE:
            raise Rejected(f"{y} fits {x}")
        if min(scores) > recipe.mismatch_at_most:
            raise Rejected(f"{y} nearly fits {x}", f"scores {scores}")
    # in the row format of constraints; code cannot check this kind, verify counts it
    c1, c2 = (
        [{"kind": "judged", "params": {"type": c["type"]}, "text": c["text"]} for c in row[key]]
        for key in ("constraints", "constraints2")
    )
    return {
        **quad_row(task_of(row), c1, row["y1"], c2, row["y2"]),
        "source": "trace",
        "match": [1, 0, 1, 0],
        "scores": [row["scores1"], mismatched[0], row["scores2"], mismatched[1]],
        "operation": row["operation"],
        "seed_id": row["id"],
        "gen": {"model": recipe.endpoint.model, "judge": recipe.judge_section().model},
    }


_ask_cells = _ask_scores(("constraints", "y2"), ("constraints2", "y1"))
STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("expand", None, _ask_expand, _finish_expand, unique="instruction"),
        Stage("structure", "expand", _ask_structure, _finish_structure, unique="x1"),
        Stage("check", "structure", _ask_check, _finish_check),
        Stage("respond", "check", _ask_response("x1"), _finish_response("y1", None)),
        Stage("score", "respond", _ask_scores(("constraints", "y1")), _finish_score("scores1")),
        Stage("worse", "score", _ask_worse, _finish_worse),
        Stage("revise", "score", _ask_revise, _finish_revise),
        Stage("respond2", "revise", _ask_response("x2"), _finish_response("y2", "y1")),
        Stage("score2", "respond2", _ask_scores(("constraints2", "y2")), _finish_score("scores2")),
        Stage("cells", "score2", _ask_cells, _finish_cells, unique="id"),
    )
}
