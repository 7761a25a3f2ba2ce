"""What every benchmark has: a file, items with a conversation each, measures of the verdicts."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from iopo.files import given_records, shortened
from iopo.sources import files_of
from iopo.stats import Units

# metric -> unit (an item, or a group of items) -> (numerator, denominator); a metric's value is the
# sum of the numerators over the sum of the denominators.
Measures = dict[str, Units]
Verdict = dict[str, Any]  # of one item, by code or by the judge: a row of verdicts.jsonl


@dataclass(frozen=True, slots=True)
class Source:
    """A benchmark's data file: where it comes from and how to know it."""

    benchmark: str
    file: str
    origin: str
    licence: str
    sha256: str | None  # None: not known to us


@dataclass(frozen=True, slots=True)
class Item:
    """One test item. `messages` is the conversation that the model under test gets."""

    id: str
    messages: tuple[dict[str, str], ...]
    row: dict[str, Any]  # the row of the data file

    @property
    def group(self) -> str:
        """The id of the prompt that it is a cousin of, else its own."""
        of = self.row.get("cousin_of")
        return self.id if of is None else str(whole(of))


@dataclass(frozen=True, slots=True)
class Question:
    """What a judge is asked: one answer, to be scored by some constraints."""

    id: str
    task: str  # all that the answer's author was asked, but for the constraints
    criteria: tuple[str, ...]
    response: str
    maximum: int  # scores run 0 .. maximum: 10, or 1 for met or not
    format: str  # the published reply format: trace, lines, yes_no; list has no `paper` prompt
    reference: str = ""  # an answer known to be good, where the benchmark has one


def _no_question(item: Item, response: str) -> Question | None:
    """For benchmarks that code scores."""
    return None


def _no_code(item: Item, response: str) -> Verdict:
    """For benchmarks that ask the judge about every item."""
    raise NotImplementedError(f"item {item.id} has no question, and no code scores it")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """How a benchmark is read and scored.

    To add one, write a module in iopo/evaluation/benchmarks that ends with `BENCHMARK = Benchmark(
    ...)`, and conf/benchmark/NAME.yaml of the same name. A module with a function
    `evaluate(config)` in its place is a program of its own (quads, judge_check).

    load: items of the data file; raises ValueError on another file, and, before any answer is made,
    where something is missing that scoring needs.
    question: what the judge is asked about an answer to an item; None where code scores the item.
    by_code: the verdict of an item without a question.
    A verdict holds "scores", one for each constraint from 0 to `maximum`, or None if the judge's
    reply could not be read; those of IFEval and IFBench hold "strict", "loose" and "hollow".
    measures: numerators and denominators from the verdicts, in the items' order.
    cluster: what a unit of the measures is not independent of others in, the unit itself if it is.
    """

    source: Source
    headline: tuple[str, ...]  # the metrics that are printed
    load: Callable[[str | Path], list[Item]]
    measures: Callable[[list[Item], list[Verdict]], Measures]
    question: Callable[[Item, str], Question | None] = _no_question
    by_code: Callable[[Item, str], Verdict] = _no_code
    cluster: Callable[[str], str] = str
    maximum: int = 1

    @property
    def judged(self) -> bool:
        """Whether a language model scores some answers."""
        return self.question is not _no_question


def locate(source: Source, path: str | None) -> str:
    """The source of the data (iopo/sources.py): `path`, or $IOPO_DATA_DIR/<benchmark>/<file>.

    Raises ValueError that says where the file comes from, and as `files_of` does.
    """
    folder = os.environ.get("IOPO_DATA_DIR", "")
    found = path if path is not None else str(Path(folder, source.benchmark, source.file))
    try:
        files_of(found)
    except FileNotFoundError:
        raise ValueError(
            f"{source.benchmark}: no data file {found} (data.path={path}, IOPO_DATA_DIR={folder}). "
            f"It is not part of this repository: get {source.file} from {source.origin} (licence: "
            f"{source.licence}; sha256: {source.sha256 or 'not known'}) and set data.path=FILE"
        ) from None
    return found


def read_rows(path: str | Path, fields: Mapping[str, type | UnionType]) -> list[dict[str, Any]]:
    """The rows of a data file; a whole number that is written as 1.0 is an int.

    Raises ValueError naming the first rows that lack a field or hold another type there.
    """
    rows = given_records(path)
    errors = []
    for place, row in rows:
        for name, kind in fields.items():
            if kind not in (str, list, dict) and name in row:
                row[name] = whole(row[name])
            if not isinstance(row.get(name), kind):
                found = type(row[name]).__name__ if name in row else "nothing"
                expected = getattr(kind, "__name__", kind)
                errors.append(f"{place}: {name}: found {found}, expected {expected}")
    if errors or not rows:
        listed = [*shortened(errors, 10), f"{path}: {len(rows)} rows; the right file?"]
        raise ValueError("\n".join(listed))
    return [row for _, row in rows]


def whole(value: Any) -> Any:
    """1 for 1.0, which pandas writes for the integers of a column with gaps; others as they are."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def make_items(
    path: str | Path,
    rows: list[dict[str, Any]],
    make: Callable[[dict[str, Any]], Item],
    check: Callable[[Item], object] = lambda item: None,
) -> list[Item]:
    """An item for each row. Raises ValueError naming the item that `check` refuses, or two of one
    id."""
    items = [make(row) for row in rows]
    seen: set[str] = set()
    for item in items:
        try:
            check(item)
        except ValueError as error:
            raise ValueError(f"{path}: item {item.id}: {error}") from error
        if item.id in seen:
            raise ValueError(f"{path}: the id {item.id} is there more than once")
        seen.add(item.id)
    return items


def scored(
    items: list[Item], verdicts: list[Verdict]
) -> Iterator[tuple[Item, Verdict, list[float]]]:
    """Item, verdict and its scores, without the unparsed ones."""
    for item, verdict in zip(items, verdicts, strict=True):
        if verdict["scores"] is not None:
            yield item, verdict, verdict["scores"]


def user_turn(text: str) -> tuple[dict[str, str], ...]:
    """A conversation of one user message."""
    return ({"role": "user", "content": text},)


def add(table: Measures, metric: str, unit: str, value: float, weight: float = 1) -> None:
    """Add to the numerator and the denominator of a metric's unit."""
    units = table.setdefault(metric, {})
    numerator, denominator = units.get(unit, (0, 0))
    units[unit] = (numerator + value, denominator + weight)


def strict_and_loose(items: list[Item], verdicts: list[Verdict]) -> Measures:
    """IFEval's measures, and IFBench's: prompt level (all instructions) and instruction level
    (micro), strict and loose, and by kind of instruction. Beside them the share that answers, as
    far as the text says, that of each reason why one does not, and the share that follows all
    (strict) and answers."""
    table: Measures = {}
    reasons = sorted({reason for row in verdicts for reason in row["hollow"]})
    for item, row in zip(items, verdicts, strict=True):
        for mode in ("strict", "loose"):
            add(table, f"prompt_{mode}", item.id, float(all(row[mode])))
            add(table, f"instruction_{mode}", item.id, sum(row[mode]), len(row[mode]))
            for name, held in zip(item.row["instruction_id_list"], row[mode], strict=True):
                add(table, f"{mode}/{name}", item.id, held)
        answers = not row["hollow"]
        add(table, "follows_and_answers", item.id, float(answers and all(row["strict"])))
        add(table, "answers", item.id, float(answers))
        for reason in reasons:
            add(table, f"hollow/{reason}", item.id, float(reason in row["hollow"]))
    return table
