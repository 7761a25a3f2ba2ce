"""Throughput and memory of a step, row by row from a plain preference trainer to this one.

    python -m benchmarks.throughput [--quick] [--json FILE] [--shapes demo,1000/500]
        [--tuning lora,full] [--only times|memory] [--without-operations] [--default-malloc]

Every row takes the same optimizer step on the same quads (see throughput_variants.LADDER). Times
are medians of rounds in which the rows take turns; memory, loss and operations come from one step
in a fresh process per row. Results go to JSON as {"shapes": {shape: [row, ...]}}, the plain row
first, everything on last; full fine-tuning is under "full". A FILE that exists is added to, so that
shapes, rounds, and times and memory, can be measured one after the other.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import facts, write_json
from benchmarks.throughput_child import Task, measure
from benchmarks.throughput_data import SHAPES, shortened, useful_tokens
from benchmarks.throughput_flops import Weights, ledger, processed_tokens
from benchmarks.throughput_variants import (
    BEST,
    COMPILED,
    FRUGAL,
    LADDER,
    PLAIN,
    Trainer,
    Variant,
)
from iopo.data.example import Example
from iopo.model.host_memory import tune_malloc
from iopo.model.load import default_dtype, resolve_model

COLUMNS = (
    ("row", "name", "{}"),
    ("quads/s", "quads_per_s", "{:.3f}"),
    ("x plain", "speedup", "{:.2f}"),
    ("useful tok/s", "useful_tokens_per_s", "{:.0f}"),
    ("processed", "processed_tokens", "{}"),
    ("TFLOP", "tflop", "{:.3f}"),
    ("/ledger", "flops_over_ledger", "{:.3f}"),
    ("peak GB", "peak_memory_gb", "{:.2f}"),
    ("step GB", "step_memory_gb", "{:.2f}"),
    ("x plain", "memory_ratio", "{:.2f}"),
    ("loss off by", "loss_difference", "{:.1e}"),
)
QUICK = (PLAIN, BEST)
QUICK_QUADS = {"demo": 2, "1000/500": 1}  # in a step of a quick run
Cache = dict[str, list[float]]  # reference log-probs by id, as on disk
NAMES = {"lora": "LoRA", "full": "full fine-tuning"}


def times(
    trainer: Trainer,
    rows: Sequence[Variant],
    examples: Sequence[Example],
    cache: Cache,
    rounds: int,
) -> list[dict[str, Any]]:
    """Seconds of the rows, in their order."""
    seconds = interleaved(trainer, rows, examples, cache, rounds)
    step = {"quads": len(examples), "useful_tokens": useful_tokens(examples)}
    return [{"name": row.name, "seconds": seconds[row.name]} | step for row in rows]


def one_step_each(
    task: Task,
    trainer: Trainer,
    rows: Sequence[Variant],
    examples: Sequence[Example],
    cache: Cache,
    *,
    count: bool,
) -> list[dict[str, Any]]:
    """Memory and losses of the rows, and operations if they are to be counted, in their order."""
    weights = Weights.of(trainer.policy.causal_lm)
    results: list[dict[str, Any]] = []
    for row in rows:
        alone = measure(task, row, cache, count=count)
        batches = trainer.micro_batches(examples, row)
        result = {
            "name": row.name,
            "processed_tokens": processed_tokens(batches, row),
            "peak_memory_gb": alone["peak_memory_gb"],
            "step_memory_gb": alone["step_memory_gb"],
            "losses": alone["losses"],
        }
        if alone["flops"] is not None:
            expected = ledger(weights, batches, row, full=task.full)
            result |= {
                "tflop": alone["flops"] / 1e12,
                "flops_over_ledger": alone["flops"] / expected,
            }
        results.append(result)
    return results


def interleaved(
    trainer: Trainer,
    rows: Sequence[Variant],
    examples: Sequence[Example],
    cache: Cache,
    rounds: int,
) -> dict[str, list[float]]:
    """Seconds of each round by row; the rows take turns.

    A step on a short example comes before, or a whole one where something is to be compiled.
    """
    seconds: dict[str, list[float]] = {row.name: [] for row in rows}
    short = [shortened(examples[0])]
    known = cache | trainer.cache(short)
    for row in rows:
        trainer.use(row)
        trainer.step(examples if row.compile else short, row, cache=known)
    for _ in range(rounds):
        for row in rows:
            trainer.use(row)
            started = time.perf_counter()
            trainer.step(examples, row, cache=cache)
            seconds[row.name].append(time.perf_counter() - started)
    return seconds


def joined(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the same names put together, with speed, memory and loss against the first row.

    Rounds of both count.
    """
    before = {row["name"]: row for row in old}
    results = []
    for row in new:
        found = before.get(row["name"], {})
        rounds = [*found.get("seconds", []), *row.get("seconds", [])]
        results.append(found | row | ({"seconds": rounds} if rounds else {}))
    first = results[0]
    for row in results:
        if "seconds" in row:
            median = statistics.median(row["seconds"])
            row["quads_per_s"] = row["quads"] / median
            row["useful_tokens_per_s"] = row["useful_tokens"] / median
            row["speedup"] = row["quads_per_s"] / first["quads_per_s"]
        if "losses" in row:
            row["memory_ratio"] = row["peak_memory_gb"] / first["peak_memory_gb"]
            off = [abs(a - b) for a, b in zip(row["losses"], first["losses"], strict=True)]
            row["loss_difference"] = max(off)
    return results


def show(title: str, results: Sequence[dict[str, Any]]) -> None:
    """Print one table; what was not measured is a dash."""
    print(f"\n{title}")
    lines = [[label for label, _, _ in COLUMNS]]
    for row in results:
        lines.append([form.format(row[key]) if key in row else "-" for _, key, form in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]), flush=True)


def opened(file: Path | None, here: dict[str, Any]) -> dict[str, Any]:
    """The report in `file`, if there is one, with this run's date and command added to its facts.

    Raises ValueError if it was measured on another machine or with other versions.
    """
    if file is None or not file.exists():
        return here
    report = json.loads(file.read_text())
    for key in ("machine", "torch", "transformers", "model", "dtype", "shape", "malloc"):
        if report.get(key) != here.get(key):
            raise ValueError(
                f"{file}: measured with {key} {report.get(key)!r}, here it is {here.get(key)!r}; "
                "the two cannot stand in one table: write to another file"
            )
    for key in ("date", "command"):
        if here[key] not in report[key].split("; "):
            report[key] += "; " + here[key]
    return here | report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few quads, rows and rounds, LoRA; operations at the demo's lengths only",
    )
    parser.add_argument("--json", type=Path, help="write the results here, beside those there")
    parser.add_argument("--shapes", help=f"some of {','.join(SHAPES)}")
    parser.add_argument("--tuning", default="lora,full", help="lora, full or both")
    parser.add_argument("--only", choices=("times", "memory"), help="default: both")
    parser.add_argument(
        "--without-operations",
        action="store_true",
        help="do not count operations, which takes as long as the memory itself",
    )
    parser.add_argument(
        "--default-malloc",
        action="store_true",
        help="times without tune_malloc (iopo/model/host_memory.py), to see what that saves",
    )
    parser.add_argument("--compile", action="store_true", help="also a row of compiled blocks")
    parser.add_argument("--model", default="demo", help="model folder, or demo")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: what is fast")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="timed steps per row (1 if quick, else 3)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.default_malloc:
        tune_malloc()  # as train.py does; here for every row
    model = resolve_model(args.model)
    dtype = args.dtype or str(default_dtype("cpu")).removeprefix("torch.")
    shapes = args.shapes.split(",") if args.shapes else [*(QUICK_QUADS if args.quick else SHAPES)]
    rows = QUICK if args.quick else LADDER
    if args.compile:
        rows = (*rows[:-1], COMPILED, rows[-1])
    rounds = args.rounds or (1 if args.quick else 3)
    here = facts(model, dtype, args.threads)
    if args.default_malloc:
        here["malloc"] = "default"
    for tuning in ["lora"] if args.quick else args.tuning.split(","):
        # prompt by prompt is exact at no cost under LoRA only, and not a row of its own without it
        taken = [row for row in rows if tuning == "lora" or row != FRUGAL]
        for shape in shapes:
            few = QUICK_QUADS.get(shape) if args.quick else None
            task = Task(str(model), dtype, tuning == "full", shape, "iopo", args.threads, few)
            examples = task.examples()
            trainer = task.trainer(live=True)  # the cache comes from it, too
            cache = trainer.cache(examples)
            results: list[dict[str, Any]] = []
            if args.only != "memory":
                results = joined(results, times(trainer, taken, examples, cache, rounds))
            if args.only != "times":
                count = not args.without_operations and (not args.quick or shape == "demo")
                alone = one_step_each(task, trainer, taken, examples, cache, count=count)
                results = joined(results, alone)
            report = {"shapes": {}, "full": {}} | opened(args.json, here)
            tables = report["full" if tuning == "full" else "shapes"]
            tables[shape] = joined(tables.get(shape, []), results)
            show(f"{NAMES[tuning]}, prompt/response tokens {shape}, {dtype}", tables[shape])
            write_json(args.json, report)


if __name__ == "__main__":
    main()
