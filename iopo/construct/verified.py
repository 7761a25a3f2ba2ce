"""The set data/verified: quads by relabel and follow from a small model's own responses.

Responses to bare tasks are asked for in several forms, so that lists, paragraphs and questions
occur by themselves; the instructions do not contain that wish. Rule edits fill up what is rare, at
most a fifth. The same seed and responses give the same files.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product, zip_longest
from pathlib import Path
from typing import Any

from iopo.constraints import text as cut
from iopo.constraints.answers import hollow
from iopo.construct import report
from iopo.construct.proposals import SEEN_KINDS, UNSEEN_KINDS, propose
from iopo.construct.prose import PLAIN, ends_a_sentence, refuses, repeats_itself
from iopo.construct.quadruples import Candidate, edit, follow_jobs, followed, to_row
from iopo.construct.relabel import SPLITS, Relabeller, RelabelRecipe
from iopo.construct.responses import Sampler, model_sampler, sample_all
from iopo.construct.tasks import Task, instruction, read_tasks
from iopo.construct.verify import verify
from iopo.data.rows import Pair
from iopo.evaluation.config import ModelSection
from iopo.files import write_records

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
_ABOUT_THE_FORM = re.compile(r"\b(sentences?|fifty words)\b|bullet", re.I)
_SENTENCE_END = re.compile(r"[.!?]['\")]?(?=\s|$)")
_BARE_MARKER = re.compile(r"(?:\n[ \t]*(?:\d+[.)]|[-*])[ \t]*)+$")  # of items without text


@dataclass
class VerifiedRecipe:
    """What may be set of the recipe `verified` (conf/recipe/verified.yaml)."""

    name: str = "verified"
    out: str = "data/verified"
    responses: str = "data/verified/responses.jsonl"
    model_path: str | None = None
    seed: int = 0
    samples_per_task: int = 6
    follow_candidates: int = 100
    follow_samples: int = 2
    max_new_tokens: int = 64
    temperature: float = 0.7
    top_p: float = 0.95
    template_options: dict[str, Any] = field(default_factory=dict)
    train_quads: int = 1700
    heldout_quads: int = 200
    heldout_kinds_quads: int = 100
    edit_share: float = 0.2  # of all quads, at most
    most_share: float = 0.15  # of the constraints of train and heldout that one kind may have

    def sampler(self) -> Sampler:
        """The model at model_path."""
        section = ModelSection(self.model_path, template_options=self.template_options)
        return model_sampler(section, self.max_new_tokens, self.temperature, self.top_p)


def build_verified(recipe: VerifiedRecipe, sampler: Sampler) -> str:
    """Sample what the cache lacks, write the three files and the page; returns the acceptance.

    Raises ValueError if verify finds a fault in what was made.
    """

    def sampled(jobs: Mapping[str, str]) -> dict[str, str]:
        # most are cut off, so an answer counts where it ends with a sentence, or is cut back to one
        said = sample_all(jobs, Path(recipe.responses), sampler, recipe.seed)
        return {key: text for key, (text, _) in said.items()}

    tasks = read_tasks()
    texts, usable = usable_texts(tasks, sampled(bare_jobs(tasks, recipe.samples_per_task)))
    making = Making(recipe, tasks, texts)
    making.relabel()
    making.follow(sampled)  # few: not first, so that no kind is scarce enough to be refused
    making.edit()
    out = Path(recipe.out)
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{split}.jsonl" for split in SPLITS]
    for path, rows in zip(files, making.rows.values(), strict=True):
        # in random order, so that the first rows are a fair sample
        write_records(path, making.rng.sample(rows, len(rows)))
    found, _ = verify(files)
    acceptance = making.table(usable)
    report.write(out / "report.html", files, acceptance)
    if found:
        raise ValueError(f"{len(found)} faults in {out}, first: {found[0]}")
    return acceptance


def split_of(task: Task) -> str:
    """A quarter of the tasks is held out, half of it for the held-out kinds."""
    place = int(task.key, 16)  # by hash: the split does not move when tasks are added
    if place % 4:
        return "train"
    return "heldout" if place % 8 == 0 else "heldout_kinds"


def bare_jobs(tasks: Sequence[Task], samples: int) -> dict[str, str]:
    """The bare tasks, each `samples` times, with the forms in turn; some tasks need fewer.

    Neighbours begin with different forms, so that few samples a task have all forms too.
    """
    return {
        f"{task.digest}-{n}": f"{task.description} {FORMS[(place + n) % len(FORMS)]}"
        + ("" if task.input is None else f"\n# Inputs:\n{task.input}")
        for n in range(samples)
        for place, task in enumerate(tasks)
        if n < SAMPLES_TO_EDIT or split_of(task) != "heldout_kinds"
    }


def usable_texts(
    tasks: Sequence[Task], responses: Mapping[str, str]
) -> tuple[dict[str, list[str]], Counter[str]]:
    """Usable responses by task line, and how many were usable or not, and why."""
    by_digest = {task.digest: task for task in tasks}
    found: dict[str, list[str]] = {task.line: [] for task in tasks}
    tally: Counter[str] = Counter()
    for key, response in responses.items():
        task = by_digest[key.partition("-")[0]]
        text, fault = whole_text(response)
        if fault is None and (reasons := hollow(text, instruction(task, []))):
            fault = f"no answer: {reasons[0]}"
        tally[fault or "usable"] += 1
        if fault is None:
            found[task.line].append(text)
    return found, tally


def whole_text(text: str) -> tuple[str, str | None]:
    """The longest beginning of whole sentences that is of use, line breaks kept, or what is wrong.

    >>> whole_text("Bees make honey from nectar. They also dance. Then they")
    ('Bees make honey from nectar. They also dance.', None)
    """
    text = cut.after_thinking(text).translate(PLAIN).strip()
    text = re.sub(r"[ \t]+\n", "\n", re.sub(r"\n{3,}", "\n\n", text))
    if not text.isascii():
        return text, "not ascii"
    if refuses(text):
        return text, "refusal"
    if _ABOUT_THE_FORM.search(text):
        return text, "about the hint"
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    for end in (len(text), *reversed(ends)):
        kept = _BARE_MARKER.sub("", text[:end]).strip()
        size = len(cut.words(kept))
        if size < _LEAST_WORDS:
            break
        finished = ends_a_sentence(kept) and not kept.endswith(":")
        paired = kept.count('"') % 2 == 0 and kept.count("(") == kept.count(")")
        if size <= _MOST_WORDS and finished and paired and not repeats_itself(kept):
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


class Making:
    """The files so far, and why what is not in them is not."""

    def __init__(
        self, recipe: VerifiedRecipe, tasks: Sequence[Task], texts: Mapping[str, list[str]]
    ):
        self.recipe, self.tasks, self.texts = recipe, tasks, texts
        self.rng = random.Random(recipe.seed)
        self.relabeller = Relabeller(
            RelabelRecipe(
                seed=recipe.seed,
                heldout_kinds=["numbered_items", "highlights"],
                most_share=recipe.most_share,
            )
        )
        sizes = (recipe.train_quads, recipe.heldout_quads, recipe.heldout_kinds_quads)
        self.wanted = dict(zip(SPLITS, sizes, strict=True))
        self.rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self.outcomes: Counter[tuple[str, str]] = Counter()  # by source and outcome

    def full(self, split: str) -> bool:
        return len(self.rows[split]) >= self.wanted[split]

    def edits(self) -> int:
        return self.outcomes["edit", "accepted"]

    def relabel(self) -> None:
        """Pairs of responses to one task. A response may serve twice: whole, and cut shorter."""
        drawn = []
        for task in self.rng.sample(self.tasks, len(self.tasks)):
            sources = [[t, *filter(None, [beginning(t, self.rng)])] for t in self.texts[task.line]]
            pairs = [p for two in combinations(sources, 2) for p in product(*two)]
            drawn.append([(task, *pair) for pair in self.rng.sample(pairs, len(pairs))])
        used: set[tuple[str, str]] = set()
        for number, found in enumerate(zip_longest(*drawn)):  # each task once before any twice
            for task, first, second in filter(None, found):
                split = split_of(task)
                both = {(task.line, first), (task.line, second)}
                if self.full(split) or both & used:
                    continue
                named = Pair(f"{task.digest}-{number}", task.line, first, second)
                row = self.relabeller.row(named, task, split)
                if not isinstance(row, str):
                    used |= both
                    self.rows[split].append(row)
                self.outcomes["relabel", row if isinstance(row, str) else "accepted"] += 1

    def follow(self, sampled: Callable[[Mapping[str, str]], dict[str, str]]) -> None:
        """Responses that the model gave to instructions with constraints, where it followed."""
        recipe = self.recipe
        # its own stream: the prompts must not depend on other draws
        rng = random.Random(recipe.seed)
        shuffled = rng.sample(self.tasks, len(self.tasks))
        train = [task for task in shuffled if split_of(task) == "train"]
        candidates = follow_candidates(train, recipe.follow_candidates, rng)
        jobs: dict[str, str] = {}
        for n in range(recipe.follow_samples):
            for candidate in candidates:
                jobs |= follow_jobs(candidate, n)
        responses = sampled(jobs)
        for candidate in candidates:
            result = followed(candidate, responses, recipe.follow_samples)
            if isinstance(result, Candidate):
                result = result.swapped() if rng.random() < 0.5 else result
                if any(refuses(y) or repeats_itself(y) for y in (result.y1, result.y2)):
                    result = "refusal or repetition"
            self._admit("follow", result, "train")

    def edit(self) -> None:
        """Rule edits where quads lack: first for the held-out kinds, rare in responses."""
        most = int(self.recipe.edit_share * sum(self.wanted.values()))
        for split in ("heldout_kinds", "heldout", "train"):
            balance = self.relabeller.balances[split]
            kinds = UNSEEN_KINDS if split == "heldout_kinds" else SEEN_KINDS
            own = [task for task in self.tasks if split_of(task) == split and self.texts[task.line]]
            for _ in range(30):  # rounds: a task gives at most one quad in each
                for task in self.rng.sample(own, len(own)):
                    # a fifth of what there is, not of what was wished for
                    made = sum(map(len, self.rows.values())) + 1
                    share = self.edits() + 1 > self.recipe.edit_share * made
                    if self.full(split) or self.edits() >= most or share:
                        break
                    prose = [t for t in self.texts[task.line] if "\n" not in t]
                    if not prose:
                        continue
                    first, second = self.rng.choice(prose), self.rng.choice(prose)
                    result = edit(task, first, second, kinds, balance, self.rng)
                    self._admit("edit", result, split)

    def _admit(self, source: str, result: Candidate | str, split: str) -> None:
        """Let a quad in if it fits among the others; count what became of it."""
        outcome: str | None = "file is full"
        if isinstance(result, str):
            outcome = result
        elif not self.full(split):
            row = to_row(result, split)
            outcome = self.relabeller.join(row)
            if outcome is None:
                self.rows[split].append(row)
        self.outcomes[source, outcome or "accepted"] += 1

    def table(self, usable: Counter[str]) -> str:
        """Acceptance by source and reason, as markdown."""
        lines = ["responses: " + ", ".join(f"{n} {why}" for why, n in usable.most_common()), ""]
        lines += ["| source | outcome | draws | share |", "|---|---|---|---|"]
        for (source, outcome), n in sorted(self.outcomes.items()):
            of = sum(m for (other, _), m in self.outcomes.items() if other == source)
            lines.append(f"| {source} | {outcome} | {n} | {n / of:.1%} |")
        sizes = ", ".join(f"{split} {len(rows)}" for split, rows in self.rows.items())
        return "\n".join([*lines, "", f"quads: {sizes}; edits {self.edits()}"])
