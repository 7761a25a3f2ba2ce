"""`python -m iopo.training.reference [key=value ...]`: fill the reference cache of a run alone.

Takes the same overrides as train.py, on the same number of processes or under the same launcher;
the run then finds every row. What is in the cache stays, and a killed fill goes on where it was.
Exit codes are train.py's.
"""

import sys
import tempfile
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from iopo import objectives
from iopo.config import Checkpointing, ReferenceSource, TrainConfig
from iopo.redact import redact
from iopo.training import setup
from iopo.training.inputs import load_inputs
from iopo.training.launch.launcher import launch
from iopo.training.launch.placement import RankInfo, find_placement
from iopo.training.launch.signals import Control
from iopo.training.reference import sources as references

CONF = Path(__file__).resolve().parents[3] / "conf"
REFUSED = 2
ConfigStore.instance().store(name="base_config", node=TrainConfig)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(composed: DictConfig) -> None:
    """Compose, check, launch; what is refused is one message, without a traceback."""
    try:
        cfg = OmegaConf.to_object(composed)
        assert isinstance(cfg, TrainConfig)
        code = start(cfg)
    except (ValueError, FileNotFoundError) as error:
        print(f"refused: {redact(str(error))}", file=sys.stderr, flush=True)
        code = REFUSED
    sys.exit(code)


def start(cfg: TrainConfig) -> int:
    """Check what needs no weights and fill on every rank; returns the exit code.

    Raises ValueError for an objective without a reference, and for data that cannot be used.
    """
    if not objectives.OBJECTIVES[cfg.objective.name].reference:
        raise ValueError(
            f"objective.name={cfg.objective.name} has no reference: there is nothing to fill"
        )
    setup.check_sharding(cfg, find_placement(setup.processes(cfg)).world_size)
    for name, report in load_inputs(cfg).reports.items():
        print(f"{name}: " + "\n  ".join(report.lines()), flush=True)
    folder = references.cache_folder(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="fill-") as scratch:  # of error messages
        return launch(
            worker,
            cfg,
            Path(scratch),
            processes=setup.processes(cfg),
            backend=setup.backend(cfg),
            timeout_s=cfg.parallel.timeout_s,
        )


def worker(cfg: TrainConfig, scratch: Path, ranks: RankInfo, control: Control) -> None:
    """One rank: the policy at its start, which is the reference, over its share of the rows."""
    cfg.reference.source = ReferenceSource.cache
    cfg.parallel.checkpointing = Checkpointing.none  # there is no backward
    inputs = load_inputs(cfg)
    job = setup.make_job(cfg, inputs, ranks)
    train_model = setup.make_policy(cfg, inputs, ranks)

    def say(text: str) -> None:
        if ranks.is_main:
            print(text, flush=True)

    reference = references.make_reference(cfg, inputs, job, ranks, train_model, say, control.alive)
    assert reference is not None  # checked in start
    say(f"reference: all of {len(job.examples)} + {len(job.heldout)} rows in {reference.where}")


if __name__ == "__main__":
    main()
