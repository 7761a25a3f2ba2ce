"""Train small models for two steps each and print how far memory rose: a program for test_plan.

Argument: a JSON list of runs, each a list of config overrides. In a process of its own,
because the peak of resident memory is a number of a whole process. The allocator must return what
is freed: MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ are set by the caller.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from test_configs import config

from iopo.data.layout import build_shared
from iopo.logprobs import LogProbs
from iopo.model.attention import SHARED
from iopo.model.load import tiny_causal_lm
from iopo.model.parallel import prepare
from iopo.objectives import QUAD
from iopo.training import optim
from iopo.training.plan.lengths import example_of
from iopo.training.policy import adapt, block_options
from iopo.training.split import PromptByPrompt, by_prompt, splitting


def resident(key: str) -> int:
    """Bytes: VmRSS is what the process holds now, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {key}")


def train(cfg, rows) -> None:
    policy = LogProbs(tiny_causal_lm(cfg.model.tiny, seed=0, dtype=torch.float32, attention=SHARED))
    adapt(policy, cfg.model.lora, cfg.seed)
    cpu = torch.device("cpu")
    how = block_options(cfg.parallel)
    train_model = prepare(policy, device=cpu, dtype=torch.float32, mesh=None, block_options=how)
    optimizer = optim.make_optimizer(train_model.parameters, cfg.optim)
    split = splitting(cfg, 1)
    few = [example_of(QUAD, 4, 4)]  # for optimizer state, then a gradient; then comes the peak
    for micro_batches in ([few], [few, rows]):
        for examples in micro_batches:
            if not cfg.parallel.split_quads:
                train_model.model(build_shared(examples)).sum().backward()
                continue
            batches = [build_shared(part) for part in by_prompt(examples)]
            parts = PromptByPrompt(train_model, batches, split.direction)
            parts.log_probs().sum().backward()
            parts.backward(last=True)
        train_model.reduce_and_clip(1.0)
        optimizer.step()
        train_model.zero_grad()


def rise(overrides: list[str]) -> int:
    """Bytes by which the process grew at most while it trained."""
    cfg = config(*overrides)
    prompt, response = cfg.plan_for.prompt_tokens, cfg.plan_for.response_tokens
    gc.collect()  # what the run before this one left must not count as there already
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    train(cfg, [example_of(QUAD, prompt, response)] * (cfg.optim.micro_batch_quads or 1))
    return resident("VmHWM") - before


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = json.loads(sys.argv[1])
    small = ["hidden_size=48", "num_attention_heads=4", "num_key_value_heads=2", "vocab_size=512"]
    rise([*runs[0], *(f"model.tiny.{key}" for key in small)])  # loads libraries, starts threads
    print(json.dumps([rise(overrides) for overrides in runs]))
