"""Make data: `python -m iopo.construct` the demo set, `+recipe=NAME` others (conf/recipe/)."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from iopo.construct.demo import (
    HELDOUT,
    TRAIN,
    Collection,
    Tally,
    bases_of,
    collect,
    follow_candidates,
    follow_jobs,
    followed,
    is_heldout,
    write_rows,
)
from iopo.construct.quadruples import Candidate
from iopo.construct.relabel import RelabelRecipe, relabel_file
from iopo.construct.responses import (
    Job,
    Response,
    Sampler,
    bare_jobs,
    sample_all,
    transformers_sampler,
)
from iopo.construct.tasks import read_tasks
from iopo.construct.verified import VerifiedRecipe, build_verified

CONF = Path(__file__).resolve().parents[2] / "conf"


class LazySampler:
    """Loads the model at the first prompt: with a full cache none is needed."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self._sampler: Sampler | None = None

    def __call__(self, prompts: Sequence[str], seed: int) -> list[tuple[str, str]]:
        if self._sampler is None:
            if self.cfg.model_path is None:
                raise ValueError(
                    f"construct: {self.cfg.responses} lacks responses to {prompts[0]!r} and "
                    "others; name a model that writes them: model_path=demo"
                )
            self._sampler = transformers_sampler(
                self.cfg.model_path,
                max_new_tokens=self.cfg.max_new_tokens,
                temperature=self.cfg.temperature,
                top_p=self.cfg.top_p,
            )
        return self._sampler(prompts, seed)


def build(cfg: DictConfig) -> tuple[Collection, Collection, Tally, Counter[str]]:
    """Sample what the cache lacks, then draw the training and the held-out quads."""
    tasks = read_tasks()
    sampler, cache = LazySampler(cfg), Path(cfg.responses)

    def sampled(jobs: Sequence[Job]) -> dict[str, Response]:
        def progress(done: int, of: int) -> None:
            print(f"sampled {done} of {of}", flush=True)

        return sample_all(jobs, cache, sampler, seed=cfg.seed, on_progress=progress)

    usable: Counter[str] = Counter()
    bases = bases_of(tasks, sampled(bare_jobs(tasks, cfg.samples_per_task)).values(), usable)
    train_tasks = [task for task in tasks if not is_heldout(task)]
    heldout_tasks = [task for task in tasks if is_heldout(task)]

    tally = Tally()
    drafts: list[Candidate] = []
    if cfg.follow_candidates:
        candidates = follow_candidates(cfg.follow_candidates, train_tasks, bases, cfg.seed + 1)
        responses = sampled(follow_jobs(candidates, cfg.follow_samples))
        for result in followed(candidates, responses, cfg.follow_samples):
            tally.count("follow", result)
            if isinstance(result, Candidate):
                drafts.append(result)
    rng = random.Random(cfg.seed)
    train = collect([TRAIN], train_tasks, bases, rng, tally, drafts)
    heldout = collect(HELDOUT, heldout_tasks, bases, rng, tally)
    return train, heldout, tally, usable


def report(train: Collection, heldout: Collection, tally: Tally, usable: Counter[str]) -> str:
    """Acceptance by source and outcome, and by kind, as markdown tables."""
    lines = ["responses: " + ", ".join(f"{n} {why}" for why, n in usable.most_common()), ""]
    lines += ["| source | outcome | draws | share |", "|---|---|---|---|"]
    of = Counter[str]()
    for (source, _), n in tally.outcomes.items():
        of[source] += n
    for (source, outcome), n in sorted(tally.outcomes.items()):
        lines.append(f"| {source} | {outcome} | {n} | {n / of[source]:.1%} |")
    sources = sorted(of)
    lines += [
        "",
        "| kind | train | held-out | " + " | ".join(f"{s} accepted" for s in sources) + " |",
    ]
    lines.append("|---" * (3 + len(sources)) + "|")
    total = sum(train.kinds.values())
    for kind in sorted({*train.kinds, *heldout.kinds}):
        shares = " | ".join(
            f"{tally.accepted[s, kind]}/{tally.tried[s, kind]}" if tally.tried[s, kind] else "-"
            for s in sources
        )
        share = f"{train.kinds[kind]} ({train.kinds[kind] / total:.1%})"
        lines.append(f"| {kind} | {share} | {heldout.kinds[kind]} | {shares} |")
    return "\n".join(lines)


def make_demo(cfg: DictConfig) -> None:
    train, heldout, tally, usable = build(cfg)
    write_rows(Path(cfg.out) / "train.jsonl", train.rows())
    write_rows(Path(cfg.out) / "heldout.jsonl", heldout.rows())
    print(report(train, heldout, tally, usable))


def make_trace(cfg: DictConfig) -> None:
    from iopo.construct.trace.config import (
        TraceRecipe,  # needs the extra `eval`, other recipes do not
    )
    from iopo.construct.trace.pipeline import run

    run(settings(TraceRecipe, cfg))


def make_relabelled(cfg: DictConfig) -> None:
    relabel_file(settings(RelabelRecipe, cfg))


def make_verified(cfg: DictConfig) -> None:
    recipe = settings(VerifiedRecipe, cfg)
    sampling = OmegaConf.merge(
        cfg, {"responses": recipe.responses, "max_new_tokens": recipe.max_new_tokens}
    )
    assert isinstance(sampling, DictConfig)
    print(build_verified(recipe, LazySampler(sampling)))


RECIPES = {"trace": make_trace, "relabel": make_relabelled, "verified": make_verified}


def settings(schema: type, cfg: DictConfig) -> Any:
    """cfg.recipe as an object of the schema. Raises on unknown keys and on wrong values."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), cfg.recipe))


@hydra.main(version_base=None, config_path=str(CONF), config_name="construct")
def main(cfg: DictConfig) -> None:
    try:
        if "recipe" not in cfg:
            make_demo(cfg)
        elif cfg.recipe.name in RECIPES:
            RECIPES[cfg.recipe.name](cfg)
        else:
            raise ValueError(f"recipe.name is {cfg.recipe.name!r}; expected one of {list(RECIPES)}")
    except (ValueError, OmegaConfBaseException, RuntimeError, OSError) as error:
        sys.exit("construct: " + str(error).removeprefix("construct: "))


if __name__ == "__main__":
    main()
