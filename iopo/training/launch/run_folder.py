"""The run folder, used by one live run at a time.

config.yaml        the resolved config of the latest attempt (config.1.yaml, ...: earlier ones)
environment.json   one entry per attempt: code, versions, machine, argv
metrics.jsonl      one line per logged step
checkpoints/       see checkpoint/folders.py
errors/            tracebacks and stacks of the latest attempt, per rank
COMPLETE | FAILED  how the latest attempt ended; neither: it runs, was stopped, or was killed
lock               held by a live run; names its process
"""

import fcntl
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

from iopo.files import write_text
from iopo.redact import redact, redact_values

COMPLETE_FILE = "COMPLETE"
FAILED_FILE = "FAILED"
_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "hydra-core", "triton", "wandb")


@contextmanager
def open_run(run_dir: Path, *, config_text: str, environment: dict[str, Any]) -> Iterator[None]:
    """Make or reopen the run folder and hold its lock; in the main process (`Placement.is_main`).

    Reopening clears the previous attempt's COMPLETE, FAILED and errors/. Secrets are redacted.
    Raises ValueError if a live run holds the folder, or if it holds files but no run.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    found = [p.name for p in run_dir.iterdir()]
    # Hydra makes its output folder before the program starts, with its own files in it.
    foreign = [n for n in found if n not in (".hydra", "lock") and not n.endswith(".log")]
    if foreign and "config.yaml" not in found:
        raise ValueError(
            f"{run_dir} is not a run folder: it holds {', '.join(sorted(foreign)[:5])} but no "
            "config.yaml; choose another run= or empty this one"
        )
    with _lock(run_dir):  # closing the file releases the lock; so does any death of this process
        _record_attempt(run_dir, config_text, environment)
        yield


def read_complete(run_dir: Path) -> dict[str, Any] | None:
    """What `mark_complete` wrote, if the run in this folder reached its last step."""
    path = run_dir / COMPLETE_FILE
    return json.loads(path.read_text()) if path.exists() else None


def mark_complete(run_dir: Path, description: dict[str, Any]) -> None:
    """Record that the run reached its last step, once everything is on disk.

    description: "step", and the fingerprint that `check_resume` compares; secrets are redacted.
    """
    write_text(run_dir / COMPLETE_FILE, json.dumps(redact_values(description), indent=1) + "\n")


def describe_environment(repository: Path) -> dict[str, Any]:
    """One entry of environment.json, not redacted yet. repository: folder of the source; without
    git, or outside a repository, the commit is null."""
    # looked up by name: one broken package among the others would end a walk through all
    installed = [name for name in _PACKAGES if any(metadata.distributions(name=name))]
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": sys.argv,
        "git_commit": _git(repository, "rev-parse", "HEAD"),
        "git_diff": _git(repository, "diff", "HEAD"),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in installed},
        "host": platform.node(),
        "cpu": cpu[1] if cpu else platform.processor(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def _git(repository: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(repository), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _lock(run_dir: Path) -> TextIO:
    file = open(run_dir / "lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise ValueError(
            f"{run_dir} is in use by a live run ({holder or 'just starting'}); wait for it, stop "
            "it, or choose another run="
        ) from None
    file.truncate(0)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"pid {os.getpid()} on {socket.gethostname()} since {started}")
    file.flush()
    return file


def _record_attempt(run_dir: Path, config_text: str, environment: dict[str, Any]) -> None:
    for name in (COMPLETE_FILE, FAILED_FILE):
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / "errors", ignore_errors=True)

    config = run_dir / "config.yaml"
    config_text = redact(config_text)
    if config.exists() and config.read_text() != config_text:
        earlier = len(list(run_dir.glob("config.*.yaml")))
        config.rename(run_dir / f"config.{earlier + 1}.yaml")
    write_text(config, config_text)

    path = run_dir / "environment.json"
    attempts = json.loads(path.read_text()) if path.exists() else []
    write_text(path, json.dumps(redact_values([*attempts, environment]), indent=1) + "\n")
