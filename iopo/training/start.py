"""What happens before any rank exists: checks, data, the run folder; then the launch."""

import json
import sys
import tempfile
from pathlib import Path

from iopo.config import TrainConfig
from iopo.data.batching import plan_steps
from iopo.training import setup
from iopo.training.checkpoint import restore
from iopo.training.export_step import export_step
from iopo.training.inputs import load_inputs
from iopo.training.launch.environment import describe_environment
from iopo.training.launch.launcher import Worker, launch
from iopo.training.launch.placement import find_placement
from iopo.training.launch.run_folder import open_run
from iopo.training.plan.report import plan_report
from iopo.training.replay import replay

REPOSITORY = Path(__file__).resolve().parents[2]


def start(cfg: TrainConfig, config_text: str, worker: Worker) -> int:
    """Check everything that needs no weights, make the run folder and run `worker` on every rank.

    Returns the exit code; with plan=true, prints the plan and returns 0. Raises ValueError for a
    config, data or run folder that cannot be used, before anything is written into the run folder.
    """
    if cfg.plan:
        print(plan_report(cfg))
        return 0
    run = Path(cfg.run)
    if cfg.replay_step is not None or cfg.export_step is not None:
        look_back = replay if cfg.replay_step is not None else export_step
        with tempfile.TemporaryDirectory() as scratch:
            return _launch(look_back, cfg, Path(scratch))
    placement = find_placement(setup.processes(cfg))
    setup.check_sharding(cfg, placement.world_size)
    batching = setup.batching(cfg, placement.world_size)
    inputs = load_inputs(cfg)
    steps = plan_steps(len(inputs.train), batching, cfg.optim.epochs, cfg.optim.max_steps)
    now = restore.fingerprint(cfg, inputs, placement.world_size)
    if restore.is_finished(run, now, steps):
        if placement.is_main:
            print(f"{run} is complete: nothing to do (delete it, or choose another run=)")
        return 0
    notes = restore.refuse_or_note(run, now, resume=cfg.checkpoint.resume)
    if placement.is_main:
        for note in notes:
            print(f"resume: {note}")
        for name, report in inputs.reports.items():
            print(f"{name}: " + "\n  ".join(report.lines()))
        print(f"{steps} steps of {cfg.optim.global_batch_quads} examples, {cfg.run}")
        sys.stdout.flush()

    if not placement.is_main:
        return _launch(worker, cfg, run)
    environment = describe_environment(REPOSITORY)
    with open_run(run, config_text=config_text, environment=environment):
        reports = {name: report.to_dict() for name, report in inputs.reports.items()}
        (run / "data.json").write_text(json.dumps(reports, indent=1) + "\n")
        return _launch(worker, cfg, run)


def _launch(worker: Worker, cfg: TrainConfig, run: Path) -> int:
    return launch(
        worker,
        cfg,
        run,
        processes=setup.processes(cfg),
        backend=setup.backend(cfg),
        timeout_s=cfg.parallel.timeout_s,
    )
