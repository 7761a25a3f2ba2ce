"""Quads from any preference set, without a model: its two responses are measured and relabelled.

For each row (prompt, chosen, rejected) the constraints that hold for one response and not for the
other become two instructions. Rows stream in blocks, over all cores: memory holds a few blocks, a
digest of each response and some counts. Each block balances its kinds and lengths by itself, so
that the files do not depend on the number of cores.
"""

import hashlib
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from iopo.constraints import Constraint
from iopo.constraints import text as cut
from iopo.constraints.answers import hollow
from iopo.construct import importers, in_blocks, require
from iopo.construct.contrast import KINDS, fill, tell_apart, unmentioned
from iopo.construct.prose import ends_a_sentence, refuses, script_of
from iopo.construct.quadruples import MATCH, Balance, constraint_rows, four_cells, sign
from iopo.construct.tasks import Task, quad_row
from iopo.construct.trace.taxonomy import MOST_CONSTRAINTS, draw_number
from iopo.data.columns import as_written, first_turn, last_turn, text_of, with_last
from iopo.data.rows import Pair
from iopo.files import read_records, write_text
from iopo.progress import progress
from iopo.sources import files_of

log = logging.getLogger(__name__)

SPLITS = ("train", "heldout", "heldout_kinds")
Written = list[tuple[Constraint, str]]  # constraints of one side, each with its sentence
LANGUAGE = {"latin": "en", "chinese": "zh"}  # a script that we can write instructions for
_REFUSED_BY = 300  # characters: a refusal comes first


@dataclass
class RelabelRecipe:
    """What may be set of the recipe `relabel` (conf/recipe/relabel.yaml)."""

    name: str = "relabel"
    source: str | None = None  # rows of prompt, chosen, rejected
    out: str = "runs/relabel"
    seed: int = 0
    heldout_share: float = 0.1  # of the prompts, by hash; half of it for the held-out kinds
    heldout_kinds: list[str] = field(
        default_factory=lambda: ["numbered_items", "highlights", "questions"]
    )
    most_share: float = 0.15  # of all constraints that one kind may have
    most_words: int = 600  # of a response (Chinese: characters)
    most_constraints: int = 5  # in one instruction; their number is drawn as in TRACE
    limit: int | None = None  # quads

    def __post_init__(self) -> None:
        known = {kind for kinds in KINDS.values() for kind in kinds}
        require(self, "heldout_kinds", set(self.heldout_kinds) <= known, f"some of {sorted(known)}")
        require(self, "heldout_share", 0 <= self.heldout_share < 1, "0 <= share < 1")
        require(self, "most_share", 0 < self.most_share <= 1, "0 < share <= 1")
        most = MOST_CONSTRAINTS
        require(self, "most_constraints", 1 <= self.most_constraints <= most, f"1 to {most}")

    def kinds(self, split: str, language: str) -> tuple[str, ...]:
        held = split == "heldout_kinds"
        return tuple(k for k in KINDS[language] if (k in self.heldout_kinds) == held)


class Relabeller:
    """Turns pairs into rows of quads, one after the other; the same for the same input order."""

    def __init__(self, recipe: RelabelRecipe, steady: bool = False):
        self.recipe = recipe
        self.balances = {split: Balance(recipe.most_share, steady=steady) for split in SPLITS}
        self.balances["heldout_kinds"].most_share = 1.0  # a few kinds share all of it
        self._seen: set[int] = set()  # digests of responses

    def join(self, row: dict[str, Any]) -> str | None:
        """Let in a row that was made elsewhere; a str says why it must not."""
        digests = {_digest(row["y1"]), _digest(row["y2"])}
        if digests & self._seen or len(digests) < 2:
            return "repeated response"
        balance = self.balances[row["split"]]
        kinds = [c["kind"] for c in (*row["c1"], *row["c2"])]
        if not all(map(balance.has_room, kinds)):
            return "kind is frequent enough"
        together = sign(len(row["x1"]) - len(row["x2"])) * sign(len(row["y1"]) - len(row["y2"]))
        if balance.would_tell(together):
            return "length would tell"
        balance.add(kinds, together)
        self._seen |= digests
        return None

    def row(
        self, pair: Pair, task: Task, split: str, number: int | None = None
    ) -> dict[str, Any] | str:
        """The quad of a pair whose prompt ends with this task; a str says why there is none.

        number: of constraints to ask for a side, as far as there are so many; None: drawn.
        """
        asked = text_of(pair.x)
        language = LANGUAGE.get(script_of(asked))
        said = (cut.after_thinking(pair.chosen), cut.after_thinking(pair.rejected))
        fault = unusable(said, asked, language, self.recipe.most_words)
        if fault is not None or language is None:
            return fault or "script we cannot write"
        digests = {_digest(pair.chosen), _digest(pair.rejected)}
        if digests & self._seen:
            return "repeated response"
        rng = random.Random(f"{self.recipe.seed}/{pair.id}")
        kinds = self.recipe.kinds(split, language)
        orders = [self.balances[split].order(kinds, rng) for _ in range(2)]
        found = tell_apart(*said, unmentioned(orders[0], asked), rng)
        if found is None:
            return "nothing tells the responses apart"
        numbers = [number or draw_number(rng, self.recipe.most_constraints) for _ in (1, 2)]
        sides = [
            fill(first, text, unmentioned(order, asked), number, rng)
            for first, text, order, number in zip(found, said, orders, numbers, strict=True)
        ]
        y1, y2 = pair.chosen, pair.rejected
        if rng.random() < 0.5:
            sides, y1, y2 = sides[::-1], y2, y1
        written = [[(c, c.render(language, rng)) for c in side] for side in sides]
        together = self._shortened(written, sign(len(y1) - len(y2)), split)
        if together is None:
            return "length would tell"
        for side in written:
            rng.shuffle(side)
        c1, c2 = ([c for c, _ in side] for side in written)
        if four_cells(c1, y1, c2, y2) != MATCH:
            return "four cells"
        rows = [constraint_rows(side) for side in written]
        row = quad_row(task, rows[0], y1, rows[1], y2, pair.system)
        for n, c in enumerate((c1, c2), 1):
            x = with_last(pair.x, row[f"x{n}"])
            if reasons := hollow(row[f"y{n}"], text_of(x), c):
                return f"no answer: {reasons[0]}"
            row[f"x{n}"] = as_written(x)
        if not isinstance(pair.x, str):
            row["task"] = asked
        self.balances[split].add([c.kind for c in (*c1, *c2)], together)
        self._seen |= digests
        end = {"source": "relabel", "split": split, "match": [1, 0, 1, 0], "origin": pair.id}
        return row | end

    def _shortened(self, written: list[Written], longer_y: int, split: str) -> int | None:
        """Shorten the longer instruction, but for its first constraint, until lengths tell nothing.

        longer_y: the sign of the responses' lengths. Returns whether the longer instruction now has
        the longer response (1, 0, -1); None where nothing can be taken off.
        """
        while True:
            sizes = [sum(len(text) + 4 for _, text in side) for side in written]
            longer = sign(sizes[0] - sizes[1])
            if not self.balances[split].would_tell(longer * longer_y):
                return longer * longer_y
            side = written[0] if longer > 0 else written[1]
            if len(side) == 1:
                return None
            side.pop()


def unusable(
    texts: Sequence[str], prompt: str, language: str | None, most_words: int
) -> str | None:
    """Why the texts are no use; None if they are."""
    for text in texts:
        if LANGUAGE.get(script_of(text)) != language:
            return "another script than the prompt"
        size = cut.han_characters(text) if language == "zh" else len(cut.words(text))
        if size > most_words:
            return "too long"
        if reasons := hollow(text, prompt):
            return f"no answer: {reasons[0]}"
        if not ends_a_sentence(text[-200:]) and text[-1] not in "。！？”』」）":
            return "unfinished"
        if refuses(text[:_REFUSED_BY]):
            return "refusal"
    return None


def split_of(task: str, heldout_share: float) -> str:
    """train, or one of the held-out parts in equal shares, by the hash of the task."""
    place = int.from_bytes(hashlib.sha256(task.encode()).digest()[:4], "big") / 2**32
    if place >= heldout_share:
        return "train"
    return "heldout" if place < heldout_share / 2 else "heldout_kinds"


@lru_cache(maxsize=8)
def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class _Made(NamedTuple):
    """A quad as it is written, and what is counted of it."""

    split: str
    line: str
    kinds: list[str]
    digests: set[int]  # of its responses


def _relabel_block(
    recipe: RelabelRecipe, number: int, pairs: list[Pair | str]
) -> list[_Made | str]:
    """The quad of each pair, or why there is none."""
    relabeller = Relabeller(recipe, steady=number > 0)
    return [p if isinstance(p, str) else _made(relabeller, p) for p in pairs]


def _made(relabeller: Relabeller, pair: Pair) -> _Made | str:
    split = split_of(first_turn(pair.x), relabeller.recipe.heldout_share)
    row = relabeller.row(pair, Task(last_turn(pair.x)), split)
    if isinstance(row, str):
        return row
    kinds = [c["kind"] for c in (*row["c1"], *row["c2"])]
    line = json.dumps(row, ensure_ascii=False) + "\n"
    return _Made(split, line, kinds, {_digest(row["y1"]), _digest(row["y2"])})


@dataclass
class _Progress:
    """What is in the files so far; kept beside them until all is there."""

    of: list[Any]  # the recipe, and the files of its source
    blocks: int = 0
    size: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))  # bytes
    rows: int = 0  # of the source
    made: Counter[str] = field(default_factory=Counter)  # by split
    dropped: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, Counter[str]] = field(default_factory=lambda: {s: Counter() for s in SPLITS})

    def counts(self) -> dict[str, Any]:
        return {
            "in": self.made.total() + self.dropped.total(),
            "out": dict(self.made),
            "dropped": dict(self.dropped.most_common()),
        }


def _resumed(recipe: RelabelRecipe, note: Path) -> _Progress:
    """The progress of a run with the same recipe and source that was killed; else that of none."""
    stats = [(str(path), path.stat()) for path in files_of(recipe.source or "")]
    of = [asdict(recipe), [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]
    kept = json.loads(note.read_text()) if note.exists() else {}
    if kept.get("of") != of:
        return _Progress(of)
    for name in ("made", "dropped"):
        kept[name] = Counter(kept[name])
    kept["kinds"] = {split: Counter(kinds) for split, kinds in kept["kinds"].items()}
    log.info("%s: goes on after %d rows", note.parent, kept["rows"])
    return _Progress(**kept)


def relabel_file(recipe: RelabelRecipe) -> dict[str, Any]:
    """Stream a preference set into the files of each split; returns counts, as in counts.json.

    A run that was killed goes on after its last block. Raises ValueError on a source that is not
    set.
    """
    if recipe.source is None:
        raise ValueError("recipe.source is not set; expected a file of prompt, chosen, rejected")
    out = Path(recipe.out)
    out.mkdir(parents=True, exist_ok=True)
    note = out / "progress.json"
    state = _resumed(recipe, note)
    seen: set[int] = set()  # digests of responses
    pairs = islice(importers.preferences(recipe.source), state.rows, None)
    work = partial(_relabel_block, recipe)
    with ExitStack() as stack:
        show = stack.enter_context(progress(None, f"relabelling {recipe.source}"))
        files = {}
        for split in SPLITS:
            path = out / f"{split}.jsonl"
            path.touch()
            os.truncate(path, state.size[split])
            seen |= {_digest(row[y]) for row in read_records(path) for y in ("y1", "y2")}
            files[split] = stack.enter_context(path.open("a", encoding="utf-8"))
        for block in in_blocks(work, pairs, first=state.blocks):
            for made in block:
                if not isinstance(made, str) and made.digests & seen:
                    made = "repeated response"
                if isinstance(made, str):
                    state.dropped[made] += 1
                    continue
                seen |= made.digests
                state.made[made.split] += 1
                state.kinds[made.split].update(made.kinds)
                files[made.split].write(made.line)
                if state.made.total() == recipe.limit:
                    break
            state.rows, state.blocks = state.rows + len(block), state.blocks + 1
            for split, file in files.items():
                file.flush()
                state.size[split] = file.tell()
            if state.made.total() == recipe.limit:
                break
            write_text(note, json.dumps(vars(state)))
            show.what = f"relabelling: {state.rows:,} rows read, {state.made.total():,} quads"
    counts = state.counts()
    log.info(json.dumps(counts, ensure_ascii=False))
    counts["kinds"] = {split: dict(kinds.most_common()) for split, kinds in state.kinds.items()}
    write_text(out / "counts.json", json.dumps(counts, indent=1, ensure_ascii=False) + "\n")
    note.unlink(missing_ok=True)
    return counts
