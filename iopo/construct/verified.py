"""The set data/verified: quads by relabel and follow from a small model's own responses.

Responses to bare tasks are asked for in several forms, so that lists, paragraphs and questions
occur by themselves; the instructions do not contain that wish. Rule edits fill up what is rare, at
most a fifth. The same seed and responses give the same files.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import Any

from iopo.constraints import text as cut
from iopo.construct import report
from iopo.construct.demo import Tally, follow_jobs, followed, is_heldout, write_rows
from iopo.construct.proposals import SEEN_KINDS, UNSEEN_KINDS, propose
from iopo.construct.prose import (
    ABOUT_THE_HINT,
    PLAIN,
    REFUSAL,
    balanced,
    ends_a_sentence,
    repeats_itself,
)
from iopo.construct.quadruples import Candidate, Choice, Rejection, edit, kinds_of, to_row
from iopo.construct.relabel import SPLITS, Relabeller, RelabelRecipe
from iopo.construct.responses import Job, Response, Sampler, sample_all
from iopo.construct.tasks import Task, read_tasks
from iopo.construct.verify import verify
from iopo.data.rows import Pair

# What is asked after the bare task; most of them plain, so that prose prevails.
FORMS = (
    "Answer in two or three short sentences.",
    "Answer in a list of three bullet points that start with a dash.",
    "Answer in four sentences.",
    "Answer in two short paragraphs.",
    "Answer with excitement, in at most fifty words.",
    "Answer in a numbered list of three short items.",
    "Answer in at most fifty words, with a question at the end.",
    "Answer in one sentence.",
)
SAMPLES_TO_EDIT = 3  # for tasks of the held-out kinds, most of whose quads are edits
FOLLOW_KINDS = (
    "words", "sentences", "bullets", "paragraphs", "end_phrase", "start_phrase", "case", "wrapped",
)  # fmt: skip
_LEAST_WORDS, _MOST_WORDS = 8, 90
_SENTENCE_END = re.compile(r"[.!?]['\")]?(?=\s|$)")
_BARE_MARKER = re.compile(r"(?:\n[ \t]*(?:\d+[.)]|[-*])[ \t]*)+$")  # of items without text


@dataclass
class VerifiedRecipe:
    """What may be set of the recipe `verified` (conf/recipe/verified.yaml)."""

    name: str = "verified"
    out: str = "data/verified"
    responses: str = "data/verified/responses.jsonl"
    seed: int = 0
    samples_per_task: int = 6
    follow_candidates: int = 100
    follow_samples: int = 2
    max_new_tokens: int = 64
    train_quads: int = 1700
    heldout_quads: int = 200
    heldout_kinds_quads: int = 100
    edit_share: float = 0.2  # of all quads, at most
    most_share: float = 0.15  # of the constraints of train and heldout that one kind may have

    def wanted(self) -> dict[str, int]:
        sizes = (self.train_quads, self.heldout_quads, self.heldout_kinds_quads)
        return dict(zip(SPLITS, sizes, strict=True))


@dataclass
class Making:
    """The files so far, and why what is not in them is not."""

    recipe: VerifiedRecipe
    relabeller: Relabeller
    rows: dict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: {split: [] for split in SPLITS}
    )
    tally: Tally = field(default_factory=Tally)

    def full(self, split: str) -> bool:
        return len(self.rows[split]) >= self.recipe.wanted()[split]

    def admit(self, source: str, result: Candidate | Rejection, split: str) -> None:
        """Let a quad in if it fits among the others; count what became of it."""
        refusal = None
        if isinstance(result, Candidate):
            row = to_row(result, split)
            refusal = "file is full" if self.full(split) else self.relabeller.join(row)
            if refusal is None:
                self.rows[split].append(row)
        self.tally.count(source, result, refusal)

    def edits(self) -> int:
        return self.tally.outcomes["edit", "accepted"]


def build_verified(
    recipe: VerifiedRecipe, sampler: Sampler, say: Callable[[str], None] = print
) -> str:
    """Sample what the cache lacks, write the three files and the page; returns the acceptance.

    Raises ValueError if verify finds a fault in what was made.
    """

    def sampled(jobs: Sequence[Job]) -> dict[str, Response]:
        return sample_all(
            jobs,
            Path(recipe.responses),
            sampler,
            seed=recipe.seed,
            on_progress=lambda done, of: say(f"sampled {done} of {of}"),
        )

    tasks = read_tasks()
    rng = random.Random(recipe.seed)
    usable: Counter[str] = Counter()
    texts = usable_texts(tasks, sampled(bare_jobs(tasks, recipe.samples_per_task)), usable)
    relabel_recipe = RelabelRecipe(
        seed=recipe.seed,
        heldout_kinds=["numbered_items", "highlights"],
        most_share=recipe.most_share,
    )
    making = Making(recipe, Relabeller(relabel_recipe))
    _relabel(making, tasks, texts, rng)
    _follow(making, tasks, sampled)  # few: last in, so that no kind is scarce enough to be refused
    _edit(making, tasks, texts, rng)
    out = Path(recipe.out)
    files = [out / f"{split}.jsonl" for split in SPLITS]
    for path, split in zip(files, SPLITS, strict=True):
        rows = making.rows[split]
        write_rows(path, rng.sample(rows, len(rows)))  # so that the first rows are a fair sample
    found, _ = verify(files)
    acceptance = table(making, usable)
    report.write(out / "report.html", files, acceptance)
    if found:
        raise ValueError(f"{len(found)} faults in {out}, first: {found[0]}")
    return acceptance


def split_of(task: Task) -> str:
    """A quarter of the tasks is held out, half of it for the held-out kinds."""
    if not is_heldout(task):
        return "train"
    return "heldout" if int(task.key, 16) % 8 == 0 else "heldout_kinds"


def bare_jobs(tasks: Sequence[Task], samples: int) -> list[Job]:
    """The bare tasks, each `samples` times, with the forms in turn; some tasks need fewer.

    Neighbours begin with different forms, so that few samples a task have all forms too.
    """
    return [
        Job(
            f"{task.digest}-{n}",
            f"{task.description} {FORMS[(place + n) % len(FORMS)]}"
            + ("" if task.input is None else f"\n# Inputs:\n{task.input}"),
        )
        for n in range(samples)
        for place, task in enumerate(tasks)
        if n < SAMPLES_TO_EDIT or split_of(task) != "heldout_kinds"
    ]


def usable_texts(
    tasks: Sequence[Task], responses: Mapping[str, Response], tally: Counter[str]
) -> dict[str, list[str]]:
    """Usable responses by task line; the tally says how many were not, and why."""
    lines = {task.digest: task.line for task in tasks}
    found: dict[str, list[str]] = {task.line: [] for task in tasks}
    for response in responses.values():
        text, fault = whole_text(response.text)
        tally[fault or "usable"] += 1
        if fault is None:
            found[lines[response.key.partition("-")[0]]].append(text)
    return found


def whole_text(text: str) -> tuple[str, str | None]:
    """The longest beginning of whole sentences that is of use, line breaks kept, or what is wrong.

    >>> whole_text("Bees make honey from nectar. They also dance. Then they")
    ('Bees make honey from nectar. They also dance.', None)
    """
    text = text.translate(PLAIN).strip()
    text = re.sub(r"[ \t]+\n", "\n", re.sub(r"\n{3,}", "\n\n", text))
    if not text.isascii():
        return text, "not ascii"
    if REFUSAL.search(text):
        return text, "refusal"
    if ABOUT_THE_HINT.search(text) or "bullet" in text.lower():
        return text, "about the hint"
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    for end in (len(text), *reversed(ends)):
        kept = _BARE_MARKER.sub("", text[:end]).strip()
        size = len(cut.words(kept))
        if size < _LEAST_WORDS:
            break
        finished = ends_a_sentence(kept) and not kept.endswith(":")
        if size <= _MOST_WORDS and finished and balanced(kept) and not repeats_itself(kept):
            return kept, None
    return text, "too short before it breaks off or repeats itself"


def beginning(text: str, rng: random.Random) -> str | None:
    """Some of its sentences or, where it has several lines, of its lines; None: too little left."""
    if "\n" in text:
        ends = [match.start() for match in re.finditer(r"\n", text)]
    else:
        ends = [match.end() for match in _SENTENCE_END.finditer(text)][:-1]
    if not ends:
        return None
    start, fault = whole_text(text[: rng.choice(ends)])
    return start if fault is None and start != text else None


def _relabel(
    making: Making, tasks: Sequence[Task], texts: Mapping[str, list[str]], rng: random.Random
) -> None:
    """Pairs of responses to one task. A response may serve twice: whole, and cut shorter."""
    rounds: list[list[tuple[Task, str, str]]] = []
    for task in rng.sample(tasks, len(tasks)):
        sources = [[t, *filter(None, [beginning(t, rng)])] for t in texts[task.line]]
        pairs = [p for two in combinations(sources, 2) for p in product(*two)]
        for n, (first, second) in enumerate(rng.sample(pairs, len(pairs))):
            if n == len(rounds):
                rounds.append([])
            rounds[n].append((task, first, second))
    used: set[tuple[str, str]] = set()
    tally = making.tally
    for number, drawn in enumerate(rounds):  # each task once before any task twice
        for task, first, second in drawn:
            split = split_of(task)
            both = {(task.line, first), (task.line, second)}
            if making.full(split) or both & used:
                continue
            named = Pair(f"{task.digest}-{number}", task.line, first, second)
            row = making.relabeller.row(named, task, split)
            if row is not None:
                used |= both
                making.rows[split].append(row)
                tally.outcomes["relabel", "accepted"] += 1
                kinds = {c["kind"] for c in (*row["c1"], *row["c2"])}
                tally.accepted.update(("relabel", kind) for kind in kinds)
    for reason, n in making.relabeller.skipped.items():
        tally.outcomes["relabel", reason] += n


def follow_candidates(tasks: Sequence[Task], number: int, rng: random.Random) -> list[Candidate]:
    """Instruction pairs with one constraint each that exclude one another."""
    found = []
    for n in range(number):
        task = tasks[n % len(tasks)]
        first = propose(FOLLOW_KINDS[n % len(FOLLOW_KINDS)], rng, 3)
        others = [c for c in first.alternatives(rng) if c.kind in SEEN_KINDS]
        if others:
            found.append(Candidate(task, (first,), "", (rng.choice(others),), "", "follow"))
    return found


def _follow(
    making: Making, tasks: Sequence[Task], sampled: Callable[[Sequence[Job]], dict[str, Response]]
) -> None:
    recipe = making.recipe
    rng = random.Random(recipe.seed)  # of its own: what is asked must not hang on other responses
    train = [task for task in rng.sample(tasks, len(tasks)) if split_of(task) == "train"]
    drafts = follow_candidates(train, recipe.follow_candidates, rng)
    responses = sampled(follow_jobs(drafts, recipe.follow_samples))
    for result in followed(drafts, responses, recipe.follow_samples):
        if isinstance(result, Candidate):
            result = result.swapped() if rng.random() < 0.5 else result
            if any(REFUSAL.search(y) or repeats_itself(y) for y in (result.y1, result.y2)):
                result = Rejection("refusal or repetition", tuple(kinds_of(result)))
        making.admit("follow", result, "train")


def _edit(
    making: Making, tasks: Sequence[Task], texts: Mapping[str, list[str]], rng: random.Random
) -> None:
    """Rule edits of what is left: first for the held-out kinds, which responses seldom have."""
    most = int(making.recipe.edit_share * sum(making.recipe.wanted().values()))
    for split in ("heldout_kinds", "heldout", "train"):
        balance = making.relabeller.balances[split]
        kinds = UNSEEN_KINDS if split == "heldout_kinds" else SEEN_KINDS
        choice = Choice(
            kinds,
            lambda c, balance=balance: balance.has_room(c.kind),  # type: ignore[misc]
            lambda kind, balance=balance: (4 + balance.kinds[kind]) ** -2.5,  # type: ignore[misc]
        )
        own = [task for task in tasks if split_of(task) == split and texts[task.line]]
        for _ in range(30):  # rounds: a task gives at most one quad in each
            for task in rng.sample(own, len(own)):
                # a fifth of what there is, not of what was wished for
                made = sum(map(len, making.rows.values())) + 1
                share = making.edits() + 1 > making.recipe.edit_share * made
                if making.full(split) or making.edits() >= most or share:
                    break
                prose = [t for t in texts[task.line] if "\n" not in t]
                if not prose:
                    continue
                first, second = rng.choice(prose), rng.choice(prose)
                making.admit("edit", edit(task, first, second, choice, rng), split)


def table(making: Making, usable: Counter[str]) -> str:
    """Acceptance by source and reason, and by source and kind, as markdown."""
    tally = making.tally
    lines = ["responses: " + ", ".join(f"{n} {why}" for why, n in usable.most_common()), ""]
    lines += ["| source | outcome | draws | share |", "|---|---|---|---|"]
    of: Counter[str] = Counter()
    for (source, _), n in tally.outcomes.items():
        of[source] += n
    for (source, outcome), n in sorted(tally.outcomes.items()):
        lines.append(f"| {source} | {outcome} | {n} | {n / of[source]:.1%} |")
    lines += ["", "| kind | relabel | follow | edit | share of train |", "|---|---|---|---|---|"]
    train = Counter(c["kind"] for row in making.rows["train"] for c in (*row["c1"], *row["c2"]))
    for kind in sorted({kind for _, kind in tally.accepted}):
        # to a kind that relabelling does not choose there is no attempt: it measures all of them
        cells = [str(tally.accepted["relabel", kind])]
        cells += [f"{tally.accepted[s, kind]}/{tally.tried[s, kind]}" for s in ("follow", "edit")]
        share = train[kind] / max(1, train.total())
        lines.append(f"| {kind} | {' | '.join(cells)} | {share:.1%} |")
    sizes = ", ".join(f"{split} {len(rows)}" for split, rows in making.rows.items())
    return "\n".join([*lines, "", f"quads: {sizes}; edits {making.edits()}"])
