"""Table 5 of the paper on one machine: time and memory of SFT, DPO and IOPO, plain and here.

    python -m benchmarks.paper_table5 [--json FILE] [--shape 1000/500]

The paper (arXiv 2411.06208, Table 5) trains with one batch size: memory 1x, 2x, 4x and 14.54,
26.30, 34.27 hours for SFT, DPO, IOPO. An example is a row (x1, y1), a pair (x1; y1, y2) or a quad.
"plain" is the first row of the throughput ladder, "here" everything on, "here, small" the same
with activation checkpointing.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.throughput import facts
from benchmarks.throughput_child import Task, measure
from benchmarks.throughput_data import SHAPES
from benchmarks.throughput_variants import CACHED, FAST, PLAIN
from iopo.model.load import default_dtype, resolve_model

WAYS = {"plain": PLAIN, "here": FAST, "here, small": CACHED}
OBJECTIVES = ("sft", "dpo", "iopo")
TIME_TARGET, MEMORY_TARGET = 0.8, 1.3


def table(task_of: dict[str, Task], rounds: int) -> list[dict[str, Any]]:
    """One result per objective and way; times interleaved over all of them."""
    trainer = task_of["iopo"].trainer(live=True)
    examples = {name: task.examples() for name, task in task_of.items()}
    caches = {name: trainer.cache(rows) for name, rows in examples.items()}
    seconds: dict[tuple[str, str], list[float]] = {(o, w): [] for o in task_of for w in WAYS}
    for timed in range(-1, rounds):
        for (objective, way), times in seconds.items():
            trainer.use(WAYS[way])
            started = time.perf_counter()
            trainer.step(
                examples[objective], WAYS[way], objective=objective, cache=caches[objective]
            )
            if timed >= 0:
                times.append(time.perf_counter() - started)
    results = []
    for (objective, way), times in seconds.items():
        alone = measure(task_of[objective], WAYS[way], caches[objective])
        results.append(
            {
                "objective": objective,
                "way": way,
                "seconds_per_example": statistics.median(times) / len(examples[objective]),
                "peak_memory_gb": alone["peak_memory_gb"],
            }
        )
    return results


def show(results: list[dict[str, Any]]) -> None:
    """Print the table, both columns also as multiples of plain SFT, and the two targets."""
    found = {(r["objective"], r["way"]): r for r in results}
    base = found["sft", "plain"]
    print(f"{'':5} {'':12} {'s/example':>10} {'x SFT':>6} {'peak GB':>8} {'x SFT':>6}")
    for (objective, way), r in found.items():
        time_ratio = r["seconds_per_example"] / base["seconds_per_example"]
        memory_ratio = r["peak_memory_gb"] / base["peak_memory_gb"]
        print(
            f"{objective:5} {way:12} {r['seconds_per_example']:10.3f} {time_ratio:6.2f} "
            f"{r['peak_memory_gb']:8.2f} {memory_ratio:6.2f}"
        )
    dpo = found["dpo", "plain"]["seconds_per_example"]
    for way in ("here", "here, small"):
        iopo = found["iopo", way]
        print(
            f"IOPO {way}: {iopo['seconds_per_example'] / dpo:.2f} of the time of plain DPO (target "
            f"{TIME_TARGET}), {iopo['peak_memory_gb'] / base['peak_memory_gb']:.2f} of the memory "
            f"of plain SFT (target {MEMORY_TARGET})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--shape", default="1000/500", choices=SHAPES)
    parser.add_argument("--model", default="demo", help="model folder, or demo")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = resolve_model(args.model)
    dtype = str(default_dtype("cpu")).removeprefix("torch.")
    tasks = {o: Task(str(model), dtype, False, args.shape, o, args.threads) for o in OBJECTIVES}
    results = table(tasks, args.rounds)
    show(results)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        report = facts(model, dtype, args.threads) | {"shape": args.shape, "rows": results}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
