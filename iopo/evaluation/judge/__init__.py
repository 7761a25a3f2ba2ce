"""A language model as judge: prompts, requests, parsing, cost."""

from iopo.evaluation.judge.engine import first_request, judge_items, judge_one, plan, require_judge

__all__ = ["first_request", "judge_items", "judge_one", "plan", "require_judge"]
