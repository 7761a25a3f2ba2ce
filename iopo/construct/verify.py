"""Re-check a file of quads.

`python -m iopo.construct.verify FILE... [--against BENCHMARK...] [--model MODEL]`

Prints `FILE:LINE: [fault] what` for every violation, then a table by kind, and exits 1 if there was
a violation. A row without c1, c2 is a violation too. Cells of rows with "judged" constraints, which
a model scored (the TRACE pipeline), are taken from the row.
"""

import argparse
import hashlib
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from iopo.constraints import Constraint, from_dict
from iopo.constraints.answers import hollow
from iopo.constraints.text import CJK, tokens
from iopo.construct import in_blocks
from iopo.construct.prose import ends_a_sentence, script_of
from iopo.construct.quadruples import CELLS, MATCH, four_cells
from iopo.construct.summary import JUDGED, Measured, Summary, measured, report
from iopo.data.columns import read_prompt, text_of
from iopo.files import Place, iter_records
from iopo.progress import progress, show_messages

TEXTS = ("x1", "y1", "x2", "y2")
GRAM = 13  # words in a row that make an overlap with a benchmark
_HAN = re.compile(f"[{CJK}]")
# Asks for a script of its own, so that a response need not have its instruction's.
_LANGUAGE_KINDS = {"response_language", JUDGED}


Fault = tuple[str, str]  # short name of the rule that is broken, detail
Grams = dict[tuple[str, ...], Place]  # a run of tokens -> where a benchmark has it
Origin = tuple[int, Place]  # index of the file, and where in it
Seen = dict[bytes, Origin]  # digest of an id, response or task -> where it was met first


@dataclass(frozen=True, slots=True)
class Violation:
    """One fault of a row, and where it is."""

    place: Place
    fault: str  # short name of the rule that is broken
    detail: str

    def __str__(self) -> str:
        return f"{self.place}: [{self.fault}] {self.detail}"


class Checked(NamedTuple):
    """What a row shows by itself: its texts that must occur once, its faults, what is counted."""

    once: list[tuple[str, bytes, str]]  # what it is, its digest, how a message calls it
    faults: list[Fault]
    measured: Measured | None


def verify(files: Sequence[Path], against: Sequence[Path] = ()) -> tuple[list[Violation], Summary]:
    """All violations in file order, and the summary."""
    grams = benchmark_grams(against)
    found: list[Violation] = []
    summary = Summary()
    seen: Seen = {}
    places: deque[Origin] = deque()

    def rows() -> Iterator[tuple[Any, str | None]]:
        for index, path in enumerate(files):
            for place, row, unreadable in iter_records(path):
                places.append((index, place))
                yield row, unreadable

    with progress(None, "verifying") as show:
        # the grams are too large to be sent to other processes
        for block in in_blocks(partial(_check_block, grams), rows(), here=bool(grams)):
            for checked in block:
                here = places.popleft()
                faults = [*_repeated(checked.once, here, seen), *checked.faults]
                found += [Violation(here[1], fault, detail) for fault, detail in faults]
                if checked.measured is not None:
                    summary.add(checked.measured)
            show.what = f"verifying: {summary.rows:,} rows read, {len(found):,} violations"
    return found, summary


def _check_block(grams: Grams, _: int, rows: list[tuple[Any, str | None]]) -> list[Checked]:
    return [
        Checked([], [("json", f"cannot be read: {unreadable}")], None)
        if unreadable is not None
        else _check_row(row, grams)
        for row, unreadable in rows
    ]


def off_task(files: Sequence[Path], model_path: str) -> list[Violation]:
    """Responses that a model finds likelier after another task of the files than after their own.

    Rows that cannot be read are left to `verify`. Raises ValueError for a model that is not there.
    """
    # torch loads only for this
    from iopo.data.chat import Chat
    from iopo.evaluation import on_task
    from iopo.evaluation.config import ModelSection
    from iopo.evaluation.quad_metrics import bare, load_for_scoring
    from iopo.evaluation.responses import placing
    from iopo.model.load import load_tokenizer, resolve_model

    places, tasks, texts = [], [], []
    for path in files:
        for place, row, fault in iter_records(path):
            sides = row if fault is None and isinstance(row, dict) else {}
            for n in (1, 2):
                x, y = sides.get(f"x{n}"), sides.get(f"y{n}")
                prompt = read_prompt(x)
                if prompt is not None and isinstance(y, str) and y.strip():
                    places.append((place, f"y{n}"))
                    tasks.append(bare(prompt))
                    texts.append(y)
    folder = resolve_model(model_path)
    base = load_for_scoring(folder, None, *placing(ModelSection()))
    others = f"of {on_task.CANDIDATES - 1} other tasks"
    ranks = on_task.task_ranks(base, Chat(load_tokenizer(folder)), tasks, texts, tasks) or []
    return [
        Violation(place, "off task", f"{key} is likelier after {rank - 1} {others}")
        for (place, key), rank in zip(places, ranks, strict=False)
        if rank > on_task.MOST_RANK
    ]


def _check_row(row: Any, grams: Grams) -> Checked:
    """All that is wrong with a row by itself."""
    texts = row if isinstance(row, dict) else {}
    prompts = {key: read_prompt(texts.get(key)) for key in ("x1", "x2")}
    missing = [k for k in TEXTS if not isinstance(texts.get(k), str) and prompts.get(k) is None]
    if missing:
        fault = f"{', '.join(missing)} missing or no text; a row has {', '.join(TEXTS)}"
        return Checked([], [("keys", fault)], None)
    row = row | {key: text_of(x) for key, x in prompts.items() if x is not None}
    sides = [row.get(key) or [] for key in ("c1", "c2")]
    checked = Checked(_once(row), [], None)
    for key in TEXTS if grams else ():
        shared = next((gram for gram in _grams(row[key]) if gram in grams), None)
        if shared is not None:
            fault = f"{key} has {' '.join(shared)!r} of {grams[shared]}"
            checked.faults.append(("overlap", fault))
    if not all(isinstance(side, list) for side in sides):
        checked.faults.append(("constraint", "c1 or c2 is no list of constraints"))
        return checked
    kinds = [[_kind(c) for c in side] for side in sides]
    broken = list(_texts(row, {*kinds[0], *kinds[1]}))
    checked.faults.extend(broken)
    try:
        c1, c2 = ([from_dict(c) for c in side if _kind(c) != JUDGED] for side in sides)
    except (ValueError, TypeError, AttributeError) as error:
        checked.faults.append(("constraint", f"cannot be read: {error}"))
        return checked
    checked.faults.extend(_against_constraints(row, kinds, (c1, c2), bool(broken)))
    return checked._replace(measured=measured(row, kinds))


def _against_constraints(
    row: dict[str, Any],
    kinds: list[list[str]],
    sides: tuple[list[Constraint], list[Constraint]],
    broken: bool,
) -> Iterator[Fault]:
    """What is wrong between the texts and the constraints; cells only of texts that are whole."""
    judged = JUDGED in kinds[0] or JUDGED in kinds[1]
    if judged and row.get("match") != [int(cell) for cell in MATCH]:
        yield "match", f"says {row.get('match')}; a judged row must say [1, 0, 1, 0]"
    if not broken and not judged:
        yield from _cells(row, *sides)
        for n, c in enumerate(sides, 1):
            if reasons := hollow(row[f"y{n}"], row[f"x{n}"], c):
                yield "no answer", f"y{n} is hollow: {', '.join(reasons)}"
    for n in (1, 2):
        for text in (constraint.get("text") for constraint in row.get(f"c{n}") or []):
            if not isinstance(text, str) or text not in row[f"x{n}"]:
                yield "wording", f"x{n} does not contain the text {text!r} of c{n}"


def _kind(constraint: Any) -> str:
    """The kind of a constraint that may be anything; `from_dict` says what is wrong with it."""
    return str(constraint.get("kind")) if isinstance(constraint, dict) else "?"


def _texts(row: dict[str, Any], kinds: set[str]) -> Iterator[Fault]:
    empty = [key for key in TEXTS if not row[key].strip()]
    if empty:
        yield "empty", f"{', '.join(empty)} without text"
        return
    if row["x1"] == row["x2"]:
        yield "x1=x2", "the instructions are equal"
    if row["y1"] == row["y2"]:
        yield "y1=y2", "the responses are equal"
    for key in ("y1", "y2"):
        # a judged response was seen to stop by itself, and may be a table or a title
        unfinished = not ends_a_sentence(row[key][-300:]) and not _HAN.search(row[key])
        if unfinished and JUDGED not in kinds:
            yield "truncated", f"{key} ends in {row[key][-30:]!r}, expected the end of a sentence"
        x = "x" + key[1]
        scripts = script_of(row[x]), script_of(row[key])
        if scripts[0] != scripts[1] and "none" not in scripts and not kinds & _LANGUAGE_KINDS:
            yield "language", f"{key} is {scripts[1]}, {x} is {scripts[0]}"


def _cells(
    row: dict[str, Any], c1: Sequence[Constraint], c2: Sequence[Constraint]
) -> Iterator[Fault]:
    if not c1 or not c2:
        yield "unchecked", "c1 or c2 is missing or empty, so no cell can be checked"
        return
    cells = four_cells(c1, row["y1"], c2, row["y2"])
    for member, is_so, should_be in zip(CELLS, cells, MATCH, strict=True):
        if is_so != should_be:
            verb = "does not follow" if should_be else "follows"
            kinds = ", ".join(c["kind"] for c in row["c" + member[1]])
            yield member, f"{member[2:]} {verb} c{member[1]} ({kinds})"
    given = row.get("match")
    if given is not None and given != list(cells):  # 1 equals True
        yield "match", f"says {given}, the checks say {[int(cell) for cell in cells]}"


def _once(row: dict[str, Any]) -> list[tuple[str, bytes, str]]:
    """What must occur once in all files: the id, the responses; in one file: the task."""

    def digest(what: str, value: object) -> bytes:
        return hashlib.blake2b(f"{what}\x1f{value}".encode(), digest_size=12).digest()

    found = []
    if row.get("id") is not None:
        found.append(("id", digest("id", row["id"]), repr(row["id"])))
    for key in ("y1", "y2") if row["y1"] != row["y2"] else ():
        if row[key].strip():
            found.append(("response", digest("response", row[key]), key))
    if row.get("task") is not None:
        found.append(("task", digest("task", row["task"]), ""))
    return found


def _repeated(once: list[tuple[str, bytes, str]], here: Origin, seen: Seen) -> Iterator[Fault]:
    for what, digest, name in once:
        place = seen.setdefault(digest, here)
        if what == "task" and place[0] != here[0]:
            yield what, f"the task is also in {place[1]}; files must not share tasks"
        elif what == "id" and place != here:
            yield what, f"{name} is that of {place[1]}"
        elif what == "response" and place != here:
            yield what, f"{name} is a response of {place[1]}"


def benchmark_grams(files: Iterable[Path]) -> Grams:
    """Every run of 13 tokens in any text of the benchmarks' rows, with where it stands first.

    Raises ValueError with its place on a row that cannot be read.
    """
    found: Grams = {}
    for path in files:
        for place, row, fault in iter_records(path):
            if fault is not None and row is None:
                raise ValueError(f"{place}: {fault}")
            for string in _strings(row):
                for gram in _grams(string):
                    found.setdefault(gram, place)
    return found


def _grams(text: str) -> Iterator[tuple[str, ...]]:
    found = tokens(text)
    return (tuple(found[i : i + GRAM]) for i in range(len(found) - GRAM + 1))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m iopo.construct.verify", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="quads; files must not share tasks")
    parser.add_argument("--against", nargs="+", type=Path, default=[], help="benchmark files")
    parser.add_argument("--model", help="a model folder, or demo: are responses on their task?")
    options = parser.parse_args(arguments)
    show_messages(sys.stderr)
    try:
        found, summary = verify(options.files, options.against)
        if options.model is not None:
            found += off_task(options.files, options.model)
    except (ValueError, OSError) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    for violation in found:
        print(violation)
    print(report(summary))
    if options.model is None:
        print("responses were read by code alone: --model MODEL says if they are on their task")
    print(f"{len(found)} violations")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
