"""One step's gradient does not depend on micro-batches, accumulation, ranks, packing or layout."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch.distributed.tensor import DTensor

from iopo.config import TrainConfig
from iopo.training import loop
from iopo.training.inputs import load_inputs
from iopo.training.launch.launcher import launch
from iopo.training.policy import make_policy
from iopo.training.setup import make_job

ROOT = Path(__file__).resolve().parents[1]
WORDS = "rain wind sun moon tree river stone bird cloud light grass road".split()
ConfigStore.instance().store(name="base_config", node=TrainConfig)


class Capture(torch.optim.SGD):
    """Keeps the gradients instead of applying them."""

    def step(self, closure=None):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        self.seen = [g.full_tensor() if isinstance(g, DTensor) else g.clone() for g in grads]


def worker(cfg, run, ranks, control):
    """One step on every rank; rank 0 writes the gradients, unclipped."""
    inputs = load_inputs(cfg)
    job = make_job(cfg, inputs, ranks)
    train_model = make_policy(cfg, inputs, ranks)
    for name, parameter in train_model.parameters.items():
        if name.endswith("lora_B"):  # at zero it would leave no gradient for A
            with torch.no_grad():
                parameter.fill_(0.01)
    optimizer = Capture(list(train_model.parameters.values()), lr=1.0)
    result = next(loop.train_steps(job, train_model, optimizer, reference(job), first_step=1))
    means = result.reduce()
    if ranks.is_main:
        torch.save({"grads": optimizer.seen, "means": means}, run / "grads.pt")


def reference(job) -> loop.Reference:
    """Some fixed numbers, so that every quad has a weight of its own in the gradient."""

    def call(rows, batch):
        lengths = [[float(len(r)) for rs in row.responses for r in rs] for row in rows]
        return -4.0 * torch.tensor(lengths) + torch.tensor([0.0, 3.0, -5.0, 1.0])

    return loop.Reference(call, "test", 1.0)


def gradients(tmp_path: Path, data: Path, micro, accumulation, ranks, *overrides: str):
    run = tmp_path / f"{micro}-{accumulation}-{ranks}-{len(list(tmp_path.iterdir()))}"
    run.mkdir()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        composed = compose("config", overrides=[
            "+experiment=tiny_random", f"data.train={data}", f"data.heldout={data}",
            f"data.cache_dir={tmp_path}/tokens", f"run={run}", "optim.clip_norm=inf",
            f"optim.micro_batch_quads={micro}", "optim.tokens_per_microbatch=null",
            f"parallel.processes={ranks}",
            f"optim.global_batch_quads={micro * accumulation * ranks}", *overrides,
        ])  # fmt: skip
    cfg = OmegaConf.to_object(composed)
    code = launch(worker, cfg, run, processes=ranks, backend="gloo", timeout_s=120)
    assert code == 0, (run / "FAILED").read_text()
    return torch.load(run / "grads.pt")


@pytest.mark.parametrize("lora", [0, 4], ids=["full", "lora"])
def test_gradient_is_the_same_however_the_step_is_cut(tmp_path, lora):
    data = tmp_path / "quads.jsonl"
    with open(data, "w") as file:
        for i in range(8):
            y = " ".join((WORDS * 3)[i : i + 1 + 3 * (i % 4)])  # 1 to 10 words
            x = f"Write about {WORDS[i]}."
            row = {"x1": x + " Lower case.", "x2": x + " Upper.", "y1": y, "y2": y.upper() + "!"}
            file.write(json.dumps(row) + "\n")
    cuts = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]
    one, *others = [gradients(tmp_path, data, *cut, f"model.lora.rank={lora}") for cut in cuts]
    rank = f"model.lora.rank={lora}"
    plain = gradients(tmp_path, data, 8, 1, 1, rank, "data.layout=plain")
    by_tokens = ("optim.micro_batch_quads=null", "optim.tokens_per_microbatch=300")
    budget = gradients(tmp_path, data, 8, 1, 1, rank, *by_tokens)
    largest = max(g.abs().max() for g in one["grads"])
    assert largest > 1e-3
    for other in [*others, plain, budget]:
        for a, b in zip(one["grads"], other["grads"], strict=True):
            assert (a - b).abs().max() <= 1e-5 * largest
        for name in ("loss", "margin", "grad_norm", "logp/x1y1"):
            assert other["means"][name] == pytest.approx(one["means"][name], rel=2e-5)
