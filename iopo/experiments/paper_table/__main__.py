"""The paper's comparison in small: `python -m iopo.experiments.paper_table [key=value ...]`.

From one SFT checkpoint, on the same quads and as many members seen: a grid of learning rate and
beta for every method, judged on a validation split; then the jobs of +sweep=paper_table, measured
on held-out quads, IFEval and cousins of its prompts; then the tables (table.py). Each job is
train.py or evaluate.py in a process of its own, in a folder under --run. Finished jobs are not run
again: stop at any time (SIGTERM saves the running jobs) and start again to go on. On another
machine, go on with other seeds: copy choice.json into a new --run, and give the first run's
measures to table.py. key=value goes to every train.py. Exit codes: 0 done, 1 some jobs failed
(jobs.jsonl names them), 2 refused, 75 stopped.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from iopo.construct.cousins import __main__ as cousins
from iopo.evaluation.responses import check_manifest
from iopo.experiments.paper_table import data
from iopo.files import read_records, write_records, write_text
from iopo.jobs import REPOSITORY, Job, Runner, print_now

# Chosen before any result, as all sizes here and in conf/sweep/paper_table.yaml. The second number
# of a method says how strongly it prefers: beta, or ORPO's weight. SFT has none.
LEARNING_RATES = ("2e-5", "5e-5")
BETA = ("objective.beta", ("0.05", "0.2"))
STRENGTH = {
    "dpo": BETA, "output_preference": BETA, "input_preference": BETA, "iopo_three": BETA,
    "iopo": BETA, "simpo": ("objective.beta", ("2", "8")),
    "orpo": ("objective.odds_weight", ("0.1", "1.0")), "sft": None,
}  # fmt: skip
SFT = ("objective=sft", "optim.lr=1e-4", "optim.global_batch_quads=8", "optim.max_steps=24",
       "evaluation.quads=8", "evaluation.samples=0")  # fmt: skip
# The second question: method, rounds. All generate and train on as many tokens (docs/rounds.md).
ARMS = {"iopo_offline": ("iopo", 1), "iopo_rounds": ("iopo", 4), "dpo_rounds": ("dpo", 4),
        "grpo_rounds": ("grpo", 4)}  # fmt: skip
ROUNDS = ("rounds.samples=4", "rounds.max_new_tokens=96", "rounds.limit=0",
          "rounds.stop_drop=null", "optim.epochs=100",
          "optim.lr=5e-5", "data.heldout=null", "evaluation.samples=0")  # fmt: skip
PROMPTS, STEPS = 128, 48  # of an arm, shared by its rounds
QUADS_TOKENS, IFEVAL_TOKENS = 128, 256  # longest answers
# beside base and SFT; cousins need the answers to IFEval
IFEVAL_ON = ("sft", "dpo", "output_preference", "input_preference", "iopo", *ARMS)
COUSINS_ON = ("iopo", "output_preference")


class Comparison:
    """The stages, in order. Paths are absolute: jobs run in the repository's folder."""

    def __init__(self, args: argparse.Namespace, runner: Runner):
        self.args, self.runner, self.run = args, runner, runner.run_dir
        self.sft = self.run / "sft"
        self.cousins = self.run / "data" / "cousins.jsonl"

    def train(self, folder: Path, *overrides: str) -> bool:
        """One train.py run."""
        command = [
            "train.py", f"run={folder}", f"data.heldout={self.run}/data/validation.jsonl",
            f"reference.cache_dir={self.run}/reference", *overrides, *self.args.overrides,
        ]  # fmt: skip
        name = f"{folder.relative_to(self.run)} train"
        return self.runner.job(Job(name, command, folder / "COMPLETE"))

    def from_sft(self, folder: Path, method: str, sweep: str, *overrides: str) -> bool:
        """One run of a sweep, from the SFT checkpoint, on the rows that the method's file names."""
        own = load_yaml("method", method).get("data") or {}
        rows = Path(own.get("train", "train.jsonl")).name
        return self.train(
            folder, f"+sweep={sweep}", "hydra.mode=RUN", f"+method={method}",
            f"model.path={exported(self.sft)}", f"data.train={self.run}/data/{rows}", *overrides,
        )  # fmt: skip

    def evaluate(self, benchmark: str, model: str | Path, out: Path, *options: str) -> bool:
        """One evaluate.py run."""
        command = [
            "evaluate.py", f"+benchmark={benchmark}", f"model.path={model}", f"out={out}",
            "generate.batch_size=96", *options,
        ]  # fmt: skip
        return self.runner.job(Job(str(out.relative_to(self.run)), command, out / "scores.json"))

    def quads(self, model: str | Path, out: Path, rows: str, *more: str) -> bool:
        """Answers to, and log-probs of, data/{rows}.jsonl."""
        return self.evaluate(
            "quads", model, out, f"data.path={self.run}/data/{rows}.jsonl",
            "benchmark.controls=false", f"benchmark.base={self.args.model}",
            f"generate.max_new_tokens={QUADS_TOKENS}", *more,
        )  # fmt: skip

    def measure(self, model: str | Path, folder: Path) -> None:
        """Everything that the table needs of one model."""
        self.quads(model, folder / "quads", "test")
        start = folder.parent == self.run  # base or sft
        name = folder.parent.name
        if self.args.ifeval is None or not (start or name in IFEVAL_ON):
            return
        longest = f"generate.max_new_tokens={IFEVAL_TOKENS}"
        rows = f"data.path={self.args.ifeval}"
        done = self.evaluate("ifeval", model, folder / "ifeval", rows, longest)
        if not done or not self.cousins.exists() or not (start or name in COUSINS_ON):
            return
        # a prompt that is not followed by itself has nothing to lose
        own = read_records(folder / "ifeval/verdicts.jsonl")
        followed = {str(row["key"]) for row in own if all(row["strict"])}
        asked = [row for row in read_records(self.cousins) if str(row["cousin_of"]) in followed]
        write_records(folder / "cousins.jsonl", asked)
        if asked:
            rows = f"data.path={folder}/cousins.jsonl"
            self.evaluate("ifeval", model, folder / "cousins", rows, longest)

    def arm(self, name: str, seed: int) -> None:
        """On-policy rounds, or one pass on the start's samples; measured after the last."""
        method, count = ARMS[name]
        folder = self.run / "rounds" / name / f"seed{seed}"
        reward = ["rounds.reward=share"] if method in ("dpo", "grpo") else []
        command = [
            "-m", "iopo.rounds", f"+method={method}", f"run={folder}", f"seed={seed}",
            f"model.path={exported(self.sft)}", f"rounds.count={count}", *ROUNDS, *reward,
            f"rounds.prompts_per_round={PROMPTS // count}", f"optim.max_steps={STEPS // count}",
            f"reference.cache_dir={folder}/reference", *self.args.overrides,
        ]  # fmt: skip
        done = folder / "COMPLETE"
        if self.runner.job(Job(str(folder.relative_to(self.run)), command, done)):
            self.measure(done.read_text("utf-8").strip(), folder)

    def grid_points(self) -> Iterator[tuple[str, Path, list[str]]]:
        """(method, folder, overrides) of every point, the lower learning rate first, of methods
        some of whose points were not scored yet."""
        tried = self.chosen_before()["tried"]
        for method in self.args.methods:
            key, values = STRENGTH[method] or ("", ("",))
            points = list(itertools.product(LEARNING_RATES, values))
            if len(tried.get(method, ())) == len(points):
                continue
            for rate, value in points:
                overrides = [f"optim.lr={rate}"] + ([f"{key}={value}"] if key else [])
                name = f"lr{rate}-{value}" if key else f"lr{rate}"
                yield method, self.run / "grid" / method / name, overrides

    def try_point(self, method: str, folder: Path, overrides: list[str]) -> None:
        """Train one point for the grid's few steps and score it on the validation quads."""
        if (folder / "validation" / "scores.json").exists():
            return  # its export is gone
        grid = [*overrides, "seed=0", f"optim.max_steps={self.args.grid_steps}"]
        if self.from_sft(folder, method, "paper_table", *grid) and self.quads(
            exported(folder), folder / "validation", "validation", "benchmark.scored=0"
        ):
            shutil.rmtree(exported(folder))  # half a gigabyte each, not needed again

    def choose(self) -> dict[str, list[str]]:
        """choice.json: of each method the overrides whose answers most often follow all and answer.

        Ties go to the point that comes first. A point that failed is not chosen; a method all of
        whose points failed is left out. What was chosen before stands, here or in another sitting
        whose choice.json was copied.
        """
        before = self.chosen_before()
        tried: dict[str, list[dict[str, Any]]] = {}
        for method, folder, overrides in self.grid_points():
            scores = folder / "validation" / "scores.json"
            if scores.exists():
                followed = json.loads(scores.read_text())["follows_and_answers"]
                point = {"overrides": overrides, "followed": followed}
                tried.setdefault(method, []).append(point)
        chosen = {
            method: max(points, key=lambda point: point["followed"]["value"])["overrides"]
            for method, points in tried.items()
        } | before["chosen"]
        content = {"chosen": chosen, "tried": before["tried"] | tried}
        write_text(self.run / "choice.json", json.dumps(content, indent=1) + "\n")
        return chosen

    def chosen_before(self) -> dict[str, dict[str, Any]]:
        """What choice.json holds."""
        path = self.run / "choice.json"
        return json.loads(path.read_text()) if path.exists() else {"chosen": {}, "tried": {}}

    def sweep(self, name: str, chosen: dict[str, list[str]]) -> Iterator[Callable[[], None]]:
        """The jobs of a sweep with the chosen rates, each measured as soon as it is trained."""

        def train_and_measure(folder: Path, method: str, *overrides: str) -> None:
            if self.from_sft(folder, method, name, *overrides):
                self.measure(exported(folder), folder)

        for job in asked_of(name, self.args):
            method, seed = job.pop("+method"), job.pop("seed")
            tuned = tuned_as(method)
            if tuned not in chosen:
                print_now(f"{name}: no point of the grid worked for {method}; it is left out")
                continue
            if rows := job.get("data.train"):  # in the sweep's own folder, here in that of --run
                job["data.train"] = f"{self.run}/data/{Path(rows).name}"
            swept = [f"{key}={value}" for key, value in job.items()]
            changes = [f"{key}-{value.split('/')[-1]}" for key, value in job.items()]
            label = "-".join([method, *changes])  # no sign that Hydra reads
            folder = self.run / name / label / f"seed{seed}"
            kept = [rate for rate in chosen[tuned] if rate.split("=")[0] not in job]
            yield partial(train_and_measure, folder, method, f"seed={seed}", *kept, *swept)


def load_yaml(group: str, name: str) -> dict[str, Any]:
    """conf/GROUP/NAME.yaml as it stands, not composed."""
    return yaml.safe_load((REPOSITORY / "conf" / group / f"{name}.yaml").read_text("utf-8"))


def jobs_of(sweep: str) -> list[dict[str, str]]:
    """Key and value of every override, job by job, as Hydra's sweeper would make them."""
    params = load_yaml("sweep", sweep)["hydra"]["sweeper"]["params"]
    columns = [str(values).split(",") for values in params.values()]
    return [dict(zip(params, values, strict=True)) for values in itertools.product(*columns)]


def tuned_as(method: str) -> str:
    """The method of the grid whose rates it takes: its own, or IOPO's for IOPO with a change."""
    return method if method in STRENGTH else "iopo"


def asked_of(sweep: str, args: argparse.Namespace) -> list[dict[str, str]]:
    """Those of its jobs that --methods and --seeds name."""
    return [
        job for job in jobs_of(sweep)
        if int(job["seed"]) in args.seeds and tuned_as(job["+method"]) in args.methods
    ]  # fmt: skip


def exported(folder: Path) -> Path:
    """The whole model of a run."""
    merged = folder / "export-merged"
    return merged if merged.exists() else folder / "export"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(arguments)
    args.run.mkdir(parents=True, exist_ok=True)
    runner = Runner(args.run, args.jobs)
    signal.signal(signal.SIGTERM, runner.stop)
    signal.signal(signal.SIGINT, runner.stop)
    try:
        compare(Comparison(args, runner))
    except (ValueError, FileNotFoundError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    for name in runner.failed:
        print_now(f"failed: {name}")
    return 1 if runner.failed else 0


def keep_arguments(args: argparse.Namespace) -> None:
    """arguments.json: what the jobs' results depend on. Raises ValueError if it was otherwise.

    IFEval may be added to a run that began without it.
    """
    free = ("run", "sweeps", "methods", "seeds", "jobs", "data_only", "without_ifeval", "ifeval")
    kept = {key: value for key, value in vars(args).items() if key not in free}
    check_manifest(args.run / "arguments.json", json.loads(json.dumps(kept, default=str)))


def compare(comparison: Comparison) -> None:
    """All stages. Raises ValueError where it makes no sense to go on."""
    runner, run, args = comparison.runner, comparison.run, comparison.args
    keep_arguments(args)
    if not (run / "data/counts.json").exists():
        sizes = {"quads": args.quads, "validation": args.validation, "test": args.test}
        data.make(args.train, args.heldout, run / "data", **sizes)
    if args.data_only:
        return
    asked = args.ifeval is not None and args.sweeps != ["rounds"]
    if asked and not comparison.cousins.exists():
        print_now(cousins.build(args.ifeval, comparison.cousins, k=4, seed=0))
    start = (f"model.path={args.model}", f"data.train={run}/data/train.jsonl")
    runner.all([partial(comparison.train, comparison.sft, *SFT, *start)])
    if runner.failed:
        raise ValueError(f"no SFT checkpoint; {run}/logs says why")
    points = () if args.sweeps == ["rounds"] else comparison.grid_points()
    runner.all([partial(comparison.try_point, *point) for point in points])
    chosen = comparison.choose()
    runner.all([
        lambda: comparison.measure(args.model, run / "base"),
        lambda: comparison.measure(exported(comparison.sft), comparison.sft),
    ])  # fmt: skip
    tasks: list[Callable[[], None]] = []
    for name in args.sweeps:
        if name == "rounds":
            tasks += [partial(comparison.arm, arm, seed) for seed in args.seeds for arm in ARMS]
        else:
            tasks += comparison.sweep(name, chosen)
    runner.all(tasks)
    for name in args.sweeps:
        table = [sys.executable, "-m", "iopo.experiments.paper_table.table", str(run), name]
        if subprocess.run(table, cwd=REPOSITORY, check=False).returncode != 0:
            runner.failed.append(f"the table of {name}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Arguments with absolute paths; exits with 2 for what cannot be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = REPOSITORY / "data" / "verified"
    heldout = [folder / "heldout.jsonl", folder / "heldout_kinds.jsonl"]
    sweeps = sorted(path.stem for path in (REPOSITORY / "conf/sweep").glob("ablation_*.yaml"))
    ifeval = str(Path(os.environ.get("IOPO_DATA_DIR", ""), "ifeval", "input_data.jsonl"))
    add = parser.add_argument
    add("--run", type=absolute, default="runs/paper_table", help="folder of everything")
    add("--sweeps", nargs="+", choices=["paper_table", "rounds", *sweeps], default=["paper_table"])
    add("--model", default="demo", help="where SFT starts: a model folder or 'demo'")
    add("--train", type=absolute, default=folder / "train.jsonl", help="verified quads")
    add("--heldout", type=absolute, nargs="+", default=heldout, help="of other tasks")
    add("--ifeval", type=absolute, default=ifeval, help="default: $IOPO_DATA_DIR/ifeval/...")
    add("--without-ifeval", action="store_true", help="leave IFEval out of the table")
    swept = load_yaml("sweep", "paper_table")["hydra"]["sweeper"]["params"]["+method"].split(",")
    add("--methods", nargs="+", choices=STRENGTH, default=swept)
    add("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="those of the sweep")
    add("--quads", type=int, default=1400, help="training quads")
    add("--validation", type=int, default=150, help="quads that rates are chosen on")
    add("--test", type=int, default=300, help="held-out quads, in thirds by what is new in them")
    add("--grid-steps", type=int, default=40, help="optimizer steps of a point of the grid")
    add("--data-only", action="store_true", help="write the rows of all methods and stop")
    add("--jobs", type=int, default=1, help="jobs at once; they share the cores")
    add("overrides", nargs="*", help="key=value for every train.py")
    args = parser.parse_intermixed_args(arguments)
    for name in args.sweeps:
        if name != "rounds" and not asked_of(name, args):
            parser.error(
                f"--sweeps {name}: none of its jobs has one of --methods {' '.join(args.methods)} "
                f"and --seeds {' '.join(map(str, args.seeds))}; conf/sweep/{name}.yaml names them"
            )
    if args.without_ifeval or args.data_only:
        args.ifeval = None
    elif not args.ifeval.is_file():
        parser.error(f"IFEval: no file {args.ifeval}; give --ifeval FILE, or --without-ifeval")
    if Path(args.model).is_dir():
        args.model = str(absolute(args.model))
    return args


def absolute(path: str) -> Path:
    """The path, from the working directory of the command."""
    return Path(path).absolute()  # jobs run in the repository's folder


if __name__ == "__main__":
    sys.exit(main())
