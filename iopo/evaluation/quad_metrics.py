"""Held-out quads: which preferences a model gets right, and which constraints its answers follow.

Log-prob measures need no generation and little time; following is measured on greedy answers, with
code as the judge. Letters: Q quads, columns x1y1, x1y2, x2y2, x2y1.
"""

import dataclasses
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iopo import constraints, stats
from iopo.agreement import check_family, check_weights, random_quads
from iopo.constraints.answers import hollow
from iopo.constraints.text import after_thinking, repeats
from iopo.data.batching import Batching, pass_micro_batches, token_counts
from iopo.data.chat import Chat
from iopo.data.columns import Prompt, last_turn, text_of, with_last
from iopo.data.layout import build_shared
from iopo.data.rows import Quad
from iopo.data.tokenize import Example
from iopo.evaluation.config import GenerateSection
from iopo.evaluation.on_task import MOST_RANK, task_ranks
from iopo.files import sha256_text
from iopo.logprobs import LogProbs
from iopo.model.attention import SHARED
from iopo.model.generate import Decoding, generate
from iopo.model.load import load_causal_lm, read_config
from iopo.model.lora import load_adapter, merge_lora
from iopo.objectives import MEMBERS, iopo_margin
from iopo.progress import progress, tracked
from iopo.stats import Estimate

# A smaller margin is rounding, not a preference: in bf16 the margins of 150 quads whose two
# instructions were the same text had a standard deviation of 0.43 nats and reached 1.14.
TIE_NATS = 1.5

TOKENS_PER_BATCH = 4096  # of quads that are scored together
BLOCKS, BLOCK_TOKENS = 16, 512  # of plain text
BLOCK_CHARACTERS = 8 * BLOCK_TOKENS  # more than 512 tokens of English are ever made of


def load_for_scoring(path: Path, adapter: str | None, device: str, dtype: torch.dtype) -> LogProbs:
    """A model folder, the adapter on it if one is named, for `score`."""
    check_family(read_config(path), where=str(path))
    model = load_causal_lm(path, dtype, attention=SHARED)
    if adapter is not None:
        load_adapter(model, adapter)
        # Merging the rest would round it to the dtype. LogProbs reads the weight of this one.
        merge_lora(model, only=model.get_output_embeddings())
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    check_weights(model, random_quads(embedding.num_embeddings), where=str(path))
    torch.nn.Module.to(model, device)
    return LogProbs(model.eval())


@torch.inference_mode()
def score(logprobs: LogProbs, examples: Sequence[Example]) -> Tensor:
    """Log-probs of every member, float32 [Q, 4], in the order of `examples`."""
    policy_Q4 = torch.empty(len(examples), len(MEMBERS))
    alone = Batching(1, ranks=1, seed=0, tokens_per_microbatch=TOKENS_PER_BATCH)
    batches = pass_micro_batches(token_counts(examples, "shared"), alone, rank=0)
    for indices in tracked(batches, "batches of quads scored"):
        assert indices is not None, "one rank always has something"
        batch = build_shared([examples[i] for i in indices]).to(logprobs.causal_lm.device)
        policy_Q4[list(indices)] = logprobs(batch).cpu()
    return policy_Q4


def margins(policy_Q4: Tensor, reference_Q4: Tensor) -> dict[str, Estimate]:
    """Mean IOPO margin against a reference (nats), and the share of quads where it is above 0."""
    margin_Q = iopo_margin(policy_Q4 - reference_Q4)
    return {
        "margin": stats.bootstrap(margin_Q.numpy()),
        "accuracy_against_reference": stats.wilson(int((margin_Q > 0).sum()), len(margin_Q)),
    }


def group_share(policy_Q4: Tensor) -> Estimate:
    """Group accuracy with ties counted half, for controls that make exact ties."""
    margin_Q = iopo_margin(policy_Q4)
    right_Q = torch.where(margin_Q.abs() <= TIE_NATS, 0.5, (margin_Q > 0).double())
    return stats.bootstrap(right_Q.numpy())


def blanked(quads: Sequence[Quad]) -> list[Quad]:
    """Control: the same responses, the constraints of both instructions taken out.

    The remaining x1 and x2 are the same text, so group accuracy must sit at one half; a measure
    that does not reads something other than the constraints.
    """
    return [dataclasses.replace(quad, x1=bare(quad.x1), x2=bare(quad.x2)) for quad in quads]


def bare(instruction: Prompt) -> Prompt:
    """The task alone: without the numbered lines of its constraints (the layout of TRACE), which
    stand in the last turn."""
    lines = last_turn(instruction).split("\n")
    return with_last(instruction, "\n".join(x for x in lines if not re.match(r"\d+\. ", x)))


def shuffled(quads: Sequence[Quad], seed: int = 0) -> list[Quad]:
    """Control: every quad's responses under another quad's two instructions, in drawn order."""
    rng = random.Random(seed)
    order = list(range(len(quads)))
    rng.shuffle(order)
    follower = dict(zip(order, order[1:] + order[:1], strict=True))
    out = []
    for i, quad in enumerate(quads):
        x1, x2 = rng.sample([quads[follower[i]].x1, quads[follower[i]].x2], 2)
        out.append(dataclasses.replace(quad, x1=x1, x2=x2))
    return out


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """One generated answer, which of its constraints it follows, and why it is hollow, if it is."""

    id: str  # quad id and side, "q17/1"
    prompt: Prompt
    text: str
    finish_reason: str
    split: str
    kinds: tuple[str, ...]
    follows: tuple[bool, ...]
    texts: tuple[str, ...]
    hollow: tuple[str, ...]  # iopo/constraints/answers.py, and "off_task"
    task_rank: int | None = None  # iopo/evaluation/on_task.py
    raw: str | None = None  # the text with its thinking, if it had any

    @property
    def all_followed(self) -> bool:
        return all(self.follows)

    @property
    def answers(self) -> bool:
        return not self.hollow

    @property
    def follows_and_answers(self) -> bool:
        return self.all_followed and self.answers


def answer_prompts(
    model: PreTrainedModel,
    chat: Chat,
    quads: Sequence[Quad],
    splits: Sequence[str],
    section: GenerateSection,
) -> list[Answer]:
    """Greedy answers to x1 and x2 of every quad, judged by code. Two answers per quad, in order.

    quads: all `checkable`. splits: what each is held out for (seen | unseen_params | unseen_kinds).
    section: its max_new_tokens and batch_size. A chat's system prompt is for quads without one.
    """
    sides = [
        (f"{quad.id}/{side}", prompt, rows or [], quad.system, split)
        for quad, split in zip(quads, splits, strict=True)
        for side, prompt, rows in ((1, quad.x1, quad.c1), (2, quad.x2, quad.c2))
    ]
    conversations = [chat.messages(prompt, system) for _, prompt, _, system, _ in sides]
    show = progress(len(sides), "answers")
    decoding = Decoding(section.max_new_tokens, batch_size=section.batch_size)
    generations = generate(model, chat, conversations, decoding, lambda done, _: show(done))
    answers = []
    for (name, prompt, rows, _, split), generation in zip(sides, generations, strict=True):
        checks, raw = [constraints.from_dict(row) for row in rows], generation.text.strip()
        text = after_thinking(raw)
        follows = tuple(constraints.follows(checks, text))
        kinds, texts = (tuple(row[key] for row in rows) for key in ("kind", "text"))
        reason = generation.finish_reason
        faults = hollow(text, text_of(prompt), checks, ended=reason == "stop")
        thought = None if raw == text else raw
        answers.append(
            Answer(*(name, prompt, text, reason, split, kinds, follows, texts, faults), raw=thought)
        )
    return answers


def with_task_ranks(base: LogProbs, chat: Chat, answers: Sequence[Answer]) -> list[Answer]:
    """The answers with their task's rank, those that are off their task marked hollow.

    Only of those that nothing in their text gives away. Unchanged if all have one task.
    """
    asked = [bare(answer.prompt) for answer in answers]
    left = [(task, a) for task, a in zip(asked, answers, strict=True) if a.answers]
    tasks, texts = [task for task, _ in left], [answer.text for _, answer in left]
    ranks = task_ranks(base, chat, tasks, texts, among=asked)
    if ranks is None:
        return list(answers)
    rank_of = {answer.id: rank for (_, answer), rank in zip(left, ranks, strict=True)}
    return [_ranked(answer, rank_of.get(answer.id)) for answer in answers]


def _ranked(answer: Answer, rank: int | None) -> Answer:
    off = rank is not None and rank > MOST_RANK
    faults = (*answer.hollow, "off_task") if off else answer.hollow
    return dataclasses.replace(answer, task_rank=rank, hollow=faults)


def checkable(quad: Quad) -> bool:
    """Whether c1 and c2 are there and hold kinds that code can check, and no others.

    Raises ValueError for a known kind with parameters that it does not take.
    """
    for rows in (quad.c1, quad.c2):
        if not rows or any(row.get("kind") not in constraints.KINDS for row in rows):
            return False
        for row in rows:
            constraints.from_dict(row)
    return True


# Shares of answers: name in scores.json -> property of Answer. The first is the headline.
SHARES = {
    "follows_and_answers": "follows_and_answers",
    "constraint_accuracy": "all_followed",
    "answers": "answers",
}


def shares(answers: Sequence[Answer]) -> dict[str, Any]:
    """SHARES in all and by split; "hollow": the share by reason, and of those that follow all."""
    found: dict[str, Any] = {}
    splits = sorted({answer.split for answer in answers})
    for name, what in SHARES.items():
        found[name] = _share([getattr(answer, what) for answer in answers])
        for split in splits:
            found[f"{name}_{split}"] = _share(
                [getattr(answer, what) for answer in answers if answer.split == split]
            )
    reasons = sorted({reason for answer in answers for reason in answer.hollow})
    found["hollow"] = {
        reason: _share([reason in answer.hollow for answer in answers]) for reason in reasons
    }
    following = [bool(answer.hollow) for answer in answers if answer.all_followed]
    if following:
        found["hollow"]["of_following"] = _share(following)
    return found


def _share(is_so: Sequence[bool]) -> Estimate:
    return stats.wilson(sum(is_so), len(is_so))


def gain(before: Sequence[Answer], after: Sequence[Answer]) -> dict[str, Estimate]:
    """Paired differences after - before of SHARES, bootstrap over quads (two answers each).

    Raises ValueError if the two were not made from the same prompts.
    """
    if [a.id for a in before] != [a.id for a in after]:
        raise ValueError("answers before and after are not to the same prompts in the same order")
    clusters = [answer.id.rsplit("/", 1)[0] for answer in before]
    found = {}
    for name, what in SHARES.items():
        first_A, second_A = (
            np.array([getattr(answer, what) for answer in answers], dtype=float)
            for answers in (before, after)
        )
        found[name] = stats.bootstrap(second_A - first_A, clusters)
    return found


def degeneration(answers: Sequence[Answer]) -> dict[str, float]:
    """Signs of damage: words per answer, share empty, cut off, and with a word 4-gram repeated."""
    texts = [answer.text for answer in answers]
    return {
        "words": float(np.mean([len(text.split()) for text in texts])),
        "empty": float(np.mean([not text.strip() for text in texts])),
        "cut_off": float(np.mean([answer.finish_reason == "length" for answer in answers])),
        "repetitive": float(np.mean([repeats(text) for text in texts])),
    }


def plain_text() -> str:
    """The language reference that comes with every CPython: English prose on any machine.

    It differs between Python versions, so its hash goes with the scores on it. All topics by name,
    without the lines that underline headings.
    """
    return "\n\n".join(text for _, text in sorted(topics.topics.items())).replace("***", "")


@torch.inference_mode()
def plain_text_score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How well a model still predicts ordinary prose, which no training here is about.

    Perplexity on 16 blocks of 512 tokens, spread evenly over the text, each on its own.
    model: in eval mode, with its stock attention. Returns {"perplexity", "nats_per_token" (a list,
    one mean per block of 511 predictions), "sha256" of the text}.
    """
    text = plain_text()
    nats: list[float] = []
    # one block at a time: its logits take 100 MB
    for block in tracked(range(BLOCKS), "blocks of plain text"):
        start = block * (len(text) - BLOCK_CHARACTERS) // (BLOCKS - 1)
        ids = tokenizer(text[start : start + BLOCK_CHARACTERS], add_special_tokens=False)
        ids_L = torch.tensor(ids["input_ids"][:BLOCK_TOKENS], device=model.device)
        logits_LV = model(input_ids=ids_L[None]).logits[0, :-1].float()
        nats.append(F.cross_entropy(logits_LV, ids_L[1:]).item())
    return {
        "perplexity": math.exp(sum(nats) / len(nats)),
        "nats_per_token": nats,
        "sha256": sha256_text(text),
    }
