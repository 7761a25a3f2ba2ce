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
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iopo.constraints import Constraint, from_dict
from iopo.constraints.answers import hollow
from iopo.constraints.text import CJK, tokens, words
from iopo.construct.prose import ends_a_sentence, script_of
from iopo.construct.quadruples import CELLS, MATCH, four_cells, sign
from iopo.data.columns import read_prompt, text_of
from iopo.files import Place, iter_records

TEXTS = ("x1", "y1", "x2", "y2")
GRAM = 13  # words in a row that make an overlap with a benchmark
_HAN = re.compile(f"[{CJK}]")
JUDGED = "judged"  # the kind of a constraint that only a model can check
# Asks for a script of its own, so that a response need not have its instruction's.
_LANGUAGE_KINDS = {"response_language", JUDGED}
_SLOTS = 1 << 15
WARM_UP = 100  # rows that are learnt from before guesses count


Fault = tuple[str, str]  # short name of the rule that is broken, detail
Grams = dict[tuple[str, ...], Place]  # a run of tokens -> where a benchmark has it
Origin = tuple[int, Place]  # index of the file, and where in it
Seen = dict[bytes, Origin]  # digest of an id, response or task -> where it was met first


@dataclass(frozen=True, slots=True)
class Violation:
    place: Place
    fault: str  # short name of the rule that is broken
    detail: str

    def __str__(self) -> str:
        return f"{self.place}: [{self.fault}] {self.detail}"


def deviations(signs: Counter[int]) -> float:
    """How far +1 and -1 are from being equally likely, in standard deviations; above 0: more +1."""
    n = signs[1] + signs[-1]
    return (signs[1] - signs[-1]) / n**0.5 if n else 0.0


class SideGuesser:
    """Guesses which of two responses is y1 from the responses alone, and learns from each row.

    A hashed perceptron over words, ends and length; every guess is made before its row is learnt,
    so the count is honest. On x-preference a scorer of y alone ties by definition (x1y1 and x2y1
    have the same y); what can leak is the side: y1 the longer, the better or the politer one. Then
    objectives on the first rows only (dpo with quad_rows=first) learn y and not the instruction.
    """

    def __init__(self) -> None:
        self._weights = [0.0] * _SLOTS
        self._rows = 0
        self.guesses: Counter[int] = Counter()  # +1: right, -1: wrong

    def add(self, y1: str, y2: str) -> None:
        """Guess, then learn, from one row."""
        first, second = _slots(y1), _slots(y2)
        margin = sum(self._weights[i] for i in first) - sum(self._weights[i] for i in second)
        if self._rows >= WARM_UP and margin != 0:
            self.guesses[1 if margin > 0 else -1] += 1
        self._rows += 1
        if margin <= 0:
            for slots, change in ((first, 1.0), (second, -1.0)):
                for i in slots:
                    self._weights[i] += change


def _slots(text: str) -> list[int]:
    features = {word.lower() for word in words(text[:1000])[:40]}
    features |= {f"length {len(text).bit_length()}", f"first {text[:1]}", f"last {text[-1:]}"}
    return [zlib.crc32(feature.encode()) % _SLOTS for feature in features]


@dataclass
class Tally:
    """Counts over rows of quads."""

    rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    constraints: Counter[int] = field(default_factory=Counter)  # of an instruction

    def count(self, row: dict[str, Any], c1: Sequence[str], c2: Sequence[str]) -> None:
        """Count a row whose constraints are of these kinds."""
        self.rows += 1
        self.kinds.update((*c1, *c2))
        self.sources[str(row.get("source", "-"))] += 1
        self.splits[str(row.get("split", "-"))] += 1
        self.constraints.update((len(c1), len(c2)))


@dataclass
class Summary(Tally):
    """Counts over the rows that could be read.

    A scorer that matches lengths is at chance on x-preference only if `deviations(together)` is
    near 0; beyond 3 the data let it guess.
    """

    judged: int = 0  # rows with a constraint that code cannot check
    words: Counter[int] = field(default_factory=Counter)  # response length, in tens of words
    # +1: the longer instruction has the longer response, -1: it has the shorter one
    together: Counter[int] = field(default_factory=Counter)
    longer: Counter[int] = field(default_factory=Counter)  # +1: y1 is the longer one, -1: y2 is
    guesser: SideGuesser = field(default_factory=SideGuesser)

    def count(self, row: dict[str, Any], c1: Sequence[str], c2: Sequence[str]) -> None:
        super().count(row, c1, c2)
        self.guesser.add(row["y1"], row["y2"])
        self.judged += JUDGED in c1 or JUDGED in c2
        self.words.update(len(row[y].split()) // 10 for y in ("y1", "y2"))
        longer_y = sign(len(row["y1"]) - len(row["y2"]))
        self.longer[longer_y] += 1
        self.together[longer_y * sign(len(row["x1"]) - len(row["x2"]))] += 1


def verify(files: Sequence[Path], against: Sequence[Path] = ()) -> tuple[list[Violation], Summary]:
    """All violations in file order, and the summary."""
    grams = benchmark_grams(against)
    found: list[Violation] = []
    summary = Summary()
    seen: Seen = {}
    for index, path in enumerate(files):
        for place, row, unreadable in iter_records(path):
            if unreadable is not None:
                faults = iter([("json", f"cannot be read: {unreadable}")])
            else:
                faults = _check_row(row, (index, place), seen, grams, summary)
            found += [Violation(place, fault, detail) for fault, detail in faults]
    return found, summary


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
    ranks = on_task.task_ranks(base, Chat(load_tokenizer(folder)), tasks, texts) or []
    return [
        Violation(place, "off task", f"{key} is likelier after {rank - 1} {others}")
        for (place, key), rank in zip(places, ranks, strict=False)
        if rank > on_task.MOST_RANK
    ]


def _check_row(
    row: Any, here: Origin, seen: Seen, grams: Grams, summary: Summary
) -> Iterator[Fault]:
    """All that is wrong with a row; what follows from another fault is left out."""
    texts = row if isinstance(row, dict) else {}
    prompts = {key: read_prompt(texts.get(key)) for key in ("x1", "x2")}
    missing = [k for k in TEXTS if not isinstance(texts.get(k), str) and prompts.get(k) is None]
    if missing:
        yield "keys", f"{', '.join(missing)} missing or no text; a row has {', '.join(TEXTS)}"
        return
    row = row | {key: text_of(x) for key, x in prompts.items() if x is not None}
    yield from _repeated(row, here, seen)
    for key in TEXTS if grams else ():
        shared = next((gram for gram in _grams(row[key]) if gram in grams), None)
        if shared is not None:
            yield "overlap", f"{key} has {' '.join(shared)!r} of {grams[shared]}"
    sides = [row.get(key) or [] for key in ("c1", "c2")]
    if not all(isinstance(side, list) for side in sides):
        yield "constraint", "c1 or c2 is no list of constraints"
        return
    kinds = [[_kind(c) for c in side] for side in sides]
    judged = JUDGED in kinds[0] or JUDGED in kinds[1]
    broken = list(_texts(row, {*kinds[0], *kinds[1]}))
    yield from broken
    try:
        c1, c2 = ([from_dict(c) for c in side if _kind(c) != JUDGED] for side in sides)
    except (ValueError, TypeError, AttributeError) as error:
        yield "constraint", f"cannot be read: {error}"
        return
    summary.count(row, *kinds)
    if judged and row.get("match") != [int(cell) for cell in MATCH]:
        yield "match", f"says {row.get('match')}; a judged row must say [1, 0, 1, 0]"
    if not broken and not judged:
        yield from _cells(row, c1, c2)
        for n, c in enumerate((c1, c2), 1):
            if reasons := hollow(row[f"y{n}"], row[f"x{n}"], c):
                yield "no answer", f"y{n} is hollow: {', '.join(reasons)}"
    for n, side in enumerate(sides, 1):
        for text in (constraint.get("text") for constraint in side):
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


def _repeated(row: dict[str, Any], here: Origin, seen: Seen) -> Iterator[Fault]:
    def first(what: str, value: object) -> Origin:
        data = f"{what}\x1f{value}".encode()
        return seen.setdefault(hashlib.blake2b(data, digest_size=12).digest(), here)

    if row.get("id") is not None and (place := first("id", row["id"])) != here:
        yield "id", f"{row['id']!r} is that of {place[1]}"
    for key in ("y1", "y2") if row["y1"] != row["y2"] else ():
        if row[key].strip() and (place := first("response", row[key])) != here:
            yield "response", f"{key} is a response of {place[1]}"
    if row.get("task") is not None and (place := first("task", row["task"]))[0] != here[0]:
        yield "task", f"the task is also in {place[1]}; files must not share tasks"


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
    together, guesses = summary.together, summary.guesser.guesses
    leak, longer, y_only = map(deviations, (together, summary.longer, guesses))
    lines.append(
        f"length scorer: the longer instruction has the longer response in {together[1]} quads, "
        f"the shorter one in {together[-1]} ({leak:+.1f} standard deviations)"
    )
    if summary.judged:
        lines.append(f"{summary.judged} rows have judged constraints, which code cannot check")
    if abs(leak) > 3:
        lines.append("warning: lengths tell which response belongs to which instruction")
    lines += [
        f"length-only scorer: y1 is the longer one {longer:+.1f} deviations",
        f"y-only scorer: tells y1 from y2 in {guesses[1]} of {guesses.total()} rows "
        f"({y_only:+.1f} standard deviations)",
    ]
    if abs(longer) > 3 or y_only > 3:
        lines.append("warning: the responses alone tell y1 from y2; the data leak")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m iopo.construct.verify", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="quads; files must not share tasks")
    parser.add_argument("--against", nargs="+", type=Path, default=[], help="benchmark files")
    parser.add_argument("--model", help="a model folder, or demo: are responses on their task?")
    options = parser.parse_args(arguments)
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
