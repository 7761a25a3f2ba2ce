"""On-policy rounds: `python -m iopo.rounds +experiment=NAME run=FOLDER [key=value ...]`.

Each round samples responses from the policy, labels them by code, makes the rows that the
experiment's objective trains on, trains from the round's start and scores the new policy on
held-out quads. Keys that begin with `rounds.` are those of conf/rounds.yaml; all others go to each
train.py. Every stage is a process with a folder under RUN/round-NN, and is not repeated once it is
done: stop at any time (SIGTERM saves a training stage), or kill it, and start again to go on.
plan=true prints what the first round's training needs and stops. Exit codes: 0 done, 1 a stage
failed, 2 refused, 3 stopped because acceptance or following fell, 75 stopped by a signal.
"""

import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from iopo import entry
from iopo.config import Dtype, TrainConfig
from iopo.evaluation.config import ModelSection
from iopo.evaluation.responses import check_manifest, require_model
from iopo.jobs import REPOSITORY, STOPPED, Job, Runner, print_now
from iopo.objectives import OBJECTIVES
from iopo.redact import redact
from iopo.rounds import prompts, report
from iopo.rounds.config import Round, RoundsConfig, round_folder
from iopo.rounds.stage import LABELLED, SAMPLED
from iopo.training.plan.report import plan_report

OK, FAILED, REFUSED, FELL = 0, 1, 2, 3
PREFIX = "rounds."
OWN = ("data.train", "replay_step", "export_step", "export.push_to_hub")  # of a single train.py
FREE = ("count", "stop_drop", "serve_timeout_s")  # may change when a run goes on
KEYS = [*entry.keys(TrainConfig), *entry.keys(RoundsConfig, PREFIX)]
ConfigStore.instance().store(name="base_config", node=TrainConfig)


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return OK
    try:
        ours = [word for word in arguments if word.lstrip("+").startswith(PREFIX)]
        theirs = [word for word in arguments if word not in ours]
        cfg, rounds = compose_train(theirs), compose_rounds(ours)
        check(cfg, rounds, theirs)
        if cfg.plan:
            print(plan(cfg, rounds))
            return OK
        given = any(word.startswith("run=") for word in theirs)
        run = Path(cfg.run if given else f"{cfg.run}_rounds").absolute()
        run.mkdir(parents=True, exist_ok=True)
        keep_arguments(run, cfg, rounds, theirs)
        splits = prompts.write_heldout(rounds, run)
        found, dropped = prompts.read_prompts(rounds.prompts, prompts.read_held(rounds, run))
    except (ValueError, OSError) as error:
        print(f"refused: {redact(str(error))}", file=sys.stderr, flush=True)
        return REFUSED
    print_now(f"{len(found)} prompts; held-out quads: {dict(splits)}")
    for why, n in dropped.items():
        print_now(f"prompts left out, {why}: {n}")
    runner = Runner(run, 1, cwd=Path.cwd())
    signal.signal(signal.SIGTERM, runner.stop)
    signal.signal(signal.SIGINT, runner.stop)
    return Rounds(cfg, rounds, theirs, runner).run()


def compose_train(overrides: Sequence[str]) -> TrainConfig:
    """The config that each train.py gets, but for what rounds set. Raises as Hydra does."""
    flags = [word for word in overrides if word.startswith("-")]
    if flags:
        raise ValueError(f"{flags[0]}: rounds take key=value only, and no sweeps")
    with initialize_config_dir(version_base="1.3", config_dir=str(REPOSITORY / "conf")):
        composed = compose("config", overrides=list(overrides))
    entry.check_keys(composed, KEYS)
    cfg = OmegaConf.to_object(composed)
    assert isinstance(cfg, TrainConfig)
    return cfg


def compose_rounds(overrides: Sequence[str]) -> RoundsConfig:
    """conf/rounds.yaml with what was given. Exits with 2 on an unknown key."""
    given = OmegaConf.from_dotlist([word.lstrip("+").removeprefix(PREFIX) for word in overrides])
    entry.check_keys(OmegaConf.create({"rounds": given}), KEYS)
    schema, file = OmegaConf.structured(RoundsConfig), REPOSITORY / "conf" / "rounds.yaml"
    merged = OmegaConf.merge(schema, OmegaConf.load(file), given)
    assert isinstance(merged, DictConfig)
    found = OmegaConf.to_object(merged)
    assert isinstance(found, RoundsConfig)
    return found


def check(cfg: TrainConfig, rounds: RoundsConfig, overrides: Sequence[str]) -> None:
    """Raises ValueError for what rounds cannot do."""
    for word in overrides:
        key = word.lstrip("+~").partition("=")[0]
        if key in OWN:
            raise ValueError(f"{key}: rounds set it, or have no use for it; remove it")
    if cfg.model.path is None:
        raise ValueError("model.tiny: rounds sample from model.path; save the model to a folder")
    adapted = cfg.model.lora.rank > 0
    if not (cfg.export.model or adapted):
        raise ValueError("export.model=false: the next round starts from the export; remove it")
    if rounds.command is not None and cfg.model.adapter is not None:
        raise ValueError(
            "rounds.serve with model.adapter: a server gets a whole model; merge the adapter into "
            "model.path first"
        )
    name = cfg.objective.name
    if rounds.reward != "all" and OBJECTIVES[name].rows.kind != "group":
        raise ValueError(
            f"rounds.reward={rounds.reward} has no effect with objective.name={name}; remove it "
            "(used by objectives on groups)"
        )
    if rounds.seen is not None and not rounds.heldout:
        raise ValueError("rounds.seen has no effect with rounds.heldout=[]; set it to null")
    if not cfg.plan:
        require_model(start_of(cfg))


def plan(cfg: TrainConfig, rounds: RoundsConfig) -> str:
    """What a round's training needs, and what the rounds sample. The rows are not known yet."""
    cfg.data.train = None
    per_round = rounds.prompts_per_round * rounds.samples
    return (
        f"{plan_report(cfg)}\n\n{rounds.count} rounds, each: {rounds.prompts_per_round} prompts x "
        f"{rounds.samples} responses = {per_round} responses of at most {rounds.max_new_tokens} "
        f"tokens, {'in process' if rounds.command is None else 'from ' + rounds.command}"
    )


def keep_arguments(
    run: Path, cfg: TrainConfig, rounds: RoundsConfig, overrides: Sequence[str]
) -> None:
    """arguments.json: what the results depend on. Raises ValueError if it was otherwise."""
    kept = {key: value for key, value in asdict(rounds).items() if key not in FREE}
    others = sorted(word for word in overrides if not word.startswith("run="))
    kept |= {"overrides": others, "seed": cfg.seed}
    check_manifest(run / "arguments.json", kept)


def start_of(cfg: TrainConfig) -> ModelSection:
    """The first policy."""
    path = Path(str(cfg.model.path))
    name = str(path.absolute()) if path.is_dir() else str(path)
    options, device = cfg.model.template_options, cfg.parallel.device.value
    return ModelSection(name, cfg.model.adapter, cfg.model.dtype.value, device, options)


@dataclass
class Rounds:
    """The stages, in order."""

    cfg: TrainConfig
    rounds: RoundsConfig
    overrides: list[str]
    runner: Runner

    @property
    def folder(self) -> Path:
        return self.runner.run_dir

    def run(self) -> int:
        """All rounds that are not done; returns the exit code."""
        done = self.rounds.heldout == [] or self.evaluate(0)
        for number in range(1, self.rounds.count + 1):
            if not done:
                return self.ended(STOPPED if self.runner.stopping else FAILED)
            done = self.prepare(number)
            if done and (code := self.report(number)) is not None:
                return code
            done = done and self.train(number)
            done = done and (self.rounds.heldout == [] or self.evaluate(number))
            if done and (code := self.report(number)) is not None:
                return code
        return self.ended(OK if done else STOPPED if self.runner.stopping else FAILED)

    def policy(self, number: int) -> ModelSection:
        """The policy after so many rounds."""
        start = start_of(self.cfg)
        if number == 0:
            return start
        name = "export-merged" if self.cfg.model.lora.rank > 0 else "export"
        path = round_folder(self.folder, number) / "train" / name
        return dataclasses.replace(start, path=str(path), adapter=None)

    def prepare(self, number: int) -> bool:
        """Sample and label."""
        of = Round(
            str(round_folder(self.folder, number)), number,
            OBJECTIVES[self.cfg.objective.name].rows.kind, self.cfg.seed,
            self.policy(number - 1), self.cfg.model.system, self.rounds,
        )  # fmt: skip
        of.write()
        markers = {"sample": SAMPLED, "rows": LABELLED}
        return all(
            self.job(
                number, stage, ["-m", "iopo.rounds.stage", stage, of.folder], of.path(stage, marker)
            )
            for stage, marker in markers.items()
        )

    def train(self, number: int) -> bool:
        """train.py from the round's start."""
        folder, start = round_folder(self.folder, number), self.policy(number - 1)
        own = {"run": folder / "train", "data.train": folder / "rows/train.jsonl",
               "model.path": start.path}  # fmt: skip
        words = [f"{key}={quoted(value)}" for key, value in own.items()]
        if not self.given("data.limit_rows"):
            words.append("data.limit_rows=null")
        if start.adapter is None and self.cfg.model.adapter is not None:
            words.append("model.adapter=null")
        if self.cfg.model.lora.rank > 0:
            words.append("export.merged=true")
        elif self.cfg.export.dtype is Dtype.auto:  # rounding would lose the small updates
            words.append("export.dtype=fp32")
        command = [str(REPOSITORY / "train.py"), *self.overrides, *words]
        return self.job(number, "train", command, folder / "train" / "COMPLETE")

    def evaluate(self, number: int) -> bool:
        """evaluate.py on the held-out quads; the first policy says whether an answer is on task."""
        policy, out = self.policy(number), round_folder(self.folder, number) / "evaluate"
        own = {
            "model.path": policy.path, "out": out, "data.path": self.folder / prompts.HELDOUT,
            "benchmark.base": self.policy(0).path, "model.dtype": policy.dtype,
            "model.device": policy.device, "model.adapter": policy.adapter,
            "generate.system_prompt": self.cfg.model.system,
            "generate.max_new_tokens": self.rounds.max_new_tokens,
        }  # fmt: skip
        words = [f"{key}={quoted(value)}" for key, value in own.items() if value is not None]
        for key, value in policy.template_options.items():
            words.append(f"++model.template_options.{key}={quoted(value)}")
        command = [str(REPOSITORY / "evaluate.py"), "+benchmark=quads", "benchmark.controls=false"]
        return self.job(number, "evaluate", [*command, *words], out / "scores.json")

    def job(self, number: int, stage: str, command: list[str], marker: Path) -> bool:
        """A stage in a process of its own, unless it is done."""
        return self.runner.job(Job(f"round-{number:02d} {stage}", command, marker))

    def given(self, key: str) -> bool:
        return any(word.lstrip("+").startswith(f"{key}=") for word in self.overrides)

    def report(self, number: int) -> int | None:
        """Write the page; the exit code where the rounds must not go on."""
        rows = report.collect(self.folder)
        last = next(row for row in rows if row["round"] == number)
        note = f"Round {number} of {self.rounds.count}."
        fell = report.fallen(rows, self.rounds.stop_drop)
        if last.get("rows", {}).get("rows_new") == 0:
            fell = (f"acceptance fell in round {number}: no prompt gave a row", max(number - 2, 0))
        if fell is not None:
            what, good = fell
            note = f"Stopped: {what}. The last good checkpoint: {self.policy(good).path}"
        report.write(self.folder, rows, note)
        if fell is None:
            return None
        print_now(f"{note}\n{self.folder / 'report.html'}")
        return FELL

    def ended(self, code: int) -> int:
        """Say where the results are, or why there are none."""
        if code == OK:
            print_now(f"{self.policy(self.rounds.count).path}\n{self.folder / 'report.html'}")
        return code


def quoted(value: Any) -> str:
    """A value as Hydra's grammar reads it, whatever signs are in it."""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"


if __name__ == "__main__":
    entry.run(lambda: sys.exit(main(sys.argv[1:])), KEYS)
