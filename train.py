"""Train a policy on quads: `python train.py [+experiment=NAME] [+sweep=NAME] [key=value ...]`.

Without arguments, the demo: IOPO on SmolLM2-135M with the project's own data. Keys, with units, are
in conf/; `python train.py --cfg job` prints them composed. Exit codes: 0 done, 1 failed, 2 config
or data refused, 75 saved after SIGTERM or SIGUSR1 (start again to go on), 130 interrupted.
"""

import json
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from iopo.config import TrainConfig
from iopo.model.host_memory import trim_malloc
from iopo.redact import redact
from iopo.training import export, heldout, loop, optim, samples, setup, start
from iopo.training.checkpoint import resume
from iopo.training.checkpoint.tensors import gather_state
from iopo.training.checkpoint.writer import Checkpoints
from iopo.training.inputs import load_inputs
from iopo.training.launch.placement import RankInfo
from iopo.training.launch.run_folder import mark_complete
from iopo.training.launch.signals import INTERRUPTED, OK, SAVED_REQUEUE, Control
from iopo.training.logger import Teller
from iopo.training.plan.auto import resolve_checkpointing
from iopo.training.reference import sources as references
from iopo.training.report import run as report
from iopo.training.report import sweep
from iopo.training.seeds import seed_process

ConfigStore.instance().store(name="base_config", node=TrainConfig)
REFUSED = 2


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> float | None:
    """Compose, check and launch; returns the held-out metric that a sweeper may optimise."""
    hydra_config = HydraConfig.get()
    multirun = hydra_config.mode == RunMode.MULTIRUN
    if multirun:
        composed.run = hydra_config.runtime.output_dir
    code = run(composed)
    if multirun:  # the table grows with every job; the last one printed is whole
        rows = sweep.collect(Path(hydra_config.sweep.dir))
        Console(width=150).print(sweep.table(rows))
        # A failure was said above; the other jobs go on, and Hydra exits with 1 at the end.
        if code not in (OK, SAVED_REQUEUE, INTERRUPTED):
            raise RuntimeError(f"{composed.run}: exit code {code}")
    if code != OK:  # in a sweep: stopped from outside, and so are the jobs that would follow
        sys.exit(code)
    summary = Path(composed.run) / "summary.json"
    return json.loads(summary.read_text())["metric"] if summary.exists() else None


def run(composed: DictConfig) -> int:
    """One run from a composed config; what is refused is one message, without a traceback."""
    # By the module's name: spawned ranks can import `train`, but not `__main__`.
    from train import train as worker

    try:
        if composed.replay_step is not None or composed.export_step is not None:
            composed = config_of_run(composed)
        cfg = OmegaConf.to_object(composed)
        assert isinstance(cfg, TrainConfig)
        return start.start(cfg, OmegaConf.to_yaml(composed), worker)
    except (ValueError, FileNotFoundError) as error:
        print(f"refused: {redact(str(error))}", file=sys.stderr, flush=True)
        return REFUSED


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


def train(cfg: TrainConfig, run: Path, ranks: RankInfo, control: Control) -> None:
    """One run on one rank, from weights to export. `launch` calls it on every rank."""
    seed_process(cfg.seed, "process", ranks.rank)
    inputs = load_inputs(cfg)
    job = setup.make_job(cfg, inputs, ranks)
    teller = Teller(run, cfg, main=ranks.is_main)

    # The reference comes before any checkpoint: it is the starting weights, never trained ones.
    train_model = setup.make_policy(
        resolve_checkpointing(cfg, inputs, ranks, run, teller.say), inputs, ranks
    )
    policy = setup.policy_of(train_model)
    reference = references.make_reference(
        cfg, inputs, job, ranks, train_model, teller.say, control.alive
    )
    optimizer = optim.make_optimizer(train_model.parameters, cfg.optim)
    fingerprint = resume.fingerprint(cfg, inputs, ranks.world_size)
    done = resume.restore(run, train_model, optimizer, ranks)

    def evaluate(step: int) -> dict[str, float]:
        values = heldout.evaluate(job, policy, reference, control.alive)
        teller.heldout(step, values)
        return values

    with (
        teller.tracking(done, job.steps),
        Checkpoints(
            run,
            keep=cfg.checkpoint.keep,
            asynchronous=cfg.checkpoint.asynchronous,
            best_metric=cfg.checkpoint.best_metric,
        ) as checkpoints,
    ):
        if done == 0:
            if reference is not None:
                teller.start(*loop.check_start(job, policy, reference))
            samples.before(run, cfg, inputs, train_model, ranks)
            evaluate(0)
            # What came before drew as many numbers as the caches were cold: training must not care.
            seed_process(cfg.seed, "training", ranks.rank)
        trim_malloc()
        for result in loop.train_steps(job, train_model, optimizer, reference, first_step=done + 1):
            done, last = result.step, result.step == job.steps
            teller.step(result)
            due = last or every(cfg.evaluation.every_steps, done)
            measured = evaluate(done) if due else {}
            stop = control.should_stop()
            period = cfg.checkpoint.save_every_steps
            if every(period, done) or stop or (last and period is not None):
                teller.flush()
                if reference is not None:
                    reference.store()
                state = gather_state(train_model.parameters, optimizer, ranks.rank)
                checkpoints.save(done, state, fingerprint | {"metrics": measured})
            if stop and not last:
                return
    export.export(cfg, run, train_model, inputs, ranks)  # first of all: it is what the run was for
    samples.after(run, cfg, inputs, train_model, ranks)
    if ranks.is_main:
        report.write_summary(run)
        report.write_report(run)
        mark_complete(run, fingerprint | {"step": done})


def every(period: int | None, step: int) -> bool:
    """True at each multiple of `period`; never if it is None."""
    return period is not None and step % period == 0


if __name__ == "__main__":
    main()
