"""Time, extra memory and error of the head on a CPU, against what else there is.

    python -m benchmarks.linear_logprob [--quick] [--measure times] [--minutes M] [--json FILE]
    python -m benchmarks.linear_logprob --markdown FILE      # the tables of an earlier run

Times: all variants in one process, one after the other in each round, median and quartiles of the
rounds; a product of two square float32 matrices is timed in the same rounds, and its speed is the
machine's. Memory: each variant in a fresh process, peak resident size of its second step less the
size before it, outputs (the gradients) included. The JSON is rewritten after every case, and what
it holds is not measured again: repeat the command until all is there. --quick measures the cases
that decide the targets, in half an hour to an hour on two cores; all of them take hours.
"""

import argparse
import ctypes
import itertools
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.common import peak_gb, processor, reset_peak, resident_gb, run_child
from benchmarks.heads import NEEDED, OURS, WHOLE, errors, exact, heads, make_inputs, step
from iopo.kernels.tiled import FAST, bf16_speed

PASSES = ("forward", "frozen", "trainable")  # frozen, trainable: forward and backward
TARGETS = {"forward": 1.1, "frozen": 1.0, "trainable": 1.0, "memory": 10.0}
SHAPES = {  # (D, V): R
    (576, 49152): (256, 1024, 2048, 4096),
    (896, 152064): (256, 1024, 2048, 4096),
    (896, 49152): (256, 1024, 2048, 4096),
    (576, 152064): (256, 1024, 2048, 4096),
}
QUICK = {(576, 49152): (256, 2048, 4096), (896, 152064): (256, 2048)}
LARGEST_ERROR = {
    "float32": 1e-3,
    "bfloat16": 0.5,
}  # nats; beyond it a variant is not the same thing
ROUNDS = (3, 20)  # at least, at most


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


def cases(quick: bool) -> list[Case]:
    """Without a unit for bfloat16 products their emulation is measured once: it is 20x slower."""
    chosen = []
    for (width, words), all_rows in (QUICK if quick else SHAPES).items():
        for rows, dtype, name in itertools.product(all_rows, LARGEST_ERROR, PASSES):
            case = Case(rows, width, words, dtype, name)
            emulated = dtype == "bfloat16" and bf16_speed() <= FAST
            if not emulated or (rows, width, words) == (256, 576, 49152):
                chosen.append(case)
    return chosen


def time_case(case: Case, names: list[str], seconds: float) -> dict:
    """Interleaved rounds until `seconds` are used; the first step of each variant is checked."""
    inputs, available = case.inputs(), heads()
    truth_R = exact(inputs, rows=64)
    results: dict[str, dict] = {}
    for name in names:
        before = time.perf_counter()
        logp = step(available[name], case.pass_name, inputs)
        first = time.perf_counter() - before
        error = errors(available[name], logp, truth_R, inputs)
        if error["mean"] > LARGEST_ERROR[case.dtype]:
            raise ValueError(f"{name} is off by {error['mean']:.1e} nats: not the same function")
        results[name] = {"error": error, "first_s": round(first, 2)}
    square = torch.randn(2048, 2048)
    product = torch.empty_like(square)
    times: dict[str, list[float]] = {name: [] for name in [*names, "product"]}
    start = time.perf_counter()
    while len(times["product"]) < ROUNDS[1]:
        for name, seen in times.items():
            before = time.perf_counter()
            if name == "product":
                torch.mm(square, square, out=product)
            else:
                step(available[name], case.pass_name, inputs)
            seen.append(time.perf_counter() - before)
        if len(times["product"]) >= ROUNDS[0] and time.perf_counter() - start > seconds:
            break
    for name in names:
        low, median, high = (round(1e3 * t, 2) for t in statistics.quantiles(times[name], n=4))
        results[name] |= {"ms": median, "q25": low, "q75": high}
    flops = 2 * 2048**3 / statistics.median(times["product"])
    return {"rounds": len(times["product"]), "gflops": round(flops / 1e9, 1), "variants": results}


def peak_extra_bytes(case: Case, name: str) -> int:
    """In this process: peak resident bytes during the second step, less those before it."""
    inputs, head = case.inputs(), heads()[name]
    small = Case(16, case.width, case.words, case.dtype, case.pass_name).inputs()
    # Libraries load and threads start; what is compiled is compiled for its shapes.
    step(head, case.pass_name, inputs if name == "compile" else small)
    inputs[0].grad = inputs[1].grad = None
    del small
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident_gb()
    reset_peak()
    step(head, case.pass_name, inputs)
    return round((peak_gb() - before) * 1e9)


def affordable(case: Case) -> tuple[list[str], list[str]]:
    """(variants whose memory this machine has, the others), by a generous guess."""
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    copies = 2.5 if case.pass_name == "forward" else 5
    needed = {
        name: 4 * copies * case.words * ((case.rows if name in WHOLE else 512) + 2 * case.width)
        for name in heads()
    }
    return (
        [name for name, size in needed.items() if size < 0.9 * available],
        [name for name, size in needed.items() if size >= 0.9 * available],
    )


def in_fresh_process(arguments: list[str], threads: int) -> dict:
    command = [sys.executable, "-m", "benchmarks.linear_logprob", "--threads", str(threads)]
    return run_child([*command, *arguments], OMP_NUM_THREADS=str(threads))


def measure(case: Case, cell: dict, arguments: argparse.Namespace) -> None:
    """Add to the cell what it lacks: times from one fresh process, memory from one per variant."""
    text, threads = json.dumps(asdict(case)), arguments.threads
    names, cell["skipped"] = affordable(case)
    if "times" in arguments.measure and "variants" not in cell:
        options = ["--names", ",".join(names), "--seconds", str(arguments.seconds)]
        cell |= in_fresh_process(["--child", text, *options], threads)
    if "memory" in arguments.measure and "extra_bytes" not in cell and case.rows >= 2048:
        cell["extra_bytes"] = {
            name: in_fresh_process(["--child", text, "--memory", name], threads)["extra_bytes"]
            for name in names
        }


def machine(threads: int) -> dict:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_unit": bf16_speed() > FAST,
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def run_all(arguments: argparse.Namespace) -> None:
    path, start = arguments.json, time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {"cases": []}
    cells = {Case(**cell["case"]): cell for cell in before["cases"]}
    for case in cases(arguments.quick):
        if time.monotonic() - start > 60 * arguments.minutes:
            print("the time is up; the same command goes on from here")
            break
        cell = cells.setdefault(case, {"case": asdict(case)})
        known = len(cell)
        measure(case, cell, arguments)
        report = {"machine": machine(arguments.threads), "targets": TARGETS}
        lines = ",\n ".join(json.dumps(cell) for cell in cells.values())
        path.write_text(json.dumps(report)[:-1] + f', "cases": [\n {lines}\n]}}\n')
        if len(cell) > known:
            print(f"{time.monotonic() - start:.0f} s: {case}", flush=True)
    print("\n" + tables(json.loads(path.read_text())))


# --- tables, from the JSON --------------------------------------------------------------------


def tables(report: dict) -> str:
    """Times with the verdict per case, then memory and errors, in Markdown."""
    cells = report["cases"]
    names = [OURS]
    for cell in cells:
        names += [name for name in cell.get("variants", {}) if name not in names]
    about = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    times = [_times(cell, names) for cell in cells if "variants" in cell]
    memory = [_memory(cell, names) for cell in cells if "extra_bytes" in cell]
    forward = [cell for cell in cells if cell["case"]["pass_name"] == "forward"]  # as in any pass
    errors = [_errors(cell, names) for cell in forward if "variants" in cell]
    return "\n\n".join(
        [
            about,
            "Milliseconds (the floor divided by them). Floor: the operations that the answer needs "
            "at the speed of a square float32 product, timed in the same rounds.",
            _table(["case", "floor", *names, "best peer / ours", "target"], times),
            "Extra megabytes of one step, returned gradients included.",
            _table(["case", *names, "plain / ours", "target"], memory),
            "Largest error of a row's log-probability in nats, against float64.",
            _table(["case", *names], errors),
        ]
    )


def floor_ms(cell: dict) -> float:
    case = cell["case"]
    operations = NEEDED[case["pass_name"]] * case["rows"] * case["width"] * case["words"]
    return operations / cell["gflops"] / 1e6


def verdict(cell: dict) -> tuple[float, bool]:
    """(time of the fastest peer over ours, is the target met)."""
    ms = {name: found["ms"] for name, found in cell["variants"].items()}
    ratio = min(value for name, value in ms.items() if name != OURS) / ms[OURS]
    return ratio, ratio >= TARGETS[cell["case"]["pass_name"]]


def _times(cell: dict, names: list[str]) -> list[str]:
    floor, variants = floor_ms(cell), cell["variants"]
    columns = [_label(cell), f"{floor:.0f}"]
    for name in names:
        ms = variants.get(name, {}).get("ms")
        columns.append("not run" if ms is None else f"{ms:.0f} ({floor / ms:.0%})")
    ratio, met = verdict(cell)
    return [*columns, f"{ratio:.2f}", "met" if met else "missed"]


def _memory(cell: dict, names: list[str]) -> list[str]:
    found = cell["extra_bytes"]
    columns = [f"{found[name] / 1e6:.0f}" if name in found else "not run" for name in names]
    if "plain" not in found:
        return [_label(cell), *columns, "", ""]
    ratio = found["plain"] / found[OURS]
    met = "met" if ratio >= TARGETS["memory"] else "missed"
    return [_label(cell), *columns, f"{ratio:.1f}", met]


def _errors(cell: dict, names: list[str]) -> list[str]:
    found = [cell["variants"].get(name, {}).get("error", {}).get("largest") for name in names]
    return [_label(cell), *("" if error is None else f"{error:.1e}" for error in found)]


def _label(cell: dict) -> str:
    c = cell["case"]
    return f"{c['pass_name']} {c['dtype']} R={c['rows']} D={c['width']} V={c['words']}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the cases that decide the targets")
    parser.add_argument("--measure", nargs="+", choices=("times", "memory"),
                        default=("times", "memory"))  # fmt: skip
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/linear_logprob.json"))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="print FILE as tables")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=10.0, help="of timed rounds per case")
    parser.add_argument("--minutes", type=float, default=600.0, help="start no case after this")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--names", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.markdown:
        print(tables(json.loads(arguments.markdown.read_text())))
    elif arguments.memory:
        case = Case(**json.loads(arguments.child))
        print(json.dumps({"extra_bytes": peak_extra_bytes(case, arguments.memory)}))
    elif arguments.child:
        case = Case(**json.loads(arguments.child))
        print(json.dumps(time_case(case, arguments.names.split(","), arguments.seconds)))
    else:
        run_all(arguments)


if __name__ == "__main__":
    main()
