"""One row in a fresh process: peak memory and losses of a step, and the operations of another.

`measure` starts it; it reads its task from standard input and prints one line of JSON. A short step
comes first, in which libraries load and kernels are compiled. Operations are counted apart: the
mode that counts them holds a gigabyte or two more while it does. glibc is told to give freed
blocks of a megabyte and more back at once, so that resident memory is what the step needs.
"""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import common
from benchmarks.throughput_data import as_pairs, as_sft, make_quads, shortened
from benchmarks.throughput_flops import counter
from benchmarks.throughput_variants import Trainer, Variant
from iopo import objectives
from iopo.data.example import Example
from iopo.model.attention import SHARED
from iopo.model.host_memory import trim_malloc
from iopo.model.load import load_causal_lm, load_tokenizer

TIMEOUT_S = 1800
EXACT = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}  # bytes


@dataclass(frozen=True)
class Task:
    """What a step is taken on: the model folder, dtype of the computation, shape and objective.

    quads: in the step; None: as many as the shape says.
    """

    model: str
    dtype: str  # bfloat16 | float32
    full: bool
    shape: str
    objective: str
    threads: int
    quads: int | None = None

    def examples(self) -> list[Example]:
        """The rows of the step: quads, or the pairs or sft rows that the quads began as."""
        quads = make_quads(self.shape, load_tokenizer(self.model))[: self.quads]
        rows = objectives.OBJECTIVES[self.objective].rows.kind
        return as_pairs(quads) if rows == "pair" else as_sft(quads) if rows == "sft" else quads

    def trainer(self, live: bool) -> Trainer:
        """The model at its start. live: whether a row with a live reference will be run."""
        dtype = getattr(torch, self.dtype)
        wide = torch.float32 if self.full else dtype
        return Trainer(
            load_causal_lm(self.model, wide, SHARED),
            full=self.full,
            dtype=dtype,
            device=torch.device("cpu"),
            reference_lm=load_causal_lm(self.model, dtype, SHARED) if self.full and live else None,
        )


def measure(
    task: Task,
    variant: Variant,
    cache: dict[str, list[float]] | None,
    *,
    count: bool = True,
) -> dict[str, Any]:
    """Run steps of `variant` in a process of its own.

    Returns peak_memory_gb (the step's peak less what the process held before it loaded the model),
    step_memory_gb (less what it held before the step), losses (one per example) and flops (None if
    not to be counted, and for compiled rows, whose operations no mode sees).
    """
    request = {"task": asdict(task), "variant": asdict(variant), "cache": cache, "count": count}
    command = [sys.executable, "-m", "benchmarks.throughput_child"]
    return common.run_child(command, request, TIMEOUT_S, **EXACT)


def main() -> None:
    request = json.loads(sys.stdin.read())
    task, variant = Task(**request["task"]), Variant(**request["variant"])
    torch.set_num_threads(task.threads)
    examples = task.examples()
    before_model = common.resident_gb()
    trainer = task.trainer(variant.live)
    trainer.use(variant)
    cache = request["cache"]
    short = shortened(examples[0])
    known = cache and cache | {short.id: cache[examples[0].id]}

    def step(rows: list[Example]) -> torch.Tensor:
        return trainer.step(rows, variant, objective=task.objective, cache=known)

    step(examples if variant.compile else [short])  # what is compiled is compiled for its shapes
    trim_malloc()
    common.reset_peak()
    before_step = common.resident_gb()
    losses = step(examples)
    peak = common.peak_gb()
    count = request["count"] and not variant.compile
    with counter() as flops:
        if count:
            step(examples)
    result = {
        "peak_memory_gb": peak - before_model,
        "step_memory_gb": peak - before_step,
        "losses": losses.tolist(),
        "flops": flops.get_total_flops() if count else None,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
