"""What a run says: rows for metrics.jsonl, a bar on a terminal, plain lines elsewhere.

Ranks other than 0 hold a teller that says nothing, so that train.py needs no ifs.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from iopo.config import TrainConfig, plain
from iopo.training.loop import StepResult
from iopo.training.tracker import Tracker

SHOWN = {"loss": "loss", "margin": "margin", "accuracy": "acc", "tokens_per_s": "tok/s"}
HELDOUT_SHOWN = ("loss", "group_accuracy", "x_preference", "y_preference")
LINE_EVERY_S = 10.0


class Teller:
    """Progress and metrics of one run; silent unless `main`."""

    def __init__(self, run: Path, cfg: TrainConfig, *, main: bool):
        self.run, self.cfg, self.main = run, cfg, main
        self.tracker: Tracker | None = None
        self.bar: Progress | None = None
        self.first = self.last = 0
        self.started = self.printed = float("-inf")

    def say(self, text: str) -> None:
        """One line, above the bar if there is one."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        elif self.main:
            print(text, flush=True)

    @contextmanager
    def tracking(self, done: int, last: int) -> Iterator[None]:
        """Open metrics.jsonl and the bar while steps done + 1 .. last run; closes both always."""
        if not self.main:
            yield
            return
        self.first, self.last, self.started = done + 1, last, time.monotonic()
        self.tracker = Tracker(self.run, self.cfg.tracker, plain(self.cfg))
        if sys.stdout.isatty():
            text = TextColumn("{task.description}")
            count = TextColumn("{task.completed}/{task.total}")
            self.bar = Progress(count, BarColumn(20), text, TimeRemainingColumn())
            self.task = self.bar.add_task("", total=last, completed=done)
            self.bar.start()
        try:
            yield
        finally:
            self.tracker.finish()
            if self.bar is not None:
                self.bar.stop()
                self.bar = None

    def start(self, loss: float, worst: float) -> None:
        """What the check at step 0 found."""
        self.say(f"step 0: loss {loss:.7f}, largest |log-ratio| to the reference {worst:.2g} nats")

    def step(self, result: StepResult) -> None:
        """Log and show a training step. Every rank calls it: the numbers are of all ranks."""
        due = result.step % self.cfg.tracker.log_every_steps == 0 or result.step == self.last
        if not due:
            return
        values = result.reduce()
        if self.tracker is None:
            return
        self.tracker.log(result.step, "train", values)
        text = "  ".join(f"{label} {values[k]:.4g}" for k, label in SHOWN.items() if k in values)
        if self.bar is not None:
            self.bar.update(self.task, completed=result.step, description=text)
            return
        now = time.monotonic()
        if now - self.printed >= LINE_EVERY_S or result.step == self.last:
            self.printed = now
            steps = result.step - self.first + 1
            left = (now - self.started) / steps * (self.last - result.step)
            print(f"step {result.step}/{self.last}  {text}  {left:.0f} s left", flush=True)

    def heldout(self, step: int, values: dict[str, float]) -> None:
        """Log and show an evaluation on held-out quads; nothing for an empty one."""
        if self.tracker is None or not values:
            return
        self.tracker.log(step, "heldout", values)
        shown = "  ".join(f"{k} {values[k]:.4g}" for k in HELDOUT_SHOWN)
        self.say(f"held out, step {step}: {shown}")

    def flush(self) -> None:
        """Put all rows on disk; called before a checkpoint, which counts on them."""
        if self.tracker is not None:
            self.tracker.flush()
