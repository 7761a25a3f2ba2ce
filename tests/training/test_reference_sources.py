"""The reference of whole runs: its sources, and the cache filled alone on many ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import train
from iopo.config import TrainConfig
from iopo.training import loop, replay
from iopo.training.launch.placement import RankInfo
from iopo.training.reference import sources as references
from iopo.training.reference.cache import Cache
from iopo.training.setup import Run, build_run

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


def config(cache: Path, overrides: list[str], *more: str) -> TrainConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        all_keys = [*overrides, f"reference.cache_dir={cache}", *more]
        cfg = OmegaConf.to_object(compose("config", overrides=all_keys))
    assert isinstance(cfg, TrainConfig)
    return cfg


def built(cache: Path, overrides: list[str], *more: str) -> tuple[Run, Cache]:
    """A run before its first step, in this process, and its cache; no run folder is written."""
    cfg = config(cache, overrides, *more)
    run = build_run(cfg, ALONE)
    return run, Cache(cache, references.manifest(cfg.model, cfg.data, run.inputs, "cpu"))


@pytest.mark.parametrize("change", ["optim.epochs=3", "optim.epochs=1", "model.lora.rank=0"])
def test_the_cache_is_filled_before_the_first_step(tmp_path, overrides, change, caplog):
    assert len(built(tmp_path / "cache", overrides, change)[1].read(4)) == 8
    caplog.clear()
    with caplog.at_level("INFO"):
        built(tmp_path / "cache", overrides, change)
    (again,) = [m for m in caplog.messages if m.startswith("reference")]
    assert "log-probs of the first 2 of 2 layers equal" in caplog.text  # at every start
    assert again.startswith("reference: 4 cached rows scored again, differ by 0 nats")


def test_the_three_sources_agree_and_do_not_follow_the_policy(tmp_path, overrides):
    runs = [
        built(tmp_path / "cache", overrides, f"reference.source={source}")[0]
        for source in ("cache", "live", "adapter_off")
    ]
    scores = []
    for run in runs:
        for name, parameter in run.model.parameters.items():
            if name.endswith("lora_B"):
                torch.nn.init.constant_(parameter, 0.01)
        batch = run.job.build(run.job.examples)
        scores.append(run.reference.call(run.job.examples, batch))
        with torch.no_grad():
            assert (run.model.model(batch) - scores[-1]).abs().max() > 0.1
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=1e-5, atol=1e-5)


def test_a_live_reference_is_compiled_as_the_policy_is(tmp_path, overrides, monkeypatch):
    calls = []

    def planted(forward, dynamic):
        return lambda *args, **kwargs: calls.append(forward) or forward(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", planted)
    options = ("reference.source=live", "parallel.compile=true", "parallel.checkpointing=full")
    run, _ = built(tmp_path / "cache", overrides, *options)
    loop.check_start(run.job, run.model.model, run.reference)
    assert len(set(calls)) == len(calls) == 4  # two layers of the policy, and two of its copy


def test_what_float32_rounds_otherwise_is_no_wrong_reference(tmp_path, overrides, monkeypatch):
    """Sums beyond 1024 nats, the last bit of which is more than 1e-4."""
    rows = [json.loads(line) for line in (tmp_path / "quads.jsonl").read_text().splitlines()]
    long = [row | {"y1": 40 * " rain", "y2": 40 * " WIND"} for row in rows]
    (tmp_path / "quads.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    fill, signs = references.fill, [0, -np.inf, 0, -np.inf]

    def elsewhere(*args):
        return {k: np.nextafter(v, np.float32(signs)) for k, v in fill(*args).items()}

    monkeypatch.setattr(references, "fill", elsewhere)
    run, cache = built(tmp_path / "cache", overrides)
    assert max(map(np.max, cache.read(4).values())) < -1024
    loop.check_start(run.job, run.model.model, run.reference)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_replay_from_the_start_draws_what_training_drew(
    tmp_path, overrides, monkeypatch, one_rank
):
    """Dropout: the weights of a replay without a checkpoint are those of the checkpoint."""
    options = ("model.lora.dropout=0.5", "optim.max_steps=2", "checkpoint.save_every_steps=1",
               "evaluation.samples=0", "export.model=false")  # fmt: skip
    cfg = config(tmp_path / "cache", overrides, *options)
    for program in (train, replay):  # which would change the logging of the tests that follow
        monkeypatch.setattr(program, "set_up_logging", lambda **_: None)
    (tmp_path / "run").mkdir()
    control = SimpleNamespace(should_stop=lambda: False)
    train.train(cfg, tmp_path / "run", ALONE, control)
    weights = []

    def keep(job, model, *_):
        weights.append({n: p.detach().clone() for n, p in model.parameters.items()})
        return ""

    monkeypatch.setattr(replay, "describe_example", keep)
    cfg.replay_step = 2
    replay.replay(cfg, tmp_path, ALONE, control)
    monkeypatch.setattr(replay, "complete_folders", lambda _: ([], []))
    replay.replay(cfg, tmp_path, ALONE, control)
    first, last = weights[0], weights[-1]
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_two_ranks_fill_the_cache_alone(tmp_path, overrides):
    command = [sys.executable, "-m", "iopo.training.reference", *overrides, "parallel.processes=2"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all of 8 + 0 rows in") == 1
    _, alone = built(tmp_path / "alone", overrides)
    _, filled = built(tmp_path / "cache" / "iopo" / "reference", overrides)
    rows, expected = filled.read(4), alone.read(4)
    assert rows.keys() == expected.keys() and len(rows) == 8
    for key in rows:
        np.testing.assert_allclose(rows[key], expected[key], rtol=1e-5, atol=1e-5)


def test_an_objective_without_a_reference_has_nothing_to_fill(tmp_path, overrides):
    command = [sys.executable, "-m", "iopo.training.reference", *overrides, "objective=sft"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "nothing to fill" in done.stderr


def test_rounding_under_a_steep_objective_is_no_wrong_reference(monkeypatch, caplog):
    job = SimpleNamespace(tokens_N=[1], batching=None, rank=0, examples=[None], device="cpu")
    job.build = lambda rows: SimpleNamespace(input_ids=torch.zeros(1))
    monkeypatch.setattr(loop, "micro_batches", lambda *_: [[[0]]])
    steep = lambda job, batch, rows, p, r: (25 + 100 * (p - r).sum(1), None)  # noqa: E731
    monkeypatch.setattr(loop, "score", steep)

    def check(rounding: float) -> None:
        call = lambda rows, batch: torch.full((1, 4), 0.01)  # noqa: E731
        reference = loop.Reference(call, "here", 0.1, rounding)
        loop.check_start(job, lambda batch: torch.zeros(1, 4), reference)

    with caplog.at_level("INFO"):
        check(0.5)
    assert "step 0: loss 21.0000000, largest |log-ratio| to the reference 0.01 nats" in caplog.text
    with pytest.raises(ValueError, match="not computed as this policy is: set reference.source="):
        check(1e-4)
