"""Steps in bf16, in fp32, and in fp32 whose products alone are in bf16: time, memory, noise.

    python -m benchmarks.cpu.dtypes [--tuning lora,full] [--quads 16] [--json FILE]

Each in a process of its own, on one thread: processor seconds of a step of the demo's lengths with
nothing recomputed, its peak memory less what the process held before the model, and how far the
margin and the loss of a quad move between two shapes of batch (alone, and packed as a reference
cache packs) when policy and reference have equal weights, where both should be 0 and ln 2.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.throughput_child import EXACT, Task
from benchmarks.throughput_data import TRAIN, shortened
from benchmarks.throughput_variants import BEST, TOKENS_PER_MICROBATCH, Trainer
from iopo.data.batching import tokens
from iopo.data.chat import Chat
from iopo.data.example import Example
from iopo.data.layout import build_shared
from iopo.data.rows import read_rows
from iopo.data.tokenize import Encoder, Limits, tokenize_rows
from iopo.model.host_memory import trim_malloc, tune_malloc
from iopo.model.load import load_tokenizer, resolve_model

PRODUCTS = "float32, bf16 products"
DTYPES = ("bfloat16", PRODUCTS, "float32")
BETA, STEPS = 0.1, 2


def measure(dtype: str, full: bool, quads: int) -> dict[str, Any]:
    """In this process."""
    if dtype == PRODUCTS:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    model = str(resolve_model("demo"))
    task = Task(model, dtype.partition(",")[0], full, "demo", "iopo", 1)
    before = common.resident_gb()
    trainer, examples = task.trainer(live=False), task.examples()
    trainer.use(BEST)
    short = shortened(examples[0])
    cache = {e.id: [0.0] * 4 for e in [*examples, short]}
    trainer.step([short], BEST, cache=cache)
    trim_malloc()
    common.reset_peak()
    trainer.step(examples, BEST, cache=cache)
    peak = common.peak_gb() - before
    tune_malloc()  # as train.py does; not above, where memory is what the step needs
    seconds = []
    for _ in range(STEPS + 1):  # the first one fills what malloc keeps
        started = time.process_time()
        trainer.step(examples, BEST, cache=cache)
        seconds.append(round(time.process_time() - started, 3))
    result: dict[str, Any] = {"process_s": seconds[1:], "peak_memory_gb": round(peak, 3)}
    encoder = Encoder(Chat(load_tokenizer(model)), Limits(4096, 4096))
    return result | noise(trainer, tokenize_rows(read_rows(TRAIN)[:quads], encoder)[0])


@torch.no_grad()
def noise(trainer: Trainer, quads: Sequence[Example]) -> dict[str, float]:
    """Of the margin and of the loss at equal weights, over quads scored in two shapes of batch."""
    alone = torch.cat([trainer.policy(build_shared([quad], multiple=64)) for quad in quads])
    packs: list[list[Example]] = [[]]
    for quad in quads:
        if sum(tokens(q, "shared") for q in [*packs[-1], quad]) > 2 * TOKENS_PER_MICROBATCH:
            packs.append([])
        packs[-1].append(quad)
    packed = torch.cat([trainer.policy(build_shared(pack, multiple=64)) for pack in packs])
    ratio_Q4 = (alone - packed).double()
    margin_Q = ratio_Q4 @ torch.tensor([1.0, -1.0, 1.0, -1.0]).double()
    loss = torch.nn.functional.softplus(-BETA * margin_Q).mean()
    return {
        "log_ratio_std": float(ratio_Q4.std()),
        "log_ratio_largest": float(ratio_Q4.abs().max()),
        "margin_std": float(margin_Q.std()),
        "margin_largest": float(margin_Q.abs().max()),
        "loss_off": float(loss) - math.log(2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tuning", default="lora,full", help="lora, full or both")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--quads", type=int, default=16, help="for the noise")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        torch.set_num_threads(1)
        dtype, tuning = args.child
        print(json.dumps(measure(dtype, tuning == "full", args.quads)))
        return
    report = common.facts(Path("SmolLM2-135M-Instruct"), ", ".join(DTYPES), 1)
    for tuning in args.tuning.split(","):
        for dtype in args.dtypes:
            command = [sys.executable, "-m", "benchmarks.cpu.dtypes", "--quads", str(args.quads)]
            found = common.run_child([*command, "--child", dtype, tuning], **EXACT)
            report.setdefault(tuning, {})[dtype] = found
            print(f"{tuning}, {dtype}: {json.dumps(found)}", flush=True)
            common.write_json(args.json, report)


if __name__ == "__main__":
    main()
