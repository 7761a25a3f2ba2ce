"""The data of the comparison, from verified quads.

train.jsonl, validation.jsonl and test.jsonl are quads, no task in two of them; worse.jsonl has
DPO's pairs (the right response, and the same with a constraint broken); add_delete.jsonl has the
responses of train under instructions that differ by added or deleted constraints alone, as two of
the paper's three operations make them; asymmetric.jsonl quads with an easy and a hard side, noise10
and noise30.jsonl quads of which so many per cent are labelled the wrong way round. All of these are
made from rows of train.jsonl; worse and add_delete are checked by code.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from iopo.constraints import Constraint, Value, follows, from_dict, value_of
from iopo.constraints import text as cut
from iopo.constraints.marks import Commas
from iopo.construct.proposals import CLOSINGS, OPENINGS, unseen
from iopo.construct.quadruples import MATCH, four_cells
from iopo.construct.tasks import Task
from iopo.data.rows import spread
from iopo.files import given_records, sha256_text, write_records

Row = dict[str, Any]
_ORDER = "comparison"  # of the rows drawn; a change draws others


def make(
    train: Path, heldout: Sequence[Path], out: Path, *, quads: int, validation: int, test: int
) -> dict[str, Any]:
    """Write all files into the folder `out`, counts.json last; returns the counts.

    quads, validation, test: rows wanted. An eighth of the training tasks is kept for validation; a
    test row says what of it training never sees: unseen_kinds, unseen_params, or seen.
    Raises ValueError if there are too few rows, or if a task is both in train and in a test file.
    """
    rows = sorted(_read(train), key=lambda row: sha256_text(_ORDER + row["id"]))
    apart = [row for row in rows if int(task_key(row), 16) % 8 == 1]
    own = [row for row in rows if int(task_key(row), 16) % 8 != 1]
    for name, found, wanted in (("train", own, quads), ("validation", apart, validation)):
        if len(found) < wanted:
            raise ValueError(f"{train}: {len(found)} quads for {name}, expected {wanted} or more")
    own, apart = own[:quads], apart[:validation]
    tests = [row for path in heldout for row in _read(path)]
    in_train, in_tests = ({task_key(row) for row in of} for of in (rows, tests))
    if shared := in_train & in_tests:
        raise ValueError(f"{len(shared)} tasks are in {train} and in a held-out file; nothing made")
    seen = {value_of(c) for row in own for c in (*row["c1"], *row["c2"])}
    files = {
        "train": own,
        "validation": [row | {"split": "validation"} for row in apart],
        "test": in_thirds(tests, seen, test),
        "worse": [pair for row in own for pair in worse_pairs(row)],
        "add_delete": [add_delete(row) for row in own],
        "asymmetric": [less for row in own if (less := asymmetric(row))],
        "noise10": [swapped(row, 0.1) for row in own],
        "noise30": [swapped(row, 0.3) for row in own],
    }
    for name, content in files.items():
        write_records(out / f"{name}.jsonl", content)
    counts = {name: len(content) for name, content in files.items()} | {
        "test_splits": dict(Counter(row["split"] for row in files["test"])),
        "worse_broken": dict(Counter(kind for row in files["worse"] for kind in row["broken"])),
        "worse_by": dict(Counter(row["by"] for row in files["worse"])),
        "add_delete_match": dict(Counter(str(row["match"]) for row in files["add_delete"])),
    }
    (out / "counts.json").write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    return counts


def in_thirds(rows: Sequence[Row], seen: set[Value], wanted: int) -> list[Row]:
    """`wanted` rows with what training, which had the constraints `seen`, never saw of them:
    as near to a third each of unseen_kinds, unseen_params and seen as the rows allow.

    Few rows ask for seen constraints alone, so those that can do without the others lose them.
    """
    kinds = {kind for kind, _ in seen}
    found: dict[str, list[Row]] = {"unseen_kinds": [], "seen": [], "unseen_params": []}
    for row in rows:
        split = unseen(row, seen, kinds)
        less = only_seen(row, seen) if split == "unseen_params" else None
        if less is not None and len(found["seen"]) <= len(found["unseen_params"]):
            row, split = less, "seen"
        found[split].append(row | {"split": split})
    made: list[Row] = []
    for n, (_, of) in enumerate(sorted(found.items(), key=lambda item: len(item[1]))):
        made += spread(of, (wanted - len(made)) // (len(found) - n))
    return made


def only_seen(row: Row, seen: set[Value]) -> Row | None:
    """The row without constraints that training never saw; None if it is then no quad."""
    left = {c: [one for one in row[c] if value_of(one) in seen] for c in ("c1", "c2")}
    c1, c2 = ([from_dict(one) for one in of] for of in left.values())
    if not c1 or not c2 or four_cells(c1, row["y1"], c2, row["y2"]) != MATCH:
        return None
    return row | left | {f"x{n}": _asking(row, n, left[f"c{n}"]) for n in (1, 2)}


# --- DPO's pairs: the same response with a constraint broken --------------------------------------


def worse_pairs(row: Row) -> list[Row]:
    """(x1, y1 over a worse y1) and (x2, y2 over a worse y2), checked.

    "by" names the edit. Where none breaks a constraint, the quad's other response is rejected: it
    breaks one, too.
    """
    pairs = []
    for side, other in ((1, 2), (2, 1)):
        x, y = row[f"x{side}"], row[f"y{side}"]
        constraints = [from_dict(c) for c in row[f"c{side}"]]
        rng = random.Random(sha256_text(f"worse {row['id']} {side}"))
        by, rejected = worse(constraints, y, rng) or ("other response", row[f"y{other}"])
        kept = follows(constraints, rejected)
        if not all(follows(constraints, y)) or all(kept):
            raise ValueError(f"quad {row['id']}: y{side} does not fit x{side}, or y{other} does")
        broken = [c.kind for c, ok in zip(constraints, kept, strict=True) if not ok]
        pairs.append({
            "id": f"{row['id']}/{side}", "x": x, "chosen": y, "rejected": rejected,
            "broken": broken, "by": by,
        })  # fmt: skip
    return pairs


def worse(
    constraints: Sequence[Constraint], text: str, rng: random.Random
) -> tuple[str, str] | None:
    """(edit, text that breaks one constraint): as few others as possible; None if no edit does."""
    target = rng.choice(constraints)
    found = []
    for name, edited in _edits(target, text, rng):
        kept = follows(constraints, edited)
        if edited.strip() and not all(kept):
            found.append((len(kept) - sum(kept), name, edited))
    if not found:
        return None
    fewest = min(broken for broken, _, _ in found)
    _, name, edited = rng.choice([edit for edit in found if edit[0] == fewest])
    return name, edited


def _edits(target: Constraint, text: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """The text changed in ways that may break the constraint: its opposite first, then general."""
    for opposite in target.alternatives(rng):
        edited = opposite.edit(text, rng)
        if edited is not None and edited != text:
            yield "opposite", edited
    for name, change in _GENERAL.items():
        edited = change(text, rng)
        if edited != text:
            yield name, edited


def _drop_sentence(text: str, rng: random.Random) -> str:
    sentences = cut.sentences(text)
    return text.replace(rng.choice((sentences[0], sentences[-1])), "", 1).strip()


def _drop_line(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    return "\n".join(lines[1:] if rng.random() < 0.5 else lines[:-1]).strip()


_GENERAL: dict[str, Callable[[str, random.Random], str]] = {
    "opening added": lambda text, rng: f"{rng.choice(OPENINGS)} {text}",
    "closing added": lambda text, rng: f"{text} {rng.choice(CLOSINGS)}",
    "sentence dropped": _drop_sentence,
    "line dropped": _drop_line,
    "lines joined": lambda text, rng: " ".join(text.split()),
    "sentence case": lambda text, rng: re.sub(
        r"(^|[.!?]\s+)([a-z])", lambda m: m[1] + m[2].upper(), text.lower()
    ),
    "wrapping dropped": lambda text, rng: text.strip("\"'`*_()[]{}<> \n"),
    "exclamations": lambda text, rng: re.sub(r"\.(?=\s|$)", "!", text),
    "no commas": lambda text, rng: Commas("exactly", 0).edit(text, rng) or text,
}


# --- add and delete: instructions that do not exclude one another ---------------------------------


def add_delete(row: Row) -> Row:
    """The quad's responses, under instructions of which one only lacks constraints of the other.

    delete: x2 is x1 without what y2 breaks, so that y2 fits x2, y1 still does, y2 does not fit x1
    (match 1, 0, 1, 1). add: x1 is x2 without what y1 breaks (1, 1, 1, 0). Drawn by hash; the other
    where nothing would be left to ask for and something is left there.
    """
    c1, c2 = ([from_dict(c) for c in row[c]] for c in ("c1", "c2"))
    kept1, kept2 = follows(c1, row["y2"]), follows(c2, row["y1"])
    delete = int(sha256_text("operation " + row["id"]), 16) % 2 == 0
    if any(kept1) != any(kept2):
        delete = any(kept1)
    side, kept = (1, kept1) if delete else (2, kept2)
    asked = row[f"c{side}"]
    left = [c for c, keep in zip(asked, kept, strict=True) if keep]
    x = _asking(row, side, left)
    changed = {"x2": x, "c2": left} if delete else {"x1": x, "c1": left}
    made = row | changed | {"id": row["id"] + ("/delete" if delete else "/add")}
    cells = four_cells(
        *([from_dict(c) for c in made["c1"]], made["y1"]),
        *([from_dict(c) for c in made["c2"]], made["y2"]),
    )
    if cells != ((True, False, True, True) if delete else (True, True, True, False)):
        raise ValueError(f"quad {row['id']}: y1 and y2 do not exclude one another (match {cells})")
    return made | {"match": [int(cell) for cell in cells]}


# --- where the joint sigmoid and two sigmoids could differ ----------------------------------------


def asymmetric(row: Row) -> Row | None:
    """The row with one constraint on the side of the shorter response, which the other breaks: an
    easy side and a hard one. None unless the hard side has three or more."""
    easy, hard = (1, 2) if len(row["y1"]) < len(row["y2"]) else (2, 1)
    asked = row[f"c{easy}"]
    kept = follows([from_dict(c) for c in asked], row[f"y{hard}"])
    left = [c for c, keep in zip(asked, kept, strict=True) if not keep][:1]
    if len(row[f"c{hard}"]) < 3:
        return None
    return row | {f"c{easy}": left, f"x{easy}": _asking(row, easy, left)}


def swapped(row: Row, share: float) -> Row:
    """The row, with its responses exchanged in this share of all rows, by hash: a wrong label."""
    if int(sha256_text("noise " + row["id"]), 16) % 1000 >= 1000 * share:
        return row
    return row | {"y1": row["y2"], "y2": row["y1"]}


# --- rows and files -------------------------------------------------------------------------------


def _asking(row: Row, side: int, constraints: list[Row]) -> str:
    """The row's x1 or x2 with these constraints in place of its own."""
    x, before = row[f"x{side}"], _numbered(row[f"c{side}"])
    if x.count(before) != 1:
        raise ValueError(f"expected the constraints as numbered lines, once, in: {x!r}")
    return x.replace(before, _numbered(constraints))


def _numbered(constraints: list[Row]) -> str:
    return "".join(f"\n{n}. {c['text']}" for n, c in enumerate(constraints, start=1))


def _read(path: Path) -> list[Row]:
    rows = given_records(path)
    for place, row in rows:
        missing = [k for k in ("id", "task", "x1", "y1", "x2", "y2", "c1", "c2") if not row.get(k)]
        if missing:
            raise ValueError(f"{place}: no {', '.join(missing)}; expected a verified quad")
    return [row for _, row in rows]


def task_key(row: Row) -> str:
    """Equal for rows of one task."""
    return Task.of_line(row["task"]).key
