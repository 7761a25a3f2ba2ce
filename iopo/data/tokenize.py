"""Rows to token ids, once: in several processes, kept on disk, and with an account of it all.

How a row is rendered, cut and joined is in encode.py.
"""

import os
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

from iopo.data import token_cache
from iopo.data.chat import Chat, tokenizer_hash
from iopo.data.encode import Encoder, Limits, Outcome
from iopo.data.example import Example, Report, content_key, percentiles
from iopo.data.rows import MAX_LISTED, Row

__all__ = ["Chat", "Example", "Limits", "Report", "content_key", "tokenize_rows", "tokenizer_hash"]


def tokenize_rows(
    rows: Sequence[Row],
    chat: Chat,
    limits: Limits,
    *,
    three: bool = False,
    workers: int = 0,
    cache_dir: str | Path | None = None,
    source: str = "rows",
) -> tuple[list[Example], Report]:
    """Examples of the rows that can be used, in their order, and the report of all rows.

    three: quads become iopo_three examples (no x2y2 member). workers: processes to spread the rows
    over; 0 or 1 is this process. cache_dir: where results are kept, None for nowhere; the key holds
    everything that changes the result, and of several processes that ask for the same one works.
    source: the file that the message for no row left names.
    Call it before any process group exists: a first run may take minutes.
    Raises ValueError naming the rows that break the template's prefix property or end without an
    end-of-turn token, the overlong ones if the limits say so, and when no row is left.
    """

    def work() -> tuple[list[Example], Report]:
        outcome = _in_processes(rows, chat, limits, three, workers)
        return outcome.examples, _report(len(rows), outcome)

    if cache_dir is None:
        examples, report = work()
    else:
        parts = [tokenizer_hash(chat), [repr(row) for row in rows], repr(limits), three]
        examples, report = token_cache.get(Path(cache_dir), token_cache.key(parts), work)
    if not examples:
        raise ValueError(f"{source}: no row is left:\n  " + "\n  ".join(report.lines()))
    return examples, report


def _in_processes(
    rows: Sequence[Row], chat: Chat, limits: Limits, three: bool, workers: int
) -> Outcome:
    outcome = Outcome()
    if workers <= 1:
        outcome = Encoder(chat, limits, three).encode(rows)
    else:
        size = -(-len(rows) // workers)
        jobs = [(rows[at : at + size], chat, limits, three) for at in range(0, len(rows), size)]
        # spawn, not fork: the tokenizer runs threads, and a fork may keep their locks forever.
        with get_context("spawn").Pool(len(jobs)) as pool:
            for part in pool.imap(_work, jobs):
                outcome.add(part)
    if outcome.faults:
        shown = outcome.faults[:MAX_LISTED]
        if len(outcome.faults) > MAX_LISTED:
            shown.append(f"... and {len(outcome.faults) - MAX_LISTED} more")
        raise ValueError(
            f"{len(outcome.faults)} of {len(rows)} rows cannot be tokenised\n  "
            + "\n  ".join(shown)
        )
    return outcome


def _work(job: tuple[Sequence[Row], Chat, Limits, bool]) -> Outcome:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # in this worker: one process a core is enough
    rows, chat, limits, three = job
    return Encoder(chat, limits, three).encode(rows)


def _report(rows: int, outcome: Outcome) -> Report:
    examples = outcome.examples
    prompts = [len(ids) for example in examples for ids in example.prompts]
    responses = [len(ids) for example in examples for ys in example.responses for ids in ys]
    return Report(
        rows=rows,
        kept=len(examples),
        dropped=outcome.dropped,
        truncated=outcome.truncated,
        joint_differences=outcome.joint,
        prompt_tokens=percentiles(prompts),
        response_tokens=percentiles(responses),
    )
