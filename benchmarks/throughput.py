"""Throughput and memory of a step, row by row from a plain preference trainer to this one.

    python -m benchmarks.throughput [--quick] [--json FILE] [--shapes demo,1000/500]

Every row takes the same optimizer step on the same quads (see throughput_variants.LADDER). Times
are medians of rounds in which the rows take turns; memory, loss and operations come from one step
in a fresh process per row. Results go to JSON as {"shapes": {shape: [row, ...]}}, the plain row
first, everything on last; full fine-tuning is under "full".
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.throughput_child import Task, measure
from benchmarks.throughput_data import SHAPES, useful_tokens
from benchmarks.throughput_flops import Weights, ledger, processed_tokens
from benchmarks.throughput_variants import LADDER, Trainer, Variant
from iopo.data.example import Example
from iopo.model.load import default_dtype, resolve_model

COLUMNS = (
    ("row", "name", "{:<20}"),
    ("quads/s", "quads_per_s", "{:8.3f}"),
    ("x plain", "speedup", "{:8.2f}"),
    ("useful tok/s", "useful_tokens_per_s", "{:12.0f}"),
    ("processed", "processed_tokens", "{:9d}"),
    ("TFLOP", "tflop", "{:7.3f}"),
    ("/ledger", "flops_over_ledger", "{:7.3f}"),
    ("peak GB", "peak_memory_gb", "{:8.2f}"),
    ("step GB", "step_memory_gb", "{:8.2f}"),
    ("loss off by", "loss_difference", "{:11.1e}"),
)


def ladder(task: Task, rows: Sequence[Variant], rounds: int) -> list[dict[str, Any]]:
    """Results of the rows at the task's shape, in their order."""
    examples = task.examples()
    trainer = task.trainer(live=any(row.live for row in rows))
    cache = trainer.cache(examples)
    weights = Weights.of(trainer.policy.causal_lm)
    seconds = interleaved(trainer, rows, examples, cache, rounds)
    useful = useful_tokens(examples)
    results: list[dict[str, Any]] = []
    for row in rows:
        alone = measure(task, row, cache)
        batches = trainer.micro_batches(examples, row)
        expected = ledger(weights, batches, row, full=task.full)
        median = statistics.median(seconds[row.name])
        counted = expected if alone["flops"] is None else alone["flops"]
        results.append(
            {
                "name": row.name,
                "quads_per_s": len(examples) / median,
                "seconds": seconds[row.name],
                "useful_tokens_per_s": useful / median,
                "processed_tokens": processed_tokens(batches, row),
                "tflop": counted / 1e12,
                "flops_over_ledger": counted / expected,
                "peak_memory_gb": alone["peak_memory_gb"],
                "step_memory_gb": alone["step_memory_gb"],
                "losses": alone["losses"],
            }
        )
    return compared(results)


def interleaved(
    trainer: Trainer,
    rows: Sequence[Variant],
    examples: Sequence[Example],
    cache: dict[str, list[float]],
    rounds: int,
) -> dict[str, list[float]]:
    """Seconds of each round by row; the rows take turns, and their first step is not counted."""
    seconds: dict[str, list[float]] = {row.name: [] for row in rows}
    for timed in range(-1, rounds):
        for row in rows:
            trainer.use(row)
            started = time.perf_counter()
            trainer.step(examples, row, cache=cache)
            if timed >= 0:
                seconds[row.name].append(time.perf_counter() - started)
    return seconds


def compared(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with speed, memory and loss against the first row."""
    first = results[0]
    for row in results:
        off = [abs(a - b) for a, b in zip(row["losses"], first["losses"], strict=True)]
        row["speedup"] = row["quads_per_s"] / first["quads_per_s"]
        row["memory_ratio"] = row["peak_memory_gb"] / first["peak_memory_gb"]
        row["loss_difference"] = max(off)
    return results


def show(title: str, results: Sequence[dict[str, Any]]) -> None:
    """Print one table."""
    print(f"\n{title}")
    head = [f"{label:<20}" if key == "name" else label for label, key, _ in COLUMNS]
    widths = [len(form.format(results[0][key])) for _, key, form in COLUMNS]
    print("  ".join(label.rjust(width) for label, width in zip(head, widths, strict=True)))
    for row in results:
        print("  ".join(form.format(row[key]) for _, key, form in COLUMNS), flush=True)


def facts(model: Path, dtype: str, threads: int) -> dict[str, Any]:
    """What a number needs to be repeated."""
    return {
        "date": date.today().isoformat(),
        "command": "python -m " + " ".join([Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "machine": f"{_processor()}, {threads} threads",
        "amx": torch.cpu._is_amx_tile_supported(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": model.name,
        "dtype": dtype,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, LoRA, no compile")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--shapes", help=f"some of {','.join(SHAPES)}")
    parser.add_argument("--model", default="demo", help="model folder, or demo")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: what is fast")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="timed steps per row (2 if quick, else 5)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = resolve_model(args.model)
    dtype = args.dtype or str(default_dtype("cpu")).removeprefix("torch.")
    shapes = ["demo", "1000/500"] if args.quick else list(SHAPES)
    if args.shapes:
        shapes = args.shapes.split(",")
    rows = LADDER[:-1] if args.quick else LADDER
    rounds = args.rounds or (2 if args.quick else 5)
    report: dict[str, Any] = facts(model, dtype, args.threads) | {"shapes": {}, "full": {}}
    for full in (False,) if args.quick else (False, True):
        for shape in shapes:
            task = Task(str(model), dtype, full, shape, "iopo", args.threads)
            results = ladder(task, rows, rounds)
            how = "full fine-tuning" if full else "LoRA"
            show(f"{how}, prompt/response tokens {shape}, {dtype}", results)
            report["full" if full else "shapes"][shape] = results
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
