"""train.py, killed or stopped and started again, ends where an undisturbed run ends."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from helpers_fork import finish, kill, run_train, start_ranks
from safetensors.torch import load_file

from benchmarks import faults
from benchmarks.faults import Setting, read_whole
from iopo.training.checkpoint.folders import latest, step_of

pytestmark = pytest.mark.timeout(1800)
# For losses compared across numbers of processes, whose sums are rounded in another order: at the
# experiment's own rate ten steps make 1e-5 of that.
CALM = "optim.lr=1e-5"


def folder(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name / "run"


@pytest.mark.slow
@pytest.mark.parametrize("setting", faults.SETTINGS, ids=str)
def test_kills_change_nothing(tmp_path, setting, kills=4):
    steps = 30 + 60 * kills
    plain, killed = folder(tmp_path, "plain"), folder(tmp_path, "killed")
    faults.finish(plain, setting, steps)
    result = faults.kill_often(killed, setting, steps, kills, random.Random(0))
    assert faults.find_difference(plain, killed, steps) is None
    assert result.lost_steps_max <= 2 * faults.SAVE_EVERY_STEPS
    assert result.resumes >= kills // 2


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_stop_saves_the_step_it_has_reached(tmp_path, number, code):
    setting, steps = Setting(processes=1, lora=False, asynchronous=True), 30
    plain, stopped = folder(tmp_path, "plain"), folder(tmp_path, "stopped")

    def start(run: Path) -> list[BaseProcess]:
        arguments = faults.command(run, setting, steps)[2:]
        return start_ranks(1, run_train, arguments, run.parent / "cache", run.parent / "output.txt")

    ranks = start(stopped)
    try:
        while max((row["step"] for row in faults.read_rows(stopped)), default=0) < 5:
            assert ranks[0].is_alive(), (tmp_path / "stopped" / "output.txt").read_text()[-3000:]
            time.sleep(0.01)
        os.kill(ranks[0].pid, number)
        assert finish(ranks) == [code]
    finally:
        kill(ranks)
    reached = max(row["step"] for row in faults.read_rows(stopped))
    saved, remarks = latest(stopped)
    assert saved is not None and step_of(saved) == reached and remarks == []
    assert reached < steps and not (stopped / "FAILED").exists()
    for run in (stopped, plain):
        assert finish(start(run)) == [0], (run.parent / "output.txt").read_text()[-3000:]
    assert faults.find_difference(plain, stopped, steps) is None


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_with_the_same_losses(tmp_path, before, after):
    plain, moved = folder(tmp_path, "plain"), folder(tmp_path, "moved")
    faults.finish(plain, Setting(before, lora=False, asynchronous=False), 24, CALM)
    faults.finish(moved, Setting(before, lora=False, asynchronous=False), 12, CALM)
    (moved / "COMPLETE").unlink()
    faults.finish(moved, Setting(after, lora=False, asynchronous=False), 24, CALM)
    output = (moved.parent / "output.txt").read_text()
    assert "bitwise equality is given up" in output and "optim.max_steps" in output
    losses = [
        [(row["step"], row["loss"]) for row in faults.read_rows(run) if row["split"] == "train"]
        for run in (plain, moved)
    ]
    assert [step for step, _ in losses[1]] == list(range(1, 25))
    assert losses[0][:12] == losses[1][:12]
    for (_, expected), (_, found) in zip(*losses, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_eight_processes_do_what_one_does(tmp_path):
    """200 steps of eight quads, one a process: no deadlock, and the loss of one process."""
    runs = []
    for processes in (1, 8):
        run = folder(tmp_path, str(processes))
        setting = Setting(processes, lora=False, asynchronous=True)
        faults.finish(run, setting, 200, "optim.global_batch_quads=8", CALM)
        runs.append([row["loss"] for row in faults.read_rows(run) if row["split"] == "train"])
    assert len(runs[0]) == len(runs[1]) == 200
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)


@pytest.mark.slow
def test_two_torchrun_agents_train_as_one_process_does(tmp_path):
    """A new folder, two machines: rank 1 must wait for the folder that rank 0's machine makes."""
    plain, spread = folder(tmp_path, "plain"), folder(tmp_path, "spread")
    faults.finish(plain, Setting(1, lora=False, asynchronous=True), 12, CALM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = []
    for node in range(2):
        torchrun = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}"),
            *("--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"),
        ]
        command = [*faults.command(spread, Setting(1, lora=False, asynchronous=True), 12), CALM]
        environ = {"OMP_NUM_THREADS": "1", **os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        agents.append(subprocess.Popen(torchrun + command[1:], cwd=faults.ROOT, env=environ))
    assert [agent.wait(300) for agent in agents] == [0, 0]
    losses = [
        [row["loss"] for row in faults.read_rows(run) if row["split"] == "train"]
        for run in (plain, spread)
    ]
    assert len(losses[1]) == 12 and losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert (spread / "COMPLETE").exists()


@pytest.mark.slow
def test_a_finished_run_goes_on_only_for_more_of_the_same(tmp_path):
    setting = Setting(processes=1, lora=False, asynchronous=True)
    run, plain = folder(tmp_path, "run"), folder(tmp_path, "plain")

    def output_of(code: int, steps: int, *overrides: str) -> str:
        command = [*faults.command(run, setting, steps), *overrides]
        environ = {"OMP_NUM_THREADS": "1", **os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run(command, cwd=faults.ROOT, env=environ, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    assert "holds no complete checkpoint" in output_of(2, 6, "checkpoint.resume=must")
    output_of(0, 6)
    assert "is complete: nothing to do" in output_of(0, 6)
    assert "objective.beta: 0.1 -> 0.5" in output_of(2, 6, "objective.beta=0.5")
    assert "checkpoint.resume is never" in output_of(2, 12, "checkpoint.resume=never")
    assert "step 6 is done" in output_of(0, 12)
    faults.finish(plain, setting, 12)  # the same steps, since tiny_random's rate is constant
    states = [read_whole(latest(folder)[0]) for folder in (plain, run)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    steps = [row["step"] for row in faults.read_rows(run) if row["split"] == "train"]
    assert steps == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_replayed_step_has_the_losses_that_it_had(tmp_path, processes):
    """Two quads a step: their mean is the loss in metrics.jsonl, for every topology."""
    run, steps = folder(tmp_path, "run"), 7
    command = faults.command(run, Setting(processes, lora=False, asynchronous=True), steps)
    environ = {"OMP_NUM_THREADS": "1", **os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    options = {"cwd": faults.ROOT, "env": environ, "check": True, "timeout": 300}
    subprocess.run([*command, "optim.global_batch_quads=2", "checkpoint.keep=3"], **options)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    replay = [sys.executable, "train.py", f"run={run}", "replay_step=5"]
    output = subprocess.run(replay, **options, capture_output=True, text=True).stdout
    assert "step-00000003, then 1 steps" in output
    lines = [line.split() for line in output.splitlines() if "gradient norm" in line]
    mean = sum(float(words[2]) for words in lines) / len(lines)
    expected = next(row["loss"] for row in faults.read_rows(run) if row["step"] == 5)
    assert len(lines) == 2 and mean == pytest.approx(expected, abs=1e-5)
    assert output.count("x2y1") == 2
    other = subprocess.run(
        [*replay, "objective.beta=0.7", "checkpoint.keep=3"],
        cwd=faults.ROOT, env=environ, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert other.returncode == 2 and "objective.beta=0.7: the run had 0.1" in other.stderr
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


@pytest.mark.slow
def test_a_checkpoint_becomes_a_model(tmp_path):
    run = folder(tmp_path, "run")
    faults.finish(run, Setting(1, lora=False, asynchronous=True), 6)
    config = (run / "config.yaml").read_text()  # no backward: nothing to choose for `auto`
    assert "checkpointing: none" in config
    (run / "config.yaml").write_text(config.replace("checkpointing: none", "checkpointing: auto"))
    environ = {"OMP_NUM_THREADS": "1", **os.environ, "XDG_CACHE_HOME": str(run.parent / "cache")}

    def export(step: int) -> subprocess.CompletedProcess:
        options = [f"export_step={step}", "parallel.device=cpu"]
        command = [sys.executable, "train.py", f"run={run}", *options]
        return subprocess.run(
            command, cwd=faults.ROOT, env=environ, capture_output=True, text=True, timeout=300
        )

    assert "expected one of [3, 6]" in export(5).stderr
    done = export(3)
    assert done.returncode == 0, done.stderr
    saved = read_whole(run / "checkpoints" / "step-00000003")
    exported = load_file(run / "exported" / "step-00000003" / "export" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    (key,) = [key for key in saved if key.startswith("parameters/") and key.endswith(name)]
    assert torch.equal(saved[key], exported[name])


@pytest.mark.slow
def test_a_warm_reference_cache_changes_no_bit(tmp_path):
    """Dropout draws at step 1 what it would have drawn if the cache had been filled before it."""
    cold, warm = folder(tmp_path, "cold"), folder(tmp_path, "warm")
    setting = Setting(processes=1, lora=True, asynchronous=True)
    faults.finish(cold, setting, 3)
    shutil.copytree(cold.parent / "cache", warm.parent / "cache")
    faults.finish(warm, setting, 3)
    assert faults.find_difference(cold, warm, 3) is None
