"""A tokenised row, and the account of what tokenising did with the rows of a file."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iopo.files import shortened

PERCENTILES = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}
MAX_LISTED = 5  # ids shown in a line of the report; all of them are in its dict


@dataclass(frozen=True, slots=True)
class Example:
    """A forest of prompts, each with the responses that follow it; int32 token ids throughout.

    quad        prompts (x1, x2), responses ((y1, y2), (y2, y1)): members in the order of MEMBERS
    iopo_three  prompts (x1, x2), responses ((y1, y2), (y1,)): members x1y1, x1y2, x2y1
    pair        prompts (x,), responses ((chosen, rejected),)
    sft         prompts (x,), responses ((y,),)
    group       prompts (x,), responses (as many as the file's rows have,)
    Responses end with the end-of-turn token, unless truncated.
    differing: how many constraints of x1 and x2 differ; 0 when the row does not say.
    rewards: of the responses of a group.
    """

    id: str
    prompts: tuple[np.ndarray, ...]
    responses: tuple[tuple[np.ndarray, ...], ...]
    differing: int = 0
    rewards: tuple[float, ...] = ()

    def members(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(prompt, response) of each member."""
        return [(x, y) for x, ys in zip(self.prompts, self.responses, strict=True) for y in ys]

    def segments(self) -> list[np.ndarray]:
        """The first prompt, its responses, the second prompt, and so on."""
        pairs = zip(self.prompts, self.responses, strict=True)
        return [segment for x, ys in pairs for segment in (x, *ys)]


def content_key(example: Example) -> str:
    """sha256 (hex) of the example's token ids and shape, whatever its id and rewards."""
    digest = hashlib.sha256()
    for prompt, responses in zip(example.prompts, example.responses, strict=True):
        digest.update(f"prompt {len(prompt)} {len(responses)} ".encode())
        digest.update(prompt.astype("<i4").tobytes())
        for response in responses:
            digest.update(f"response {len(response)} ".encode())
            digest.update(response.astype("<i4").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Report:
    """What became of the rows; nothing is dropped or cut that is not listed here by its row id.

    dropped, truncated: reason -> ids. joint_differences: kept rows in which the tokens of prompt
    and response together do not begin with those of the prompt, which generation goes on from.
    prompt_tokens, response_tokens: percentiles over the kept rows, empty when none was kept.
    """

    rows: int
    kept: int
    dropped: dict[str, list[str]]
    truncated: dict[str, list[str]]
    joint_differences: list[str]
    prompt_tokens: dict[str, int]
    response_tokens: dict[str, int]

    def lines(self) -> list[str]:
        """The report for a person."""
        lines = [f"{self.kept} of {self.rows} rows kept"]
        for what, reasons in (("dropped", self.dropped), ("truncated", self.truncated)):
            for reason, ids in reasons.items():
                lines.append(f"{what}, {reason}: {len(ids)} ({_some(ids)})")
        if self.joint_differences:
            lines.append(
                f"kept, but tokens differ when prompt and response are tokenised together: "
                f"{len(self.joint_differences)} ({_some(self.joint_differences)})"
            )
            if 2 * len(self.joint_differences) > self.kept:
                lines.append(
                    "  most rows: the tokenizer merges the end of the template's prompt with the "
                    "start of responses; end the prompt with a special token or a line break"
                )
        for what, numbers in (("prompt", self.prompt_tokens), ("response", self.response_tokens)):
            if numbers:
                values = ", ".join(f"{name} {value}" for name, value in numbers.items())
                lines.append(f"{what} tokens: {values}")
        return lines


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """PERCENTILES of the lengths, each a length that occurs; {} of none."""
    if not lengths:
        return {}
    values = np.percentile(lengths, list(PERCENTILES.values()), method="higher")
    return {name: int(value) for name, value in zip(PERCENTILES, values, strict=True)}


def _some(ids: list[str]) -> str:
    return ", ".join(shortened(ids, MAX_LISTED))
