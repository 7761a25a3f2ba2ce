"""The throughput ladder on one GPU: Qwen2-7B's shapes with random weights, LoRA, bf16.

    python -m benchmarks.gpu.ladder [--json FILE] [--shapes 200/300,1000/500,5000/900]

Out of memory, or any other failure of a row, is its result; the others go on, and FILE is written
after each. Utilisation (MFU) is given twice: by the operations that a row needs itself, and by
those of the plain row, which is what the same work costs without this project. Operations come from
the ledger (throughput_flops), which the CPU benchmark checks. --device cpu rehearses this at tiny
size.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from benchmarks.common import peak_tflops, write_json
from benchmarks.throughput_data import alike, quads_of_lengths, useful_tokens
from benchmarks.throughput_flops import Weights, ledger, processed_tokens
from benchmarks.throughput_variants import COMPILED, LADDER, PLAIN, Trainer, Variant
from iopo.data.example import Example
from iopo.model.attention import SHARED

SHAPES = {  # prompt and response tokens: the quads of a step
    "200/300": alike(200, 300, 16),
    "1000/500": alike(1000, 500, 4),
    "5000/900": alike(5000, 900, 1),
}
ROWS = (*LADDER, COMPILED)
TOKENS_PER_MICROBATCH = 8192
TARGETS = {"200/300": 4.0, "1000/500": 3.0}  # quads/s against plain
UTILISATION_TARGET = 0.45
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}  # what a CPU rehearses with


def qwen2_7b(
    layers: int, device: torch.device, dtype: torch.dtype, **changes: Any
) -> PreTrainedModel:
    """Qwen2-7B with random weights, drawn on the device, with some keys changed."""
    shape = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064,
    }  # fmt: skip
    config = Qwen2Config(
        num_hidden_layers=layers, max_position_embeddings=32768, tie_word_embeddings=False,
        use_cache=False, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        **(shape | changes),
    )  # fmt: skip
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=SHARED)


@dataclass
class Ladder:
    """The rows on one shape's quads; what each did so far is in `found`, by the row's name.

    found: {"seconds": [...], "losses", "peak_memory_gb"}, or {"failed": why}.
    """

    trainer: Trainer
    quads: Sequence[Example]
    rows: Sequence[Variant]
    cache: dict[str, list[float]] = field(default_factory=dict)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, rounds: int) -> Iterator[list[dict[str, Any]]]:
        """The results after each step. The first step of a row (warm-up, compilation) is not timed
        and gives its memory and losses."""
        failed = self.attempt(lambda: self.cache.update(self.trainer.cache(self.quads)))
        for row in self.rows:
            self.found[row.name] = {"seconds": []} if failed is None else {"failed": failed}
        for timed in range(rounds + 1):
            for row in self.rows:
                if "failed" not in self.found[row.name]:
                    failed = self.attempt(partial(self.one_step, row, timed=timed > 0))
                    if failed is not None:
                        self.found[row.name] = {"failed": failed}
                    yield self.results()
        yield self.results()

    def one_step(self, row: Variant, *, timed: bool) -> None:
        self.trainer.use(row)
        cuda, found = self.trainer.device.type == "cuda", self.found[row.name]
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        losses = self.trainer.step(self.quads, row, cache=self.cache)  # on the CPU: it waits
        if cuda:
            torch.cuda.synchronize()
        if timed:
            found["seconds"].append(time.perf_counter() - started)
        else:
            found["losses"] = losses.tolist()
            found["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9 if cuda else None

    def attempt(self, work: Callable[[], None]) -> str | None:
        """Do it; why it failed, or None. Its memory is free again then."""
        try:
            return work()
        except Exception as error:  # of a peer, a compiler, a kernel: the other rows still count
            memory = isinstance(error, torch.OutOfMemoryError)
            failed = "out of memory" if memory else f"{type(error).__name__}: {error}"[:300]
        self.trainer.train_model.zero_grad()  # what the failed step had gathered
        gc.collect()  # its frames, now that the exception is gone
        if self.trainer.device.type == "cuda":
            torch.cuda.empty_cache()
        return failed

    def results(self) -> list[dict[str, Any]]:
        """One a row, with rates once it was timed."""
        weights = Weights.of(self.trainer.policy.causal_lm)
        cuda = self.trainer.device.type == "cuda"
        peak = peak_tflops(torch.cuda.get_device_name()) if cuda else None
        naive = ledger(weights, self.trainer.micro_batches(self.quads, PLAIN), PLAIN, full=False)
        results = []
        for row in self.rows:
            result = {"name": row.name} | self.found[row.name]
            results.append(result)
            if not result.get("seconds"):
                continue
            median = statistics.median(result["seconds"])
            batches = self.trainer.micro_batches(self.quads, row)
            needed = ledger(weights, batches, row, full=False)
            result |= {
                "quads_per_s": len(self.quads) / median,
                "useful_tokens_per_s": useful_tokens(self.quads) / median,
                "processed_tokens_per_s": processed_tokens(batches, row) / median,
                "tflop": needed / 1e12,
                "mfu": None if peak is None else needed / median / peak / 1e12,
                "mfu_naive": None if peak is None else naive / median / peak / 1e12,
            }
        return results


def show(shape: str, results: Sequence[dict[str, Any]]) -> None:
    """Print one table."""
    print(f"\nQwen2-7B's shapes, LoRA, prompt/response tokens {shape}")
    print(
        f"{'row':<22}{'quads/s':>9}{'x plain':>9}{'useful tok/s':>14}{'MFU':>7}{'naive':>7}"
        f"{'peak GB':>9}{'loss off by':>13}"
    )
    first = results[0]
    for row in results:
        if not row.get("seconds"):
            print(f"{row['name']:<22} {row.get('failed', 'not timed')}")
            continue
        ratio, off = "-", "-"
        if first.get("seconds"):
            pairs = zip(row["losses"], first["losses"], strict=True)
            ratio = f"{row['quads_per_s'] / first['quads_per_s']:.2f}"
            off = f"{max(abs(a - b) for a, b in pairs):.1e}"
        used = ["-" if row[key] is None else f"{row[key]:.1%}" for key in ("mfu", "mfu_naive")]
        memory = "-" if row["peak_memory_gb"] is None else f"{row['peak_memory_gb']:.1f}"
        print(
            f"{row['name']:<22}{row['quads_per_s']:9.3f}{ratio:>9}"
            f"{row['useful_tokens_per_s']:14.0f}{used[0]:>7}{used[1]:>7}{memory:>9}{off:>13}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--layers", type=int, default=28, help="fewer for a smaller GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled row out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    device, dtype, shapes, changes = torch.device(args.device), torch.bfloat16, SHAPES, {}
    if args.device == "cpu":
        dtype, changes, shapes = torch.float32, TINY, dict.fromkeys(SHAPES, alike(8, 12, 2))
        args.layers = 2
    trainer = Trainer(
        qwen2_7b(args.layers, device, dtype, **changes), full=False, dtype=dtype, device=device,
        tokens_per_microbatch=TOKENS_PER_MICROBATCH,
    )  # fmt: skip
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "layers": args.layers,
        "targets": TARGETS | {"mfu": UTILISATION_TARGET},
        "shapes": {},
    }
    rows = ROWS[:-1] if args.no_compile else ROWS
    draw = np.random.default_rng(0)
    for shape in args.shapes.split(","):
        lengths, words = shapes[shape], trainer.config.vocab_size
        text = draw.integers(0, words, sum(map(sum, lengths))).astype(np.int32)
        for results in Ladder(trainer, quads_of_lengths(text, lengths), rows).run(args.rounds):
            report["shapes"][shape] = results
            write_json(args.json, report)
        show(shape, results)
    of_all = [row for results in report["shapes"].values() for row in results]
    done = [row for row in of_all if row.get("seconds")]
    best = max((row["mfu"] or 0.0 for row in done), default=0.0)
    print(f"{len(done)} of {len(of_all)} rows timed, the highest MFU {best:.1%}")
    return int(not done)


if __name__ == "__main__":
    sys.exit(main())
