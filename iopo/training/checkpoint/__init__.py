"""Checkpoints: writing, finding, reading, and resuming from them."""

from iopo.training.checkpoint.folders import complete_folders, latest, read_state, step_of
from iopo.training.checkpoint.resume import (
    fingerprint,
    is_finished,
    load_checkpoint,
    refuse_or_note,
    restore,
)
from iopo.training.checkpoint.tensors import gather_state
from iopo.training.checkpoint.writer import CheckpointError, Checkpoints

__all__ = [
    "CheckpointError", "Checkpoints", "complete_folders", "fingerprint", "gather_state",
    "is_finished", "latest", "load_checkpoint", "read_state", "refuse_or_note", "restore",
    "step_of",
]  # fmt: skip
