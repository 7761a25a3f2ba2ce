"""Where metrics go: metrics.jsonl in the run folder always, Weights & Biases when asked.

A row is {"step": n, "split": "train" | "heldout", name: value, ...}; step n is the n-th optimizer
step, counted from 1, and 0 is before the first.
"""

import json
import os
import uuid
from pathlib import Path
from typing import Any

from iopo.config import TrackerConfig, Wandb
from iopo.redact import redact


class Tracker:
    """Appends rows to metrics.jsonl and mirrors them to wandb. Only rank 0 has one."""

    def __init__(self, run: Path, cfg: TrackerConfig, config: dict[str, Any]):
        self.file = open(run / "metrics.jsonl", "a", encoding="utf-8")
        self.wandb = None
        if cfg.wandb is not Wandb.off:
            self.wandb = _start_wandb(run, cfg, config)

    def log(self, step: int, split: str, values: dict[str, float]) -> None:
        """One row. It is flushed, so that a killed run keeps every finished step."""
        row = {"step": step, "split": split} | {k: _rounded(v) for k, v in values.items()}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.wandb is not None:
            self.wandb.log({f"{split}/{k}": v for k, v in values.items()}, step=step)

    def flush(self) -> None:
        """Force rows to disk; called before a checkpoint, which promises them."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self) -> None:
        """Close both; safe to call twice."""
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()
            self.wandb = None


def _rounded(value: float) -> float:
    return float(f"{value:.8g}")


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
        config=json.loads(redact(json.dumps(config))),
        # argv, git diff and console would go unredacted; environment.json has the first two
        settings=wandb.Settings(x_disable_meta=True, disable_git=True, console="off"),
    )


def read_metrics(run: Path, split: str | None = None) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl, in file order, of one split if given."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if split is None or row["split"] == split]
