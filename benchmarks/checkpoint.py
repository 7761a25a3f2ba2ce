"""What saves and restarts cost on the demo model (SmolLM2-135M, all weights, fp32 state).

    python -m benchmarks.checkpoint [--rounds 4] [--steps 3] [--restarts 3] [--json FILE]

Saves: the same few optimizer steps are taken with and without an asynchronous save before them, in
turn and in alternating order; they end when the upload has. Medians; the difference is what one
save costs, in seconds and as a share of EVERY steps.
Restarts: `python train.py` is killed with SIGKILL after a save and started again; the time runs
from the start of the program to the start of its first step.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from benchmarks.faults import ROOT, read_rows
from benchmarks.throughput import facts
from iopo.config import CheckpointConfig, TrainConfig
from iopo.model.load import dtype_name
from iopo.training import loop, setup
from iopo.training.checkpoint.folders import latest
from iopo.training.checkpoint.resume import fingerprint
from iopo.training.checkpoint.tensors import gather_state
from iopo.training.checkpoint.writer import Checkpoints
from iopo.training.launch.launcher import launch
from iopo.training.launch.placement import RankInfo
from iopo.training.launch.signals import Control, heartbeat

EVERY = 50  # steps: an interval of saves that people use
OVERRIDES = (
    *("data.heldout=null", "data.limit_rows=16", "parallel.device=cpu", "evaluation.samples=0"),
    *(
        "checkpoint.save_every_steps=1",
        "export.model=false",
        "optim.epochs=100",
        "optim.global_batch_quads=8",
    ),
)


def config(run: Path) -> TrainConfig:
    """The default experiment with OVERRIDES; steps of 8 quads, as in `make demo`."""
    ConfigStore.instance().store(name="base_config", node=TrainConfig)
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = OmegaConf.to_object(compose("config", overrides=[*OVERRIDES, f"run={run}"]))
    assert isinstance(cfg, TrainConfig)
    return cfg


def time_steps(cfg: TrainConfig, run: Path, ranks: RankInfo, control: Control) -> None:
    """A worker for `launch`: seconds of every step and save to RUN/times.json."""
    rounds, steps = (int(os.environ[f"CHECKPOINT_{name}"]) for name in ("ROUNDS", "STEPS"))
    built = setup.build_run(cfg, ranks)
    job, model, optimizer = built.job, built.model, built.optimizer
    description = fingerprint(cfg, built.inputs, ranks.world_size) | {"metrics": {}}
    times: dict[str, list[float]] = {"plain": [], "saving": [], "staging": [], "sync": []}

    def step() -> None:  # always the first one: the same quads, the same work
        next(loop.train_steps(job, model, optimizer, built.reference, first_step=1))
        heartbeat()

    def save(checkpoints: Checkpoints, number: int) -> float:
        started = time.perf_counter()
        state = gather_state(model.parameters, optimizer, ranks.rank)
        checkpoints.save(number, state, description)
        return time.perf_counter() - started

    with Checkpoints(run, CheckpointConfig(asynchronous=True)) as checkpoints:
        step()
        save(checkpoints, 1)  # the first allocates what the others use again
        for number in range(2, rounds + 2):
            for saving in (False, True) if number % 2 else (True, False):
                checkpoints.wait()
                started = time.perf_counter()
                if saving:
                    times["staging"].append(save(checkpoints, number))
                for _ in range(steps):
                    step()
                checkpoints.wait()
                times["saving" if saving else "plain"].append(time.perf_counter() - started)
    with Checkpoints(run, CheckpointConfig(asynchronous=False)) as checkpoints:
        times["sync"] = [save(checkpoints, rounds + 2 + i) for i in range(3)]
    folder, _ = latest(run)
    assert folder is not None
    size = sum(path.stat().st_size for path in folder.iterdir())
    (run / "times.json").write_text(json.dumps(times | {"checkpoint_gb": size / 1e9}))


def measure_saves(folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Medians of seconds of `steps` steps and of saves, and what an asynchronous save adds."""
    from benchmarks.checkpoint import time_steps as worker  # spawned ranks find it by this name

    run = folder / "saves"
    run.mkdir()
    os.environ |= {"CHECKPOINT_ROUNDS": str(rounds), "CHECKPOINT_STEPS": str(steps)}
    code = launch(worker, config(run), run, processes=1, backend="gloo", timeout_s=1800)
    if code != 0:
        sys.exit(code)
    times = json.loads((run / "times.json").read_text())
    median = {k: statistics.median(times[k]) for k in ("plain", "saving", "staging", "sync")}
    added = median["saving"] - median["plain"]
    share = added * steps / median["plain"] / EVERY
    return {"checkpoint_gb": times["checkpoint_gb"], "steps": steps, "median_s": median} | {
        "added_s": added,
        f"share_of_{EVERY}_steps": share,
        "seconds": {k: [round(x, 3) for x in v] for k, v in times.items() if isinstance(v, list)},
    }


def measure_restarts(folder: Path, count: int) -> dict[str, Any]:
    """Kill and start again `count` times; restart_s ends where the first step begins."""
    run = folder / "restarts"
    restarts, steps = [], []
    program = start(run)
    try:
        wait_for(run, program, lambda: latest(run)[0] is not None)
        for _ in range(count):
            program.send_signal(signal.SIGKILL)
            program.wait()
            (run / "metrics.jsonl").write_text("")  # so that the next row is the new program's
            started = time.time()
            program = start(run)
            wait_for(run, program, lambda: len(read_rows(run)) > 0)
            seen = time.time()
            steps.append(read_rows(run)[0]["step_s"])
            restarts.append(round(seen - started - steps[-1], 2))
    finally:
        program.kill()
        program.wait()
    return {"restart_s": restarts, "first_step_s": steps, "median_s": statistics.median(restarts)}


def start(run: Path) -> subprocess.Popen:
    command = [sys.executable, "train.py", *OVERRIDES, f"run={run}"]
    with open(run.parent / "output.txt", "a") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)


def wait_for(run: Path, program: subprocess.Popen, condition: Callable[[], bool]) -> None:
    while not condition():
        if program.poll() is not None:
            raise RuntimeError((run.parent / "output.txt").read_text()[-3000:])
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="with a save, and without")
    parser.add_argument("--steps", type=int, default=3, help="in a round")
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None, help="also write the results here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        saves = measure_saves(Path(folder), arguments.rounds, arguments.steps)
        restarts = (
            measure_restarts(Path(folder), arguments.restarts) if arguments.restarts else None
        )
    s, share = saves["median_s"], saves[f"share_of_{EVERY}_steps"]
    print(
        f"{arguments.steps} steps {s['plain']:.2f} s, with an async save {s['saving']:.2f} s: "
        f"{saves['added_s']:.2f} s added, {100 * share:.2f} % of {EVERY} steps, "
        f"{s['staging']:.2f} s of it before the first; a synchronous save takes {s['sync']:.2f} s "
        f"({saves['checkpoint_gb']:.2f} GB)"
    )
    if restarts is not None:
        print(f"restart to first step {restarts['median_s']:.1f} s, of {restarts['restart_s']}")
    if arguments.json is not None:
        config_facts = facts(
            Path("SmolLM2-135M-Instruct"), dtype_name("auto", "cpu"), os.cpu_count() or 1
        )
        text = json.dumps(config_facts | {"saves": saves, "restarts": restarts}, indent=1)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
