"""Checkpoints: writing, finding, reading, and resuming from them.

Resuming a run is not exported here: it needs the model code, whose import takes seconds.
"""

from iopo.training.checkpoint.folders import complete_folders, latest, read_state, step_of
from iopo.training.checkpoint.tensors import gather_state, load_state
from iopo.training.checkpoint.writer import CheckpointError, Checkpoints

__all__ = [
    "CheckpointError", "Checkpoints", "complete_folders", "gather_state", "latest", "load_state",
    "read_state", "step_of",
]  # fmt: skip
