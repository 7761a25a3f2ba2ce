"""Rows to token ids, once: in several processes, kept on disk, and with an account of it all.

The boundary. The prompt's text is the template's with the generation prompt; the response's text
is the rest of the template's text for the whole conversation. Generation goes on from the prompt's
tokens, so where these are the first of the whole text's tokens, the response is the others. (Llama
2's tokenizer puts a blank before every text: a response tokenised alone would get one too many.)
Where the boundary merges there are none: the response is tokenised alone, and the row counted.
A response is scored up to and including the first end-of-turn token; what the template writes after
it (a line break, mostly) is not part of the example.

The limits. A prompt's tokens are the same for both of its responses, and a response's for both of
its prompts, because each text gets its tokens and its cut once.
"""

import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from iopo.constraints import value_of
from iopo.data import token_cache
from iopo.data.chat import Chat, special_texts, tokenizer_hash
from iopo.data.columns import Prompt, last_turn, text_of
from iopo.data.example import Example, Report, percentiles
from iopo.data.rows import MAX_LISTED, Group, Pair, Quad, Row
from iopo.data.token_cache import Add, Examples
from iopo.files import shortened
from iopo.progress import progress

BLOCK_ROWS = 1000
MANY_ROWS = 20_000
ALL_MEMBERS = (0, 1, 2, 3)
PROMPT_TOO_LONG = "prompt longer than max_prompt_tokens"
RESPONSE_TOO_LONG = "response longer than max_response_tokens"
SPECIAL_TOKEN = "text holds a special token of the tokenizer"
EQUAL_PROMPTS = "the two prompts are equal after truncation"
EQUAL_RESPONSES = "the two responses are equal after truncation"


@dataclass(frozen=True)
class Limits:
    """How long prompts and responses may be, in tokens, template and end-of-turn token included.

    on_overlong: "drop" the row and report it; "error"; or "truncate": a response loses its end (and
    with it the end-of-turn token), a prompt the end of its instruction, while the template's text
    around the instruction, earlier turns too, stays whole. (The released code cuts the prompt from
    the right, assistant header included.)
    """

    max_prompt_tokens: int
    max_response_tokens: int
    on_overlong: str = "drop"


@dataclass
class Outcome:
    """What became of a block of rows.

    dropped, truncated: (reason, row id). joint: see Report.joint_differences.
    """

    examples: list[Example] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    truncated: list[tuple[str, str]] = field(default_factory=list)
    joint: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Tree:
    """The texts of a prompt: its last turn, the whole of it, and the responses under it."""

    instruction: str
    prompt: str
    responses: tuple[str, ...]


class Encoder:
    """Rows to examples in one process; every distinct text of a block is tokenised once.

    columns: the members of a quad that its example keeps (Rows.columns in objectives.py).
    """

    def __init__(self, chat: Chat, limits: Limits, columns: tuple[int, ...] = ALL_MEMBERS):
        self.chat, self.limits, self.columns = chat, limits, columns
        self.end_of_turn = chat.trained_end_of_turn()
        end = str(chat.tokenizer.convert_ids_to_tokens(self.end_of_turn))
        forbidden = {*special_texts(chat.tokenizer), end}
        self.special = re.compile("|".join(map(re.escape, sorted(forbidden, reverse=True))))
        self.ids: dict[str, np.ndarray] = {}  # of the texts of the present block

    def encode(self, rows: Sequence[Row]) -> Outcome:
        outcome = Outcome()
        rendered: list[tuple[Row, list[_Tree]]] = []
        for row in rows:
            forest = _forest(row, self.columns)
            texts = [row.system or "", *(text for x, ys in forest for text in (text_of(x), *ys))]
            if any(self.special.search(text) for text in texts):
                outcome.dropped.append((SPECIAL_TOKEN, row.id))
                continue
            try:
                rendered.append((row, [self._render(x, ys, row.system) for x, ys in forest]))
            except ValueError as error:
                outcome.faults.append(f"row {row.id!r}: {error}")
        self._tokenize(tree for _, forest in rendered for tree in forest)
        for row, trees in rendered:
            try:
                self._finish(row, trees, outcome)
            except ValueError as error:
                outcome.faults.append(f"row {row.id!r}: {error}")
        return outcome

    def _render(self, x: Prompt, ys: Sequence[str], system: str | None) -> _Tree:
        prompt = self.chat.prompt(x, system)
        return _Tree(
            last_turn(x), prompt, tuple(self.chat.response(prompt, x, y, system) for y in ys)
        )

    def _tokenize(self, trees: Iterable[_Tree]) -> None:
        """All texts of the rows at once: prompts, headers, and responses after their header."""
        texts: dict[str, None] = {}
        for tree in trees:
            header = self._header(tree.prompt)
            joined = (header + response for response in tree.responses)
            texts.update(dict.fromkeys((tree.prompt, header, *joined)))
        self.ids = {}
        if texts:
            encoded = self.chat.tokenizer(list(texts), add_special_tokens=False, verbose=False)
            for text, ids in zip(texts, encoded["input_ids"], strict=True):
                self.ids[text] = np.array(ids, dtype=np.int32)

    def _header(self, prompt: str) -> str:
        """The prompt from its last special token on: tokens before it do not see what follows."""
        last = max((found.start() for found in self.special.finditer(prompt)), default=0)
        return prompt[last:]

    def _follows(self, text: str, trees: Sequence[_Tree]) -> tuple[np.ndarray, bool]:
        """A response's tokens, the same under all its prompts, and whether a boundary merges."""
        rests: list[np.ndarray] = []
        for header in {self._header(tree.prompt) for tree in trees if text in tree.responses}:
            before, whole = self.ids[header], self.ids[header + text]
            rest = whole[len(before) :]
            same_before = np.array_equal(whole[: len(before)], before)
            if not same_before or not all(np.array_equal(rest, other) for other in rests):
                alone = self.chat.tokenizer(text, add_special_tokens=False, verbose=False)
                return np.array(alone["input_ids"], dtype=np.int32), True
            rests.append(rest)
        return rests[0], False

    def _finish(self, row: Row, trees: list[_Tree], outcome: Outcome) -> None:
        """Cut at the end of turn, apply the limits, and book the row under what became of it."""
        prompts = [self.ids[tree.prompt] for tree in trees]
        texts = {text for tree in trees for text in tree.responses}
        after = {text: self._follows(text, trees) for text in texts}
        whole = {text: self._until_end(ids, text) for text, (ids, _) in after.items()}
        responses = [[whole[text] for text in tree.responses] for tree in trees]
        longest = max(map(len, prompts)), max(len(ids) for ys in responses for ids in ys)
        most_x, most_y = self.limits.max_prompt_tokens, self.limits.max_response_tokens
        too_long = [(PROMPT_TOO_LONG, longest[0])] if longest[0] > most_x else []
        too_long += [(RESPONSE_TOO_LONG, longest[1])] if longest[1] > most_y else []
        if too_long and self.limits.on_overlong == "error":
            named = " and ".join(f"{reason} ({length} tokens)" for reason, length in too_long)
            what_to_do = "raise the limit, or set data.on_overlong to drop or truncate"
            raise ValueError(f"{named}: {what_to_do}")
        if too_long and self.limits.on_overlong == "drop":
            outcome.dropped.append((too_long[0][0], row.id))
            return
        if too_long:
            prompts = [self._cut_prompt(*cut) for cut in zip(prompts, trees, strict=True)]
            responses = [[ids[:most_y] for ids in ys] for ys in responses]
            for reason, both in ((EQUAL_PROMPTS, prompts), (EQUAL_RESPONSES, responses[0])):
                two = len(both) == 2 and not isinstance(row, Group)  # samples may be equal
                if two and np.array_equal(both[0], both[1]):
                    outcome.dropped.append((reason, row.id))
                    return
            outcome.truncated += [(reason, row.id) for reason, _ in too_long]
        if any(merges for _, merges in after.values()):
            outcome.joint.append(row.id)
        forest = tuple(map(tuple, responses))
        rewards = tuple(row.rewards) if isinstance(row, Group) else ()
        outcome.examples.append(Example(row.id, tuple(prompts), forest, _differing(row), rewards))

    def _until_end(self, ids: np.ndarray, text: str) -> np.ndarray:
        """Tokens of a response up to and including the first end-of-turn token."""
        ends = np.flatnonzero(ids == self.end_of_turn)
        if len(ends) == 0:
            name = self.chat.tokenizer.convert_ids_to_tokens(self.end_of_turn)
            raise ValueError(
                f"the template writes no end-of-turn token {name!r} after the response, only "
                f"{text[-30:]!r}: end every assistant turn of the template with it"
            )
        return ids[: ends[0] + 1]

    def _cut_prompt(self, ids: np.ndarray, tree: _Tree) -> np.ndarray:
        """The prompt without the end of its instruction, so that it fits; the frame stays."""
        if len(ids) <= self.limits.max_prompt_tokens:
            return ids
        before, found, frame = tree.prompt.rpartition(tree.instruction.strip())
        start, end = self.chat.tokenizer([before, frame], add_special_tokens=False)["input_ids"]
        after = np.array(end, dtype=np.int32)
        keep = self.limits.max_prompt_tokens - len(after)
        if not found or keep < max(1, len(start)) or not np.array_equal(ids[-len(after) :], after):
            raise ValueError(
                f"the prompt of {len(ids)} tokens cannot be cut to {self.limits.max_prompt_tokens} "
                f"within the template, which ends it with {frame!r}: raise max_prompt_tokens, or "
                "set data.on_overlong to drop"
            )
        return np.concatenate((ids[:keep], after))


def _forest(row: Row, columns: tuple[int, ...]) -> tuple[tuple[Prompt, tuple[str, ...]], ...]:
    """(instruction, its responses) in member order; of a quad the members in `columns`."""
    if isinstance(row, Quad):
        ys = (row.y1, row.y2, row.y2, row.y1)
        under_x1 = tuple(ys[column] for column in columns if column < 2)
        under_x2 = tuple(ys[column] for column in columns if column >= 2)
        return ((row.x1, under_x1), (row.x2, under_x2))
    if isinstance(row, Pair):
        return ((row.x, (row.chosen, row.rejected)),)
    if isinstance(row, Group):
        return ((row.x, tuple(row.responses)),)
    return ((row.x, (row.y,)),)


def _differing(row: Row) -> int:
    """Constraints of x1 that x2 has not, or the other way round, whichever are more."""
    if not isinstance(row, Quad) or row.c1 is None or row.c2 is None:
        return 0

    c1, c2 = (set(map(value_of, of)) for of in (row.c1, row.c2))
    return max(len(c1 - c2), len(c2 - c1))


def tokenize_file(
    read: Callable[[], Sequence[Row]],
    encoder: Encoder,
    *,
    identity: Sequence[object],
    cache_dir: Path,
    workers: int = 0,
    source: str,
) -> Examples:
    """As `tokenize_rows`, of a whole file, in memory-mapped arrays that processes share.

    read: returns the rows; called only where the result is not in cache_dir. identity: JSON values
    that determine what it returns, the file's hash among them. Call it before any process group
    exists: a first run may take minutes.
    """
    how = [tokenizer_hash(encoder.chat), repr(encoder.limits), encoder.columns]

    def work(add: Add) -> Report:
        return _encode_rows(read(), encoder, workers, source, add)

    return token_cache.get(cache_dir, identity, how, work)


def tokenize_rows(
    rows: Sequence[Row], encoder: Encoder, *, workers: int = 0, source: str = "rows"
) -> tuple[list[Example], Report]:
    """Examples of the rows that can be used, in their order, and the report of all rows.

    workers: processes to spread the rows over; 0: one, or one per core for MANY_ROWS. source: the
    file that an error names.
    Raises ValueError naming the rows that break the template's prefix property or end without an
    end-of-turn token, the overlong ones if the limits say so, and when no row remains.
    """
    examples: list[Example] = []
    report = _encode_rows(rows, encoder, workers, source, examples.extend)
    return examples, report


def _encode_rows(
    rows: Sequence[Row], encoder: Encoder, workers: int, source: str, add: Add
) -> Report:
    """Give the examples to `add`, block by block; returns the report of all rows."""
    # One process per core where there is work for them: starting one costs seconds.
    workers = workers or (len(os.sched_getaffinity(0)) if len(rows) > MANY_ROWS else 1)
    booked = Outcome()
    prompts, responses = array("q"), array("q")  # lengths
    kept = 0
    show = progress(len(rows), f"rows of {source} tokenised")
    for number, block in enumerate(_outcomes(rows, encoder, workers), 1):
        show(min(number * BLOCK_ROWS, len(rows)))
        kept += len(block.examples)
        for example in block.examples:
            prompts.extend(map(len, example.prompts))
            responses.extend(map(len, chain(*example.responses)))
        add(block.examples)
        block.examples = []
        for name, values in vars(block).items():
            getattr(booked, name).extend(values)
    if booked.faults:
        raise ValueError(
            f"{len(booked.faults)} of {len(rows)} rows cannot be tokenised\n  "
            + "\n  ".join(shortened(booked.faults, MAX_LISTED))
        )
    report = Report(
        rows=len(rows),
        kept=kept,
        dropped=_by_reason(booked.dropped),
        truncated=_by_reason(booked.truncated),
        joint_differences=booked.joint,
        prompt_tokens=percentiles(prompts),
        response_tokens=percentiles(responses),
    )
    if not kept:
        raise ValueError(f"{source}: no row is left:\n  " + "\n  ".join(report.lines()))
    return report


def _outcomes(rows: Sequence[Row], encoder: Encoder, workers: int) -> Iterator[Outcome]:
    """What becomes of each block of rows, in their order.

    Blocks, because the tokenizer's lists of Python numbers take ten times their arrays.
    """
    blocks = (rows[at : at + BLOCK_ROWS] for at in range(0, len(rows), BLOCK_ROWS))
    if workers <= 1:
        yield from map(encoder.encode, blocks)
        return
    # spawn, not fork: the tokenizer runs threads, and a fork may keep their locks forever.
    with get_context("spawn").Pool(workers, _start_worker, (encoder,)) as pool:
        yield from pool.imap(_encode_in_worker, blocks)


_encoder: Encoder  # of a worker process


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is enough


def _encode_in_worker(block: Sequence[Row]) -> Outcome:
    return _encoder.encode(block)


def _by_reason(booked: list[tuple[str, str]]) -> dict[str, list[str]]:
    reasons = dict.fromkeys(reason for reason, _ in booked)
    return {reason: [i for r, i in booked if r == reason] for reason in reasons}
