"""Batched generation with any transformers causal LM, in process.

Shapes: S sequences still running, L padded length so far, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from iopo.constraints.text import THINK_START
from iopo.data.chat import Chat

Conversation = Sequence[dict[str, str]]  # [{"role": ..., "content": ...}, ...], last turn: user


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer. `finish_reason` is "stop" (end of turn) or "length" (cut at max_new_tokens)."""

    # As decoded, blanks at its ends included, for a benchmark may count lines; it begins with the
    # <think> that the prompt ended with, if it did, so that thinking is whole.
    text: str
    finish_reason: str
    tokens: int  # generated tokens, the end-of-turn token included


@dataclass(frozen=True)
class Decoding:
    """How answers are made.

    temperature: 0 is greedy, above 0 samples from softmax(logits / temperature) in fp32.
    top_p: in (0, 1], samples from the smallest set of tokens that holds this much probability.
    Raises ValueError for values out of range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    batch_size: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        whole = min(self.max_new_tokens, self.batch_size) >= 1
        if not (whole and self.temperature >= 0 and 0 < self.top_p <= 1):
            raise ValueError(
                f"generate: found {self}, expected max_new_tokens and batch_size of 1 or more, "
                "temperature of 0 (greedy) or more, and 0 < top_p <= 1"
            )


def generate(
    model: PreTrainedModel,
    chat: Chat,
    conversations: Sequence[Conversation],
    decoding: Decoding,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Answer every conversation; results come in the order of the conversations.

    on_progress: called as (answers finished, answers in all) whenever an answer ends.

    What is repeatable: the draws of conversation i are a function of (seed, i) alone, so batch size
    and the other conversations do not change them. The logits of a row may still differ in their
    last bits between batch shapes, so texts are equal for other batch sizes except at near ties
    (frequent enough to see in bf16, rare in fp32). Same arguments, same machine: same texts.

    `chat` renders the prompts, without adding its own system prompt. Train mode is restored
    afterwards. Raises ValueError on a prompt that is empty or longer than the model takes.
    """
    prompts = [chat.prompt_ids(conversation) for conversation in conversations]
    check_room(model, prompts, decoding.max_new_tokens)
    stops = end_of_turn_ids(model, chat)
    opening = THINK_START if chat.opens_thinking() else ""
    # Long prompts first: the first batch is the largest, so memory runs out at once or never.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: dict[int, Generation] = {}
    with inference(model):
        for start in range(0, len(order), decoding.batch_size):
            batch = order[start : start + decoding.batch_size]
            for i, tokens in _decode(model, prompts, batch, stops, decoding):
                stopped = tokens[-1] in stops
                said = tokens[:-1] if stopped else tokens
                text = opening + str(chat.tokenizer.decode(said, skip_special_tokens=True))
                answers[i] = Generation(text, "stop" if stopped else "length", len(tokens))
                if on_progress is not None:
                    on_progress(len(answers), len(prompts))
    return [answers[i] for i in range(len(prompts))]


def check_room(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Raise ValueError unless every prompt leaves room for its answer in the model's positions."""
    limit = model.config.get_text_config().max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= limit - max_new_tokens:
            raise ValueError(
                f"generate: conversation {i} has {len(prompt)} tokens, expected 1 or more that "
                f"leave room for {max_new_tokens} new ones in the model's {limit} "
                "positions; shorten the prompt or lower max_new_tokens"
            )


def end_of_turn_ids(model: PreTrainedModel, chat: Chat) -> frozenset[int]:
    """Tokens that end an answer: the one that training ends a response with, the tokenizer's end
    token and the generation config's."""
    config = model.generation_config
    named = config.eos_token_id if config is not None else None
    ends = named if isinstance(named, list) else [named]
    found = {chat.end_of_turn(), chat.tokenizer.eos_token_id, *ends} - {None}
    if not found:
        raise ValueError(
            "generate: neither the chat template, nor the tokenizer, nor the generation config "
            "names an end-of-turn token; set tokenizer.eos_token"
        )
    return frozenset(found)


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, no autograd; the mode of every submodule is put back, also after an error."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def _decode(
    model: PreTrainedModel,
    prompts: list[list[int]],
    batch: list[int],
    stops: frozenset[int],
    decoding: Decoding,
) -> Iterator[tuple[int, list[int]]]:
    """Yield (conversation index, generated tokens) as answers end.

    Rows that end leave the batch and the cache, so a straggler costs one row and not a batch.
    """
    steps, temperature = decoding.max_new_tokens, decoding.temperature
    # in [0, 1), by row and step; a row's depend on (seed, its index) only
    uniforms = np.stack([np.random.default_rng((decoding.seed, i)).random(steps) for i in batch])
    cache = DynamicCache(config=model.config)  # layers with a sliding window stay as they are
    cache.layers = [GrowingLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    # A window counts places of the cache, and the pads of shorter rows would stand between what is
    # shared and the rest.
    full = all(isinstance(layer, GrowingLayer) for layer in cache.layers)
    shared = _shared_tokens([prompts[i] for i in batch]) if full else 0
    ids_SL, mask_SL = _left_pad([prompts[i][shared:] for i in batch], device=model.device)
    if shared:  # a system prompt, mostly: read once, not once a row
        first = torch.tensor([prompts[batch[0]][:shared]], device=model.device)
        model(input_ids=first, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(batch))
        mask_SL = torch.cat([mask_SL.new_ones(len(batch), shared), mask_SL], dim=1)
    position_S = mask_SL.sum(1)
    positions_SL = (mask_SL.cumsum(1) - 1).clamp(min=0)[:, shared:]
    rows = list(range(len(batch)))  # row of the running batch -> row of `batch`
    out: list[list[int]] = [[] for _ in batch]
    for step in range(steps):
        output = model(
            input_ids=ids_SL,
            attention_mask=mask_SL,
            position_ids=positions_SL,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_SV = output.logits[:, -1]
        if temperature == 0:
            token_S = logits_SV.argmax(-1)
        else:
            draw_S = torch.from_numpy(uniforms[rows, step]).to(logits_SV.device)
            token_S = sample(logits_SV.float() / temperature, draw_S, decoding.top_p)
        keep = []
        for s, (row, token) in enumerate(zip(rows, token_S.tolist(), strict=True)):
            out[row].append(token)
            if token in stops or step == steps - 1:
                yield batch[row], out[row]
            else:
                keep.append(s)
        if not keep:
            return
        if len(keep) < len(rows):
            rows = [rows[s] for s in keep]
            keep_S = torch.tensor(keep, device=token_S.device)
            cache.batch_select_indices(keep_S)
            token_S, mask_SL, position_S = token_S[keep_S], mask_SL[keep_S], position_S[keep_S]
        ids_SL = token_S[:, None]
        positions_SL = position_S[:, None]
        position_S = position_S + 1
        mask_SL = torch.cat([mask_SL, mask_SL.new_ones(len(rows), 1)], dim=1)


def _shared_tokens(prompts: Sequence[list[int]]) -> int:
    """How many leading tokens all prompts share, less one: each row keeps a token to go on from."""
    if len(prompts) == 1:
        return 0
    low, high = min(prompts), max(prompts)  # as lists compare, these two differ first
    pairs = zip(low, high, strict=False)
    same = next((n for n, (a, b) in enumerate(pairs) if a != b), len(low))
    return min(same, min(map(len, prompts)) - 1)


class GrowingLayer(DynamicLayer):
    """Keys and values in buffers with room ahead.

    transformers' own layer copies all earlier positions for every new token, which on a CPU costs
    more than attention itself once answers are long.
    """

    ROOM = 128  # positions

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []  # keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Append positions; returns all so far, as views [S, heads, L, head width]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = (key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        if not self._buffers or stop > self._buffers[0].shape[2]:
            grown = [x.new_empty(*x.shape[:2], stop + self.ROOM, x.shape[3]) for x in new]
            for buffer, old in zip(grown, self._buffers, strict=False):
                buffer[:, :, :start] = old[:, :, :start]
            self._buffers = grown
        for buffer, x in zip(self._buffers, new, strict=True):
            buffer[:, :, start:stop] = x
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change_rows(lambda buffer: buffer[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_rows(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        length = self.get_seq_length()
        self._buffers = [change(buffer) for buffer in self._buffers]
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


def sample(scores_SV: Tensor, uniform_S: Tensor, top_p: float) -> Tensor:
    """Tokens, int64 [S], where softmax(scores) cumulates past `uniform_S` in [0, 1).

    One uniform number a row decides the token, which makes a row's draw independent of the batch.
    """
    probability_SV = scores_SV.softmax(-1)
    if top_p == 1.0:
        return _invert(probability_SV, uniform_S)
    # The nucleus seldom needs more than the 256 likeliest tokens, and sorting all V is slow on CPU.
    sorted_SV, token_SV = probability_SV.topk(min(256, probability_SV.shape[-1]))
    if bool((sorted_SV.sum(-1) < top_p).any()):
        sorted_SV, token_SV = probability_SV.sort(dim=-1, descending=True)
    before_SV = sorted_SV.cumsum(-1) - sorted_SV
    sorted_SV = sorted_SV.masked_fill(before_SV >= top_p, 0.0)  # the first token always stays
    return token_SV.gather(1, _invert(sorted_SV, uniform_S)[:, None])[:, 0]


def _invert(weight_SV: Tensor, uniform_S: Tensor) -> Tensor:
    # float64: a float32 running sum over 150,000 tokens misplaces the tail
    cumulative_SV = weight_SV.double().cumsum(-1)
    target_S1 = uniform_S.double()[:, None] * cumulative_SV[:, -1:]
    token_S = torch.searchsorted(cumulative_SV, target_S1, right=True)[:, 0]
    return token_S.clamp(max=weight_SV.shape[-1] - 1)


def _left_pad(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 [S, L]. Pads are token 0: they are masked, so any id would do."""
    length = max(len(prompt) for prompt in prompts)
    ids_SL = torch.zeros(len(prompts), length, dtype=torch.int64)
    mask_SL = torch.zeros_like(ids_SL)
    for s, prompt in enumerate(prompts):
        ids_SL[s, length - len(prompt) :] = torch.tensor(prompt)
        mask_SL[s, length - len(prompt) :] = 1
    return ids_SL.to(device), mask_SL.to(device)
