"""plan=true: memory, FLOPs and communication of a run without weights or a GPU."""

from iopo.training.plan.auto import resolve_checkpointing
from iopo.training.plan.report import Plan, plan_report

__all__ = ["Plan", "plan_report", "resolve_checkpointing"]
