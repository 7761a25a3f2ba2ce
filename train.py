"""Train a policy on quads: `python train.py [+experiment=NAME] [+sweep=NAME] [key=value ...]`.

Without arguments, the demo: IOPO on SmolLM2-135M with the project's own data. Keys, with units, are
in conf/; `python train.py --cfg job` prints them composed. Exit codes: 0 done, 1 failed, 2 config
or data refused, 75 saved after SIGTERM or SIGUSR1 (start again to go on), 130 interrupted.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from iopo import entry
from iopo.config import TrainConfig, plain
from iopo.data.batching import plan_steps
from iopo.model.host_memory import trim_malloc
from iopo.model.load import dtype_line
from iopo.training import export, loop, report, samples, setup
from iopo.training.checkpoint import resume
from iopo.training.checkpoint.folders import discard
from iopo.training.checkpoint.tensors import gather_state
from iopo.training.checkpoint.writer import Checkpoints
from iopo.training.inputs import batching, load_inputs
from iopo.training.launch.launcher import launch
from iopo.training.launch.placement import RankInfo, find_placement
from iopo.training.launch.run_folder import describe_environment, mark_complete, open_run
from iopo.training.launch.signals import INTERRUPTED, OK, SAVED_REQUEUE, Control
from iopo.training.logger import Logger, set_up_logging
from iopo.training.model_card import Facts
from iopo.training.plan.report import plan_report
from iopo.training.policy import check_sharding
from iopo.training.replay import replay
from iopo.training.seeds import seed_process

ConfigStore.instance().store(name="base_config", node=TrainConfig)
KEYS = entry.keys(TrainConfig)
log = logging.getLogger("iopo.train")


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> float | None:
    """Compose, check and launch; returns the held-out metric that a sweeper may optimise."""
    entry.check_keys(composed, KEYS)
    hydra_config = HydraConfig.get()
    multirun = hydra_config.mode == RunMode.MULTIRUN
    if multirun:
        composed.run = hydra_config.runtime.output_dir
    code = run(composed)
    if multirun:  # the table grows with every job; the last one printed is whole
        rows = report.collect(Path(hydra_config.sweep.dir))
        Console(width=150).print(report.table(rows))
        # A failure was said above; the other jobs go on, and Hydra exits with 1 at the end.
        if code not in (OK, SAVED_REQUEUE, INTERRUPTED):
            raise RuntimeError(f"{composed.run}: exit code {code}")
    if code != OK:  # in a sweep: stopped from outside, and so are the jobs that would follow
        sys.exit(code)
    summary = Path(composed.run) / "summary.json"
    return json.loads(summary.read_text())["metric"] if summary.exists() else None


def run(composed: DictConfig) -> int:
    """One run from a composed config; what is refused is one message, without a traceback."""
    try:
        if composed.replay_step is not None or composed.export_step is not None:
            composed = config_of_run(composed)
        cfg = OmegaConf.to_object(composed)
        assert isinstance(cfg, TrainConfig)
        return start(cfg, OmegaConf.to_yaml(composed))
    except (ValueError, FileNotFoundError) as error:
        return setup.refuse(error)


def config_of_run(asked: DictConfig) -> DictConfig:
    """The config that the run wrote down, but for where it runs and what is exported.

    Raises ValueError if the command gives an option another value than the run had.
    """
    path = Path(asked.run) / "config.yaml"
    if not path.exists():
        raise ValueError(f"{path} does not exist; give run= the folder of a run")
    changes = {key: asked[key] for key in ("run", "replay_step", "export_step")}
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    where = OmegaConf.from_dotlist([x for x in given if x.startswith(("parallel.", "export."))])
    schema = OmegaConf.structured(TrainConfig)
    merged = OmegaConf.merge(schema, OmegaConf.load(path), changes, where)
    assert isinstance(merged, DictConfig)
    for key in (x.partition("=")[0].lstrip("+~") for x in given):
        now, then = (OmegaConf.select(config, key) for config in (asked, merged))
        if now != then and not OmegaConf.is_config(now):
            raise ValueError(
                f"{key}={now}: the run had {then}, and its steps are looked at as they were; leave "
                "it out (parallel.* and export.* can be changed)"
            )
    return merged


def start(cfg: TrainConfig, config_text: str) -> int:
    """Check everything that needs no weights, make the run folder and run `train` on every rank.

    Returns the exit code; with plan=true, prints the plan and returns 0. Raises ValueError for a
    config, data or run folder that cannot be used, before anything is written into the run folder.
    """
    # By the module's name: spawned ranks can import `train`, but not `__main__`.
    from train import train as worker

    if cfg.plan:
        print(plan_report(cfg))
        return OK
    folder, ranks = Path(cfg.run), setup.launch_options(cfg.parallel)
    if cfg.replay_step is not None or cfg.export_step is not None:
        look_back = replay if cfg.replay_step is not None else export.export_step
        with tempfile.TemporaryDirectory() as scratch:
            return launch(look_back, cfg, Path(scratch), **ranks)
    placement = find_placement(ranks["processes"])
    set_up_logging(main=placement.is_main)
    check_sharding(cfg.parallel, placement.world_size)
    export.check_push(cfg.export, cfg.model)
    batches = batching(cfg.optim, cfg.data.layout, cfg.seed, placement.world_size)
    inputs = load_inputs(cfg)
    steps = plan_steps(len(inputs.train), batches, cfg.optim.epochs, cfg.optim.max_steps)
    fingerprint = resume.fingerprint(cfg, inputs, placement.world_size)
    if resume.is_finished(folder, fingerprint, steps):
        log.info(f"{folder} is complete: nothing to do (delete it, or choose another run=)")
        return OK
    for note in resume.refuse_or_note(folder, fingerprint, resume=cfg.checkpoint.resume):
        log.info(f"resume: {note}")
    device = "cuda" if ranks["backend"] == "nccl" else "cpu"
    for line in [dtype_line(cfg.model.dtype, device), *inputs.report_lines()]:
        log.info(line)
    log.info(f"{steps} steps of {cfg.optim.global_batch_quads} examples, {cfg.run}")

    if not placement.is_main:
        return launch(worker, cfg, folder, **ranks)
    environment = describe_environment(Path(__file__).resolve().parent)
    with open_run(folder, config_text=config_text, environment=environment):
        reports = {name: plain(report) for name, report in inputs.reports.items()}
        reports["chat"] = inputs.chat.record()
        (folder / "data.json").write_text(json.dumps(reports, indent=1) + "\n")
        return launch(worker, cfg, folder, **ranks)


def train(cfg: TrainConfig, folder: Path, ranks: RankInfo, control: Control) -> None:
    """One run on one rank, from weights to export. `launch` calls it on every rank."""
    set_up_logging(main=ranks.is_main)
    seed_process(cfg.seed, "process", ranks.rank)
    # Before any checkpoint: unless reference.path is set, the reference is the starting weights.
    run = setup.build_run(cfg, ranks)
    job, model, reference = run.job, run.model, run.reference
    fingerprint = resume.fingerprint(cfg, run.inputs, ranks.world_size)
    done = resume.restore(folder, model, run.optimizer, main=ranks.is_main)
    c, steps = cfg.checkpoint, range(done + 1, job.steps + 1)
    logger = Logger(folder, cfg.tracker, plain(cfg), main=ranks.is_main, steps=steps)
    with logger, Checkpoints(folder, c) as checkpoints:
        if done == 0:
            if reference is not None and cfg.reference.path is None:  # else they differ
                loop.check_start(job, model.model, reference)
            if ranks.is_main:
                samples.before(folder, cfg.evaluation, run.inputs, model)
            logger.heldout(0, loop.evaluate(job, model.model, reference))
            # What came before drew as many numbers as the caches were cold: training must not care.
            seed_process(cfg.seed, "training", ranks.rank)
        trim_malloc()
        for result in loop.train_steps(job, model, run.optimizer, reference, first_step=done + 1):
            done, last, measured = result.step, result.step == job.steps, {}
            logger.step(done, result.reduce)
            if last or every(cfg.evaluation.every_steps, done):
                measured = loop.evaluate(job, model.model, reference)
                logger.heldout(done, measured)
            stop = control.should_stop()
            asked = last and c.save_every_steps is not None
            asked = asked or stop or every(c.save_every_steps, done)
            if asked or (last and cfg.export.any):
                logger.flush()
                state = gather_state(model.parameters, run.optimizer, ranks.rank)
                # An export may fail, and is read back into memory: the weights are safe before it.
                save = checkpoints.save if asked else checkpoints.secure
                save(done, state, fingerprint | {"metrics": measured})
            if stop and not last:
                return
    # The export comes first: it is what the run was for.
    export.export_run(run, folder, Facts(cfg, run.inputs, done), ranks)
    if ranks.is_main:
        samples.after(folder, cfg.evaluation, run.inputs, model)
        report.write_summary(folder)
        report.write_report(folder)
        mark_complete(folder, fingerprint | {"step": done})
        if c.save_every_steps is None:
            discard(folder, done)  # what was saved for the export alone


def every(period: int | None, step: int) -> bool:
    """True at each multiple of `period`; never if it is None."""
    return period is not None and step % period == 0


if __name__ == "__main__":
    entry.run(main, KEYS)
