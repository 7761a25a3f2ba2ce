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
from iopo.constraints.text import repeats
from iopo.data.batching import Batching, pass_micro_batches, token_counts
from iopo.data.chat import Chat
from iopo.data.layout import build_shared
from iopo.data.rows import Quad
from iopo.data.tokenize import Example
from iopo.evaluation.config import GenerateSection
from iopo.evaluation.report import progress
from iopo.files import sha256_text
from iopo.logprobs import LogProbs
from iopo.model.attention import SHARED
from iopo.model.generate import Decoding, generate
from iopo.model.load import load_causal_lm, model_config
from iopo.model.lora import load_adapter, merge_lora
from iopo.objectives import MEMBERS, iopo_margin
from iopo.stats import Estimate

# A smaller margin is rounding, not a preference: in bf16 the margins of 150 quads whose two
# instructions were the same text had a standard deviation of 0.43 nats and reached 1.14.
TIE_NATS = 1.5

TOKENS_PER_BATCH = 4096  # of quads that are scored together
BLOCKS, BLOCK_TOKENS = 16, 512  # of plain text
BLOCK_CHARACTERS = 8 * BLOCK_TOKENS  # more than 512 tokens of English are ever made of


def load_for_scoring(path: Path, adapter: str | None, device: str, dtype: torch.dtype) -> LogProbs:
    """A model folder, with the adapter merged if one is named, for `score`."""
    check_family(model_config(None, path), where=str(path))
    model = load_causal_lm(path, dtype, attention=SHARED)
    if adapter is not None:
        load_adapter(model, adapter)
        merge_lora(model)
    quads = random_quads(model.config.get_text_config().vocab_size)
    check_weights(model, quads, where=str(path))
    torch.nn.Module.to(model, device)
    return LogProbs(model.eval())


@torch.inference_mode()
def score(logprobs: LogProbs, examples: Sequence[Example]) -> Tensor:
    """Log-probs of every member, float32 [Q, 4], in the order of `examples`."""
    policy_Q4 = torch.empty(len(examples), len(MEMBERS))
    alone = Batching(1, ranks=1, seed=0, tokens_per_microbatch=TOKENS_PER_BATCH)
    for indices in pass_micro_batches(token_counts(examples, "shared"), alone, rank=0):
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
    return [dataclasses.replace(quad, x1=_blank(quad.x1), x2=_blank(quad.x2)) for quad in quads]


def _blank(instruction: str) -> str:
    """Without its numbered lines, which hold the constraints (the layout of TRACE)."""
    return "\n".join(x for x in instruction.split("\n") if not re.match(r"\d+\. ", x))


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
    """One generated answer and which of its constraints it follows."""

    id: str  # quad id and side, "q17/1"
    prompt: str
    text: str
    finish_reason: str
    split: str
    kinds: tuple[str, ...]
    follows: tuple[bool, ...]
    texts: tuple[str, ...]

    @property
    def all_followed(self) -> bool:
        return all(self.follows)


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    quads: Sequence[Quad],
    splits: Sequence[str],
    section: GenerateSection,
) -> list[Answer]:
    """Greedy answers to x1 and x2 of every quad, judged by code. Two answers per quad, in order.

    quads: all `checkable`. splits: what each is held out for (seen | unseen_params | unseen_kinds).
    section: its max_new_tokens, batch_size, and system_prompt, for quads without their own.
    """
    sides = [
        (f"{quad.id}/{side}", prompt, rows or [], quad.system, split)
        for quad, split in zip(quads, splits, strict=True)
        for side, prompt, rows in ((1, quad.x1, quad.c1), (2, quad.x2, quad.c2))
    ]
    chat = Chat(tokenizer, section.system_prompt)
    conversations = [chat.messages(prompt, system) for _, prompt, _, system, _ in sides]
    show = progress(len(sides), "answers")
    decoding = Decoding(section.max_new_tokens, batch_size=section.batch_size)
    generations = generate(model, chat, conversations, decoding, lambda done, _: show(done))
    answers = []
    for (name, prompt, rows, _, split), generation in zip(sides, generations, strict=True):
        checks, text = [constraints.from_dict(row) for row in rows], generation.text.strip()
        follows = tuple(constraints.follows(checks, text))
        kinds, texts = (tuple(row[key] for row in rows) for key in ("kind", "text"))
        reason = generation.finish_reason
        answers.append(Answer(name, prompt, text, reason, split, kinds, follows, texts))
    return answers


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


def following(answers: Sequence[Answer]) -> dict[str, Estimate]:
    """Share of answers that follow all their constraints (strict), in all and by split."""
    groups = {"all": list(answers)}
    for split in sorted({answer.split for answer in answers}):
        groups[split] = [answer for answer in answers if answer.split == split]
    return {
        name: stats.wilson(sum(answer.all_followed for answer in group), len(group))
        for name, group in groups.items()
    }


def following_gain(before: Sequence[Answer], after: Sequence[Answer]) -> Estimate:
    """Paired difference after - before in following, bootstrap over quads (two answers each).

    Raises ValueError if the two were not made from the same prompts.
    """
    if [a.id for a in before] != [a.id for a in after]:
        raise ValueError("answers before and after are not to the same prompts in the same order")
    gain = np.array(
        [b.all_followed - a.all_followed for a, b in zip(before, after, strict=True)], dtype=float
    )
    clusters = [answer.id.rsplit("/", 1)[0] for answer in before]
    return stats.bootstrap(gain, clusters)


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
    for block in range(BLOCKS):  # one at a time: the logits of a block take 100 MB
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
