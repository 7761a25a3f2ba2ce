"""Side by side with TRL's DPOTrainer: the same pairs, the same steps, losses, speed and memory.

    python -m benchmarks.trl_peer [--json FILE] [--shape demo]

All fine-tune all weights with AdamW: TRL with its defaults elsewhere (activation checkpointing,
live reference), TRL without the one and with reference log-probs computed before, and this project
as in the last row of the throughput ladder. Makes an environment with
TRL in the user's cache on first use; --install stops there.
"""

import argparse
import configparser
import json
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks import common
from benchmarks.throughput_child import Task
from benchmarks.throughput_data import SHAPES
from benchmarks.throughput_variants import BEST, Trainer
from iopo.data.example import Example
from iopo.data.layout import build_shared
from iopo.files import cache_root
from iopo.model.attention import SHARED
from iopo.model.host_memory import tune_malloc
from iopo.model.load import default_dtype, load_causal_lm, resolve_model

LOSS_TARGET = 1e-3


def trl_version() -> str:
    """As setup.cfg's extra `bench` pins it."""
    package = configparser.ConfigParser()
    package.read(common.ROOT / "setup.cfg")
    return package["options.extras_require"]["bench"].strip()


def environment() -> Path:
    """Python of an environment that has TRL, over this one's packages, and so the same PyTorch."""
    wanted = trl_version()
    folder = cache_root() / ("bench-" + wanted.replace("==", "-"))
    python = folder / "bin" / "python"
    if not (folder / "COMPLETE").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        site = Path(subprocess.check_output(where, text=True).strip())
        (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        kept = [f"torch=={torch.__version__}", f"transformers=={transformers.__version__}"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", wanted, *kept], check=True)
        (folder / "COMPLETE").touch()
    return python


def task_of(
    model: Path, dtype: str, threads: int, examples: list[Example], steps: int, lr: float
) -> dict[str, Any]:
    """What a child of either side is told; also the token ids, so that neither tokenises."""
    pairs = [
        {
            "prompt_ids": e.prompts[0].tolist(),
            "chosen_ids": e.responses[0][0].tolist(),
            "rejected_ids": e.responses[0][1].tolist(),
        }
        for e in examples
    ]
    return {
        "model": str(model), "dtype": dtype, "threads": threads,
        "pairs": pairs, "steps": steps, "lr": lr,
    }  # fmt: skip


def ours() -> None:
    """The child of this project's side: reads a task, prints the same JSON as TRL's."""
    task = json.loads(sys.stdin.read())
    torch.set_num_threads(task["threads"])
    tune_malloc()  # as train.py does
    dtype = getattr(torch, task["dtype"])
    examples = [
        Example(
            f"p{i}",
            (np.array(pair["prompt_ids"], np.int32),),
            (tuple(np.array(pair[key], np.int32) for key in ("chosen_ids", "rejected_ids")),),
        )
        for i, pair in enumerate(task["pairs"])
    ]
    before = common.resident_gb()
    trainer = Trainer(
        load_causal_lm(task["model"], torch.float32, SHARED),
        full=True,
        dtype=dtype,
        device=torch.device("cpu"),
        lr=task["lr"],
        shifted=False,
    )
    common.reset_peak()
    trainer.use(BEST)
    losses, seconds = [], []
    cache: dict[str, list[float]] = {}
    started = time.perf_counter()
    with torch.no_grad():  # the policy is still its own reference
        for rows in trainer.micro_batches(examples, BEST):
            batch = build_shared(rows)
            values = trainer.policy(batch).tolist()
            cache |= {row.id: value for row, value in zip(rows, values, strict=True)}
    reference_s = time.perf_counter() - started
    for _ in range(task["steps"]):
        started = time.perf_counter()
        loss_E = trainer.step(examples, BEST, objective="dpo", cache=cache)
        seconds.append(time.perf_counter() - started)
        losses.append(loss_E.mean().item())
    result = {
        "losses": losses,
        "seconds": seconds,
        "reference_s": reference_s,  # once a run
        "peak_memory_gb": common.peak_gb() - before,
    }
    print(json.dumps(result))


def compare(python: Path, task: dict[str, Any]) -> list[dict[str, Any]]:
    """One result per side, ours last; the first step, which allocates, is not in the median."""
    theirs = [str(python), "-m", "benchmarks.trl_peer_child"]
    sides = {
        "TRL": theirs,
        "TRL, tuned": [*theirs, "--tuned"],
        "here": [sys.executable, "-m", "benchmarks.trl_peer", "--ours"],
    }
    rows = []
    for name, command in sides.items():
        result = common.run_child(command, task)
        median = statistics.median(result["seconds"][1:])
        rows.append({"name": name, "pairs_per_s": len(task["pairs"]) / median} | result)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--shape", default="demo", choices=SHAPES)
    parser.add_argument("--model", default="demo", help="model folder, or demo")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--pairs", type=int, help="in a step; default: as the shape says")
    parser.add_argument("--install", action="store_true", help="only make TRL's environment")
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours or args.install:
        ours() if args.ours else environment()
        return
    model = resolve_model(args.model)
    speed = str(default_dtype("cpu")).removeprefix("torch.")
    most = len(SHAPES[args.shape])
    if args.pairs is not None and args.pairs > most:
        parser.error(f"--pairs is {args.pairs}; {args.shape} has {most} in a step: {most} or fewer")
    task = Task(str(model), speed, True, args.shape, "dpo", args.threads, args.pairs)
    examples = task.examples()
    python = environment()
    report: dict[str, Any] = common.facts(model, speed, args.threads) | {
        "trl": trl_version(),
        "shape": args.shape,
    }
    # losses in fp32, where both sides should agree; speed in what is fast here
    for dtype in dict.fromkeys(("float32", speed)):
        rows = compare(python, task_of(model, dtype, args.threads, examples, args.steps, 1e-5))
        report[dtype] = rows
        print(f"{dtype}, {len(examples)} pairs, lengths {args.shape}")
        for row in rows:
            losses = " ".join(f"{loss:.5f}" for loss in row["losses"])
            print(
                f"  {row['name']:18} {row['pairs_per_s']:8.3f} pairs/s  "
                f"{row['peak_memory_gb']:6.2f} GB  losses {losses}"
            )
        print(f"  here, the reference once a run: {rows[-1]['reference_s']:.1f} s")
        steps = zip(*(row["losses"] for row in rows), strict=True)
        worst = max(max(losses) - min(losses) for losses in steps)
        print(f"  largest difference of loss {worst:.1e} (target {LOSS_TARGET:g} in float32)")
    common.write_json(args.json, report)


if __name__ == "__main__":
    main()
