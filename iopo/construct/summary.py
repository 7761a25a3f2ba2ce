"""Counts over the rows of files of quads, and what tells y1 from y2 without the instruction."""

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from iopo.constraints.text import words
from iopo.construct.quadruples import sign

JUDGED = "judged"  # the kind of a constraint that only a model can check
WARM_UP = 100  # rows that are learnt from before guesses count
_SLOTS = 1 << 15


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

    def add(self, first: list[int], second: list[int]) -> None:
        """Guess, then learn, from the `_slots` of the two responses of one row."""
        margin = sum(self._weights[i] for i in first) - sum(self._weights[i] for i in second)
        if self._rows >= WARM_UP and margin != 0:
            self.guesses[1 if margin > 0 else -1] += 1
        self._rows += 1
        if margin <= 0:
            for slots, change in ((first, 1.0), (second, -1.0)):
                for i in slots:
                    self._weights[i] += change


def _slots(text: str) -> list[int]:
    features = set(words(text[:1000])[:40])
    features |= {f"length {len(text).bit_length()}", f"first {text[:1]}", f"last {text[-1:]}"}
    return list(map(_slot, features))


@lru_cache(maxsize=_SLOTS)
def _slot(feature: str) -> int:
    return zlib.crc32(feature.encode()) % _SLOTS


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

    def add(self, row: "Measured") -> None:
        self.count({"source": row.source, "split": row.split}, row.c1, row.c2)
        self.guesser.add(*row.slots)
        self.judged += JUDGED in row.c1 or JUDGED in row.c2
        self.words.update(row.tens)
        self.longer[row.longer_y] += 1
        self.together[row.longer_y * row.longer_x] += 1


class Measured(NamedTuple):
    """What the summary counts of a row."""

    source: str
    split: str
    c1: list[str]  # kinds
    c2: list[str]
    tens: list[int]  # of words, of y1 and y2
    longer_y: int  # +1: y1 is the longer one, -1: y2 is
    longer_x: int
    slots: tuple[list[int], list[int]]


def measured(row: dict[str, Any], kinds: list[list[str]]) -> Measured:
    """kinds: of the constraints of x1, and of x2."""
    ys = row["y1"], row["y2"]
    return Measured(
        str(row.get("source", "-")),
        str(row.get("split", "-")),
        kinds[0],
        kinds[1],
        [len(y.split()) // 10 for y in ys],
        sign(len(ys[0]) - len(ys[1])),
        sign(len(row["x1"]) - len(row["x2"])),
        (_slots(ys[0]), _slots(ys[1])),
    )


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
