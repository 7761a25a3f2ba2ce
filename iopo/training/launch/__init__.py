"""Processes of a run: placement, launch, signals, failures, the run folder."""

from iopo.training.launch.launcher import Worker, launch
from iopo.training.launch.placement import Placement, RankInfo, find_placement
from iopo.training.launch.run_folder import (
    describe_environment,
    mark_complete,
    open_run,
    read_complete,
)
from iopo.training.launch.signals import INTERRUPTED, OK, SAVED_REQUEUE, Control, heartbeat

__all__ = [
    "INTERRUPTED", "OK", "SAVED_REQUEUE", "Control", "Placement", "RankInfo", "Worker",
    "describe_environment", "find_placement", "heartbeat", "launch", "mark_complete", "open_run",
    "read_complete",
]  # fmt: skip
