"""Token counts and prices, estimated from the texts."""

from iopo.evaluation.config import JudgeSection

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
