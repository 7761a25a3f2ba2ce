"""Table 5 of the paper on one machine: time and memory of SFT, DPO and IOPO, plain and here.

    python -m benchmarks.paper_table5 [--json FILE] [--shape 1000/500] [--only times|memory]

The paper (arXiv 2411.06208, Table 5) trains with one batch size: memory 1x, 2x, 4x and 14.54,
26.30, 34.27 hours for SFT, DPO, IOPO. An example is a row (x1, y1), a pair (x1; y1, y2) or a quad.
"plain" is the first row of the throughput ladder; of this project's ways, "frugal" recomputes every
block in backward, "selective" all but the products and attention, "fast" nothing.
"""

import argparse
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import facts, write_json
from benchmarks.throughput import opened
from benchmarks.throughput_child import Task, measure
from benchmarks.throughput_data import SHAPES, shortened
from benchmarks.throughput_variants import BEST, FRUGAL, PLAIN, SELECTIVE
from iopo.model.host_memory import tune_malloc
from iopo.model.load import default_dtype, resolve_model

WAYS = {"plain": PLAIN, "frugal": FRUGAL, "selective": SELECTIVE, "fast": BEST}
OBJECTIVES = ("sft", "dpo", "iopo")
TARGETS = (  # of IOPO in this project's ways, as multiples of what a plain trainer takes
    ("seconds_per_example", "dpo", 0.8, "time"),
    ("peak_memory_gb", "sft", 1.3, "memory"),
)


def times(task_of: dict[str, Task], rounds: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Seconds per example of every objective and way; all of them take turns."""
    trainer = task_of["iopo"].trainer(live=True)
    examples = {name: task.examples() for name, task in task_of.items()}
    short = {name: [shortened(rows[0])] for name, rows in examples.items()}
    caches = {name: trainer.cache([*examples[name], *short[name]]) for name in task_of}
    seconds: dict[tuple[str, str], list[float]] = {(o, w): [] for o in task_of for w in WAYS}
    for timed in range(-1, rounds):  # the first round is a short one, to warm up
        for (objective, way), found in seconds.items():
            rows = short[objective] if timed < 0 else examples[objective]
            trainer.use(WAYS[way])
            started = time.perf_counter()
            trainer.step(rows, WAYS[way], objective=objective, cache=caches[objective])
            if timed >= 0:
                found.append(time.perf_counter() - started)
    return {
        (objective, way): {
            "seconds": found,
            "seconds_per_example": statistics.median(found) / len(examples[objective]),
        }
        for (objective, way), found in seconds.items()
    }


def memory(task_of: dict[str, Task]) -> dict[tuple[str, str], dict[str, Any]]:
    """Peak memory of one step of every objective and way, each in a process of its own."""
    trainer = task_of["iopo"].trainer(live=True)
    found = {}
    for objective, task in task_of.items():
        cache = trainer.cache(task.examples())
        for way, variant in WAYS.items():
            alone = measure(task, variant, cache, count=False)
            found[objective, way] = {"peak_memory_gb": alone["peak_memory_gb"]}
    return found


def show(results: list[dict[str, Any]]) -> None:
    """Print the table, both columns also as multiples of plain SFT, and the two targets."""
    found = {(r["objective"], r["way"]): r for r in results}
    print(f"{'':5} {'':12} {'s/example':>10} {'x SFT':>6} {'peak GB':>8} {'x SFT':>6}")
    for (objective, way), row in found.items():
        cells = ""
        for key, form in (("seconds_per_example", "{:10.3f}"), ("peak_memory_gb", "{:8.2f}")):
            if key in row:
                cells += f" {form.format(row[key])} {row[key] / found['sft', 'plain'][key]:6.2f}"
        print(f"{objective:5} {way:12}{cells}")
    for way in list(WAYS)[1:]:
        said = []
        for key, base, target, what in TARGETS:
            if key in found["iopo", way]:
                ratio = found["iopo", way][key] / found[base, "plain"][key]
                said.append(f"{ratio:.2f} of the {what} of plain {base.upper()} (target {target})")
        print(f"IOPO, {way}: {', '.join(said)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--shape", default="1000/500", choices=SHAPES)
    parser.add_argument("--model", default="demo", help="model folder, or demo")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=("times", "memory"), help="default: both")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tune_malloc()
    model = resolve_model(args.model)
    dtype = str(default_dtype("cpu")).removeprefix("torch.")
    tasks = {o: Task(str(model), dtype, False, args.shape, o, args.threads) for o in OBJECTIVES}
    report = opened(args.json, facts(model, dtype, args.threads) | {"shape": args.shape})
    found = {(row["objective"], row["way"]): row for row in report.pop("rows", [])}
    measured = [times(tasks, args.rounds)] if args.only != "memory" else []
    measured += [memory(tasks)] if args.only != "times" else []
    rows = []
    for key in product(OBJECTIVES, WAYS):
        row = {"objective": key[0], "way": key[1]} | found.get(key, {})
        for results in measured:
            row |= results[key]
        rows.append(row)
    report["rows"] = rows
    show(rows)
    write_json(args.json, report)


if __name__ == "__main__":
    main()
