"""`python train.py run=DIR replay_step=N`: step N again, example by example, to see what was wrong.

Weights are those that step N met: the newest checkpoint before it, trained on to step N - 1 (the
same numbers, on the same topology). Nothing in the run folder is changed. One machine only.
"""

import logging
from pathlib import Path

from iopo import objectives
from iopo.config import Checkpointing, TrainConfig
from iopo.data.batching import quads_of_step
from iopo.model.parallel import TrainModel
from iopo.progress import tracked
from iopo.training import loop
from iopo.training.checkpoint.folders import complete_folders, step_of
from iopo.training.checkpoint.resume import load_checkpoint
from iopo.training.launch.placement import RankInfo
from iopo.training.launch.signals import Control, heartbeat
from iopo.training.logger import set_up_logging
from iopo.training.seeds import seed_process
from iopo.training.setup import build_run

log = logging.getLogger(__name__)


def replay(cfg: TrainConfig, scratch: Path, ranks: RankInfo, control: Control) -> None:
    """Print loss, gradient norm and every member's log-probs of each example of the step.

    A worker for `launch`; scratch takes its error files. Every rank computes every example, since
    sharded weights are gathered together. Raises ValueError for a step that the run does not have.
    """
    set_up_logging(main=ranks.is_main)
    if cfg.parallel.checkpointing is Checkpointing.auto:  # decides what fits, and no number
        cfg.parallel.checkpointing = Checkpointing.full
    run = build_run(cfg, ranks)
    job, model, step = run.job, run.model, cfg.replay_step
    if step is None or not 1 <= step <= job.steps:
        raise ValueError(f"replay_step: found {step}, expected 1 to {job.steps}")
    done = 0
    folders = [f for f in complete_folders(Path(cfg.run))[0] if step_of(f) < step]
    if folders:
        done = load_checkpoint(folders[-1], model, run.optimizer)
    else:
        seed_process(cfg.seed, "training", ranks.rank)  # as train.py does before step 1
    log.info(f"weights: {folders[-1] if folders else 'the start'}, then {step - 1 - done} steps")
    steps = loop.train_steps(job, model, run.optimizer, run.reference, first_step=done + 1)
    for _ in tracked(range(done + 1, step), "steps"):
        next(steps)
        heartbeat()
    for index in quads_of_step(len(job.tokens_N), job.batching, step - 1):
        heartbeat()
        log.info(describe_example(job, model, run.reference, int(index), ranks.world_size))


def describe_example(
    job: loop.Job, train_model: TrainModel, reference: loop.Reference | None, index: int, world: int
) -> str:
    """Id, loss and gradient norm of one example alone, and a line per member."""
    rows = [job.examples[index]]
    batch = job.build(rows)
    policy_EM = train_model.model(batch)
    reference_EM = loop.reference_log_probs(reference, rows, batch)
    loss_E, _ = loop.score(job, batch, rows, policy_EM, reference_EM)
    train_model.set_sync(True)
    (loss_E.sum() / world).backward()  # gradients are summed over ranks, and all do the same
    norm = train_model.reduce_and_clip(float("inf")).item()
    train_model.zero_grad()
    lines = [f"{rows[0].id}  loss {loss_E.item():.6g}  gradient norm {norm:.6g}"]
    ours = policy_EM[0].tolist()
    names = objectives.OBJECTIVES[job.objective].rows.members
    if rewards := rows[0].rewards:
        names = tuple(f"y{n} ({reward:g})" for n, reward in enumerate(rewards, 1))
    theirs = [float("nan")] * len(ours) if reference_EM is None else reference_EM[0].tolist()
    for name, tokens, a, b in zip(names, batch.scored_M.tolist(), ours, theirs, strict=True):
        lines.append(f"  {name:9s} {tokens:5d} tokens  policy {a:12.4f}  reference {b:12.4f} nats")
    return "\n".join(lines)
