"""What keeping freed memory saves a training step on a CPU: `python -m benchmarks.freed_memory`.

Four quads of the demo set, forward and backward on SmolLM2-135M with all weights trained, in
fresh processes with and without tune_malloc (iopo/model/host_memory.py), in turn. Prints the median
seconds of each and their ratio, after checking that both gave the same log-probs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import date

import torch

from iopo.data.layout import build_shared
from iopo.data.rows import read_rows
from iopo.data.tokenize import Chat, Encoder, Limits, tokenize_rows
from iopo.logprobs import LogProbs
from iopo.model.attention import SHARED
from iopo.model.host_memory import tune_malloc
from iopo.model.load import default_dtype, load_causal_lm, load_tokenizer, resolve_model
from iopo.model.parallel import prepare

ROUNDS = 3


def child(keep: bool, repeats: int) -> None:
    """One variant in this process: prints its step times and log-probs as JSON."""
    if keep:
        tune_malloc()
    path = resolve_model("demo")
    chat = Chat(load_tokenizer(path))
    rows = read_rows("data/demo/train.jsonl", kind="quad")[:4]
    examples, _ = tokenize_rows(rows, Encoder(chat, Limits(512, 256)))
    policy = LogProbs(load_causal_lm(path, torch.float32, attention=SHARED)).train()
    cpu = torch.device("cpu")
    train_model = prepare(policy, device=cpu, dtype=default_dtype("cpu"), mesh=None)
    batch = build_shared(examples)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        logps = policy(batch)
        logps.sum().backward()
        seconds.append(time.perf_counter() - started)
    train_model.zero_grad()
    print(json.dumps({"seconds": seconds, "logps": logps.detach().flatten().tolist()}))


def main() -> None:
    """Run the variants in turn and print their medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", choices=["keep", "default"], help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=6, help="steps per process; the first warms")
    args = parser.parse_args()
    if args.child:
        child(args.child == "keep", args.repeats)
        return
    found: dict[str, list[float]] = {"default": [], "keep": []}
    logps = {}
    for _ in range(ROUNDS):
        for variant in found:
            command = [sys.executable, "-m", "benchmarks.freed_memory", "--child", variant]
            command += ["--repeats", str(args.repeats)]
            out = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
            found[variant] += out["seconds"][1:]
            logps[variant] = torch.tensor(out["logps"])
    torch.testing.assert_close(logps["default"], logps["keep"], atol=0.5, rtol=0)
    medians = {name: statistics.median(values) for name, values in found.items()}
    print(f"{date.today()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, value in medians.items():
        print(f"{name:8s} {value:6.2f} s per forward and backward")
    print(f"ratio    {medians['default'] / medians['keep']:6.2f}")


if __name__ == "__main__":
    main()
