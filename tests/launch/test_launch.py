"""Workers are spawned or adopted, and every bad end leaves a cause, stacks and an exit code."""

import atexit
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from iopo.training.launch import launcher
from iopo.training.launch.launcher import launch
from iopo.training.launch.placement import RankInfo, find_placement, first_host
from iopo.training.launch.signals import stop_clock
from iopo.training.seeds import seed_process, stream_seed

# ---- workers: functions of this module, because spawned ranks import them by name -------------


def sum_ranks(cfg, run_dir, ranks, control):
    value = torch.tensor(float(ranks.rank + 1))
    dist.all_reduce(value)
    (run_dir / f"sum-{ranks.rank}").write_text(f"{value.item()} {ranks.world_size} {cfg['x']}")


def fail_on_rank_1(cfg, run_dir, ranks, control):
    if ranks.rank == 1:
        raise ValueError("row 7 is bad; password=hunter2hunter2")
    dist.barrier()


def fail_everywhere(cfg, run_dir, ranks, control):
    raise ValueError("the same on all")


def killed_rank(cfg, run_dir, ranks, control):
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def exiting_rank(cfg, run_dir, ranks, control):
    if ranks.rank == 1:
        os._exit(3)
    time.sleep(1000)


def aborts_at_exit(cfg, run_dir, ranks, control):
    atexit.register(os.abort)


def export_on_rank_0(cfg, run_dir, ranks, control):
    """Rank 1 ends, and its NCCL, for which a function stands here, waits for rank 0's."""
    done = run_dir / "exported"
    if ranks.rank == 0:
        stop_clock()
        time.sleep(5)
        done.write_text("yes")
    else:
        dist.destroy_process_group = lambda: wait_for(done)


def hanging_rank(cfg, run_dir, ranks, control):
    if ranks.rank == 1:
        time.sleep(1000)
    dist.barrier()


def step_until_stopped(cfg, run_dir, ranks, control):
    (run_dir / f"pid-{ranks.rank}").write_text(str(os.getpid()))
    for step in range(cfg):
        time.sleep(0.01)
        if control.should_stop():
            (run_dir / f"stopped-{ranks.rank}").write_text(str(step))
            return


def never_stops(cfg, run_dir, ranks, control):
    (run_dir / f"pid-{ranks.rank}").write_text(str(os.getpid()))
    time.sleep(1000)


# ---- helpers -------------------------------------------------------------------------------

_PROGRAM = """
import sys
from pathlib import Path
import test_launch
from iopo.training.launch import launch
if __name__ == "__main__":
    worker = getattr(test_launch, sys.argv[1])
    code = launch(worker, 3000, Path(sys.argv[2]), processes=int(sys.argv[3]), backend="gloo",
                  timeout_s=60)
    sys.exit(code)
"""


def start_program(tmp_path: Path, worker: str, processes: int, *prefix: str) -> subprocess.Popen:
    script = tmp_path / "program.py"
    script.write_text(_PROGRAM)
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    environ = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [*(prefix or (sys.executable,)), str(script), worker, str(tmp_path), str(processes)]
    return subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, timeout_s: float = 60) -> str:
    end = time.monotonic() + timeout_s
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)
    return path.read_text()


def is_gone(pid: int) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


# ---- spawned ranks ---------------------------------------------------------------------------


def test_every_rank_runs_the_worker_in_one_group(tmp_path):
    assert launch(sum_ranks, {"x": 5}, tmp_path, processes=2, backend="gloo", timeout_s=60) == 0
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in range(2)] == ["3.0 2 5"] * 2
    assert list((tmp_path / "errors").iterdir()) == []
    assert not (tmp_path / "FAILED").exists()


def test_a_raising_rank_is_named_once_and_its_secrets_are_not(tmp_path, capfd):
    code = launch(fail_on_rank_1, None, tmp_path, processes=2, backend="gloo", timeout_s=60)
    printed = capfd.readouterr().err
    assert code == 1
    assert printed.count("row 7 is bad") == 1
    assert "rank 1: ValueError" in (tmp_path / "FAILED").read_text()
    traceback = (tmp_path / "errors" / "rank-1.txt").read_text()
    assert "fail_on_rank_1" in traceback
    assert "hunter2" not in printed + traceback + (tmp_path / "FAILED").read_text()


@pytest.mark.slow
def test_the_same_error_on_all_ranks_is_printed_once(tmp_path, capfd):
    assert launch(fail_everywhere, None, tmp_path, processes=2, backend="gloo", timeout_s=60) == 1
    assert capfd.readouterr().err.count("the same on all") == 1
    assert {p.name for p in (tmp_path / "errors").glob("rank-?.txt")} == {
        "rank-0.txt",
        "rank-1.txt",
    }


def test_a_killed_rank_is_the_cause_not_the_broken_connection_it_leaves(tmp_path, capfd):
    assert launch(killed_rank, None, tmp_path, processes=2, backend="gloo", timeout_s=60) == 1
    assert "rank 1 was ended by SIGKILL" in capfd.readouterr().err
    assert "rank 1 was ended by SIGKILL" in (tmp_path / "FAILED").read_text()


@pytest.mark.slow
def test_an_exiting_rank_ends_a_rank_that_does_not_notice_and_shows_its_stack(tmp_path):
    start = time.monotonic()
    assert launch(exiting_rank, None, tmp_path, processes=2, backend="gloo", timeout_s=3) == 1
    assert time.monotonic() - start < 60
    assert "rank 1 exited with code 3" in (tmp_path / "FAILED").read_text()
    assert "exiting_rank" in (tmp_path / "errors" / "rank-0.stacks.txt").read_text()


def test_a_rank_whose_work_is_done_does_not_fail_in_its_teardown(tmp_path):
    assert launch(aborts_at_exit, None, tmp_path, processes=2, backend="gloo", timeout_s=60) == 0
    assert not (tmp_path / "FAILED").exists()


def test_a_rank_that_waits_for_the_export_of_rank_0_is_no_hang(tmp_path):
    assert launch(export_on_rank_0, None, tmp_path, processes=2, backend="gloo", timeout_s=3) == 0


def test_a_hang_ends_and_shows_the_stack_of_every_rank(tmp_path):
    assert launch(hanging_rank, None, tmp_path, processes=2, backend="gloo", timeout_s=5) == 1
    assert "made no progress" in (tmp_path / "FAILED").read_text()
    for rank in range(2):  # the rank whose clock ends second may see the other go: a traceback
        written = [p.read_text() for p in (tmp_path / "errors").glob(f"rank-{rank}.*txt")]
        assert "hanging_rank" in "".join(written)


# ---- signals through the whole program -------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 75),
        pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_program_stops_all_ranks_at_one_step(tmp_path, number, code):
    program = start_program(tmp_path, "step_until_stopped", 2)
    wait_for(tmp_path / "pid-0"), wait_for(tmp_path / "pid-1")
    program.send_signal(number)
    assert program.wait(120) == code
    assert (tmp_path / "stopped-0").read_text() == (tmp_path / "stopped-1").read_text()
    assert not (tmp_path / "FAILED").exists()


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(tmp_path):
    program = start_program(tmp_path, "step_until_stopped", 2)
    pid = int(wait_for(tmp_path / "pid-1"))
    os.kill(pid, signal.SIGTERM)
    assert program.wait(120) == 75
    assert (tmp_path / "stopped-0").read_text() == (tmp_path / "stopped-1").read_text()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_ranks_that_do_not_listen(tmp_path):
    program = start_program(tmp_path, "never_stops", 2)
    pids = [int(wait_for(tmp_path / f"pid-{rank}")) for rank in range(2)]
    program.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert program.poll() is None
    program.send_signal(signal.SIGINT)
    assert program.wait(120) == 130
    assert all(is_gone(pid) for pid in pids)


def test_ranks_die_with_a_killed_parent(tmp_path):
    program = start_program(tmp_path, "never_stops", 2)
    pids = [int(wait_for(tmp_path / f"pid-{rank}")) for rank in range(2)]
    program.kill()
    program.wait(120)
    assert all(is_gone(pid) for pid in pids)


# ---- adopted ranks ---------------------------------------------------------------------------


def torchrun(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "torch.distributed.run", *arguments)


def test_torchrun_ranks_are_adopted(tmp_path):
    program = start_program(
        tmp_path, "step_until_stopped", 1, *torchrun("--standalone", "--nproc-per-node", "2")
    )
    os.kill(int(wait_for(tmp_path / "pid-1")), signal.SIGUSR1)
    program.wait(120)
    assert (tmp_path / "stopped-0").read_text() == (tmp_path / "stopped-1").read_text()


@pytest.mark.slow
def test_two_torchrun_agents_on_loopback(tmp_path):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    agents = [
        start_program(
            tmp_path,
            "step_until_stopped",
            1,
            *torchrun("--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"),
            *("--master-addr", "127.0.0.1", "--master-port", str(port)),
        )
        for node in range(2)
    ]
    os.kill(int(wait_for(tmp_path / "pid-1")), signal.SIGUSR1)
    for agent in agents:
        agent.wait(120)
    assert (tmp_path / "stopped-0").read_text() == (tmp_path / "stopped-1").read_text()


# ---- placement and seeds: pure functions -----------------------------------------------------

_SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "41234",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
}


@pytest.mark.parametrize(("visible", "device"), [(4, "cuda:1"), (1, "cuda:0")])
def test_slurm_with_one_task_per_gpu_is_adopted(monkeypatch, visible, device):
    """With --gpus-per-task=1 SLURM shows each task its own GPU only, as cuda:0."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    placement = find_placement(4, _SRUN)
    assert placement.adopted and placement.world_size == 8
    ranks = placement.ranks(placement.local_rank, "nccl")
    assert (ranks.rank, ranks.local_rank, str(ranks.device)) == (5, 1, device)
    assert (placement.address, placement.port) == ("gpu003", 21234)
    assert not placement.is_main


def test_slurm_with_one_task_per_node_spawns_that_node():
    environ = {**_SRUN, "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    placement = find_placement(4, environ)
    assert not placement.adopted
    assert [placement.ranks(i, "gloo").rank for i in range(4)] == [4, 5, 6, 7]


@pytest.mark.parametrize(("world", "backend"), [(1, "gloo"), (2, "cpu:gloo,cuda:nccl")])
def test_one_process_with_a_gpu_needs_no_nccl(monkeypatch, world, backend):
    made = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda name, **keys: made.update(keys, of=name))
    ranks = RankInfo(0, world, 0, world, torch.device("cuda", 0))
    launcher._init_group(launcher._Task(sum_ranks, None, Path(), "nccl", 60), ranks, None)
    assert made["of"] == backend and (made["device_id"] is None) == (world == 1)


@pytest.mark.parametrize(("name", "kept"), [(None, None), ("PYTORCH_CUDA_ALLOC_CONF", "backend:x")])
def test_gpu_memory_grows_in_segments_unless_the_user_said_otherwise(monkeypatch, name, kept):
    environ = {} if name is None else {name: kept}
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setattr(launcher, "_spawn", lambda task, placement: 0)
    launch(sum_ranks, None, Path(), processes=1, backend="nccl", timeout_s=60)
    assert environ == (
        {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if not name else {name: kept}
    )


def test_an_allocation_without_srun_is_not_adopted():
    environ = {k: v for k, v in _SRUN.items() if k != "SLURM_STEP_ID"}
    placement = find_placement(2, environ)
    assert (placement.adopted, placement.world_size, placement.is_main) == (False, 2, True)


@pytest.mark.parametrize(
    ("processes", "environ", "message"),
    [
        (3, _SRUN, "8 tasks on 2 nodes"),
        (1, {"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK"),
    ],
)
def test_contradicting_launchers_are_refused(processes, environ, message):
    with pytest.raises(ValueError, match=message):
        find_placement(processes, environ)


@pytest.mark.parametrize(
    ("text", "host"),
    [("n1", "n1"), ("gpu[003-007,9],x", "gpu003"), ("a,b", "a"), ("r[1-2]n5", "r1n5")],
)
def test_first_host_of_a_node_list(text, host):
    assert first_host(text) == host


def test_streams_differ_by_name_and_place_and_never_change():
    assert stream_seed(0, "init") == 7797302695267191734  # a resumed run relies on it
    seeds = {stream_seed(s, n, r) for s in range(3) for n in ("init", "rank") for r in range(3)}
    assert len(seeds) == 18 and all(0 <= s < 2**63 for s in seeds)


def test_seed_process_repeats_all_generators():
    import random

    import numpy as np

    def draw():
        seed_process(7, "rank", 0)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw() == draw()
