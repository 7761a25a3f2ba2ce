"""A language model as judge: prompts, requests, parsing, cost."""

from iopo.evaluation.judge.engine import (
    Judgement,
    first_request,
    judge_items,
    judge_one,
    plan,
    require_judge,
)
from iopo.evaluation.judge.parse import Unreadable

__all__ = [
    "Judgement",
    "Unreadable",
    "first_request",
    "judge_items",
    "judge_one",
    "plan",
    "require_judge",
]
