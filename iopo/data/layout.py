"""From tokenised examples to the tensors of one micro-batch, in two layouts.

shared  all examples in one row, each prompt once: [x1 | y1 | y2 | x2 | y2 | y1] of a quad
plain   one right-padded row per member: the reference path

The shared layout processes 2P + 4R tokens of a quad instead of 4(P + R). Positions restart after
the prompt for each response, and the last prompt token's hidden row is scored once per response.

Letters: S sequences, L padded length, T packed tokens, R response rows, M members of all examples,
N attention segments, K gathered keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iopo.data.example import Example


@dataclass(frozen=True, slots=True)
class SharedSegments:
    """Who attends to whom in a packed row: N segments of consecutive queries.

    Segment n holds the queries [start, stop). They attend to all keys of [prefix_start,
    prefix_stop) and causally to their own. A prompt and its first response are one segment without
    a prefix; each further response is a segment whose prefix is the prompt. Segments cover every
    token once, in order.

    ranges_N4: int64 [N, 4], rows (start, stop, prefix_start, prefix_stop); stays on the CPU.
    cu_q, cu_k: int32 [N+1], where a segment's queries and keys begin; keys are laid out as
        (prefix, own) per segment, so the causal mask is aligned bottom-right.
    gather_K: int64 [K], the token behind each of those keys. A token occurs at most once per
        response of its prompt.
    max_q, max_k: most queries and most keys of a segment; max_k is also the longest path.
    """

    ranges_N4: Tensor
    cu_q: Tensor
    cu_k: Tensor
    gather_K: Tensor
    max_q: int
    max_k: int

    def to(self, device: torch.device | str) -> "SharedSegments":
        """The same segments with the index tensors of CUDA kernels on `device`."""
        return replace(self, **_moved(self, ("cu_q", "cu_k", "gather_K"), device))


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. All tensors are int64 unless said otherwise.

    input_ids, positions: [1, T] (shared) or [S, L] (plain).
    rows_R: the row of hidden.flatten(0, 1) that predicts each response token; has duplicates.
    targets_R: the response token itself.
    scored_M: response tokens per member, [examples * members]; a member's rows are neighbours.
    attention: the segments; None in the plain layout.
    padding_mask: bool [S, L], True on tokens; None unless the layout is plain.
    """

    input_ids: Tensor
    positions: Tensor
    rows_R: Tensor
    targets_R: Tensor
    scored_M: Tensor
    examples: int
    members: int
    attention: SharedSegments | None
    padding_mask: Tensor | None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device` (copies do not block the host where memory is pinned)."""
        names = ["input_ids", "positions", "rows_R", "targets_R", "scored_M"]
        if self.padding_mask is not None:
            names.append("padding_mask")
        segments = None if self.attention is None else self.attention.to(device)
        return replace(self, attention=segments, **_moved(self, names, device))


def _moved(holder: object, names: Sequence[str], device: torch.device | str) -> dict[str, Any]:
    return {name: getattr(holder, name).to(device, non_blocking=True) for name in names}


def build_shared(examples: Sequence[Example], *, multiple: int = 1) -> Batch:
    """Pack whole examples into one row, each prompt once, followed by its responses.

    multiple: T is rounded up to this multiple, so that compiled code meets few lengths. The tail
        holds token 0, is a segment of its own and is never scored.

    >>> a = Example("a", (np.array([1, 2, 3]),), ((np.array([4, 5]), np.array([6])),))
    >>> b = Example("b", (np.array([7]),), ((np.array([8]), np.array([9, 9])),))
    >>> batch = build_shared([a, b])
    >>> batch.input_ids                     # 1 2 3 is the prompt of both 4 5 and 6
    tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 9]])
    >>> batch.positions
    tensor([[0, 1, 2, 3, 4, 3, 0, 1, 1, 2]])
    >>> batch.rows_R, batch.targets_R       # row 2 (token 3) predicts 4, and 6
    (tensor([2, 3, 2, 6, 6, 8]), tensor([4, 5, 6, 8, 9, 9]))
    >>> batch.scored_M
    tensor([2, 1, 1, 2])
    >>> batch.attention.ranges_N4.tolist()  # start, stop, prefix_start, prefix_stop
    [[0, 5, 0, 0], [5, 6, 0, 3], [6, 8, 6, 6], [8, 10, 6, 7]]
    >>> batch.attention.gather_K.tolist()
    [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 6, 8, 9]
    """
    members = _members_of_each(examples)
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    ranges: list[tuple[int, int, int, int]] = []
    end = 0
    for example in examples:
        for prompt, responses in zip(example.prompts, example.responses, strict=True):
            start, prompt_end = end, end + len(prompt)
            tokens.append(prompt)
            positions.append(np.arange(len(prompt)))
            for index, response in enumerate(responses):
                own = prompt_end if index == 0 else end
                end = own + len(response)
                tokens.append(response)
                positions.append(np.arange(len(prompt), len(prompt) + len(response)))
                rows.append(_predicting_rows(prompt_end - 1, own, len(response)))
                targets.append(response)
                if index == 0:
                    ranges.append((start, end, start, start))
                elif response.size:
                    ranges.append((own, end, start, prompt_end))
    tail = -end % multiple
    if tail:
        tokens.append(np.zeros(tail, np.int64))
        positions.append(np.arange(tail))
        ranges.append((end, end + tail, end, end))
    return Batch(
        input_ids=_joined(tokens)[None],
        positions=_joined(positions)[None],
        rows_R=_joined(rows),
        targets_R=_joined(targets),
        scored_M=torch.tensor([len(response) for response in targets]),
        examples=len(examples),
        members=members,
        attention=segments(ranges),
        padding_mask=None,
    )


def build_plain(examples: Sequence[Example]) -> Batch:
    """One right-padded row per member; padding is token 0 at a position no real token sees.

    >>> a = Example("a", (np.array([1, 2, 3]),), ((np.array([4, 5]), np.array([6])),))
    >>> batch = build_plain([a])
    >>> batch.input_ids
    tensor([[1, 2, 3, 4, 5],
            [1, 2, 3, 6, 0]])
    >>> batch.rows_R, batch.targets_R
    (tensor([2, 3, 7]), tensor([4, 5, 6]))
    >>> batch.padding_mask[1]
    tensor([ True,  True,  True,  True, False])
    """
    members = _members_of_each(examples)
    pairs = [pair for example in examples for pair in example.members()]
    length = max(len(prompt) + len(response) for prompt, response in pairs)
    input_ids = np.zeros((len(pairs), length), np.int64)
    mask = np.zeros((len(pairs), length), bool)
    rows = []
    for index, (prompt, response) in enumerate(pairs):
        path = np.concatenate([prompt, response])
        input_ids[index, : len(path)] = path
        mask[index, : len(path)] = True
        last = index * length + len(prompt) - 1
        rows.append(_predicting_rows(last, last + 1, len(response)))
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        positions=torch.arange(length).repeat(len(pairs), 1),
        rows_R=_joined(rows),
        targets_R=_joined([response for _, response in pairs]),
        scored_M=torch.tensor([len(response) for _, response in pairs]),
        examples=len(examples),
        members=members,
        attention=None,
        padding_mask=torch.from_numpy(mask),
    )


def segments(ranges: Sequence[tuple[int, int, int, int]]) -> SharedSegments:
    """The index tensors of segments given as (start, stop, prefix_start, prefix_stop)."""
    ranges_N4 = np.asarray(ranges, np.int64)
    start, stop, prefix_start, prefix_stop = ranges_N4.T
    queries = stop - start
    keys = queries + prefix_stop - prefix_start
    gather = [np.concatenate([np.arange(c, d), np.arange(a, b)]) for a, b, c, d in ranges]
    return SharedSegments(
        ranges_N4=torch.from_numpy(ranges_N4),
        cu_q=torch.from_numpy(np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)),
        cu_k=torch.from_numpy(np.concatenate([[0], np.cumsum(keys)]).astype(np.int32)),
        gather_K=_joined(gather),
        max_q=int(queries.max()),
        max_k=int(keys.max()),
    )


def _members_of_each(examples: Sequence[Example]) -> int:
    """The number of members that all examples have in common."""
    for example in examples:
        # the last token of a prompt predicts the first one of its responses
        assert all(map(len, example.prompts)), f"example {example.id!r} has an empty prompt"
        assert all(example.responses), f"example {example.id!r} has a prompt without response"
    counts = {sum(map(len, example.responses)) for example in examples}
    assert len(counts) == 1, f"expected equally many members in each example, found {counts}"
    return counts.pop()


def _predicting_rows(last_prompt_row: int, own: int, length: int) -> np.ndarray:
    """Rows that predict a response of `length` tokens whose first token stands in row `own`."""
    rows = np.arange(own - 1, own + length - 1)
    rows[:1] = last_prompt_row
    return rows


def _joined(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64, copy=False))
