"""What would fail after the weights are loaded, found before: from config.json, the headers of the
weight files and the tokenised rows. Nothing is written, and no weight of a model is read."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from iopo import constraints
from iopo.config import Device, Dtype, Layout, ModelConfig
from iopo.data.batching import member_counts, member_tokens
from iopo.data.chat import Chat
from iopo.data.example import Example
from iopo.data.layout import build_shared
from iopo.data.rows import Quad
from iopo.logprobs import LogProbs
from iopo.model import load, lora
from iopo.model.attention import SHARED
from iopo.model.generate import check_room
from iopo.model.parallel import blocks

Rows = Mapping[str, Sequence[Example]]  # file -> its examples


def check_model(path: Path, adapter: str | None) -> tuple[PreTrainedModel, list[str]]:
    """The model of a folder on the meta device in bf16, with its adapter merged; and remarks.

    Raises ValueError for a model, weight files or an adapter that cannot be loaded.
    """
    config = load.read_config(path)
    model = load.meta_causal_lm(config, torch.bfloat16, SHARED, where=str(path))
    unused = load.check_tensors(model, path)
    _merge(model, adapter)
    count, names = f"{len(unused)} tensors in the files are not the model's", ", ".join(unused[:3])
    return model, [f"{path}: {count}, such as {names}"] if unused else []


def check_policy(cfg: ModelConfig, path: Path | None) -> tuple[LogProbs, list[str]]:
    """The starting weights' model without values, and what the user should know of it.

    path: of the weights; None for model.tiny. Raises ValueError as check_model does, and for
    model.lora.targets that fit nothing.
    """
    if path is None:
        config, remarks = load.config_of_tiny(cfg.tiny or {}), list[str]()
        model = load.meta_causal_lm(config, torch.bfloat16, SHARED, where="model.tiny")
        _merge(model, cfg.adapter)
    else:
        model, remarks = check_model(path, cfg.adapter)
    if cfg.lora.rank > 0:
        remarks.append(lora.describe(model, cfg.lora.targets, cfg.lora.rank))
    blocks(model)
    return LogProbs(model), remarks


def _merge(model: PreTrainedModel, adapter: str | None) -> None:
    if adapter is not None:
        lora.load_adapter(model, adapter)
        lora.merge_lora(model)


def check_rows(policy: LogProbs, chat: Chat, rows: Rows, *, shared: bool) -> list[str]:
    """Whether the model can take every row: its token ids, and its length.

    policy: from check_policy. shared: whether data.layout is. Returns remarks. Raises ValueError,
    naming the file, the row and its length, for ids without an embedding, for rows longer than a
    table of positions, and in the shared layout for rows longer than a sliding window.
    """
    model = policy.causal_lm
    _check_ids(model, chat, rows)
    remarks = []
    for file, examples in rows.items():
        if not examples:
            continue
        prompts_NM, responses_NM = member_counts(examples)
        length_N = (prompts_NM + responses_NM).max(1)
        longest, length = examples[int(length_N.argmax())], int(length_N.max())
        which = f"{file}: row {longest.id} is the longest with {length} tokens"
        remarks += _check_length(model, length, which)
        if shared:
            _check_window(policy, longest, which)
    return remarks


def check_samples(policy: LogProbs, chat: Chat, quads: Sequence[Quad], max_new_tokens: int) -> None:
    """Raises ValueError if a prompt that training will answer leaves no room for the answer, or if
    its answer cannot be checked: a constraint of one of our kinds has other parameters."""
    for quad in quads:
        try:
            for row in checkable(quad):
                constraints.from_dict(row)
        except ValueError as error:
            raise ValueError(
                f"data.heldout: row {quad.id}, c1: {error}; correct it, or give a kind of your own "
                "another name"
            ) from error
    prompts = [chat.prompt_ids(chat.messages(quad.x1, quad.system)) for quad in quads]
    try:
        check_room(policy.causal_lm, prompts, max_new_tokens)
    except ValueError as error:
        raise ValueError(f"evaluation.samples of data.heldout: {error}") from error


def checkable(quad: Quad) -> list[dict[str, Any]]:
    """The constraints of x1 that code can check; those of other kinds need a judge."""
    return [row for row in quad.c1 or [] if row.get("kind") in constraints.KINDS]


def check_precision(dtype: Dtype, layout: Layout, device: Device) -> None:
    """Raises ValueError for numbers that the shared layout's attention lacks on the GPU here."""
    cuda = device is not Device.cpu and torch.cuda.is_available()
    if cuda and layout is Layout.shared and dtype in (Dtype.fp32, Dtype.fp64):
        raise ValueError(
            f"model.dtype={dtype}: the attention of data.layout=shared computes in bf16 on CUDA; "
            "set model.dtype to auto or bf16, data.layout=plain, or parallel.device=cpu"
        )


def _check_ids(model: PreTrainedModel, chat: Chat, rows: Rows) -> None:
    tokenizer, embedding = chat.tokenizer, model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    embeddings = embedding.num_embeddings
    named = {"end of turn": chat.end_of_turn(), "eos_token": tokenizer.eos_token_id}
    for what, token in named.items():
        if token is not None and token >= embeddings:
            raise ValueError(_too_few(f"the tokenizer's {what} is", tokenizer, token, embeddings))
    if max(tokenizer.get_vocab().values()) < embeddings:
        return
    for file, examples in rows.items():
        for example in examples:
            ids = np.concatenate(example.segments())
            if (beyond := ids[ids >= embeddings]).size:
                which = f"{file}: row {example.id} holds"
                raise ValueError(_too_few(which, tokenizer, int(beyond[0]), embeddings))


def _too_few(which: str, tokenizer: PreTrainedTokenizerBase, token: int, embeddings: int) -> str:
    return (
        f"{which} {tokenizer.convert_ids_to_tokens(token)} (id {token}); the model has "
        f"{embeddings} embeddings: resize and save it (model.resize_token_embeddings("
        f"{len(tokenizer)}), model.save_pretrained), or use its own tokenizer"
    )


def _check_length(model: PreTrainedModel, length: int, which: str) -> list[str]:
    """Rotary positions are computed and have no end, only a length that was trained; others are
    rows of a table, which is an embedding beside that of the tokens."""
    trained = _trained_positions(model.config.get_text_config())
    if length <= trained:
        return []
    if any(name.endswith("inv_freq") for name, _ in model.named_buffers()):
        return [f"{which}, more than the {trained} positions that the model was made for"]
    tokens = model.get_input_embeddings()
    if any(isinstance(m, nn.Embedding) and m is not tokens for m in model.modules()):
        raise ValueError(
            f"{which}; the model has {trained} learned positions: lower data.max_prompt_tokens or "
            "data.max_response_tokens"
        )
    return []


def _trained_positions(config: PretrainedConfig) -> float:
    """max_position_embeddings, or the length that scaled rotary positions reach, if it is more."""
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]  # or one per kind
    scaled = ((p.get("original_max_position_embeddings") or limit, p.get("factor")) for p in parts)
    return max([limit, *(int(original * (factor or 0)) for original, factor in scaled)])


def _check_window(policy: LogProbs, longest: Example, which: str) -> None:
    """Run the row without values: shared_attention, which every layer calls, says what it refuses.

    Only where a window is shorter than the row. An operator whose shapes depend on values cannot
    run so; then the first step decides.
    """
    config = policy.causal_lm.config.get_text_config().to_dict()
    named = (v for k, v in config.items() if "window" in k and "layer" not in k)
    windows = [value for value in named if type(value) is int]
    if min(windows, default=math.inf) >= max(member_tokens(longest)):
        return
    try:
        policy(build_shared([longest]).to("meta"))
    except ValueError as error:
        raise ValueError(f"{which}; {error}") from error
    except RuntimeError:
        return
