"""Kill -9 a training run at random moments, restart it, and compare it with an undisturbed one.

    python -m benchmarks.faults --kills 20

prints a line per setting (one and two gloo processes, all weights and LoRA, sync and async saves)
and, last, `kills=20 lost_steps_max=... bitwise_equal=true`. Compared are the parameters, the
optimizer state and the random generators in the last checkpoint, and metrics.jsonl: no step twice,
none missing, every number the same but the clock's. Every second kill is aimed into a save.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from iopo.training.checkpoint.folders import latest, step_of

ROOT = Path(__file__).resolve().parents[1]
CLOCK_COLUMNS = {"step_s", "tokens_per_s"}
SAVE_EVERY_STEPS = 3


@dataclass(frozen=True)
class Setting:
    processes: int
    lora: bool
    asynchronous: bool

    def __str__(self) -> str:
        weights = "lora" if self.lora else "full"
        return (
            f"{self.processes} process(es), {weights}, {'async' if self.asynchronous else 'sync'}"
        )


@dataclass
class Kills:
    """What the kills of one setting did. lost_steps: finished, but after the last whole save.

    resumes: starts from a checkpoint; the others began again.
    """

    count: int = 0
    resumes: int = 0
    inside_save: int = 0
    lost_steps_max: int = 0


SETTINGS = [Setting(*values) for values in product((1, 2), (False, True), (True, False))]


def command(run: Path, setting: Setting, steps: int) -> list[str]:
    """The tiny experiment, with dropout under LoRA so that generator states matter."""
    adapters = ["model.lora.rank=4", "model.lora.dropout=0.1"] if setting.lora else []
    return [
        *(sys.executable, "train.py", "+experiment=tiny_random", f"run={run}"),
        *("optim.epochs=100000", f"optim.max_steps={steps}", "optim.global_batch_quads=4"),
        *("evaluation.samples=0", "export.model=false", f"parallel.processes={setting.processes}"),
        f"checkpoint.save_every_steps={SAVE_EVERY_STEPS}",
        f"checkpoint.asynchronous={str(setting.asynchronous).lower()}",
        *adapters,
    ]


def start(run: Path, setting: Setting, steps: int, *overrides: str) -> subprocess.Popen:
    """Start (or resume) the run; its output goes to output.txt beside the run folder."""
    environ = {"OMP_NUM_THREADS": "1", **os.environ, "XDG_CACHE_HOME": str(run.parent / "cache")}
    with open(run.parent / "output.txt", "a") as output:
        return subprocess.Popen(
            [*command(run, setting, steps), *overrides],
            cwd=ROOT, env=environ, stdout=output, stderr=output,
        )  # fmt: skip


def finish(run: Path, setting: Setting, steps: int, *overrides: str) -> None:
    """Run to the end. Raises RuntimeError with the output of a run that fails."""
    program = start(run, setting, steps, *overrides)
    try:
        code = program.wait()
    finally:
        program.kill()
    if code != 0:
        output = (run.parent / "output.txt").read_text()
        raise RuntimeError(f"{setting}: the run failed\n{output[-4000:]}")


def kill_often(run: Path, setting: Setting, steps: int, kills: int, rng: random.Random) -> Kills:
    """Start the run `kills` times and kill it each time; then let it end."""
    result = Kills()
    while result.count < kills:
        program = start(run, setting, steps)
        try:
            _wait_for_moment(run, program, aim_at_save=result.count % 2 == 0, rng=rng)
        finally:
            program.kill()
            ended = program.wait()
        if ended != -9:
            raise RuntimeError(f"{setting}: the run ended ({ended}) before kill {result.count + 1}")
        result.count += 1
        folder, remarks = latest(run)
        result.resumes += folder is not None  # the next start
        result.inside_save += bool(remarks)
        done = max((row["step"] for row in read_rows(run)), default=0)
        saved = 0 if folder is None else step_of(folder)
        result.lost_steps_max = max(result.lost_steps_max, done - saved)
    finish(run, setting, steps)
    return result


def _wait_for_moment(
    run: Path, program: subprocess.Popen, *, aim_at_save: bool, rng: random.Random
) -> None:
    """Return inside the run's next save, or at a random moment after it is complete."""
    before, saved = len(read_rows(run)), latest(run)[0]
    while program.poll() is None and len(read_rows(run)) <= before:
        before = min(before, len(read_rows(run)))  # a resume cuts the file first
        time.sleep(0.01)
    if not aim_at_save:
        while program.poll() is None and latest(run)[0] == saved:
            time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.5))
    if aim_at_save:
        known = set((run / "checkpoints").glob("*"))
        while program.poll() is None and set((run / "checkpoints").glob("*")) <= known:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.01))


def read_rows(run: Path) -> list[dict]:
    """Whole rows of metrics.jsonl; a line that is being written is left out."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def find_difference(plain: Path, killed: Path, steps: int) -> str | None:
    """The first difference between two finished runs, in words; None if they are bitwise equal."""
    rows = [
        [{k: v for k, v in row.items() if k not in CLOCK_COLUMNS} for row in read_rows(run)]
        for run in (plain, killed)
    ]
    for run, some in zip((plain, killed), rows, strict=True):
        trained = [row["step"] for row in some if row["split"] == "train"]
        if trained != list(range(1, steps + 1)):
            return f"{run}: the steps in metrics.jsonl are {trained}, expected 1..{steps}"
    if rows[0] != rows[1]:
        first = next(pair for pair in zip(*rows, strict=False) if pair[0] != pair[1])
        return f"metrics.jsonl differs: {first[0]} and {first[1]}"
    folders = [latest(run)[0] for run in (plain, killed)]
    assert folders[0] is not None and folders[1] is not None
    if (step_of(folders[0]), step_of(folders[1])) != (steps, steps):
        return f"the last checkpoints are {folders[0]} and {folders[1]}, expected step {steps}"
    expected, found = read_whole(folders[0]), read_whole(folders[1])
    if expected.keys() != found.keys():
        return f"other tensors: {sorted(expected.keys() ^ found.keys())}"
    differing = [key for key in expected if not torch.equal(expected[key], found[key])]
    return f"tensors differ: {differing}" if differing else None


def read_whole(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint of this machine's own, unsharded, in this process alone."""
    reader = dcp.FileSystemReader(folder)
    saved = reader.read_metadata().state_dict_metadata
    state = {k: torch.zeros(v.size, dtype=v.properties.dtype) for k, v in saved.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="over all settings together")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, default=None, help="also write the result here")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    table, equal = [], True
    for i, setting in enumerate(SETTINGS):
        kills = arguments.kills // len(SETTINGS) + (i < arguments.kills % len(SETTINGS))
        if kills == 0:
            continue
        steps = 30 + 60 * kills
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "plain").mkdir()
            (Path(folder) / "killed").mkdir()
            plain, killed = Path(folder) / "plain" / "run", Path(folder) / "killed" / "run"
            finish(plain, setting, steps)
            result = kill_often(killed, setting, steps, kills, rng)
            difference = find_difference(plain, killed, steps)
        equal &= difference is None
        row = {"setting": str(setting), "steps": steps} | vars(result) | {"difference": difference}
        table.append(row)
        print(f"{setting}: {steps} steps, {result}, {difference or 'bitwise equal'}", flush=True)
    lost = max(row["lost_steps_max"] for row in table)
    done = sum(row["count"] for row in table)
    print(f"kills={done} lost_steps_max={lost} bitwise_equal={str(equal).lower()}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
