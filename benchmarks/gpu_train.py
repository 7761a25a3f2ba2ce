"""The throughput ladder on one GPU: Qwen2-7B's shapes with random weights, LoRA, bf16.

    python -m benchmarks.gpu_train [--json FILE] [--shapes 200/300,1000/500,5000/900]

Out of memory is a result, not an error. Utilisation (MFU) is given twice: by the operations that a
row needs itself, and by those of the plain row, which is what the same work costs without this
project. Operations come from the ledger (throughput_flops), which the CPU benchmark checks.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
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


def qwen2_7b(layers: int, device: torch.device) -> PreTrainedModel:
    """Qwen2-7B with random weights, drawn on the device."""
    config = Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=layers,
        num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
        max_position_embeddings=32768, tie_word_embeddings=False, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    with device:
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=SHARED
        )


def ladder(
    trainer: Trainer, quads: Sequence[Example], rows: Sequence[Variant], rounds: int
) -> list[dict[str, Any]]:
    """Results of the rows on these quads; a row that does not fit says so."""
    weights = Weights.of(trainer.policy.causal_lm)
    peak = peak_tflops(torch.cuda.get_device_name())
    needed = {
        row.name: ledger(weights, trainer.micro_batches(quads, row), row, full=False)
        for row in rows
    }
    cache = or_none(trainer, lambda: trainer.cache(quads))
    if cache is None:
        return [{"name": row.name, "out_of_memory": True} for row in rows]
    seconds = interleaved(trainer, quads, rows, cache, rounds)
    results = []
    for row in rows:
        found = seconds[row.name]
        if found is None:
            results.append({"name": row.name, "out_of_memory": True})
            continue
        median = statistics.median(found["seconds"])
        batches = trainer.micro_batches(quads, row)
        results.append(
            found
            | {
                "name": row.name,
                "out_of_memory": False,
                "quads_per_s": len(quads) / median,
                "useful_tokens_per_s": useful_tokens(quads) / median,
                "processed_tokens_per_s": processed_tokens(batches, row) / median,
                "tflop": needed[row.name] / 1e12,
                "mfu": None if peak is None else needed[row.name] / median / peak / 1e12,
                "mfu_naive": None if peak is None else needed[PLAIN.name] / median / peak / 1e12,
            }
        )
    return results


def interleaved(
    trainer: Trainer,
    quads: Sequence[Example],
    rows: Sequence[Variant],
    cache: dict[str, list[float]],
    rounds: int,
) -> dict[str, dict[str, Any] | None]:
    """Seconds, peak memory and losses by row, None where memory ran out.

    The first step of a row (warm-up, compilation) is not timed and gives its memory and losses.
    """
    found: dict[str, dict[str, Any] | None] = {}
    for row in rows:
        torch.cuda.reset_peak_memory_stats()
        first = or_none(trainer, partial(one_step, trainer, quads, row, cache))
        found[row.name] = None
        if first is not None:
            memory = torch.cuda.max_memory_allocated() / 1e9
            found[row.name] = {"peak_memory_gb": memory, "losses": first[1], "seconds": []}
    for _ in range(rounds):
        for row in rows:
            result = found[row.name]
            if result is None:
                continue
            again = or_none(trainer, partial(one_step, trainer, quads, row, cache))
            if again is None:
                found[row.name] = None
            else:
                result["seconds"].append(again[0])
    return found


def one_step(
    trainer: Trainer, quads: Sequence[Example], row: Variant, cache: dict[str, list[float]]
) -> tuple[float, list[float]]:
    """(seconds, losses)."""
    trainer.use(row)
    torch.cuda.synchronize()
    started = time.perf_counter()
    losses = trainer.step(quads, row, cache=cache)
    torch.cuda.synchronize()
    return time.perf_counter() - started, losses.tolist()


def or_none(trainer: Trainer, work: Callable[[], Any]) -> Any:
    """What `work` returns, or None if the GPU's memory ran out; its memory is free again then."""
    try:
        return work()
    except torch.cuda.OutOfMemoryError:
        pass
    trainer.train_model.zero_grad()  # what the failed step had gathered
    gc.collect()  # its frames, now that the exception is gone
    torch.cuda.empty_cache()
    return None


def show(shape: str, results: Sequence[dict[str, Any]]) -> None:
    """Print one table."""
    print(f"\nQwen2-7B's shapes, LoRA, prompt/response tokens {shape}")
    print(
        f"{'row':<22}{'quads/s':>9}{'x plain':>9}{'useful tok/s':>14}{'MFU':>7}{'naive':>7}"
        f"{'peak GB':>9}{'loss off by':>13}"
    )
    first = results[0]
    for row in results:
        if row["out_of_memory"]:
            print(f"{row['name']:<22} out of memory")
            continue
        ratio, off = "-", "-"
        if not first["out_of_memory"]:
            pairs = zip(row["losses"], first["losses"], strict=True)
            ratio = f"{row['quads_per_s'] / first['quads_per_s']:.2f}"
            off = f"{max(abs(a - b) for a, b in pairs):.1e}"
        used = ["-" if row[key] is None else f"{row[key]:.1%}" for key in ("mfu", "mfu_naive")]
        print(
            f"{row['name']:<22}{row['quads_per_s']:9.3f}{ratio:>9}"
            f"{row['useful_tokens_per_s']:14.0f}{used[0]:>7}{used[1]:>7}"
            f"{row['peak_memory_gb']:9.1f}{off:>13}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--layers", type=int, default=28, help="fewer for a smaller GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled row out")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; on a CPU run benchmarks.throughput")
    device = torch.device("cuda")
    trainer = Trainer(
        qwen2_7b(args.layers, device), full=False, dtype=torch.bfloat16, device=device,
        tokens_per_microbatch=TOKENS_PER_MICROBATCH,
    )  # fmt: skip
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "layers": args.layers,
        "targets": TARGETS | {"mfu": UTILISATION_TARGET},
        "shapes": {},
    }
    rows = ROWS[:-1] if args.no_compile else ROWS
    draw = np.random.default_rng(0)
    for shape in args.shapes.split(","):
        text = draw.integers(0, 150_000, sum(map(sum, SHAPES[shape]))).astype(np.int32)
        results = ladder(trainer, quads_of_lengths(text, SHAPES[shape]), rows, args.rounds)
        show(shape, results)
        report["shapes"][shape] = results
        write_json(args.json, report)


if __name__ == "__main__":
    main()
