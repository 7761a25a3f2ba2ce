"""Training and generation on one CUDA device, in bf16, against slow twins: `pytest -m gpu`.

Kernels are in tests/kernels/test_kernels_gpu.py, attention is in tests/model/test_attention.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.smoke import CONFIG, Smoke
from iopo.data.layout import build_plain, build_shared
from iopo.logprobs import LogProbs
from iopo.model import lora
from iopo.model.attention import SHARED
from iopo.model.generate import Decoding, _decode, inference
from iopo.model.load import tiny_causal_lm

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def smoke() -> Smoke:
    return Smoke(CUDA, torch.bfloat16)


def base_of(smoke: Smoke) -> LogProbs:
    return (
        LogProbs(tiny_causal_lm(CONFIG, seed=0, dtype=smoke.dtype, attention=SHARED))
        .to(CUDA)
        .eval()
    )


def test_the_shared_layout_is_as_near_to_fp32_on_a_cpu_as_the_plain_one(smoke):
    """Log-probs and gradients of bf16 on CUDA, by FlashAttention over segments and by "sdpa"."""
    wide = Smoke(torch.device("cpu"), torch.float32)
    truth = wide.step(wide.policy(attention="sdpa"), build_plain)
    truth = [x.to(CUDA) for x in truth]
    off = {}
    for name, build in (("sdpa", build_plain), (SHARED, build_shared)):
        logp, grad = smoke.step(smoke.policy(attention=name), build)
        nats, share = (logp - truth[0]).abs().max(), (grad - truth[1]).norm() / truth[1].norm()
        off[name] = nats.item(), share.item()
    assert off["sdpa"][1] < 5e-2
    for one, other in zip(off[SHARED], off["sdpa"], strict=True):
        assert one <= 2 * other + 1e-3, off


@pytest.mark.parametrize("full", [False, True])
def test_steps_have_the_same_bits_twice(smoke, full):
    runs = [smoke.step(smoke.policy(full=full)) for _ in range(3)]
    for run in runs[1:]:
        assert torch.equal(run[0], runs[0][0]) and torch.equal(run[1], runs[0][1])


def test_log_probs_do_not_depend_on_what_they_are_packed_with(smoke):
    policy = smoke.policy()
    with torch.no_grad():
        together = policy.model(build_shared(smoke.quads).to(CUDA))
        alone = [policy.model(build_shared([quad]).to(CUDA)) for quad in smoke.quads]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=4 * smoke.tolerance)


def test_live_and_adapter_off_references_are_the_starting_weights(smoke):
    """Both equal the policy before its adapters were put on, bit for bit."""
    base, policy = base_of(smoke), smoke.policy()
    batch = build_shared(smoke.quads).to(CUDA)
    with torch.no_grad():
        live = base(batch)
        with lora.adapter_off(policy.model):
            off = policy.model(batch)
        adapted = policy.model(batch)
    assert torch.equal(live, off) and not torch.equal(adapted, off)


def test_greedy_generation_takes_the_best_token_of_a_forward_without_cache(smoke):
    """Keys in a cache, left padding and shared prefixes, against one forward for each token."""
    model, draw = base_of(smoke).causal_lm, torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 1000, (n,), generator=draw).tolist() for n in (5, 17, 30)]
    decoding = Decoding(max_new_tokens=12, batch_size=3)
    with inference(model):
        answers = dict(_decode(model, prompts, [2, 1, 0], set(), decoding))
    for i, prompt in enumerate(prompts):
        assert len(answers[i]) == 12
        for n, token in enumerate(answers[i]):
            ids = torch.tensor([[*prompt, *answers[i][:n]]], device=CUDA)
            with torch.no_grad():
                logits_V = model(ids).logits[0, -1].float()
            assert logits_V.max() - logits_V[token] < 0.05  # a near tie in bf16


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path):
    """train.py on the GPU: six steps at once, and three, a kill, and three more."""
    tiny = {
        "model.tiny.hidden_size": 256, "model.tiny.intermediate_size": 512,
        "model.dtype": "bf16", "parallel.device": "cuda", "optim.max_steps": 6,
        "checkpoint.save_every_steps": 3, "evaluation.samples": 0, "export.model": "false",
        "data.heldout": "null", "optim.lr": 1e-3,
    }  # fmt: skip
    losses = {}
    for name in ("whole", "killed"):
        run = tmp_path / name
        command = [sys.executable, "train.py", "+experiment=tiny_random", f"run={run}"]
        command += [f"{key}={value}" for key, value in tiny.items()]
        environ = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        if name == "killed":
            first = subprocess.Popen(command, cwd=ROOT, env=environ)
            while (
                first.poll() is None and not (run / "checkpoints/step-00000003/COMPLETE").exists()
            ):
                pass
            first.kill()
            first.wait()
        assert subprocess.run(command, cwd=ROOT, env=environ).returncode == 0
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[name] = {row["step"]: row["loss"] for row in rows if row["split"] == "train"}
    assert losses["whole"] == losses["killed"] and len(losses["whole"]) == 6
