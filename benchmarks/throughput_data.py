"""Quads of given lengths, made of the demo data's own text."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from iopo.data.encode import Limits
from iopo.data.example import Example
from iopo.data.rows import read_rows
from iopo.data.tokenize import Chat, tokenize_rows

TRAIN = Path(__file__).parent.parent / "data" / "verified" / "train.jsonl"
# name -> (prompt tokens, response tokens, quads in a step); None: as in the demo data
SHAPES: dict[str, tuple[int, int, int] | tuple[None, None, int]] = {
    "demo": (None, None, 6),
    "200/300": (200, 300, 2),
    "1000/500": (1000, 500, 1),
    "2000/200": (2000, 200, 1),
}


def demo_examples(tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """All training quads of the demo."""
    limits = Limits(max_prompt_tokens=4096, max_response_tokens=4096)
    return tokenize_rows(read_rows(TRAIN), Chat(tokenizer), limits)[0]


def make_quads(shape: str, demo: Sequence[Example]) -> list[Example]:
    """The quads of one step at `shape`, the same at every call."""
    prompt, response, count = SHAPES[shape]
    if prompt is None or response is None:
        picked = np.random.default_rng(0).choice(len(demo), count, replace=False)
        return [demo[i] for i in picked]
    # a running text of prompts and responses: predictions are as peaky as on real text
    text = np.concatenate([part for e in demo for part in (e.prompts[0], e.responses[0][0])])
    return quads_of_lengths(text, prompt, response, count)


def quads_of_lengths(text: np.ndarray, prompt: int, response: int, count: int) -> list[Example]:
    """`count` quads with prompts of exactly `prompt` and responses of exactly `response` tokens.

    text: int32 token ids to cut them from, repeated if too few.
    """
    need = count * 2 * (prompt + response)
    parts = np.resize(text, need).reshape(count, 2, prompt + response)
    quads = []
    for i, (one, two) in enumerate(parts):
        y1, y2 = one[prompt:], two[prompt:]
        quads.append(Example(f"q{i}", (one[:prompt], two[:prompt]), ((y1, y2), (y2, y1))))
    return quads


def shortened(example: Example) -> Example:
    """The first few tokens of every prompt and response, for a step that only warms up."""
    return replace(
        example,
        id=f"{example.id} shortened",
        prompts=tuple(prompt[:32] for prompt in example.prompts),
        responses=tuple(tuple(y[:16] for y in ys) for ys in example.responses),
    )


def as_pairs(quads: Sequence[Example]) -> list[Example]:
    """The preference pair that each quad began as: x1, y1 preferred to y2."""
    return [replace(q, prompts=q.prompts[:1], responses=q.responses[:1]) for q in quads]


def as_sft(quads: Sequence[Example]) -> list[Example]:
    """The instruction and right response that each quad began as: x1, y1."""
    return [replace(q, prompts=q.prompts[:1], responses=((q.responses[0][0],),)) for q in quads]


def useful_tokens(examples: Sequence[Example]) -> int:
    """Prompt and response tokens, each counted once per member: 4(P + R) of a quad."""
    return sum(
        len(prompt) + len(response)
        for e in examples
        for prompt, responses in zip(e.prompts, e.responses, strict=True)
        for response in responses
    )
