"""What an evaluation will ask for and cost, from the texts alone: nothing is sent or loaded."""

from types import ModuleType
from typing import Any

from iopo.evaluation.config import EvaluateConfig, JudgeSection
from iopo.evaluation.items import Item
from iopo.evaluation.judge import engine as judge

ASSUMED_RESPONSE = "x " * 400  # where answers are not there yet: 800 characters
REPLY_TOKENS = 60  # of a judge, to begin with, and ...
REPLY_TOKENS_PER_CRITERION = 55  # ... for each constraint it explains


def tokens(text: str) -> int:
    """A rough count: 3 tokens for 4 Chinese characters, 1 for 4 others."""
    wide = sum(ord(character) >= 0x2E80 for character in text)
    return round(0.75 * wide + 0.25 * (len(text) - wide))


def cost_usd(section: JudgeSection, prompt: int, completion: int) -> float | None:
    """The price of so many tokens; None where the config names no prices."""
    prices = (section.usd_per_million_prompt_tokens, section.usd_per_million_completion_tokens)
    if prices[0] is None or prices[1] is None:
        return None
    return (prompt * prices[0] + completion * prices[1]) / 1e6


def show(
    config: EvaluateConfig,
    module: ModuleType,
    judged: bool,
    items: list[Item],
    texts: dict[str, str] | None,
    say: Any,
) -> dict[str, Any]:
    """Say and return the estimate. texts: answers by id; None: of an assumed length."""
    answer = {
        "items": len(items),
        "answers_to_make": 0 if texts is not None else len(items),
        "answer_prompt_tokens": sum(tokens(m["content"]) for i in items for m in i.messages),
    }
    found: dict[str, Any] = dict(answer)
    if judged:
        found |= _judge_plan(config.judge, module, items, texts)
    for key, value in found.items():
        say(f"{key.replace('_', ' ')}: {'not known' if value is None else value}")
    if judged and found["judge_cost_usd"] is None:
        say("set judge.usd_per_million_prompt_tokens and ..._completion_tokens for a cost")
    say("token counts are estimates from characters; re-asked replies come on top")
    return found


def _judge_plan(
    section: JudgeSection, module: ModuleType, items: list[Item], texts: dict[str, str] | None
) -> dict[str, Any]:
    requests = prompt = completion = 0
    for item in items:
        text = ASSUMED_RESPONSE if texts is None else texts.get(item.id, "")
        for question in module.questions(item, text):
            if not question.response.strip():
                continue
            whole, _ = judge.prepare(question, section)
            parts = judge.split(whole, per_criterion=section.per_criterion, style=section.style)
            for part in parts:
                requests += 1
                prompt += tokens(judge.prompt(part.question, section.style))
                completion += REPLY_TOKENS + REPLY_TOKENS_PER_CRITERION * len(part.places)
    cost = cost_usd(section, prompt, completion)
    return {
        "judge_requests": requests,
        "judge_prompt_tokens": prompt,
        "judge_completion_tokens": completion,
        "judge_cost_usd": None if cost is None else round(cost, 2),
    }
