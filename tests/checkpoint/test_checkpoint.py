"""Checkpoints come back bitwise, survive kills, full disks and damage, and fit other worlds."""

import json
import os
import pickle
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers_fork import finish, kill, start_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.faults import read_whole
from iopo.config import CheckpointConfig
from iopo.training.checkpoint import folders as files
from iopo.training.checkpoint import writer
from iopo.training.checkpoint.folders import latest, latest_intact
from iopo.training.checkpoint.tensors import gather_state, load_state
from iopo.training.checkpoint.writer import CheckpointError, Checkpoints
from iopo.training.launch.launcher import launch
from iopo.training.seeds import rng_state, seed_process, set_rng_state

META = {"config": {"seed": 0}, "identity": {}, "metrics": {}}


# ---- a toy run: few lines, but with all kinds of state ----------------------------------------


class Toy:
    """Two layers and AdamW; "full" trains all of it under FSDP2, "lora" one layer, replicated."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 33), nn.Dropout(0.5), nn.Linear(33, 4))
        if kind == "lora":
            self.model[0].requires_grad_(False)
        elif dist.is_initialized():
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            fully_shard(self.model, mesh=mesh)
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.parameters: dict[str, nn.Parameter] = trained
        self.optimizer = torch.optim.AdamW(trained.values(), lr=0.01)

    def step(self, step: int) -> float:
        generator = torch.Generator().manual_seed(step)  # data: a function of the step
        loss = self.model(torch.randn(16, 8, generator=generator)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def state(self) -> dict:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return gather_state(self.parameters, self.optimizer, rank)


def train(run_dir: Path, kind: str, steps: int, rank: int, *, asynchronous: bool, every: int = 1):
    """The resume protocol of a real run: newest intact checkpoint, metrics cut, go on."""
    seed_process(0, "rank", rank)
    toy = Toy(kind)
    folder, _ = latest_intact(run_dir)
    first = 1
    if folder is not None:
        load_state(folder, toy.parameters, toy.optimizer)
        first = files.step_of(folder) + 1
    with Checkpoints(run_dir, CheckpointConfig(asynchronous=asynchronous)) as checkpoints:
        for step in range(first, steps + 1):
            toy.step(step)
            if step % every == 0:
                checkpoints.save(step, toy.state(), META)
    return toy


def whole(state: dict) -> dict[str, torch.Tensor]:
    return {
        key: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for key, value in state.items()
    }


@pytest.fixture
def alone(tmp_path):
    """A process group of one, in this process."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    yield run_dir
    dist.destroy_process_group()


def save_steps(run_dir: Path, *steps: int, keep: int = 9, best_metric=None, metrics=None):
    toy = Toy("lora")
    cfg = CheckpointConfig(keep=keep, asynchronous=False, best_metric=best_metric)
    with Checkpoints(run_dir, cfg) as checkpoints:
        for step in steps:
            toy.step(step)
            meta = META | {"metrics": {} if metrics is None else metrics[step]}
            checkpoints.save(step, toy.state(), meta)
    return toy


def names(run_dir: Path) -> list[int]:
    return [files.step_of(f) for f in files.complete_folders(run_dir)[0]]


# ---- one process -------------------------------------------------------------------------------


def test_every_asynchronous_save_has_a_stager_of_its_own(alone, monkeypatch):
    """PyTorch 2.11 closes a stager after its first use; later versions keep the copies."""
    stagers = []

    class UsedOnce(writer.DefaultStager):
        def stage(self, state):
            stagers.append(self)
            return super().stage(state)

    monkeypatch.setattr(writer, "DefaultStager", UsedOnce)
    train(alone, "lora", 3, 0, asynchronous=True)
    assert len(set(stagers)) == 3 and names(alone) == [2, 3]


def test_the_writer_thread_stays_on_the_gpu_of_its_rank(alone, monkeypatch):
    chosen = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    set_device = partial(chosen.__setitem__, "device")
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with Checkpoints(alone, CheckpointConfig()) as checkpoints:
        checkpoints._thread.submit(int).result()
    assert chosen == {"device": 3}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_is_bitwise_the_undisturbed_one(alone, kind, asynchronous):
    expected = whole(train(alone, kind, 6, 0, asynchronous=asynchronous, every=9).state())
    train(alone, kind, 3, 0, asynchronous=asynchronous)
    found = whole(train(alone, kind, 6, 0, asynchronous=asynchronous).state())
    assert any(key.startswith("optimizer/exp_avg_sq/") for key in found)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_what_is_saved_asynchronously_is_the_state_at_the_call(alone):
    toy = Toy("full")
    toy.step(1)
    before = whole(toy.state())
    with Checkpoints(alone, CheckpointConfig(asynchronous=True)) as checkpoints:
        checkpoints.save(1, toy.state(), META)
        toy.step(2)
    load_state(files.folder_of(alone, 1), toy.parameters, toy.optimizer)
    after = whole(toy.state())
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_checkpoint_can_be_read_whole_without_ranks(alone):
    toy = save_steps(alone, 1)
    found = read_whole(files.folder_of(alone, 1))
    expected = whole(toy.state())
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_state_json_can_be_read_and_holds_no_secret(alone, monkeypatch):
    monkeypatch.setenv("HUB_TOKEN", "very-secret-1")
    toy = Toy("lora")
    with Checkpoints(alone, CheckpointConfig(asynchronous=False)) as checkpoints:
        checkpoints.save(7, toy.state(), META | {"config": {"note": "very-secret-1"}})
    state = files.read_state(files.folder_of(alone, 7))
    assert (state["step"], state["world_size"], state["identity"]) == (7, 1, {})
    assert state["config"] == {"note": "<redacted:HUB_TOKEN>"}


@pytest.mark.parametrize("metric", ["group_accuracy", "loss"])
def test_newest_and_best_are_kept(alone, metric):
    best, worse = (0.9, 0.2) if metric == "group_accuracy" else (0.2, 0.9)
    values = {1: worse, 2: best, 3: float("nan"), 5: 0.5}
    metrics = {step: {metric: values[step]} if step in values else {} for step in range(1, 6)}
    save_steps(alone, 1, 2, 3, 4, 5, keep=2, best_metric=metric, metrics=metrics)
    assert names(alone) == [2, 4, 5]


def test_fewer_than_two_are_refused():
    with pytest.raises(ValueError, match="2 or more"):
        CheckpointConfig(keep=1)


@pytest.mark.parametrize(
    ("harm", "remark"),
    [
        (lambda f: (f / "COMPLETE").unlink(), "no COMPLETE"),
        (lambda f: os.truncate(f / "__0_0.distcp", 100), "has 100 bytes"),
        (lambda f: (f / ".metadata").unlink(), ".metadata is missing"),
        (lambda f: flip_a_byte(f / "__0_0.distcp"), "another sha256"),
        (lambda f: f.rename(f.with_name(f.name + ".partial")), "being written"),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(alone, harm, remark):
    save_steps(alone, 1, 2)
    harm(files.folder_of(alone, 2))
    folder, remarks = latest_intact(alone)
    assert folder == files.folder_of(alone, 1)
    assert remark in remarks[0] and "step-00000002" in remarks[0]


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_run_that_went_back_behind_a_damaged_checkpoint_replaces_it(alone):
    save_steps(alone, 1, 2)
    (files.folder_of(alone, 2) / "COMPLETE").unlink()
    files.partial_of(alone, 2).mkdir()
    (files.partial_of(alone, 2) / "rubbish").touch()
    save_steps(alone, 2)
    assert names(alone) == [1, 2]
    assert not (files.folder_of(alone, 2) / "rubbish").exists()
    assert latest_intact(alone) == (files.folder_of(alone, 2), [])


def test_an_empty_run_has_no_checkpoint(alone):
    assert latest(alone) == (None, [])
    assert latest_intact(alone) == (None, [])


def test_another_model_is_refused(alone):
    save_steps(alone, 1)
    toy = Toy("full")
    with pytest.raises(ValueError, match="holds 2 parameters, the model trains 4"):
        load_state(files.folder_of(alone, 1), toy.parameters, toy.optimizer)


class Attack:
    def __reduce__(self):
        return (os.system, ("touch /tmp/iopo-attacked",))


def test_an_index_that_would_run_code_is_refused(alone):
    save_steps(alone, 1)
    folder = files.folder_of(alone, 1)
    (folder / ".metadata").write_bytes(pickle.dumps(Attack()))
    toy = Toy("lora")
    with pytest.raises(ValueError, match="refers to posix.system"):
        load_state(folder, toy.parameters, toy.optimizer)
    assert not Path("/tmp/iopo-attacked").exists()


# ---- a disk that fails -------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_said_and_leaves_the_last_checkpoint_whole(alone, asynchronous):
    """RLIMIT_FSIZE makes the write fail inside the shard, as a full disk does."""
    import resource

    save_steps(alone, 1)
    toy = Toy("full")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="step 2 could not be written.*step-00000001"):
            with Checkpoints(alone, CheckpointConfig(asynchronous=asynchronous)) as checkpoints:
                checkpoints.save(2, toy.state(), META)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert latest_intact(alone)[0] == files.folder_of(alone, 1)


@pytest.mark.parametrize("harm", ["vanished", "file in the way"])
def test_a_run_folder_that_cannot_be_written_is_said(alone, harm):
    shutil.rmtree(alone)
    if harm == "file in the way":  # root ignores read-only modes, a file refuses root as well
        alone.touch()
    toy = Toy("lora")
    with pytest.raises(CheckpointError, match="could not be written"):
        with Checkpoints(alone, CheckpointConfig(asynchronous=False)) as checkpoints:
            checkpoints.save(1, toy.state(), META)
    assert not alone.is_dir()


# ---- generators --------------------------------------------------------------------------------


def test_generators_come_back():
    def draw():
        return torch.rand(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1)

    seed_process(3, "test")
    draw()  # leaves a second Gaussian cached in NumPy and Python
    state = rng_state()
    expected = draw()
    draw()
    set_rng_state(state)
    assert draw() == expected


# ---- several processes -------------------------------------------------------------------------


def worker(cfg, run_dir, ranks, control):
    """Trains as `train` does, then writes its state and its first loss for the test to compare."""
    asynchronous = cfg["asynchronous"]
    toy = train(run_dir, cfg["kind"], cfg["steps"], ranks.rank, asynchronous=asynchronous)
    state = whole(toy.state())
    torch.save(state, run_dir / f"state-{ranks.rank}.pt")


def run_worker(run_dir: Path, cfg: dict) -> int:
    return launch(worker, cfg, run_dir, processes=1, backend="gloo", timeout_s=60)


def final_state(run_dir: Path, rank: int) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / f"state-{rank}.pt", weights_only=True)


def kill_and_restart(run_dir: Path, cfg: dict, processes: int, kills: int) -> None:
    """Run the toy, which saves at every step; kill it some times, then let it end."""
    generator = random.Random(0)
    for _ in range(kills):
        ranks = start_ranks(processes, run_worker, run_dir, cfg | {"steps": 400})
        before, end = latest(run_dir)[0], time.monotonic() + 60
        while latest(run_dir)[0] == before:
            assert time.monotonic() < end, "no checkpoint appeared"
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.05))
        kill(ranks)
    assert finish(start_ranks(processes, run_worker, run_dir, cfg)) == [0] * processes


@pytest.mark.parametrize(
    ("kind", "asynchronous", "processes"),
    [
        ("full", True, 2),
        pytest.param("full", False, 2, marks=pytest.mark.slow),
        pytest.param("lora", True, 2, marks=pytest.mark.slow),
        pytest.param("full", True, 1, marks=pytest.mark.slow),
        pytest.param("lora", False, 1, marks=pytest.mark.slow),
    ],
)
def test_kills_inside_saves_change_nothing(tmp_path, kind, asynchronous, processes, request):
    kills = 4 if request.node.get_closest_marker("slow") else 2
    killed, plain = tmp_path / "killed", tmp_path / "plain"
    killed.mkdir(), plain.mkdir()
    cfg = {"kind": kind, "asynchronous": asynchronous, "steps": 20}
    kill_and_restart(killed, cfg, processes, kills)
    cfg["steps"] = reached = max(20, *names(killed))
    assert finish(start_ranks(processes, run_worker, plain, cfg)) == [0] * processes
    if reached > 20:
        assert finish(start_ranks(processes, run_worker, killed, cfg)) == [0] * processes
    for rank in range(processes):
        expected, found = final_state(plain, rank), final_state(killed, rank)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def reshard(cfg, run_dir, ranks, control):
    toy = Toy("full")
    for module in toy.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    folder, _ = latest_intact(run_dir)
    if folder is None:
        toy.step(1)
        with Checkpoints(run_dir, CheckpointConfig(asynchronous=False)) as checkpoints:
            checkpoints.save(1, toy.state(), META)
    else:
        load_state(folder, toy.parameters, toy.optimizer)
    state = whole(toy.state())
    if ranks.is_main:
        torch.save({k: v for k, v in state.items() if "rng" not in k}, run_dir / cfg)


def run_reshard(name: str, run_dir: Path) -> int:
    return launch(reshard, name, run_dir, processes=1, backend="gloo", timeout_s=60)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_gets_the_same_tensors(tmp_path, before, after):
    for name, processes in (("saved.pt", before), ("loaded.pt", after)):
        assert finish(start_ranks(processes, run_reshard, name, tmp_path)) == [0] * processes
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    loaded = torch.load(tmp_path / "loaded.pt", weights_only=True)
    assert saved.keys() == loaded.keys() and len(saved) > 8
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert json.loads((files.folder_of(tmp_path, 1) / "state.json").read_text())["step"] == 1
