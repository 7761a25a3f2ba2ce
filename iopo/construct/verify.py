"""Re-check a file of quads: `python -m iopo.construct.verify FILE... [--against BENCHMARK...]`.

Prints `file:line: [fault] what` for every violation, then a table by kind, and exits 1 if there was
a violation. What code cannot check (a row without c1, c2) is a violation too.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iopo.constraints import Constraint, from_dict
from iopo.constraints.text import CJK

from .prose import ends_a_sentence
from .quadruples import MATCH, four_cells

MEMBERS = ("x1y1", "x1y2", "x2y2", "x2y1")
TEXTS = ("x1", "y1", "x2", "y2")
GRAM = 13  # words in a row that make an overlap with a benchmark
_TOKEN = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")
_HAN = re.compile(f"[{CJK}]")


@dataclass(frozen=True, slots=True)
class Violation:
    file: str
    line: int
    fault: str  # short name of the rule that is broken
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: [{self.fault}] {self.detail}"


@dataclass
class Summary:
    """Counts over the rows that could be read."""

    rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    constraints: Counter[int] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)  # response length, in tens of words
    longer_together: int = 0  # the longer instruction has the longer response
    longer_apart: int = 0

    def add(self, row: dict[str, Any], c1: Sequence[Constraint], c2: Sequence[Constraint]) -> None:
        self.rows += 1
        self.kinds.update(c.kind for c in (*c1, *c2))
        self.sources[str(row.get("source", "-"))] += 1
        self.splits[str(row.get("split", "-"))] += 1
        self.constraints.update((len(c1), len(c2)))
        self.words.update(len(row[y].split()) // 10 for y in ("y1", "y2"))
        together = (len(row["x1"]) - len(row["x2"])) * (len(row["y1"]) - len(row["y2"]))
        self.longer_together += together > 0
        self.longer_apart += together < 0

    def length_leak(self) -> float:
        """Standard deviations from chance of 'the longer instruction has the longer response'.

        A scorer of y alone (its length, its style) is at chance on x-preference whatever the data:
        it scores x1y1 and x2y1 alike. A scorer that matches lengths is at chance only if this is
        near 0; beyond 3 the data let it guess.
        """
        n = self.longer_together + self.longer_apart
        return (self.longer_together - self.longer_apart) / n**0.5 if n else 0.0


def verify(files: Sequence[Path], against: Sequence[Path] = ()) -> tuple[list[Violation], Summary]:
    """All violations in file order, and the summary."""
    grams = benchmark_grams(against)
    found: list[Violation] = []
    summary = Summary()
    seen: dict[str, dict[str, str]] = {"id": {}, "response": {}, "task": {}}
    for path in files:
        for number, line in enumerate(path.open(encoding="utf-8"), start=1):
            for fault, detail in _check_line(line, f"{path}:{number}", seen, grams, summary):
                found.append(Violation(str(path), number, fault, detail))
    return found, summary


def _check_line(
    line: str,
    where: str,
    seen: dict[str, dict[str, str]],
    grams: dict[tuple[str, ...], str],
    summary: Summary,
) -> Iterator[tuple[str, str]]:
    """(fault, detail) for all that is wrong with a row; what follows from a fault is left out."""
    try:
        row = json.loads(line)
    except ValueError as error:
        yield "json", f"cannot be read: {error}"
        return
    missing = [
        key for key in TEXTS if not isinstance(row, dict) or not isinstance(row.get(key), str)
    ]
    if missing:
        yield "keys", f"{', '.join(missing)} missing or no text; a row has {', '.join(TEXTS)}"
        return
    yield from _repeated(row, where, seen)
    yield from _overlaps(row, grams)
    broken = list(_texts(row))
    yield from broken
    try:
        c1, c2 = ([from_dict(c) for c in row.get(key) or ()] for key in ("c1", "c2"))
    except (ValueError, TypeError, AttributeError) as error:
        yield "constraint", f"cannot be read: {error}"
        return
    summary.add(row, c1, c2)
    if not broken:
        yield from _cells(row, c1, c2)
    for x, key in (("x1", "c1"), ("x2", "c2")):
        for constraint in row.get(key) or ():
            if constraint.get("text", "") not in row[x]:
                yield "wording", f"{x} does not contain {constraint['text']!r} of {key}"


def _texts(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    empty = [key for key in TEXTS if not row[key].strip()]
    if empty:
        yield "empty", f"{', '.join(empty)} without text"
        return
    if row["x1"] == row["x2"]:
        yield "x1=x2", "the instructions are equal"
    if row["y1"] == row["y2"]:
        yield "y1=y2", "the responses are equal"
    for key in ("y1", "y2"):
        if not ends_a_sentence(row[key]) and not _HAN.search(row[key]):
            yield "truncated", f"{key} ends in {row[key][-30:]!r}, expected the end of a sentence"
        x = "x" + key[1]
        if _mostly_han(row[key]) != _mostly_han(row[x]):
            yield "language", f"{key} is in another script than {x}"


def _cells(
    row: dict[str, Any], c1: Sequence[Constraint], c2: Sequence[Constraint]
) -> Iterator[tuple[str, str]]:
    if not c1 or not c2:
        yield "unchecked", "c1 or c2 is missing or empty, so no cell can be checked"
        return
    cells = four_cells(c1, row["y1"], c2, row["y2"])
    for member, is_so, should_be in zip(MEMBERS, cells, MATCH, strict=True):
        if is_so != should_be:
            verb = "does not follow" if should_be else "follows"
            constraints = row["c" + member[1]]
            kinds = ", ".join(c["kind"] for c in constraints)
            yield member, f"{member[2:]} {verb} c{member[1]} ({kinds})"
    given = row.get("match")
    if given is not None and [bool(bit) for bit in given] != list(cells):
        yield "match", f"says {given}, the checks say {[int(cell) for cell in cells]}"


def _repeated(
    row: dict[str, Any], where: str, seen: dict[str, dict[str, str]]
) -> Iterator[tuple[str, str]]:
    file = where.rpartition(":")[0]
    if row.get("id") is not None:
        first = seen["id"].setdefault(str(row["id"]), where)
        if first != where:
            yield "id", f"{row['id']!r} is that of {first}"
    for key in ("y1", "y2"):
        if row[key].strip() and row["y1"] != row["y2"]:
            first = seen["response"].setdefault(row[key], where)
            if first != where:
                yield "response", f"{key} is a response of {first}"
    if row.get("task") is not None:
        first = seen["task"].setdefault(row["task"], where)
        if first.rpartition(":")[0] != file:
            yield "task", f"the task is also in {first}; files must not share tasks"


def _overlaps(row: dict[str, Any], grams: dict[tuple[str, ...], str]) -> Iterator[tuple[str, str]]:
    for key in TEXTS if grams else ():
        shared = next((gram for gram in _grams(row[key]) if gram in grams), None)
        if shared is not None:
            yield "overlap", f"{key} has {' '.join(shared)!r} of {grams[shared]}"


def benchmark_grams(files: Iterable[Path]) -> dict[tuple[str, ...], str]:
    """Every run of 13 tokens in any text of the benchmarks' rows, with where it stands first."""
    found: dict[tuple[str, ...], str] = {}
    for path in files:
        text = path.read_text(encoding="utf-8")
        whole = path.suffix == ".json"
        for number, line in enumerate([text] if whole else text.splitlines(), start=1):
            if line.strip():
                for string in _strings(json.loads(line)):
                    for gram in _grams(string):
                        found.setdefault(gram, str(path) if whole else f"{path}:{number}")
    return found


def _grams(text: str) -> Iterator[tuple[str, ...]]:
    tokens = _TOKEN.findall(text.lower())  # words, and Chinese character by character
    return (tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _mostly_han(text: str) -> bool:
    return len(_HAN.findall(text)) * 4 > len(_TOKEN.findall(text))


def report(summary: Summary) -> str:
    """The table by kind, the counts and the length scorer's verdict."""
    total = sum(summary.kinds.values())
    lines = [f"{summary.rows} quads, {total} constraints", "", f"{'kind':<20} {'count':>6} share"]
    lines += [f"{kind:<20} {n:>6} {n / total:>5.1%}" for kind, n in summary.kinds.most_common()]
    lines.append("")
    for name, counts in (("source", summary.sources), ("split", summary.splits)):
        lines.append(f"{name}: " + ", ".join(f"{key} {n}" for key, n in counts.most_common()))
    sizes = sorted(summary.constraints.items())
    lines.append("constraints per instruction: " + ", ".join(f"{k}: {n}" for k, n in sizes))
    lines.append("words per response:")
    most = max(summary.words.values(), default=1)
    for tens, n in sorted(summary.words.items()):
        lines.append(f"  {10 * tens:>3}-{10 * tens + 9:<3} {'#' * (40 * n // most)} {n}")
    leak = summary.length_leak()
    lines.append(
        "length scorer: the longer instruction has the longer response in "
        f"{summary.longer_together} quads, the shorter one in {summary.longer_apart} "
        f"({leak:+.1f} standard deviations)"
    )
    if abs(leak) > 3:
        lines.append("warning: lengths tell which response belongs to which instruction")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m iopo.construct.verify", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="quads; files must not share tasks")
    parser.add_argument("--against", nargs="+", type=Path, default=[], help="benchmark files")
    options = parser.parse_args(arguments)
    found, summary = verify(options.files, options.against)
    for violation in found:
        print(violation)
    print(report(summary))
    print(f"{len(found)} violations")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
