"""Quads of given lengths, made of the text of the project's own data."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from iopo.data.example import Example
from iopo.data.rows import read_rows
from iopo.data.tokenize import Chat, Encoder, Limits, tokenize_rows

TRAIN = Path(__file__).parent.parent / "data" / "verified" / "train.jsonl"
Lengths = tuple[int, int, int, int]  # tokens of x1, x2, y1, y2


def alike(prompt: int, response: int, count: int) -> list[Lengths]:
    """Lengths of `count` quads with equal prompts and equal responses."""
    return [(prompt, prompt, response, response)] * count


SHAPES: dict[str, list[Lengths]] = {  # the quads of a step
    "demo": [  # a draw from the demo's first data set, of shorter instructions than data/verified
        (101, 118, 27, 25), (58, 72, 55, 59), (78, 63, 46, 47),
        (73, 63, 52, 35), (55, 62, 41, 18), (67, 69, 19, 19),
    ],
    "200/300": alike(200, 300, 2),
    "1000/500": alike(1000, 500, 1),
    "2000/200": alike(2000, 200, 1),
}  # fmt: skip


def make_quads(shape: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The quads of one step at `shape`, the same at every call."""
    limits = Limits(max_prompt_tokens=4096, max_response_tokens=4096)
    own = tokenize_rows(read_rows(TRAIN), Encoder(Chat(tokenizer), limits))[0]
    # a running text of prompts and responses: predictions are as peaky as on real text
    text = np.concatenate([part for e in own for part in (e.prompts[0], e.responses[0][0])])
    return quads_of_lengths(text, SHAPES[shape])


def quads_of_lengths(text: np.ndarray, lengths: Sequence[Lengths]) -> list[Example]:
    """Quads with prompts and responses of exactly these lengths.

    text: int32 token ids to cut them from in turn, repeated if too few.
    """
    text = np.resize(text, sum(map(sum, lengths)))
    quads = []
    for i, (p1, p2, r1, r2) in enumerate(lengths):
        x1, y1, x2, y2, text = np.split(text, np.cumsum([p1, r1, p2, r2]))
        quads.append(Example(f"q{i}", (x1, x2), ((y1, y2), (y2, y1))))
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
