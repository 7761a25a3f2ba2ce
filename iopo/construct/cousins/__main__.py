"""Cousins of the prompts in a file, to measure reliable@k.

    python -m iopo.construct.cousins FILE --out OUT [--k 4] [--seed 0]

FILE: rows of IFEval's schema (key, prompt, instruction_id_list, kwargs), or quads with c1 and c2,
each side of which is a prompt. OUT: each prompt that has a cousin (change "none") and up to k
cousins of it, in IFEval's schema with cousin_of and change. Score it with `python evaluate.py
+benchmark=ifeval data.path=OUT`. What could not be changed, and why, is printed.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iopo.constraints.text import missing_packages
from iopo.construct.cousins import Asked
from iopo.construct.cousins.listed import Listed
from iopo.construct.cousins.prose import Prose
from iopo.evaluation.benchmarks.ifeval import CHANGES
from iopo.files import Place, given_records, shortened, write_records
from iopo.progress import show_messages, tracked

TRIES = 8  # draws of one change that may give a cousin that is there already
Source = Listed | Prose
Reasons = Counter[tuple[str, str]]  # (change or "left out", why) -> prompts


def sources(place: Place, row: dict[str, Any]) -> Iterator[tuple[str | int, Source | str]]:
    """(key, prompt) of each prompt in a row, or (key, why code cannot read it).

    Raises ValueError with the place on a row of another form.
    """
    if "cousin_of" in row:
        raise ValueError(f"{place}: is a cousin already; expected the file that it was made from")
    if all(isinstance(row.get(key), list) for key in ("c1", "c2")):
        name = row.get("id")
        if name is None or any(not isinstance(row.get(key), str) for key in ("y1", "y2")):
            raise ValueError(f"{place}: expected a quad with id, x1, y1, x2, y2, c1, c2")
        for side in (1, 2):
            try:
                yield f"{name}-x{side}", Listed(row, side)
            except ValueError as error:
                yield f"{name}-x{side}", _short(error)
        return
    key, prompt = row.get("key"), row.get("prompt")
    ids, kwargs = row.get("instruction_id_list"), row.get("kwargs")
    lists = isinstance(ids, list) and isinstance(kwargs, list) and 0 < len(ids) == len(kwargs)
    if not (isinstance(key, str | int) and isinstance(prompt, str) and lists):
        raise ValueError(
            f"{place}: found keys {sorted(row)}; expected key, prompt, instruction_id_list and as "
            "many kwargs, or a quad with c1 and c2"
        )
    assert isinstance(ids, list) and isinstance(kwargs, list)
    given = tuple({k: v for k, v in (of or {}).items() if v is not None} for of in kwargs)
    if "combination:repeat_prompt" in ids:
        yield key, "its answer must repeat the prompt word for word"
        return
    try:
        yield key, Prose(Asked(prompt, tuple(ids), given))
    except ValueError as error:
        yield key, _short(error)


def _short(error: ValueError) -> str:
    return str(error).partition("; known")[0].partition(": bad arguments")[0][:100]


def cousins(
    source: Source, k: int, rng: random.Random, reasons: Reasons
) -> list[tuple[str, Asked]]:
    """Up to k different cousins, each with its change: every change in turn, while one is left."""
    found: list[tuple[str, Asked]] = []
    seen = {source.prompt}
    left = list(CHANGES)
    while left and len(found) < k:
        for change in tuple(left):
            if len(found) == k:
                break
            made = _another(source, change, rng, seen)
            if isinstance(made, Asked):
                found.append((change, made))
                seen.add(made.prompt)
                continue
            left.remove(change)
            if all(change != other for other, _ in found):
                reasons[change, made] += 1
    return found


def _another(source: Source, change: str, rng: random.Random, seen: set[str]) -> Asked | str:
    """A cousin that is not there yet and keeps its promise, or why there is none."""
    for _ in range(TRIES):
        made: Asked | str = getattr(source, change)(rng)
        if isinstance(made, str):
            return made
        if made.prompt not in seen:
            promised(source.asked, change, made)
            return made
    return "no other one"


def promised(asked: Asked, change: str, made: Asked) -> None:
    """Raise RuntimeError unless the cousin is checked as its change says."""
    pairs = list(zip(asked.kwargs, made.kwargs, strict=True))
    other = sum(old != new for old, new in pairs)
    if made.ids != asked.ids or other != (change == "parameter"):
        raise RuntimeError(f"{change} changed what is checked: {asked} to {made}; this is a bug")
    made.constraints  # noqa: B018 - raises on kwargs that are none


@dataclass
class Counts:
    """What was made of a file's prompts, for the table."""

    reasons: Reasons = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)  # cousins of a prompt -> prompts
    made: Counter[str] = field(default_factory=Counter)  # cousins by change
    having: Counter[str] = field(default_factory=Counter)  # prompts with a cousin of the change
    # by kind: constraints, those whose wording was found, cousins with another parameter of it
    kinds: dict[str, list[int]] = field(default_factory=dict)

    def add(self, source: Source, found: list[tuple[str, Asked]]) -> None:
        self.sizes[len(found)] += 1
        self.made.update(change for change, _ in found)
        self.having.update({change for change, _ in found})
        asked = source.asked
        located = source.about if isinstance(source, Prose) else source.texts
        for i, name in enumerate(asked.ids):
            of = self.kinds.setdefault(name, [0, 0, 0])
            of[0] += 1
            of[1] += bool(located[i])
            of[2] += sum(made.kwargs[i] != asked.kwargs[i] for _, made in found)

    def table(self) -> str:
        prompts = self.sizes.total()
        sizes = (f"{n} have {size}" for size, n in sorted(self.sizes.items(), reverse=True))
        lines = [f"{prompts} prompts, {self.made.total()} cousins: {', '.join(sizes)}"]
        for change in CHANGES:
            lines.append(
                f"{change:<11}{self.made[change]} cousins of {self.having[change]} prompts"
            )
            lines += self._why(change)
        lines += ["left out", *self._why("left out")] if self._why("left out") else []
        lines.append(f"{'kind':<50}{'asked':>7}{'found':>7}{'changed':>9}")
        for name, (asked, found, changed) in sorted(self.kinds.items()):
            lines.append(f"{name:<50}{asked:>7}{found:>7}{changed:>9}")
        return "\n".join(lines)

    def _why(self, what: str) -> list[str]:
        return [f"  not {n}: {why}" for (of, why), n in self.reasons.most_common() if of == what]


def build(path: Path, out: Path, k: int, seed: int) -> str:
    """Write OUT; returns the table of what was made. Raises ValueError on what cannot be used."""
    counts = Counts()
    rows: list[dict[str, Any]] = []
    faults, keys = [], set()
    for place, row in tracked(given_records(path), "prompts read"):
        try:
            prompts = list(sources(place, row))
        except ValueError as error:
            faults.append(str(error))
            continue
        for key, source in prompts:
            if str(key) in keys:
                faults.append(f"{place}: the key {key} is there more than once; give each its own")
            keys.add(str(key))
            if isinstance(source, str):
                counts.reasons["left out", source] += 1
                continue
            found = cousins(source, k, random.Random(f"{seed}/{key}"), counts.reasons)
            counts.add(source, found)
            for n, (change, asked) in enumerate([("none", source.asked), *found] if found else ()):
                name = {"key": f"{key}-{n}" if n else key, "cousin_of": key, "change": change}
                rows.append(name | asked.row())
    if faults:
        raise ValueError("\n".join(shortened(faults, 10)))
    if not rows:
        raise ValueError(f"{path}: no prompt with a cousin in it\n{counts.table()}")
    write_records(out, rows)
    return f"{out}: {counts.table()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m iopo.construct.cousins",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--k", type=int, default=len(CHANGES), help="cousins of each prompt")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.k < 1:
        parser.error(f"--k is {args.k}; expected 1 or more")
    show_messages(sys.stderr)
    try:
        if missing := missing_packages():
            raise ValueError(f"needs {', '.join(missing)}; pip install 'iopo[eval]'")
        print(build(args.file, args.out, args.k, args.seed))
    except (ValueError, OSError) as error:
        print(f"cousins: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
