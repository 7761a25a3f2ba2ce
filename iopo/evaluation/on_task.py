"""Whether an answer is about its task, by log-probs: is it likelier after that than after others?

The second half of `answers`; iopo/constraints/answers.py is the first. One model judges all answers
that are compared, mostly the base model: a trained one has learnt to like its own.

Letters: C candidate tasks, R answers.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from iopo.data.chat import Chat
from iopo.data.columns import Prompt, text_of
from iopo.data.example import Example
from iopo.data.layout import build_shared
from iopo.logprobs import LogProbs
from iopo.progress import tracked

CANDIDATES = 8  # tasks that an answer is scored after, its own among them
MOST_RANK = 1  # of its own task among them; an answer to another task has it by chance in 1 of 8
FIRST_TOKENS = 16  # of an answer that are scored: 399 of 400 held-out responses rank first by them
ANSWERS_AT_ONCE = 64  # after one prompt: bounds the memory


@torch.inference_mode()
def task_ranks(
    base: LogProbs,
    chat: Chat,
    tasks: Sequence[Prompt],
    texts: Sequence[str],
    among: Sequence[Prompt],
) -> list[int] | None:
    """The rank of each text's own task by the text's log-prob after it, 1 where none is likelier.

    tasks: of the texts, without constraints. among: all tasks asked, of which the candidates are,
    those with another "# Inputs:" first; a text's rank depends on no other text. base: loaded for
    the shared layout. None: all have one task.
    """
    order = _apart(among)
    if len(order) < 2:
        return None
    heads = [text[: 8 * FIRST_TOKENS] for text in texts]  # more characters than are needed
    ids = [np.array(chat.tokenizer(head, add_special_tokens=False)["input_ids"]) for head in heads]
    rows_of: dict[Prompt, list[int]] = {task: [] for task in order}
    for row, task in enumerate(tasks):
        rows_of[task].append(row)
    ranks = [0] * len(texts)
    for start in tracked(range(0, len(order), CANDIDATES), "groups of tasks"):
        own = order[start : start + CANDIDATES]
        # the last ones compete with the first
        others = (order * 2)[start + len(own) : start + min(CANDIDATES, len(order))]
        rows = [row for task in own for row in rows_of[task]]
        for at in range(0, len(rows), ANSWERS_AT_ONCE):
            some = rows[at : at + ANSWERS_AT_ONCE]
            responses = tuple(ids[row][:FIRST_TOKENS] for row in some)
            logp_CR = torch.stack([_logps(base, chat, x, responses) for x in own + others])
            own_R = torch.tensor([own.index(tasks[row]) for row in some])
            better_R = (logp_CR > logp_CR.gather(0, own_R[None])).sum(0)
            for row, better in zip(some, better_R.tolist(), strict=True):
                ranks[row] = 1 + better
    return ranks


def _logps(base: LogProbs, chat: Chat, task: Prompt, responses: tuple[np.ndarray, ...]) -> Tensor:
    """log p of each response after the task's prompt, which is read once, [R] in nats."""
    prompt = np.array(chat.prompt_ids(chat.messages(task)))
    batch = build_shared([Example("", (prompt,), (responses,))])
    return base(batch.to(base.causal_lm.device))[0].cpu()


def _apart(tasks: Sequence[Prompt]) -> list[Prompt]:
    """Each task once, so that tasks about one text are not among each other's candidates."""
    found = sorted(set(tasks), key=lambda task: text_of(task).partition("# Inputs:")[::-1])
    stride = math.ceil(len(found) / CANDIDATES)
    return [task for start in range(stride) for task in found[start::stride]]
