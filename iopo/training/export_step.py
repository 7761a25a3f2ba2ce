"""`python train.py run=DIR export_step=N`: a checkpoint of a run as a model that others can load.

Writes DIR/exported/step-0000000N/export (and export-merged, where the run's config asks for it).
"""

from pathlib import Path

from iopo.config import Checkpointing, TrainConfig
from iopo.training import export, optim, setup
from iopo.training.checkpoint.folders import complete_folders, step_of
from iopo.training.checkpoint.tensors import load_state
from iopo.training.inputs import load_inputs
from iopo.training.launch.placement import RankInfo
from iopo.training.launch.signals import Control


def export_step(cfg: TrainConfig, scratch: Path, ranks: RankInfo, control: Control) -> None:
    """A worker for `launch`; scratch takes its error files. The rest of the run stays as it is.

    Raises ValueError if the run has no complete checkpoint of that step.
    """
    run, step = Path(cfg.run), cfg.export_step
    folders = {step_of(folder): folder for folder in complete_folders(run)[0]}
    if step not in folders:
        raise ValueError(
            f"export_step: {run} has no complete checkpoint of step {step}, expected one of "
            f"{sorted(folders)}"
        )
    cfg.parallel.checkpointing = Checkpointing.none  # there is no backward
    inputs = load_inputs(cfg)
    train_model = setup.make_policy(cfg, inputs, ranks)
    optimizer = optim.make_optimizer(train_model.parameters, cfg.optim)
    load_state(folders[step], train_model.parameters, optimizer, rank=ranks.rank, same_world=False)
    train_model.refresh()
    control.alive()
    place = run / "exported" / folders[step].name
    if ranks.is_main:
        place.mkdir(parents=True, exist_ok=True)
    cfg.export.model = True
    export.export(cfg, place, train_model, inputs, ranks)
    if ranks.is_main:
        print(f"{folders[step]} -> {place}", flush=True)
