"""Whether log-probs through the project's path are those of the stock model's own logits.

A model's family decides how its layers mix tokens and what happens between its last hidden state
and its logits. Instead of a list of families, a short example is scored twice: by LogProbs in the
run's layout, and one member at a time by the model's own forward with eager attention, in fp32.
`check_family` does so on a small random model of the same config, before weights load;
`check_weights` on the first layers of the model that was loaded, before any step.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from iopo.data.example import Example
from iopo.data.layout import build_plain, build_shared
from iopo.logprobs import LogProbs
from iopo.model.attention import SHARED
from iopo.model.load import check_config
from iopo.model.parallel import blocks
from iopo.progress import progress

TOLERANCE = 1e-3  # nats, of a member's summed log-prob
PROMPT, RESPONSE = 8, 4  # tokens of the short quad
LAYERS, WORDS = 2, 8192  # of a loaded model
SMALL_LAYERS, EXPERTS, VOCABULARY = 4, 16, 128  # of a small one; more layers if kinds come later

log = logging.getLogger(__name__)


def small_config(config: PretrainedConfig) -> PretrainedConfig:
    """The same config with few layers, experts and words, fewer heads, and narrower ones.

    All counts of heads are divided by one number, all widths of a head by another, all other widths
    by their product, which keeps what they have to do with each other. The rest stays: kinds of
    layers, scales, windows, switches.
    """
    fields, text = config.to_dict(), config.get_text_config()
    width, layers = text.hidden_size, text.num_hidden_layers
    counts = [fields[k] for k in fields if _kind(k) == "heads" and (fields[k] or 0) > 1]
    head = fields.get("head_dim") or width // max([1, *counts])
    fewer = narrower = 1
    while not any(n % (2 * fewer) for n in (*counts, width)) and (
        counts and min(counts) >= 4 * fewer and max(counts) >= 8 * fewer
    ):
        fewer *= 2
    while head % (16 * narrower) == 0 and width % (2 * narrower * fewer) == 0:
        narrower *= 2
    # every kind of layer once, whatever the list that names the kinds
    lists = [v for v in fields.values() if isinstance(v, list) and len(v) == layers]
    first = [values.index(value) + 1 for values in lists for value in values]
    kept = max([min(layers, SMALL_LAYERS), *first])
    sizes: dict[str, Callable[[int], int]] = {
        "layers": lambda n: kept,
        "words": lambda n: VOCABULARY,
        "token": lambda n: min(n, VOCABULARY - 1),
        "heads": lambda n: n // fewer if n > 1 else n,
        "head": lambda n: n // narrower if n >= 16 else n,
        "width": lambda n: n // (fewer * narrower) if n >= 16 else n,
        "experts": lambda n: min(n, EXPERTS),
    }

    def small(key: str, value: Any) -> Any:
        if isinstance(value, list) and len(value) == layers:
            return value[:kept]
        if isinstance(value, list) and value and all(type(x) is float for x in value):
            return value[: len(value) // narrower]  # of a rotary embedding, one per frequency
        if isinstance(value, dict):
            return {k: small(str(k), v) for k, v in value.items()}
        kind = _kind(config.attribute_map.get(key, key))
        return sizes[kind](value) if type(value) is int and kind in sizes else value

    names = {v: k for k, v in config.attribute_map.items()}
    drop = ("transformers_version", "_name_or_path", "model_type", "dtype")
    return type(config)(
        **{k: small(names.get(k, k), v) for k, v in fields.items() if k not in drop}
    )


KINDS = {
    "layers": r"^(num_hidden_layers|num_layers|n_layers?)$",
    "words": r"^vocab_size$",
    "token": r"token_id$",
    None: r"window|chunk|kernel|group|position|patch|image|vocab|state",
    "head": r"head_dim|head_size|d_head|d_kv",
    "heads": r"n_heads?$|num_.*heads$",
    "width": r"size|dim|rank|embd|inner|width|d_model|d_ff",
    "experts": r"expert",
}


def _kind(key: str) -> str | None:
    """What an integer of a config counts; None for what stays."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, key)), None)


def small_model(config: PretrainedConfig) -> PreTrainedModel:
    """A random fp32 model of small_config, lively enough that no part of it is without effect."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            small_config(config),
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                if parameter.dim() > 1:
                    parameter.copy_(noise / parameter.shape[-1] ** 0.5)
                else:
                    parameter.add_(noise, alpha=0.3)
    model.config.use_cache = False
    return model.eval()


@torch.no_grad()
def own_log_probs(model: PreTrainedModel, examples: Sequence[Example]) -> Tensor:
    """[examples, members] from the model's own logits, one member at a time, eager attention."""
    sums = []
    with _attention(model, "eager"):
        for example in examples:
            for prompt, response in example.members():
                ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
                logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
                logp_RV = logits.float().log_softmax(-1)
                sums.append(logp_RV.gather(1, ids[0, len(prompt) :, None]).sum())
    return torch.stack(sums).view(len(examples), -1)


@torch.no_grad()
def difference(model: PreTrainedModel, examples: Sequence[Example], attention: str) -> float:
    """The largest difference, in nats, of a member's log-prob between the two paths.

    model: on the CPU, in fp32. attention: SHARED scores the shared layout, any other the plain one.
    """
    with _attention(model, attention):
        batch = (build_shared if attention == SHARED else build_plain)(examples)
        found = LogProbs(model)(batch)
    return (found - own_log_probs(model, examples)).abs().max().item()


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def check_family(config: PretrainedConfig, *, where: str, attention: str = SHARED) -> None:
    """Raise ValueError for a model that is not supported; its weights need not be here.

    attention: of the run, see `difference`. Where no small model can be made of the config,
    check_weights has the word.
    """
    check_config(config, where=where)
    fields = {"model_type": config.model_type, **config.to_dict()}
    found, reason = family_difference(json.dumps(fields, default=str), attention)
    if reason is not None:
        raise _refusal(where, config, f"its log-probs cannot be computed: {reason}")
    if found is None:
        log.info(f"{where}: no small model of its config could be made to check its log-probs")
    else:
        _refuse_above(found, where, config, "a small random model of its config")


@cache
def family_difference(config: str, attention: str) -> tuple[float | None, str | None]:
    """(`difference` of a small model of the config, why it cannot be found), for a config's JSON.

    Both are None where the model cannot be made, or cannot compute its own logits.
    """
    quads = random_quads(VOCABULARY)
    try:
        model = small_model(AutoConfig.for_model(**json.loads(config)))
        own_log_probs(model, quads)
    except Exception as error:  # any code of any family: the model itself is checked later
        log.debug("no small model", exc_info=error)
        return None, None
    try:
        return difference(model, quads, attention), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".removeprefix("ValueError: ")


def check_weights(model: PreTrainedModel, examples: Sequence[Example], *, where: str) -> None:
    """Raise ValueError if the first layers of a loaded model score a short quad in another way.

    model: on the CPU, not sharded, in the run's attention. Of what is compared, narrow weights are
    in fp32 for the moment; the model is left as it was. examples: give the tokens of the quad,
    modulo WORDS, whatever the rows of the objective are.
    """
    first, last = examples[0], examples[-1]
    x1, x2 = first.prompts[0][-PROMPT:], last.prompts[-1][-PROMPT:]
    y1, y2 = first.responses[0][0][:RESPONSE], last.responses[-1][-1][:RESPONSE]
    x1, x2, y1, y2 = (ids % WORDS for ids in (x1, x2, y1, y2))
    quad = Example(first.id, (x1, x2), ((y1, y2), (y2, y1)))
    layers = len(blocks(model))
    training = model.training
    shown = progress(None, "comparing log-probs with those of the model's own logits")
    with shown, _first_layers(model), _widened(model):
        found = difference(model.eval(), [quad], model.config._attn_implementation)
    model.train(training)
    what = f"the first {min(layers, LAYERS)} of {layers} layers"
    _refuse_above(found, where, model.config, what)
    log.info(
        f"log-probs of {what} equal those of the model's own logits (eager attention, fp32) within "
        f"{found:.1g} nats a response, on {first.id} shortened"
    )


@contextmanager
def _first_layers(model: PreTrainedModel) -> Iterator[None]:
    """The model without its later layers."""
    layers = {id(block) for block in blocks(model)}
    lists = [
        m for m in model.modules()
        if isinstance(m, nn.ModuleList) and any(id(child) in layers for child in m)
    ]  # fmt: skip
    later = [list(m)[LAYERS:] for m in lists]
    for m in lists:
        del m[LAYERS:]
    try:
        yield
    finally:
        for m, rest in zip(lists, later, strict=True):
            m.extend(rest)


@contextmanager
def _widened(model: PreTrainedModel) -> Iterator[None]:
    """The model's floating-point tensors in fp32, of the vocabulary WORDS entries, and back again.

    A head of 150,000 words takes seconds and gigabytes in fp32.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    cut = {id(t) for module in (embedding, head) for t in module.parameters(recurse=False)}
    tensors = (*model.parameters(), *model.buffers())
    kept = [(t, t.data) for t in tensors if t.is_floating_point()]
    padding, embedding.padding_idx = embedding.padding_idx, None  # it may lie beyond them
    for tensor, data in kept:
        part = data[:WORDS] if id(tensor) in cut else data
        tensor.data = part.float() if data.element_size() < 4 else part
    try:
        yield
    finally:
        embedding.padding_idx = padding
        for tensor, data in kept:
            tensor.data = data


def _refusal(where: str, config: PretrainedConfig, why: str) -> ValueError:
    return ValueError(f"{where}: model type '{config.model_type}' is not supported: {why}")


def _refuse_above(found: float, where: str, config: PretrainedConfig, what: str) -> None:
    if not found <= TOLERANCE:
        raise _refusal(
            where,
            config,
            f"log-probs of {what} differ from those of its own logits by {found:.3g} nats a "
            f"response, expected at most {TOLERANCE:g}: its layers mix packed responses, or more "
            "than a scale, a linear head and a soft cap follows",
        )


def random_quads(vocab: int) -> list[Example]:
    """Two quads without meaning; packed together, so that every kind of leak would show."""
    draw = np.random.default_rng(0)
    quads = []
    for i, lengths in enumerate([(9, 7, 5, 4), (6, 11, 3, 7)]):
        x1, x2, y1, y2 = (draw.integers(vocab, size=n) for n in lengths)
        quads.append(Example(str(i), (x1, x2), ((y1, y2), (y2, y1))))
    return quads
