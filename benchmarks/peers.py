"""Side by side with other trainers: the same pairs, the same steps, losses, speed and memory.

    python -m benchmarks.peers [--json FILE] [--shape demo] [--rounds 3]

DPO with AdamW on all weights, kept in fp32, in the dtype that is fast here:
plain PyTorch   padded sequences, one pair a forward, stock logits in fp32, a reference model in
                every step, every block recomputed (the first row of benchmarks.throughput)
TRL             DPOTrainer at its defaults: activation checkpointing, a reference in every step
TRL, fastest    no activation checkpointing, reference log-probs before training. Its padding_free
                is parsed and not used; its Liger kernels need a GPU
                With narrow weights: none in fp32, so that small updates are lost
here            the last row of benchmarks.throughput, reference log-probs before training

Every side runs in a fresh process, in turn, round by round; speed is the median of all steps but
each process's first. Losses are compared in fp32 on fewer pairs. Makes an environment with TRL in
the user's cache on first use; --install stops there.
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
from benchmarks.throughput_variants import BEST, PLAIN, Trainer, Variant
from iopo.data.example import Example
from iopo.data.layout import build_shared
from iopo.files import cache_root
from iopo.model.attention import SHARED
from iopo.model.host_memory import tune_malloc
from iopo.model.load import default_dtype, load_causal_lm, resolve_model

LOSS_TARGET = 1e-3  # of the largest difference of losses, nats, in fp32
LR = 1e-5
OURS, NARROW = "here", "TRL, fastest, narrow weights"


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


def task_of(args: argparse.Namespace, model: Path, dtype: str, examples: list[Example]) -> Any:
    """What a child of any side is told; also the token ids, so that none tokenises."""
    pairs = [
        {
            "prompt_ids": e.prompts[0].tolist(),
            "chosen_ids": e.responses[0][0].tolist(),
            "rejected_ids": e.responses[0][1].tolist(),
        }
        for e in examples
    ]
    return {
        "model": str(model), "dtype": dtype, "threads": args.threads, "clock": args.clock,
        "pairs": pairs, "steps": args.steps, "lr": LR,
    }  # fmt: skip


def ours(row: Variant) -> None:
    """The child of a side in this project: reads a task, prints the same JSON as TRL's."""
    task = json.loads(sys.stdin.read())
    torch.set_num_threads(task["threads"])
    now = getattr(time, task["clock"])
    if row is BEST:
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
        reference_lm=load_causal_lm(task["model"], dtype, SHARED) if row.live else None,
        lr=task["lr"],
        shifted=False,
    )
    common.reset_peak()
    trainer.use(row)
    losses, seconds = [], []
    cache: dict[str, list[float]] = {}
    started = now()
    if not row.live:
        with torch.no_grad():  # the policy is still its own reference
            for rows in trainer.micro_batches(examples, row):
                values = trainer.policy(build_shared(rows)).tolist()
                cache |= {row.id: value for row, value in zip(rows, values, strict=True)}
    reference_s = now() - started
    for _ in range(task["steps"]):
        started = now()
        loss_E = trainer.step(examples, row, objective="dpo", cache=cache)
        seconds.append(now() - started)
        losses.append(loss_E.mean().item())
    result = {
        "losses": losses,
        "seconds": seconds,
        "reference_s": reference_s,  # once a run
        "peak_memory_gb": common.peak_gb() - before,
    }
    print(json.dumps(result))


def sides(python: Path) -> dict[str, list[str]]:
    """Name -> the command of its child, ours last."""
    own = [sys.executable, "-m", "benchmarks.peers", "--child"]
    theirs = [str(python), "-m", "benchmarks.peers_trl"]
    return {
        "plain PyTorch": [*own, PLAIN.name],
        "TRL": theirs,
        "TRL, fastest": [*theirs, "--fastest"],
        NARROW: [*theirs, "--fastest", "--narrow"],
        OURS: [*own, BEST.name],
    }


def timed(commands: dict[str, list[str]], task: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Per side: pairs a second (median, lowest, highest), peak memory, losses of a process's steps.

    A round runs every side once, each round beginning with another one.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for number in range(rounds):
        order = [*commands][number % len(commands) :] + [*commands][: number % len(commands)]
        for name in order:
            found[name].append(common.run_child(commands[name], task))
    result = {}
    for name, runs in found.items():
        seconds = [s for run in runs for s in run["seconds"][1:]]
        speeds = [len(task["pairs"]) / s for s in (statistics.median(seconds), *seconds)]
        result[name] = {
            "pairs_per_s": speeds[0],
            "range": [min(speeds), max(speeds)],
            "peak_memory_gb": statistics.median(run["peak_memory_gb"] for run in runs),
            "losses": runs[0]["losses"],
            "seconds": [run["seconds"] for run in runs],
            "reference_s": [run["reference_s"] for run in runs if "reference_s" in run],
        }
    return result


def difference(rows: dict[str, Any]) -> float:
    """The largest difference of the sides' losses in any step."""
    steps = zip(*(row["losses"] for row in rows.values()), strict=True)
    return max(max(losses) - min(losses) for losses in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--shape", default="demo", choices=SHAPES)
    parser.add_argument("--model", default="demo", help="model folder, or demo")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of a process, the first not timed")
    parser.add_argument("--pairs", type=int, help="in a step; default: as the shape says")
    parser.add_argument("--compared", type=int, default=2, help="pairs whose losses are compared")
    parser.add_argument(
        "--clock", choices=("perf_counter", "process_time"), default="perf_counter",
        help="process_time: of one thread beside other programs",
    )  # fmt: skip
    parser.add_argument("--install", action="store_true", help="only make TRL's environment")
    parser.add_argument("--child", choices=(PLAIN.name, BEST.name), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        ours(PLAIN if args.child == PLAIN.name else BEST)
        return
    python = environment()
    if args.install:
        return
    model = resolve_model(args.model)
    speed = str(default_dtype("cpu")).removeprefix("torch.")
    most = len(SHAPES[args.shape])
    if args.pairs is not None and args.pairs > most:
        parser.error(f"--pairs is {args.pairs}; {args.shape} has {most} in a step: {most} or fewer")
    if min(args.steps, args.rounds, args.compared) < 1 or args.steps < 2:
        parser.error("--steps must be 2 or more, --rounds and --compared 1 or more")
    examples = Task(str(model), speed, True, args.shape, "dpo", args.threads, args.pairs).examples()
    commands = sides(python)
    report: dict[str, Any] = common.facts(model, speed, args.threads)
    report |= {"trl": trl_version(), "shape": args.shape, "pairs": len(examples)}
    report["clock"] = args.clock
    few = task_of(args, model, "float32", examples[: args.compared])
    wide = {name: command for name, command in commands.items() if name != NARROW}
    report["float32"] = timed(wide, few, 1)
    worst = report["loss_difference"] = difference(report["float32"])
    print(f"losses of {args.steps} steps in fp32: largest difference {worst:.1e}")
    if not worst <= LOSS_TARGET:
        sys.exit(f"expected at most {LOSS_TARGET:g}: the sides do not train on the same")
    task = task_of(args, model, speed, examples)
    rows = report[speed] = timed(commands, task, args.rounds)
    best = rows[OURS]
    print(f"{speed}, {len(examples)} pairs a step, lengths {args.shape}, {args.threads} threads")
    print("| | pairs/s | here is so many times as fast | peak GB | here takes of it |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        row["here_speed"] = best["pairs_per_s"] / row["pairs_per_s"]
        row["here_memory"] = best["peak_memory_gb"] / row["peak_memory_gb"]
        low, high = row["range"]
        print(
            f"| {name} | {row['pairs_per_s']:.3f} ({low:.3f} to {high:.3f}) "
            f"| {row['here_speed']:.2f} | {row['peak_memory_gb']:.2f} | {row['here_memory']:.2f} |"
        )
    common.write_json(args.json, report)


if __name__ == "__main__":
    main()
