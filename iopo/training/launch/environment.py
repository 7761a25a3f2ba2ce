"""What a run must write down about the code, the libraries and the machine it ran on."""

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "hydra-core", "triton", "wandb")


def describe_environment(repository: Path) -> dict[str, Any]:
    """Facts for environment.json: argv, git commit and diff, versions, host, cores, GPUs.

    repository: folder of the source; without git, or outside a repository, the commit is null.
    The result is not redacted: `open_run` does that.
    """
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": sys.argv,
        "git_commit": _git(repository, "rev-parse", "HEAD"),
        "git_diff": _git(repository, "diff", "HEAD"),
        "python": platform.python_version(),
        "packages": _versions(),
        "host": platform.node(),
        "cpu": _cpu(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def _versions() -> dict[str, str]:
    installed = {d.metadata["Name"].lower() for d in metadata.distributions()}
    return {name: metadata.version(name) for name in _PACKAGES if name in installed}


def _cpu() -> str:
    """The processor's name, on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")


def _git(repository: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *arguments], capture_output=True, text=True, timeout=20
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
