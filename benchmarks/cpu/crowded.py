"""How much a busy program on one core slows a training step down, by how OpenMP's threads wait.

    python -m benchmarks.cpu.crowded [--steps 3] [--quads 2] [--json FILE]

Threads of a product wait for each other at its end. By default they spin for a while, and take the
time of the thread that they wait for if another program left one core for both. Every way to wait
is set before torch loads, in a process of its own, and timed beside nothing, beside a busy program
and beside one of the lowest priority. This benchmark starts and ends that program.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import facts, run_child, write_json

WAYS = {
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BESIDE = {"nothing": None, "a busy program": 0, "a busy program, nice 19": 19}


@contextmanager
def busy(nice: int | None) -> Iterator[None]:
    """A program that keeps the last core busy at this niceness; None: no program."""
    if nice is None:
        yield
        return
    core = max(os.sched_getaffinity(0))
    code = f"import os; os.nice({nice}); os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    program = subprocess.Popen([sys.executable, "-c", code])
    try:
        time.sleep(0.2)
        yield
    finally:
        program.kill()
        program.wait()


def step_seconds(quads: int, steps: int) -> list[float]:
    """In this process: seconds of LoRA steps at the demo's lengths, nothing recomputed."""
    import torch

    from benchmarks.throughput_child import Task
    from benchmarks.throughput_variants import BEST
    from iopo.model.host_memory import tune_malloc
    from iopo.model.load import default_dtype, resolve_model

    tune_malloc()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dtype = str(default_dtype("cpu")).removeprefix("torch.")
    model = str(resolve_model("demo"))
    task = Task(model, dtype, False, "demo", "iopo", torch.get_num_threads(), quads)
    trainer, examples = task.trainer(live=True), task.examples()
    trainer.use(BEST)
    cache = trainer.cache(examples)
    seconds = []
    for _ in range(steps + 1):  # the first one compiles kernels
        started = time.perf_counter()
        trainer.step(examples, BEST, cache=cache)
        seconds.append(round(time.perf_counter() - started, 3))
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="timed, after one more")
    parser.add_argument("--quads", type=int, default=2, help="in a step")
    parser.add_argument("--ways", default=",".join(WAYS), help="some of them")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(step_seconds(args.quads, args.steps)))
        return
    command = [sys.executable, "-m", "benchmarks.cpu.crowded", "--child"]
    command += ["--quads", str(args.quads), "--steps", str(args.steps)]
    threads = str(len(os.sched_getaffinity(0)))
    report = facts(Path("SmolLM2-135M-Instruct"), "default", int(threads)) | {"seconds": {}}
    for way in args.ways.split(","):
        for name, nice in BESIDE.items():
            with busy(nice):
                env = {"OMP_NUM_THREADS": threads} | WAYS[way]
                found = run_child(command, timeout_s=600, **env)
            report["seconds"].setdefault(way, {})[name] = found
            print(f"{way}, beside {name}: {statistics.median(found):.2f} s a step", flush=True)
    write_json(args.json, report)


if __name__ == "__main__":
    main()
