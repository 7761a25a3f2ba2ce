"""parallel.checkpointing=auto: what is chosen, and that all ranks choose alike."""

import json
import logging
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers_fork import finish, start_ranks
from test_configs import config

from iopo.config import Checkpointing
from iopo.model.host_memory import available_ram
from iopo.training.inputs import load_inputs
from iopo.training.launch.placement import RankInfo
from iopo.training.plan import auto as plan_auto
from iopo.training.plan import resolve_checkpointing

CPU = torch.device("cpu")
ALONE = RankInfo(0, 1, 0, 1, CPU)
PLENTY, LITTLE = 10**9, 10**6  # bytes; the runs below are planned to take some 10^7


def auto(tmp_path, *overrides: str):
    cfg = config(
        "+experiment=tiny_random", "parallel.checkpointing=auto",
        f"data.cache_dir={tmp_path}/tokens", *overrides,
    )  # fmt: skip
    return cfg, load_inputs(cfg)


@pytest.fixture
def resolved(monkeypatch, tmp_path, caplog):
    """Call it with free bytes and overrides for the kind that is chosen and what is logged."""
    caplog.set_level("INFO", "iopo")
    monkeypatch.setattr(logging.getLogger("iopo"), "propagate", True)

    def resolve(free: float, *overrides: str) -> tuple[str, str]:
        monkeypatch.setattr(plan_auto, "free_bytes", lambda ranks: int(free))
        caplog.clear()
        cfg = resolve_checkpointing(*auto(tmp_path, *overrides), ALONE, tmp_path)
        return cfg.parallel.checkpointing.value, " ".join(caplog.messages)

    return resolve


def test_what_is_chosen_is_said_and_written_down(resolved, tmp_path):
    for free, kind in ((PLENTY, "none"), (LITTLE, "full")):
        chosen, said = resolved(free)
        assert chosen == kind and f"auto: {kind}" in said
        written = json.loads((tmp_path / plan_auto.FILE).read_text())
        assert written["checkpointing"] == kind
        assert written["free_gb"] == pytest.approx(free / 1e9)
        assert ("MORE THAN" in said) == (kind == "full")
    assert written["too_large_gb"].keys() == {"none", "selective"}
    none, selective = written["too_large_gb"].values()
    assert none > selective > written["planned_gb"] > 0
    assert resolved(selective * 1e9 / 0.89)[0] == "selective"


def test_other_kinds_are_left_alone(tmp_path):
    cfg, inputs = auto(tmp_path)
    cfg = replace(cfg, parallel=replace(cfg.parallel, checkpointing=Checkpointing.every_k))
    assert resolve_checkpointing(cfg, inputs, ALONE, tmp_path) is cfg
    assert not (tmp_path / plan_auto.FILE).exists()


def test_the_plain_layout_has_no_plan_to_choose_by(tmp_path):
    with pytest.raises(ValueError, match="auto knows the memory .* expected none, every_k"):
        auto(tmp_path, "data.layout=plain")


def choose_on_a_rank(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    plan_auto.free_bytes = lambda ranks: PLENTY if rank == 0 else LITTLE
    cfg = resolve_checkpointing(*auto(folder), RankInfo(rank, 2, rank, 2, CPU), folder)
    (folder / f"rank{rank}").write_text(cfg.parallel.checkpointing.value)
    dist.destroy_process_group()


def test_all_ranks_choose_by_the_one_with_the_least_memory(tmp_path):
    assert finish(start_ranks(2, choose_on_a_rank, tmp_path)) == [0, 0]
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["full", "full"]


def test_free_memory_is_the_machines_or_what_a_container_leaves(tmp_path):
    for folder in ("proc", "sys/fs/cgroup/memory"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable:   800 kB\n")
    assert available_ram(tmp_path) == 800 * 1024
    group = tmp_path / "sys/fs/cgroup"
    for limit, expected in (("max", 800 * 1024), ("5000", 5000 - (2000 - 300))):
        (group / "memory.max").write_text(limit + "\n")
        (group / "memory.current").write_text("2000\n")
        (group / "memory.stat").write_text("anon 1\ninactive_file 300\n")
        assert available_ram(tmp_path) == expected
    assert 0 < available_ram() < 2**50
