"""What the benchmarks share: memory of this process (Linux), facts about the machine, JSON."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from iopo.kernels.tiled import bf16_speed

ROOT = Path(__file__).parent.parent
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# 10^12 dense bfloat16 operations a second, from the data sheets
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "B200": 2250}


def resident_gb() -> float:
    """Resident memory now, 10^9 bytes."""
    return _field("VmRSS")


def peak_gb() -> float:
    """The most resident memory since reset_peak, 10^9 bytes."""
    return _field("VmHWM")


def reset_peak() -> None:
    """Forget the peak so far."""
    CLEAR.write_text("5")


def _field(name: str) -> float:
    for line in STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / 1e9
    raise RuntimeError(f"{STATUS} has no {name}; peak memory is measured on Linux only")


def facts(model: Path, dtype: str, threads: int) -> dict[str, Any]:
    """What a number needs to be repeated."""
    program = sys.modules["__main__"].__spec__  # of `python -m benchmarks.NAME`
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["python -m", program.name if program else "", *sys.argv[1:]]),
        "machine": processor(),
        "threads": threads,
        "bf16_speed": round(bf16_speed(), 2),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": model.name,
        "dtype": dtype,
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def peak_tflops(gpu: str) -> float | None:
    """Dense bfloat16 peak of a GPU by its name; None for one that is not listed."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in gpu), None)


def run_child(
    command: Sequence[str | Path], request: Any = None, timeout_s: float | None = None, **env: str
) -> Any:
    """The JSON on the last line that a Python command prints, run in a process of its own.

    request: sent as JSON to its standard input. env: added to its environment.
    Raises RuntimeError with the end of what it said if it fails.
    """
    done = subprocess.run(
        list(map(str, command)), input=json.dumps(request), capture_output=True, text=True,
        cwd=ROOT, timeout=timeout_s, env=os.environ | env, check=False,
    )  # fmt: skip
    if done.returncode:
        said = f"{' '.join(map(str, command))}: exit code {done.returncode}"
        raise RuntimeError(f"{said}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def write_json(path: Path | None, report: Any) -> None:
    """Write a report; None: nowhere."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
