"""What a run says and records: lines on stdout, metrics.jsonl, Weights & Biases, a progress bar.

Every file of the package writes its lines with `log = logging.getLogger(__name__)`; they appear
once `set_up_logging` was called in the process.

A row of metrics.jsonl is {"step": n, "split": "train" | "heldout", name: value, ...}; step n is the
n-th optimizer step, counted from 1, and 0 is before the first.
"""

import json
import logging
import os
import statistics
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch

from iopo.config import HELDOUT_MEASURES, TrackerConfig, Wandb
from iopo.files import read_records
from iopo.progress import progress
from iopo.redact import redact, redact_values

SHOWN = {"loss": "loss", "margin": "margin", "accuracy": "acc", "tokens_per_s": "tok/s"}
CROWDED = 2.0  # times slower than the first steps

log = logging.getLogger(__name__)


class _Stdout(logging.Handler):
    """Plain lines on the stdout of the moment: rich replaces it while a bar is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def set_up_logging(*, main: bool) -> None:
    """Show the package's messages on stdout; of a process that is not `main`, only warnings."""
    package = logging.getLogger("iopo")
    package.handlers = [_Stdout()]
    package.propagate = False  # Hydra's handler would print every line again
    package.setLevel(logging.INFO if main else logging.WARNING)


class Logger:
    """Metrics and progress of `steps`; use it as a context.

    config: of the run, for Weights & Biases. main: rank 0; on other ranks nothing is written.
    """

    def __init__(
        self, run: Path, cfg: TrackerConfig, config: dict[str, Any], *, main: bool, steps: range
    ):
        self.every, self.first, self.last = cfg.log_every_steps, steps.start, steps.stop - 1
        self.file = open(run / "metrics.jsonl", "a", encoding="utf-8") if main else None
        self.wandb = _start_wandb(run, cfg, config) if main and cfg.wandb is not Wandb.off else None
        self.crowding = None if torch.cuda.is_available() else Crowding()
        self.show = progress(self.last, "steps", self.first - 1, at_once=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()
        if self.wandb is not None:
            self.wandb.finish()
        self.show.close()

    def step(self, step: int, reduce: Callable[[], dict[str, float]]) -> None:
        """Record and show a training step, if it is one to log. Every rank calls it.

        reduce: a collective call that returns the step's numbers, of all ranks.
        """
        if step % self.every and step != self.last:
            return
        values = reduce()
        if self.file is None:
            return
        self._record(step, "train", values)
        text = "  ".join(f"{label} {values[k]:.4g}" for k, label in SHOWN.items() if k in values)
        self.show(step, text)
        if self.crowding is not None:
            self.crowding.watch(values["tokens_per_s"])

    def heldout(self, step: int, values: dict[str, float]) -> None:
        """Record and show an evaluation on held-out quads; nothing for an empty one."""
        if self.file is not None and values:
            self._record(step, "heldout", values)
            shown = "  ".join(f"{k} {values[k]:.4g}" for k in HELDOUT_MEASURES)
            log.info(f"held out, step {step}: {shown}")

    def flush(self) -> None:
        """Put all rows on the disk; called before a checkpoint, which counts on them."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def _record(self, step: int, split: str, values: dict[str, float]) -> None:
        assert self.file is not None
        rounded = {name: float(f"{value:.8g}") for name, value in values.items()}
        self.file.write(json.dumps({"step": step, "split": split} | rounded) + "\n")
        self.file.flush()  # a killed run keeps every finished step
        if self.wandb is not None:
            self.wandb.log({f"{split}/{k}": v for k, v in values.items()}, step=step)


class Crowding:
    """Says once that other programs take this run's cores: threads of a product wait for each
    other, so that one busy core slows all of them down."""

    def __init__(self) -> None:
        self.speeds: list[float] = []
        self.said = False

    def watch(self, tokens_per_s: float) -> None:
        """Look at a step: at the median of the last three against that of the first five, the very
        first left out."""
        self.speeds.append(tokens_per_s)
        load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
        if self.said or len(self.speeds) < 9 or load <= cores + 0.5:
            return
        slower = statistics.median(self.speeds[1:6]) / statistics.median(self.speeds[-3:])
        if slower > CROWDED:
            self.said = True
            log.warning(
                f"crowded: steps are {slower:.1f} times slower than the first ones, and {load:.1f} "
                f"threads want the {cores} cores of this machine (load average). Stop the other "
                "programs, or lower their priority (renice -n 19 -p PID); or stop this run, which "
                f"resumes, and start it with OMP_NUM_THREADS below its {torch.get_num_threads()}"
            )


def _start_wandb(run: Path, cfg: TrackerConfig, config: dict[str, Any]):
    import wandb

    # One id per run folder: a resumed run continues its own curves.
    id_file = run / "wandb_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8])
    return wandb.init(
        project=redact(cfg.project),
        name=run.name,
        id=id_file.read_text(),
        resume="allow" if cfg.wandb is Wandb.online else None,
        mode="online" if cfg.wandb is Wandb.online else "offline",
        dir=str(run),
        tags=[redact(tag) for tag in cfg.tags],
        config=redact_values(config),
        # argv, git diff and console would go unredacted; environment.json has the first two
        settings=wandb.Settings(x_disable_meta=True, disable_git=True, console="off"),
    )


def read_metrics(run: Path, split: str | None = None) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl, in file order, of one split if given."""
    rows = read_records(run / "metrics.jsonl", torn_tail=True)
    return [row for row in rows if split in (None, row["split"])]
