"""`python -m iopo.training.reference [key=value ...]`: fill the reference cache of a run alone.

Takes the same overrides as train.py, on any number of processes; the run then finds every row. What
is in the cache stays, and a killed fill goes on where it was. Exit codes are train.py's.
"""

import logging
import sys
import tempfile
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from iopo import entry, objectives
from iopo.config import Checkpointing, ReferenceSource, TrainConfig
from iopo.training import setup
from iopo.training.inputs import load_inputs
from iopo.training.launch.launcher import launch
from iopo.training.launch.placement import RankInfo, find_placement
from iopo.training.launch.signals import Control
from iopo.training.logger import set_up_logging
from iopo.training.policy import check_sharding
from iopo.training.reference.sources import cache_folder

CONF = Path(__file__).resolve().parents[3] / "conf"
ConfigStore.instance().store(name="base_config", node=TrainConfig)
KEYS = entry.keys(TrainConfig)
log = logging.getLogger("iopo.training.reference")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(composed: DictConfig) -> None:
    """Compose, check what needs no weights, and fill on every rank."""
    entry.check_keys(composed, KEYS)
    # By the module's name: spawned ranks cannot import `__main__`.
    from iopo.training.reference.__main__ import fill as worker

    try:
        cfg = OmegaConf.to_object(composed)
        assert isinstance(cfg, TrainConfig)
        name = cfg.objective.name
        if not objectives.OBJECTIVES[name].reference:
            raise ValueError(f"objective.name={name} has no reference: there is nothing to fill")
        ranks = setup.launch_options(cfg.parallel)
        placement = find_placement(ranks["processes"])
        set_up_logging(main=placement.is_main)
        check_sharding(cfg.parallel, placement.world_size)
        for line in load_inputs(cfg).report_lines():
            log.info(line)
        cfg.reference.source = ReferenceSource.cache
        cfg.parallel.checkpointing = Checkpointing.none  # there is no backward
        folder = cache_folder(cfg.reference)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="fill-") as scratch:  # of errors
            sys.exit(launch(worker, cfg, Path(scratch), **ranks))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(setup.refuse(error))


def fill(cfg: TrainConfig, scratch: Path, ranks: RankInfo, control: Control) -> None:
    """One rank: the policy at its start, which is the reference, over its share of the rows."""
    set_up_logging(main=ranks.is_main)
    run = setup.build_run(cfg, ranks)
    assert run.reference is not None  # checked in main
    rows = f"{len(run.job.examples)} + {len(run.job.heldout)} rows"
    log.info(f"reference: all of {rows} in {run.reference.where}")


if __name__ == "__main__":
    entry.run(main, KEYS)
