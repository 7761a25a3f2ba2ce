"""Run a worker on every rank: spawn the ranks of this machine, or adopt a launcher's.

One rank is one process, also when there is only one: every run, and every job of a sweep, gets a
fresh process group, CUDA context and signal state. (For a debugger, let the ranks be adopted:
`torchrun --nproc-per-node 1 train.py ...` runs the worker in the process it starts.)

Exit codes are those of signals.py; after a failure see FAILED and errors/ in the run folder.
"""

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from iopo.model.host_memory import tune_malloc
from iopo.training.launch import failures
from iopo.training.launch.placement import Placement, RankInfo, find_placement, from_rank_0
from iopo.training.launch.signals import (
    FAILED,
    INTERRUPTED,
    OK,
    SAVED_REQUEUE,
    STOP_SIGNALS,
    Control,
    heartbeat,
    stop_clock,
)

Worker = Callable[[Any, Path, RankInfo, Control], None]

_GRACE_S = 10.0  # for the other ranks to notice a failure and to write down what they saw
_ENDED_WELL = (OK, SAVED_REQUEUE, INTERRUPTED)


@dataclass(frozen=True)
class _Task:
    """What every rank does, and the limits under which it does it; see `launch`."""

    worker: Worker
    cfg: Any
    run_dir: Path
    backend: str
    timeout_s: float


def launch(
    worker: Worker, cfg: Any, run_dir: Path, *, processes: int, backend: str, timeout_s: float
) -> int:
    """Call `worker(cfg, run_dir, ranks, control)` on every rank; return the run's exit code.

    worker: a function of a module (it is pickled by name). After each step it asks
        `control.should_stop()`, and saves and returns when that is True.
    cfg: anything that pickles. run_dir: an existing folder, shared between machines.
    processes: ranks per machine where none exist yet. backend: "gloo" (CPU) or "nccl" (one GPU
        per rank; small CPU messages still go through gloo, and those of a single rank too).
    timeout_s: longest silence of a rank, in a collective call or between two heartbeats, before it
        counts as hung. A failing rank ends the others within min(timeout_s, 10) s.
    Call it from the main thread: it handles signals. Raises ValueError for a launcher's environment
    that contradicts itself.
    """
    placement = find_placement(processes)
    if backend == "gloo":  # kernels of past shapes; 1024 by default (docs/performance.md)
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    elif "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # lengths vary: blocks that can grow fit all
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    task = _Task(worker, cfg, run_dir, backend, timeout_s)
    return _run_adopted(task, placement) if placement.adopted else _spawn(task, placement)


def _spawn(task: _Task, placement: Placement) -> int:
    """Start the ranks of this machine, pass signals on to them, and wait for their ends."""
    store, port = None, placement.port
    if placement.first_rank == 0:  # the parent hosts it: it outlives every rank, on a free port
        store = dist.TCPStore(placement.address, port, is_master=True, wait_for_workers=False)
        port = store.port
    else:
        _await_folder(task)
    children: list[SpawnProcess] = []
    with _forward_signals(children) as received:
        # Blocked until a rank has its handlers: a signal during its imports must not be lost.
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            for local_rank in range(placement.local_world_size):
                ranks = placement.ranks(local_rank, task.backend)
                child = multiprocessing.get_context("spawn").Process(
                    target=_run_spawned, args=(task, ranks, placement.address, port)
                )
                child.start()
                children.append(child)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        codes = _supervise(children, min(task.timeout_s, _GRACE_S))
    if received.count(signal.SIGINT) > 1:
        return INTERRUPTED
    code = _conclude(task.run_dir, placement, codes)
    # Whoever listened before: submitit's handler requeues the job, and exits.
    for number in dict.fromkeys(received) if code == SAVED_REQUEUE else ():
        if callable(handler := signal.getsignal(number)):
            handler(number, None)
    return code


def _await_folder(task: _Task) -> None:
    """Wait until the folder, which rank 0's machine makes, can be seen from this process."""
    end = time.monotonic() + task.timeout_s
    while not task.run_dir.is_dir():
        if time.monotonic() > end:
            raise ValueError(
                f"run folder {task.run_dir} did not appear within {task.timeout_s:g} s; rank 0's "
                "machine makes it: it must be on a file system that all machines see"
            )
        time.sleep(0.1)


@contextmanager
def _forward_signals(children: list[SpawnProcess]) -> Iterator[list[int]]:
    """Pass stop signals on to all ranks (their own sessions hide them from the terminal).

    A second SIGINT kills them. SIGUSR2, with which submitit warns, is passed on as SIGUSR1: a rank
    would take it for another request. Yields the list of signals received so far.
    """
    received: list[int] = []

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        if received.count(signal.SIGINT) > 1:
            number = signal.SIGKILL
        _send(children, signal.SIGUSR1 if number == signal.SIGUSR2 else number)

    numbers = (*STOP_SIGNALS, signal.SIGUSR2)
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _send(children, signal.SIGKILL)  # only an exception in the parent leaves any alive


def _send(children: Iterable[SpawnProcess], number: int) -> None:
    for child in children:
        if child.is_alive() and child.pid is not None:
            os.kill(child.pid, number)


def _supervise(children: list[SpawnProcess], grace_s: float) -> dict[int, int]:
    """Wait for all ranks; after the first failure end the others within `grace_s`.

    Returns exit codes by local rank, in the order of the ends; those ended here are left out.
    """
    codes: dict[int, int] = {}
    waiting = {child.sentinel: local_rank for local_rank, child in enumerate(children)}
    deadline: float | None = None
    while waiting and (deadline is None or time.monotonic() < deadline):
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = multiprocessing.connection.wait(list(waiting), timeout)
        for local_rank in [rank for sentinel, rank in waiting.items() if sentinel in ready]:
            child = children[local_rank]
            waiting.pop(child.sentinel)
            child.join()
            codes[local_rank] = child.exitcode or OK
            if codes[local_rank] not in _ENDED_WELL and deadline is None:
                deadline = time.monotonic() + grace_s
    if waiting:
        remaining = [children[local_rank] for local_rank in waiting.values()]
        _send(remaining, signal.SIGUSR2)  # stacks, then the end
        time.sleep(0.5)
        _send(remaining, signal.SIGKILL)
    for child in children:
        child.join()
    return codes


def _conclude(run_dir: Path, placement: Placement, codes: dict[int, int]) -> int:
    """The run's exit code; after a failure, one message with its cause."""
    failed = [i for i, code in codes.items() if code not in _ENDED_WELL]
    if not failed:
        return max(codes.values())
    for local_rank in failed:
        rank = placement.first_rank + local_rank
        if not failures.error_path(run_dir, rank).exists():  # a silent death is the cause
            failures.record_death(run_dir, rank, codes[local_rank])
            break
    failures.print_failure(run_dir)
    return FAILED


def _run_spawned(task: _Task, ranks: RankInfo, address: str, port: int) -> None:
    """Main function of a spawned rank."""
    os.setsid()  # Ctrl-C goes to the parent alone, which passes it on
    # Die with the parent, even if it is killed: no orphan may go on writing into the run folder.
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:
        os._exit(FAILED)
    try:
        store = dist.TCPStore(address, port, timeout=timedelta(seconds=task.timeout_s))
        _init_group(task, ranks, dist.PrefixStore("ranks", store))
    except (RuntimeError, OSError) as error:
        failures.record_error(task.run_dir, ranks.rank, error)
        _leave(FAILED)
    _leave(_run_rank(task, ranks, announce=False))


def _run_adopted(task: _Task, placement: Placement) -> int:
    """Be the rank that a launcher made of this process; the run folder is rank 0's."""
    os.environ.setdefault("MASTER_ADDR", placement.address)  # SLURM's tasks: torchrun sets them
    os.environ.setdefault("MASTER_PORT", str(placement.port))
    ranks = placement.ranks(placement.local_rank, task.backend)
    _init_group(task, ranks, None)
    task = replace(task, run_dir=from_rank_0(lambda: task.run_dir))
    _await_folder(task)
    return _run_rank(task, ranks, announce=True)


def _init_group(task: _Task, ranks: RankInfo, store: dist.Store | None) -> None:
    cuda = ranks.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(ranks.device)
    nccl = cuda and ranks.world_size > 1  # one process has nobody to talk to
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if nccl else "gloo",
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        # A little more than the ranks' own hang clock: the stacks come first.
        timeout=timedelta(seconds=task.timeout_s + 5),
        device_id=ranks.device if nccl else None,
    )


def _run_rank(task: _Task, ranks: RankInfo, *, announce: bool) -> int:
    """Run the worker; turn its end, good or bad, into an exit code and files in the run folder.

    Only once the group exists: then rank 0 has cleared errors/ of an earlier attempt. After a
    failure the process ends here, without waiting for ranks that are gone or hang.
    """
    stacks = failures.stacks_path(task.run_dir, ranks.rank)
    stacks.parent.mkdir(exist_ok=True)
    control = Control(stacks, task.timeout_s)
    # OMP_NUM_THREADS, else an equal share of the cores that this process may use.
    share = max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", share)))
    if ranks.device.type == "cpu":
        tune_malloc()
    try:
        task.worker(task.cfg, task.run_dir, ranks, control)
        if ranks.is_main:
            heartbeat()
        else:  # NCCL's end waits for the ranks of the machine, and rank 0 may still write an export
            stop_clock()
        dist.destroy_process_group()
    except BaseException as error:  # SystemExit too: a rank that leaves early is a failure
        control.close()
        if failures.record_error(task.run_dir, ranks.rank, error) and announce:
            failures.print_failure(task.run_dir)
        _leave(FAILED)
    control.close()
    return control.exit_code


def _leave(code: int) -> NoReturn:
    """End the process now: no teardown that could wait for a rank that is gone, or abort after
    work that is done (a thread of a C++ library that needs the interpreter while it ends)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
