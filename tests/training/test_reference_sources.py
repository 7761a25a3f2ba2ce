"""The reference of whole runs: filled on the way, filled before, filled alone on many ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from iopo.config import TrainConfig
from iopo.training import loop, optim, setup
from iopo.training.inputs import load_inputs
from iopo.training.launch.placement import RankInfo
from iopo.training.reference import sources as references
from iopo.training.reference.cache import Cache

ROOT = Path(__file__).resolve().parents[2]
WORDS = "rain wind sun moon tree river stone bird cloud light grass road".split()
ALONE = RankInfo(0, 1, 0, 1, torch.device("cpu"))
ConfigStore.instance().store(name="base_config", node=TrainConfig)


@pytest.fixture
def overrides(tmp_path) -> list[str]:
    with open(tmp_path / "quads.jsonl", "w") as file:
        for i in range(8):
            y = " ".join((WORDS * 3)[i : i + 1 + 3 * (i % 4)])  # 1 to 10 words
            x = f"Write about {WORDS[i]}."
            row = {"x1": x + " Lower case.", "x2": x + " Upper.", "y1": y, "y2": y.upper() + "!"}
            file.write(json.dumps(row) + "\n")
    return [
        "+experiment=tiny_random", f"data.train={tmp_path}/quads.jsonl", "data.heldout=null",
        f"data.cache_dir={tmp_path}/tokens", f"run={tmp_path}/run", "model.lora.rank=4",
        "optim.global_batch_quads=4", "optim.epochs=3", "optim.lr=1e-2",
    ]  # fmt: skip


class Run:
    """Some steps of a run in this process; it never writes a run folder."""

    def __init__(self, cache: Path, overrides: list[str], *more: str):
        with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
            all_keys = [*overrides, f"reference.cache_dir={cache}", *more]
            self.cfg = OmegaConf.to_object(compose("config", overrides=all_keys))
        self.inputs = load_inputs(self.cfg)
        self.job = setup.make_job(self.cfg, self.inputs, ALONE)
        self.train_model = setup.make_policy(self.cfg, self.inputs, ALONE)
        self.said: list[str] = []
        self.reference = references.make_reference(
            self.cfg, self.inputs, self.job, ALONE, self.train_model, self.said.append, lambda: None
        )
        self.cache = Cache(cache, references.manifest(self.cfg, self.inputs, "cpu"))

    def train(self, steps: int) -> list[list[float]]:
        optimizer = optim.make_optimizer(self.train_model.parameters, self.cfg.optim)
        results = loop.train_steps(
            self.job, self.train_model, optimizer, self.reference, first_step=1
        )
        taken = [result for _, result in zip(range(steps), results, strict=False)]
        return [list(result.reduce().values())[:4] for result in taken]


def test_filled_on_the_way_equals_filled_before(tmp_path, overrides):
    on_the_way = Run(tmp_path / "one", overrides)
    assert "8 of 8 examples are not in" in on_the_way.said[0]
    before = Run(tmp_path / "two", overrides, "reference.source=cache")
    assert on_the_way.cache.read(4) == {} and len(before.cache.read(4)) == 8
    losses = [run.train(6) for run in (on_the_way, before)]
    np.testing.assert_allclose(*losses, rtol=1e-5, atol=1e-5)
    rows, expected = on_the_way.cache.read(4), before.cache.read(4)
    assert rows.keys() == expected.keys()
    for key in rows:
        np.testing.assert_allclose(rows[key], expected[key], rtol=1e-5, atol=1e-5)
    # and the adapters had left their start long before the last row was looked up
    with torch.no_grad():
        moved = on_the_way.train_model.model(on_the_way.job.build(on_the_way.job.examples))
    assert (moved - on_the_way.reference.call(on_the_way.job.examples, None)).abs().max() > 0.1


def test_a_run_that_stops_in_the_first_epoch_leaves_what_it_has_stored(tmp_path, overrides):
    stopped = Run(tmp_path / "cache", overrides)
    stopped.train(1)
    stopped.reference.store()  # as train.py does before a checkpoint
    assert len(stopped.cache.read(4)) == 4
    again = Run(tmp_path / "cache", overrides)
    assert "4 of 8 examples are not in" in again.said[0] and "scored again" in again.said[1]
    again.train(2)
    assert len(again.cache.read(4)) == 8
    assert "scored again" in Run(tmp_path / "cache", overrides).said[0]


@pytest.mark.parametrize("change", ["optim.epochs=1", "model.lora.rank=0"])
def test_with_one_epoch_or_without_adapters_the_cache_is_filled_before(tmp_path, overrides, change):
    assert len(Run(tmp_path / "cache", overrides, change).cache.read(4)) == 8


def test_two_ranks_fill_the_cache_alone(tmp_path, overrides):
    command = [
        sys.executable,
        "-m",
        "iopo.training.reference.cache",
        *overrides,
        "parallel.processes=2",
    ]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "all of 8 + 0 rows in" in done.stdout
    alone = Run(tmp_path / "alone", overrides, "reference.source=cache")
    filled = Run(tmp_path / "cache" / "iopo" / "reference", overrides)
    assert "scored again" in filled.said[0]  # nothing is missing
    rows, expected = filled.cache.read(4), alone.cache.read(4)
    assert rows.keys() == expected.keys() and len(rows) == 8
    for key in rows:
        np.testing.assert_allclose(rows[key], expected[key], rtol=1e-5, atol=1e-5)


def test_an_objective_without_a_reference_has_nothing_to_fill(tmp_path, overrides):
    command = [sys.executable, "-m", "iopo.training.reference", *overrides, "objective=sft"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "nothing to fill" in done.stderr


def test_rounding_under_a_steep_objective_is_no_wrong_reference(monkeypatch):
    job = SimpleNamespace(tokens_N=[1], batching=None, rank=0, examples=[None], device="cpu")
    job.build = lambda rows: None
    monkeypatch.setattr(loop, "micro_batches", lambda *_: [[0]])
    steep = lambda job, batch, rows, p, r: (25 + 100 * (p - r).sum(1), None)  # noqa: E731
    monkeypatch.setattr(loop, "score", steep)

    def check(rounding: float) -> tuple[float, float]:
        call = lambda rows, batch: torch.full((1, 4), 0.01)  # noqa: E731
        reference = loop.Reference(call, "cache", "here", 0.1, rounding)
        return loop.check_start(job, lambda batch: torch.zeros(1, 4), reference)

    assert check(0.5) == pytest.approx((21.0, 0.01))
    with pytest.raises(ValueError, match="does not belong to these starting weights"):
        check(1e-4)
