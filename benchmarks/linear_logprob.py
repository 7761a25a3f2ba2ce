"""Time, extra memory and error of the head on a CPU, against what else there is.

    python -m benchmarks.linear_logprob [--quick] [--json FILE] [--threads N]
    python -m benchmarks.linear_logprob --markdown FILE      # a table from an earlier run

Times: all variants in one process, one after the other in each round, median and quartiles of the
rounds. Memory: each variant in a fresh process, peak resident size of its second step less the
size before it, outputs (the gradients) included. Takes about two hours, --quick about ten minutes;
the JSON is rewritten after every case.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.heads import OURS, errors, heads, make_inputs, step

PASSES = ("forward", "frozen", "trainable")  # frozen, trainable: forward and backward
WIDTH_AND_WORDS = ((576, 49152), (896, 49152), (576, 152064), (896, 152064))
ROWS = (256, 1024, 2048, 4096)
QUICK_WIDTH_AND_WORDS, QUICK_ROWS, QUICK_SECONDS = ((576, 49152),), (256, 2048), 6.0
TARGETS = {"forward": 1.1, "frozen": 1.0, "trainable": 1.0, "memory": 10.0}


@dataclass(frozen=True)
class Case:
    rows: int
    width: int
    words: int
    dtype: str
    pass_name: str

    def inputs(self):
        dtype = getattr(torch, self.dtype)
        shape = (self.rows, self.width, self.words)
        return make_inputs(shape, dtype, self.pass_name, device="cpu", std=4.0)

    def heads(self):
        return heads(trainable=self.pass_name == "trainable")

    def label(self) -> str:
        return f"{self.pass_name} {self.dtype} R={self.rows} D={self.width} V={self.words}"


def time_case(case: Case, names: list[str], seconds: float) -> dict[str, dict]:
    """Interleaved rounds until `seconds` are used, at least 3 and at most 20."""
    inputs, available = case.inputs(), case.heads()
    results: dict[str, dict] = {
        name: {"error": errors(available[name], inputs, rows=64)} for name in names
    }
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        before = time.perf_counter()
        step(available[name], case.pass_name, inputs)
        results[name]["first_s"] = time.perf_counter() - before
    start = time.perf_counter()
    while len(times[names[0]]) < 20:
        for name in names:
            before = time.perf_counter()
            step(available[name], case.pass_name, inputs)
            times[name].append(time.perf_counter() - before)
        if len(times[names[0]]) >= 3 and time.perf_counter() - start > seconds:
            break
    for name in names:
        low, median, high = statistics.quantiles(times[name], n=4)
        results[name]["ms"] = {
            "median": median * 1e3,
            "q25": low * 1e3,
            "q75": high * 1e3,
            "rounds": len(times[name]),
        }
    return results


def peak_extra_bytes(case: Case, name: str) -> int:
    """In this process: peak resident bytes during the second step, less those before it."""
    inputs, head = case.inputs(), case.heads()[name]
    small = Case(16, case.width, case.words, case.dtype, case.pass_name).inputs()
    step(head, case.pass_name, small)  # libraries load and threads start
    del small
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # restart the high-water mark
    step(head, case.pass_name, inputs)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {key}; this benchmark needs Linux")


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ValueError("/proc/meminfo has no MemAvailable; this benchmark needs Linux")


def needed_bytes(case: Case, name: str) -> int:
    """A generous guess, to leave out what would end the benchmark for lack of memory."""
    whole = name in ("plain", "compile", "linear_cross_entropy")
    copies = 2.5 if case.pass_name == "forward" else 5
    return int(copies * 4 * case.words * ((case.rows if whole else 512) + 2 * case.width))


def in_fresh_process(arguments: list[str], threads: int) -> dict:
    command = [sys.executable, "-m", "benchmarks.linear_logprob", "--threads", str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"failed": f"exit code {done.returncode}: {reason}"}
    return json.loads(done.stdout.splitlines()[-1])


def run_case(case: Case, seconds: float, threads: int) -> dict:
    """Times from one fresh process, memory from one per variant."""
    text = json.dumps(asdict(case))
    names = [n for n in case.heads() if needed_bytes(case, n) < 0.9 * _available_bytes()]
    skipped = [n for n in case.heads() if n not in names]
    variants = in_fresh_process(
        ["--child", text, "--names", ",".join(names), "--seconds", str(seconds)], threads
    )
    if "failed" in variants:
        return {**asdict(case), **variants, "skipped": skipped}
    for name in names:
        memory = in_fresh_process(["--child", text, "--memory", name], threads)
        variants[name]["extra_bytes"] = memory.get("extra_bytes")
    return {**asdict(case), "variants": variants, "skipped": skipped, **verdict(case, variants)}


def verdict(case: Case, variants: dict[str, dict]) -> dict:
    """Our best variant against the fastest peer, and its memory against the plain way."""
    median = {name: found["ms"]["median"] for name, found in variants.items()}
    ours = min((name for name in median if name in OURS), key=lambda name: median[name])
    peer = min((name for name in median if name not in OURS), key=lambda name: median[name])
    result: dict = {"ours": ours, "best_peer": peer, "speedup": median[peer] / median[ours]}
    result["fast_enough"] = result["speedup"] >= TARGETS[case.pass_name]
    mine = variants[ours].get("extra_bytes")
    plain = variants.get("plain", {}).get("extra_bytes")
    if mine and plain:
        result["memory_ratio"] = plain / mine
        result["lean_enough"] = case.rows < 2048 or plain / mine >= TARGETS["memory"]
    return result


def machine(threads: int) -> dict:
    cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu[0].split(":", 1)[1].strip() if cpu else platform.processor(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def markdown(report: dict) -> str:
    """One row per case: time of our best variant, best peer and plain; memory; error; verdict."""
    about = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines = [
        about,
        "",
        "| case | ours ms | best peer ms | ratio | plain ms | extra MB ours / plain | ratio "
        "| largest error ours / plain, nats | targets |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in report["cases"]:
        label = Case(*(cell[key] for key in Case.__dataclass_fields__)).label()
        if "failed" in cell:
            lines.append(f"| {label} | {cell['failed']} | | | | | | | not measured |")
            continue
        variants = cell["variants"]
        ours, peer, plain = (variants.get(n) for n in (cell["ours"], cell["best_peer"], "plain"))
        missed = [
            word
            for key, word in (("fast_enough", "time missed"), ("lean_enough", "memory missed"))
            if cell.get(key) is False
        ]
        error = variants["linear_logprob"]["error"]["largest"]
        columns = [
            f"{label} ({cell['ours']})",
            f"{ours['ms']['median']:.1f}",
            f"{peer['ms']['median']:.1f} ({cell['best_peer']})",
            f"{cell['speedup']:.2f}",
            f"{plain['ms']['median']:.1f}" if plain else "skipped",
            f"{_mb(ours)} / {_mb(plain)}",
            f"{cell['memory_ratio']:.1f}" if "memory_ratio" in cell else "",
            f"{error:.1e} / {plain['error']['largest']:.1e}" if plain else f"{error:.1e}",
            ", ".join(missed) or "met",
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def _mb(variant: dict | None) -> str:
    extra = (variant or {}).get("extra_bytes")
    return "?" if extra is None else f"{extra / 1e6:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, two numbers of rows")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/linear_logprob.json"))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="print FILE as a table")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=20.0, help="of timed rounds per case")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--names", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.markdown:
        print(markdown(json.loads(arguments.markdown.read_text())))
    elif arguments.memory:
        case = Case(**json.loads(arguments.child))
        print(json.dumps({"extra_bytes": peak_extra_bytes(case, arguments.memory)}))
    elif arguments.child:
        case = Case(**json.loads(arguments.child))
        print(json.dumps(time_case(case, arguments.names.split(","), arguments.seconds)))
    else:
        run_all(arguments)


def run_all(arguments: argparse.Namespace) -> None:
    shapes = QUICK_WIDTH_AND_WORDS if arguments.quick else WIDTH_AND_WORDS
    rows = QUICK_ROWS if arguments.quick else ROWS
    seconds = QUICK_SECONDS if arguments.quick else arguments.seconds
    report: dict = {"machine": machine(arguments.threads), "targets": TARGETS, "cases": []}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    for (width, words), r, dtype, pass_name in itertools.product(
        shapes, rows, ("float32", "bfloat16"), PASSES
    ):
        case = Case(r, width, words, dtype, pass_name)
        cell = run_case(case, seconds, arguments.threads)
        report["cases"].append(cell)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
        print(markdown({**report, "cases": [cell]}).splitlines()[-1], flush=True)
    print("\n" + markdown(report))


if __name__ == "__main__":
    main()
