"""Quads from prompts with checkable constraints and a model's answers to them.

relabel: two answers that both follow the prompt's constraints are told apart by further ones, which
become x1 and x2. follow: where the row holds the wording of its constraints (`constraint`), they
are taken out of the prompt and written anew, and in x2 one of them is replaced by another that
excludes it. The model answers both; a pair of answers in all four cells is a quad.
"""

import json
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from iopo.constraints import Constraint, Value, compatible, value_of
from iopo.constraints.answers import hollow
from iopo.constraints.text import after_thinking
from iopo.construct import importers, require
from iopo.construct.audit import Checks, constraints_of, kind_of, verdicts
from iopo.construct.quadruples import Candidate, follow_jobs, followed, to_row
from iopo.construct.relabel import SPLITS, Relabeller, RelabelRecipe, split_of
from iopo.construct.responses import Sampler, endpoint_sampler, model_sampler, sample_all
from iopo.construct.tasks import Task, digest
from iopo.construct.verify import verify
from iopo.data.rows import Pair
from iopo.evaluation.config import EndpointSection, ModelSection
from iopo.evaluation.responses import check_manifest, load_chat, placing
from iopo.files import given_records, write_records, write_text
from iopo.redact import redact

log = logging.getLogger(__name__)


@dataclass
class IfSeedsRecipe:
    """What may be set of the recipe `ifseeds` (conf/recipe/ifseeds.yaml)."""

    name: str = "ifseeds"
    source: str | None = None  # prompts with constraints, in columns of audit.py
    out: str = "runs/ifseeds"  # folder of all files, the responses among them
    model_path: str | None = None
    endpoint: EndpointSection = field(default_factory=EndpointSection)  # in place of a model
    seed: int = 0
    samples: int = 4  # responses to each prompt
    max_new_tokens: int = 512
    temperature: float = 0.8
    top_p: float = 0.95
    template_options: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None  # prompts
    heldout_share: float = 0.1  # of the tasks, by hash; half of it for the held-out kinds
    most_share: float = 0.15  # of the constraints that one kind may have
    most_words: int = 600  # of a response

    def __post_init__(self) -> None:
        require(self, "samples", self.samples >= 2, "2 or more: a quad needs two responses")
        if self.endpoint.base_url is None:
            return
        if self.endpoint.model is None:
            raise ValueError(
                "recipe.endpoint.base_url is set without recipe.endpoint.model; name the model"
            )
        require(self, "model_path", self.model_path is None, "null beside recipe.endpoint.base_url")
        extra, options = self.endpoint.extra, self.template_options
        if options and extra.get("chat_template_kwargs", options) != options:
            raise ValueError(
                "recipe.template_options would replace recipe.endpoint.extra.chat_template_kwargs; "
                "remove one"
            )
        if options:
            self.endpoint.extra = extra | {"chat_template_kwargs": options}

    @property
    def model(self) -> ModelSection:
        """The model in process."""
        return ModelSection(self.model_path, template_options=self.template_options)

    def sampler(self) -> Sampler:
        """The server of `endpoint`, or the model at `model_path`."""
        if self.endpoint.base_url is not None:
            return endpoint_sampler(self.endpoint, self.max_new_tokens, self.temperature)
        return model_sampler(self.model, self.max_new_tokens, self.temperature, self.top_p)

    def manifest(self) -> dict[str, Any]:
        """All that an answer of the server or the model depends on beside its prompt."""
        names = ("seed", "max_new_tokens", "temperature")
        settings = {name: getattr(self, name) for name in names}
        if (url := self.endpoint.base_url) is not None:
            server = {"server": redact(url), "model": self.endpoint.model}
            return settings | server | {"extra": self.endpoint.extra}
        from iopo.model.identity import identity  # loads torch
        from iopo.model.load import resolve_model

        chat = load_chat(self.model)
        settings |= {"top_p": self.top_p, "chat": chat.record()}
        settings["dtype"] = str(placing(self.model)[1])
        return settings | identity(resolve_model(self.model_path or ""), chat, None)


@dataclass(frozen=True)
class Seed:
    """A prompt, its constraints, and the task without them where their wording is known."""

    id: str
    prompt: str
    checks: Checks
    task: Task | None

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        return tuple(chain.from_iterable(self.checks.values()))

    @property
    def line(self) -> str:
        """The task, which decides the split; the prompt where its constraints' wording is unknown.

        One for all rows of a task: no other file may train on it.
        """
        return self.prompt if self.task is None else self.task.line

    def asks_for(self, kinds: Container[str]) -> bool:
        return any(constraint.kind in kinds for constraint in self.constraints)


def read_checkable(source: str, limit: int | None) -> tuple[list[Seed], Counter[str]]:
    """The prompts of a source with their constraints, and why others are left out."""
    seeds: dict[str, Seed] = {}
    dropped: Counter[str] = Counter()
    rows = given_records(source)
    if rows:
        named = importers.name_of(rows[0][1])
        log.info("%s: %s, read as prompts with constraints", source, named)
    for _, row in rows:
        try:
            prompt = importers.instruction_of(row)
            if not prompt:
                raise ValueError("no prompt of one turn")
            checks = constraints_of(row)
        except ValueError as error:
            dropped[str(error).partition(": bad arguments")[0][:200]] += 1
            continue
        said = row.get("constraint")
        bare = None
        if isinstance(said, str) and said.strip() and said.strip() in prompt:
            bare = " ".join(prompt.replace(said.strip(), " ").split(" ")).strip() or None
        seed = Seed(digest(prompt), prompt, checks, None if bare is None else Task(bare))
        if seed.id in seeds:
            dropped["repeated prompt"] += 1
        elif limit is None or len(seeds) < limit:
            seeds[seed.id] = seed
    return list(seeds.values()), dropped


def candidate(
    source: Seed, rng: random.Random, refused: Callable[[Constraint], bool] = lambda c: False
) -> Candidate | None:
    """Two instructions of a prompt's task, the second with one constraint replaced by another that
    excludes it; None where there is no task or no such constraint.

    refused: what must not take the place of a constraint.
    """
    own = source.constraints
    found = [
        (*own[:n], other, *own[n + 1 :])
        for n, constraint in enumerate(own)
        for other in constraint.alternatives(rng)
        if not refused(other)
    ]
    found = [side for side in found if compatible(side)]
    if source.task is None or not found or not compatible(own):
        return None
    return Candidate(source.task, own, "", rng.choice(found), "", "follow")


def _split(
    found: list[Seed], dropped: Counter[str], held: Container[str], share: float
) -> list[tuple[Seed, str]]:
    """Each prompt with its split; one that asks for a held-out kind is in heldout_kinds or none."""
    seeds = []
    for seed in found:
        split = split_of(seed.line, share)
        if split == "heldout_kinds" or not seed.asks_for(held):
            seeds.append((seed, split))
        else:
            dropped["asks for a held-out kind"] += 1
    return seeds


def _opposed(seed: Seed, split: str, held: Container[str], rng: random.Random) -> Candidate | None:
    """A candidate that asks for a held-out kind in heldout_kinds, and for none elsewhere."""
    if split != "heldout_kinds":
        return candidate(seed, rng, lambda c: c.kind in held)
    own = seed.asks_for(held)
    return candidate(seed, rng, lambda c: not own and c.kind not in held)


class Admission:
    """Quads let in one after the other, and what became of every draw."""

    def __init__(self, relabeller: Relabeller, held: Container[Value] = ()):
        self.relabeller = relabeller
        self.held = held  # what no quad may ask for
        self.rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self.outcomes: Counter[str] = Counter()

    def relabel(self, pair: Pair, task: Task, split: str) -> bool:
        """The quad of two answers to one prompt, measured; whether there is one."""
        return self._count("relabel", self.relabeller.row(pair, task, split))

    def follow(self, result: Candidate | str, split: str) -> bool:
        """A candidate with answers that a model gave, or why there is none; whether it is in."""
        if isinstance(result, str):
            return self._count("follow", result)
        row = to_row(result, split)
        return self._count("follow", self.relabeller.join(row) or row)

    def _count(self, source: str, row: dict[str, Any] | str) -> bool:
        if isinstance(row, dict) and any(value_of(c) in self.held for c in row["c1"] + row["c2"]):
            row = "held-out constraint"
        self.outcomes[f"{source}: {row if isinstance(row, str) else 'accepted'}"] += 1
        if isinstance(row, str):
            return False
        self.rows[row["split"]].append(row)
        return True


def build(recipe: IfSeedsRecipe, sampler: Sampler) -> str:
    """Sample what is missing, write the files of each split and counts.json; returns a table.

    Raises ValueError without a source or a checkable prompt, for a folder whose answers were made
    with other settings, and if verify finds a fault.
    """
    if recipe.source is None:
        raise ValueError("recipe.source is not set; expected prompts whose rows carry constraints")
    relabel = RelabelRecipe(
        seed=recipe.seed, most_share=recipe.most_share, most_words=recipe.most_words
    )
    held = relabel.heldout_kinds
    found, dropped = read_checkable(recipe.source, recipe.limit)
    seeds = _split(found, dropped, held, recipe.heldout_share)
    if not seeds:
        raise ValueError(f"{recipe.source}: no prompt with checkable constraints: {dict(dropped)}")
    pairs = [
        (pair, split)
        for seed, split in seeds
        if (pair := _opposed(seed, split, held, random.Random(f"{recipe.seed}/{seed.id}")))
    ]
    jobs = {f"{s.id}-{n}": s.prompt for n in range(recipe.samples) for s, _ in seeds}
    for n in range(recipe.samples):
        for pair, _ in pairs:
            jobs |= follow_jobs(pair, n)
    said = _sampled(recipe, jobs, sampler)
    made = Admission(Relabeller(relabel))
    made.outcomes["responses cut off"] = len(jobs) - len(said)
    kinds: defaultdict[str, Counter[bool]] = defaultdict(Counter)
    for seed, split in seeds:
        keys = [f"{seed.id}-{n}" for n in range(recipe.samples)]
        texts = [after_thinking(said[key]).strip() for key in keys if key in said]
        good = list(_right(seed, texts, kinds))
        for first, second in zip(good[::2], good[1::2], strict=False):
            if made.relabel(Pair(seed.id, seed.prompt, first, second), Task(seed.prompt), split):
                made.rows[split][-1]["task"] = seed.line
    for pair, split in pairs:
        made.follow(followed(pair, said, recipe.samples), split)
    rows, outcomes, out = made.rows, made.outcomes, Path(recipe.out)
    files = [out / f"{split}.jsonl" for split in SPLITS]
    for path, of in zip(files, rows.values(), strict=True):
        write_records(path, of)
    _write_counts(out / "counts.json", len(seeds), rows, outcomes, dropped, kinds)
    faults, _ = verify(files)
    if faults:
        raise ValueError(f"{len(faults)} faults in {out}, first: {faults[0]}")
    log.info("written: %s, responses.jsonl, counts.json", ", ".join(map(str, files)))
    return "\n".join(
        [f"{len(seeds)} prompts; quads: {', '.join(f'{k} {len(v)}' for k, v in rows.items())}"]
        + [f"{what}: {n}" for what, n in outcomes.most_common()]
        + [f"prompts left out, {why}: {n}" for why, n in dropped.most_common()]
        + [f"{kind}: {found[True]} of {found.total()} followed" for kind, found in kinds.items()]
    )


def _sampled(recipe: IfSeedsRecipe, jobs: Mapping[str, str], sampler: Sampler) -> dict[str, str]:
    """The answers by key, but for those that were cut off: these are none.

    Where neither a server nor a model is named, answers that are there are read, whoever gave them.
    """
    file = Path(recipe.out) / "responses.jsonl"
    manifest = file.with_name("responses.manifest.json")
    if recipe.endpoint.base_url is not None or recipe.model_path is not None:
        if not (file.exists() and file.stat().st_size):
            manifest.unlink(missing_ok=True)  # of a run that got no answer
        elif not manifest.exists():
            raise ValueError(
                f"{file}: expected {manifest.name} beside it, which says what gave these answers; "
                "choose another recipe.out, or name no model to use them as they are"
            )
        check_manifest(manifest, recipe.manifest())
    said = sample_all(jobs, file, sampler, recipe.seed)
    return {key: text for key, (text, ended) in said.items() if ended}


def _right(seed: Seed, texts: list[str], kinds: Mapping[str, Counter[bool]]) -> Iterator[str]:
    """The different texts that follow all constraints and answer; counts every verdict by kind."""
    for text in dict.fromkeys(texts):
        verdict = verdicts(seed.checks, text)
        for name, is_so in verdict.items():
            kinds[kind_of(name)][is_so] += 1
        if all(verdict.values()) and not hollow(text, seed.prompt, seed.constraints):
            yield text


def _write_counts(
    path: Path,
    seeds: int,
    rows: Mapping[str, list[dict[str, Any]]],
    outcomes: Counter[str],
    dropped: Counter[str],
    kinds: Mapping[str, Counter[bool]],
) -> None:
    counts = {
        "prompts": seeds,
        "out": {split: len(found) for split, found in rows.items()},
        "outcomes": dict(outcomes.most_common()),
        "prompts left out": dict(dropped.most_common()),
        "followed": {kind: [found[True], found.total()] for kind, found in kinds.items()},
    }
    write_text(path, json.dumps(counts, indent=1, ensure_ascii=False) + "\n")
