"""Commands in processes of their own, several at once, stoppable: what was done, and what it cost.

RUN/jobs.jsonl has a row for every process that ended, RUN/logs what it printed.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iopo.files import read_records

REPOSITORY = Path(__file__).resolve().parents[1]
STOPPED = 75  # as train.py: saved, start again to go on


def print_now(line: str) -> None:
    """For readers of log files: at once, and in one piece where threads print."""
    print(f"{line}\n", end="", flush=True)


@dataclass(frozen=True)
class Job:
    """A command in a process of its own, and the file that exists once it is done."""

    name: str  # its folder under the run folder, and what it does there
    command: list[str]
    marker: Path


class Runner:
    """Runs jobs, several at once, keeps their output and what they cost in files."""

    def __init__(self, run: Path, at_once: int, cwd: Path = REPOSITORY):
        self.run_dir, self.at_once, self.cwd = run, at_once, cwd
        self.stopping = False
        self.failed: list[str] = []
        self.live: dict[str, int] = {}  # name -> process id
        self.lock = threading.Lock()
        # Held by the jobs too: those of a killed call end before a new one starts.
        self.held = open(run / "lock", "w")
        try:
            fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print_now("waiting for the jobs of another call to end")
            fcntl.flock(self.held, fcntl.LOCK_EX)

    def stop(self, *_: Any) -> None:
        """End the running jobs, which save, and start no others. A signal handler."""
        self.stopping = True
        for pid in list(self.live.values()):
            self._end(pid)

    def _end(self, pid: int) -> None:
        # not Popen.terminate, which may reap the process before wait4 asks what it used
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)

    def all(self, tasks: Sequence[Callable[[], object]]) -> None:
        """Call all tasks, at_once at a time; leaves the program if it was told to stop."""
        with ThreadPoolExecutor(self.at_once) as pool:
            list(pool.map(lambda task: None if self.stopping else task(), tasks))
        if self.stopping:
            sys.exit(STOPPED)

    def job(self, job: Job) -> bool:
        """Run one job unless it is done; whether it is done now."""
        if job.marker.exists():
            return True
        if self.stopping:
            return False
        print_now(f"{time.strftime('%H:%M:%S')} {job.name}")
        log = self.run_dir / "logs" / (job.name.replace("/", "_").replace(" ", "_") + ".log")
        log.parent.mkdir(exist_ok=True)
        cores = len(os.sched_getaffinity(0))
        threads = {"OMP_NUM_THREADS": str(max(1, cores // self.at_once))}
        started = time.time()
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, *job.command], stdout=file, stderr=file, cwd=self.cwd,
                env=threads | os.environ, pass_fds=[self.held.fileno()],
            )  # fmt: skip
            self.live[job.name] = process.pid
            if self.stopping:  # told so while it started
                self._end(process.pid)
            _, status, usage = os.wait4(process.pid, 0)  # which also says what it used
            process.returncode = os.waitstatus_to_exitcode(status)
            del self.live[job.name]
        done = process.returncode == 0 and job.marker.exists()
        row = {
            "job": job.name, "code": process.returncode, "seconds": round(time.time() - started, 1),
            "peak_rss_gb": round(usage.ru_maxrss * 1024 / 1e9, 3),
            "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": job.command,
        }  # fmt: skip
        with self.lock, (self.run_dir / "jobs.jsonl").open("a") as rows:
            rows.write(json.dumps(row) + "\n")
        if not done and not self.stopping:
            self.failed.append(job.name)
            print_now(f"failed ({process.returncode}): {job.name}; {log} says why")
        return done


def costs(run: Path) -> dict[str, dict[str, float]]:
    """Seconds (all attempts) and peak resident GB of every job, from jobs.jsonl."""
    found: dict[str, dict[str, float]] = {}
    for row in read_records(run / "jobs.jsonl") if (run / "jobs.jsonl").exists() else []:
        cost = found.setdefault(row["job"], {"seconds": 0.0, "peak_rss_gb": 0.0})
        cost["seconds"] += row["seconds"]
        cost["peak_rss_gb"] = max(cost["peak_rss_gb"], row["peak_rss_gb"])
    return found
