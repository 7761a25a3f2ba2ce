"""The share of a core's product peak that a training step reaches, by kind of work.

    python -m benchmarks.cpu.peak [--tuning lora,full] [--dtype bfloat16] [--json FILE]

One thread, six quads of the demo's lengths, nothing recomputed. Operations are counted as they run
(throughput_flops); processor time is the profiler's. The peak is the fastest of three products of
this model's and of larger shapes, measured before and after the steps.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import common
from benchmarks.throughput_child import EXACT, Task
from benchmarks.throughput_flops import counter
from benchmarks.throughput_variants import BEST
from iopo.model.host_memory import tune_malloc
from iopo.model.load import resolve_model

SHAPES = ((1024, 576, 1536), (2048, 1536, 576), (2048, 2048, 2048))  # rows, in, out of a product
STEPS = 3
# The outermost of these that an operator runs under is its kind; all others are "rest".
KINDS = {
    "iopo::segment_attention": "attention",
    "iopo::linear_logprob": "head",
    "aten::mm": "products",
    "aten::addmm": "products",
    "aten::linear": "products",
    "aten::matmul": "products",
}


def kind_of(name: str) -> str | None:
    return next((kind for start, kind in KINDS.items() if name.startswith(start)), None)


def peak(dtype: torch.dtype) -> float:
    """GFLOP/s of the fastest product, processor time."""
    best = 0.0
    for rows, width, out in SHAPES:
        x, weight = torch.randn(rows, width).to(dtype), torch.randn(out, width).to(dtype)
        for _ in range(20):
            started = time.process_time()
            torch.nn.functional.linear(x, weight)
            seconds = time.process_time() - started
            best = max(best, 2 * rows * width * out / seconds / 1e9)
    return best


def measure(dtype: str, full: bool) -> dict[str, Any]:
    """In this process: GFLOP/s of the step and of each kind, shares of its time and of the peak."""
    tune_malloc()
    task = Task(str(resolve_model("demo")), dtype, full, "demo", "iopo", 1)
    trainer, examples = task.trainer(live=False), task.examples()
    trainer.use(BEST)
    cache = {e.id: [0.0] * 4 for e in examples}
    trainer.step(examples, BEST, cache=cache)
    counted = counter()
    with counted:
        trainer.step(examples, BEST, cache=cache)
    flops = Counter[str]()
    for operator, n in counted.get_flop_counts()["Global"].items():
        flops[kind_of(str(operator).replace(".", "::", 1)) or "rest"] += n
    before = peak(getattr(torch, dtype))
    started = time.process_time()
    for _ in range(STEPS):
        trainer.step(examples, BEST, cache=cache)
    seconds = (time.process_time() - started) / STEPS
    top = max(before, peak(getattr(torch, dtype)))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        trainer.step(examples, BEST, cache=cache)
    spent = Counter[str]()
    for event in profiler.events():
        above, kind = event, kind_of(event.name)
        while above := above.cpu_parent:
            kind = kind_of(above.name) or kind
        spent[kind or "rest"] += event.self_cpu_time_total
    whole = sum(spent.values())
    rows = {
        kind: {
            "share_of_time": round(time_us / whole, 3),
            "gflops": round(flops[kind] / (seconds * time_us / whole) / 1e9, 1),
            "share_of_peak": round(flops[kind] / (seconds * time_us / whole) / 1e9 / top, 3),
        }
        for kind, time_us in spent.most_common()
    }
    total = sum(flops.values())
    return {
        "process_s": round(seconds, 3),
        "tflop": round(total / 1e12, 3),
        "peak_gflops": round(top, 1),
        "share_of_peak": round(total / seconds / 1e9 / top, 3),
        "kinds": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tuning", default="lora,full", help="lora, full or both")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        torch.set_num_threads(1)
        print(json.dumps(measure(args.dtype, args.child == "full")))
        return
    report = common.facts(Path("SmolLM2-135M-Instruct"), args.dtype, 1)
    for tuning in args.tuning.split(","):
        command = [sys.executable, "-m", "benchmarks.cpu.peak", "--dtype", args.dtype]
        report[tuning] = common.run_child([*command, "--child", tuning], **EXACT)
        print(f"{tuning}: {json.dumps(report[tuning], indent=1)}", flush=True)
        common.write_json(args.json, report)


if __name__ == "__main__":
    main()
