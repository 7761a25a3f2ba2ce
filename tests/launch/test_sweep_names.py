"""The folders of a sweep's jobs, as Hydra makes them; no job is run."""

import importlib
import sys
from fnmatch import fnmatch
from pathlib import Path

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig

from iopo.config import TrainConfig
from iopo.training.launch.sweep_names import folder_name

CONF = Path(__file__).resolve().parents[2] / "conf"
ConfigStore.instance().store(name="base_config", node=TrainConfig)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (
            "-m +experiment=tiny_random optim.epochs=1 checkpoint.keep=3 tracker.wandb=off "
            "parallel.timeout_s=600 checkpoint.save_every_steps=2 optim.schedule=cosine "
            "data.heldout=null evaluation.samples=0 evaluation.batch_size=4 "
            "evaluation.max_new_tokens=16 data.train=/home/me/train.jsonl optim.lr=0.001,0.002",
            ["optim.lr=0.001", "optim.lr=0.002"],
        ),
        (
            "-m data.train=/home/me/a.jsonl,/home/me_a.jsonl",
            ["data.train=_home_me_a.jsonl-*", "data.train=_home_me_a.jsonl-*"],
        ),
        (
            "-m +experiment=tiny_random,smollm2_135m_dpo seed=choice(7)",
            ["+experiment=smollm2_135m_dpo,seed=7", "+experiment=tiny_random,seed=7"],
        ),
        (
            "-m objective=glob(iopo_*) seed=range(2)",
            ["objective=iopo_three,seed=0", "objective=iopo_three,seed=1"],
        ),
        (  # the sweep's config fixes the seed and sweeps the weight; the command has the last word
            "+sweep=ablation_anchor seed=1,2 objective.sft_weight=0.1",
            ["seed=1", "seed=2"],
        ),
    ],
)
def test_a_name_holds_what_is_swept(tmp_path, monkeypatch, arguments, names):
    folders = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(_) -> None:
        folders.append(Path(HydraConfig.get().runtime.output_dir))

    for module in ("core.utils", "_internal.hydra", "_internal.core_plugins.basic_launcher"):
        found = importlib.import_module(f"hydra.{module}")
        monkeypatch.setattr(found, "configure_log", lambda *_, **__: None)
    options = [*arguments.split(), f"hydra.sweep.dir={tmp_path}/sweep"]
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    job()
    assert all(folder.parent == tmp_path / "sweep" for folder in folders), "one level deep"
    assert len(set(folders)) == len(folders)
    for folder, name in zip(sorted(folders), names, strict=True):
        assert fnmatch(folder.name, name)


def test_names_of_folders():
    """A sweep that is started again finds its jobs, and no two jobs share a folder."""
    assert folder_name("") == "job"
    assert folder_name("data.train=/a/b") == folder_name("data.train=/a/b")
    assert folder_name("data.train=/a/b") != folder_name("data.train=_a/b")
    one, two = (folder_name(f"tracker.project={'é' * 300}{n}") for n in (1, 2))
    assert one != two and one.startswith("tracker.project=") and len(one.encode()) < 150
