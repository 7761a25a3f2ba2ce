"""The folders of a sweep's jobs, as Hydra makes them; no job is run."""

import sys
from pathlib import Path

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig

from iopo.config import TrainConfig
from iopo.training.launch.sweep_names import MOST_CHARS, folder_name

CONF = Path(__file__).resolve().parents[2] / "conf"
ConfigStore.instance().store(name="base_config", node=TrainConfig)
LONG = "x" * 300


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (
            "-m +experiment=tiny_random optim.epochs=1 checkpoint.keep=3 tracker.wandb=off "
            "parallel.timeout_s=600 checkpoint.save_every_steps=2 optim.schedule=cosine "
            "data.heldout=null evaluation.samples=0 evaluation.batch_size=4 "
            "evaluation.max_new_tokens=16 optim.lr=0.001,0.002 objective.beta=0.1",
            ["optim.lr=0.001", "optim.lr=0.002"],
        ),
        (
            "-m data.train=/home/me/train.jsonl objective.beta=choice(0.05,0.1) seed=range(2)",
            [f"objective.beta={beta},seed={seed}" for beta in (0.05, 0.1) for seed in (0, 1)],
        ),
        (
            "-m data.train=/home/me/a.jsonl,/home/me_a.jsonl",
            ["data.train=_home_me_a.jsonl-a", "data.train=_home_me_a.jsonl-b"],
        ),
        (
            f"-m tracker.project={LONG}1,{LONG}2",
            [f"tracker.project={LONG}"[:MOST_CHARS] + end for end in ("-a", "-b")],
        ),
        ("-m +experiment=tiny_random,smollm2_135m_dpo", ["+experiment=smollm2_135m_dpo",
                                                         "+experiment=tiny_random"]),
        ("-m objective=glob(iopo*)", ["objective=iopo", "objective=iopo_three"]),
        (
            "+experiment=tiny_random +sweep=beta_seed objective.beta=0.1",
            [f"seed={seed}" for seed in (0, 1, 2)],
        ),
        (
            "+sweep=ablation_anchor optim.epochs=1",
            ["objective.sft_weight=0.1", "objective.sft_weight=1.0"],
        ),
        ("-m seed=1", ["job"]),
    ],
)  # fmt: skip
def test_a_name_holds_what_is_swept(tmp_path, monkeypatch, arguments, names):
    folders = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(_) -> None:
        folders.append(Path(HydraConfig.get().runtime.output_dir))

    silent = ("hydra/job_logging=none", "hydra/hydra_logging=none")
    options = [*arguments.split(), f"hydra.sweep.dir={tmp_path}/sweep", *silent]
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    job()
    assert all(folder.parent == tmp_path / "sweep" for folder in folders), "one level deep"
    assert len(set(folders)) == len(folders) == len(names)
    for folder, name in zip(sorted(folders), names, strict=True):
        if name[-2:] in ("-a", "-b"):  # stands for the hash of two that would be equal
            assert folder.name.rpartition("-")[0] == name[:-2]
        else:
            assert folder.name == name


def test_equal_overrides_have_equal_names():
    """A sweep that is started again finds its jobs."""
    assert folder_name("data.train=/a/b") == folder_name("data.train=/a/b") != folder_name("a")
    assert folder_name("data.train=/a/b") != folder_name("data.train=_a/b")
