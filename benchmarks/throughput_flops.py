"""Floating-point operations of a step: counted as it runs, and from the ledger of its design.

A multiply-add is two operations. Attention counts the causal pairs of query and key that are
needed, whatever a kernel computes on top; backward of attention is 2.5 times its forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from benchmarks.throughput_variants import Variant, unshared
from iopo.data.batching import tokens
from iopo.data.example import Example
from iopo.model.lora import LoRALinear, adapters
from iopo.model.parallel import blocks

ATTENTION_BACKWARD = 2.5


def counter() -> FlopCounterMode:
    """A FlopCounterMode that knows this project's operators and the CPU's attention."""
    aten, ours = torch.ops.aten, torch.ops.iopo
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _dense(1.0),
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _dense_backward,
            aten._scaled_dot_product_flash_attention: _dense(1.0),
            aten._scaled_dot_product_flash_attention_backward: _dense_backward,
            aten._scaled_dot_product_efficient_attention: _dense(1.0),
            aten._scaled_dot_product_efficient_attention_backward: _dense_backward,
            ours.segment_attention: _segments,
            ours.segment_attention_backward: _segments_backward,
            ours.linear_logprob: _head,
            ours.linear_logprob_backward: _head_backward,
            ours.linear_logprob_weight_gradient: _head_weight,
        },
    )


def _raw(formula):
    formula._get_raw = True  # tensors, not shapes
    return formula


def _pairs(ranges_N4: Tensor) -> float:
    """Pairs of query and key that segments look at."""
    start, stop, prefix_start, prefix_stop = ranges_N4.double().unbind(1)
    own = stop - start
    return float((own * own / 2 + own * (prefix_stop - prefix_start)).sum())


@_raw
def _segments(query, key, value, ranges_N4, scale, **_: Any) -> int:
    return int(4 * query.shape[1] * query.shape[2] * _pairs(ranges_N4))


@_raw
def _segments_backward(grad, query, key, value, out, lse, ranges_N4, scale, **_: Any) -> int:
    return int(ATTENTION_BACKWARD * _segments(query, key, value, ranges_N4, scale))


def _dense(factor: float):
    def formula(query_shape, key_shape, value_shape, *_args, **_: Any) -> int:
        sequences, heads, length, width = query_shape
        return int(factor * 4 * sequences * heads * width * length * length / 2)

    return formula


def _dense_backward(grad_shape, query_shape, *args, **kwargs) -> int:
    return _dense(ATTENTION_BACKWARD)(query_shape, *args, **kwargs)


@_raw
def _head(hidden_RD, weight_VD, *args, **_: Any) -> int:
    with_gradient = args[-1]
    return (4 if with_gradient else 2) * hidden_RD.shape[0] * weight_VD.numel()


@_raw
def _head_backward(grad_R, hidden_RD, weight_VD, *args, **_: Any) -> int:
    need_weight = args[-2]
    return (6 if need_weight else 4) * hidden_RD.shape[0] * weight_VD.numel()


@_raw
def _head_weight(kept, hidden_RD, *_args, **_: Any) -> int:
    return 2 * kept.numel() * hidden_RD.shape[1]


@dataclass(frozen=True)
class Weights:
    """Numbers of a model that multiply tokens: trunk and head in parameters, and attention."""

    trunk: int  # parameters of the linear layers of all blocks
    recomputed: int  # those that checkpointing computes again
    adapters: int  # parameters of the adapters; 0 under full fine-tuning
    head: int  # vocabulary times width
    attention: int  # blocks times query heads times head width

    @staticmethod
    def of(model: PreTrainedModel) -> "Weights":
        """Of a causal LM, with adapters or without."""
        inner = blocks(model)
        linear = [m for b in inner for m in b.modules() if isinstance(m, nn.Linear)]
        trunk = sum(m.weight.numel() for m in linear)
        low = adapters(model).values()
        # A block's last product is not needed for the backward of a layer without adapter.
        last = [[m for m in b.modules() if isinstance(m, nn.Linear)][-1] for b in inner]
        spared = sum(m.weight.numel() for m in last if not isinstance(m, LoRALinear))
        c = model.config
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        return Weights(
            trunk=trunk,
            recomputed=trunk - spared,
            adapters=sum(m.lora_A.numel() + m.lora_B.numel() for m in low),
            head=c.vocab_size * c.hidden_size,
            attention=len(inner) * c.num_attention_heads * width,
        )


def ledger(
    weights: Weights, micro_batches: Sequence[Sequence[Example]], variant: Variant, *, full: bool
) -> float:
    """Operations of one step with a reference, from lengths alone.

    Passes over the trunk: forward, the reference's forward if live, recomputation, gradients of
    the inputs and, under full fine-tuning, of the weights. The head meets every token in the stock
    model and the response tokens in the fused one. A trained head that is too large to keep its
    errors (iopo/kernels/tiled.py) computes its logits once more; none here is.
    """
    w, live = weights, int(variant.live)
    again = 1 / variant.checkpoint_every if variant.checkpoint_every else 0.0
    low_again = again
    if variant.selective:  # of the products, only those of B are wide and cheap
        again, low_again = 0.0, again / 2
    counts = [_count(rows, variant) for rows in micro_batches]
    processed, scored, pairs = (sum(column) for column in zip(*counts, strict=True))
    trunk = w.trunk * (1 + live + 1 + full) + w.recomputed * again
    low = w.adapters * (1 + low_again + 2)
    head_tokens = scored if variant.fused else processed
    head = w.head * (1 + live + 1 + full)
    attention = 4 * w.attention * (1 + live + again + ATTENTION_BACKWARD)
    return 2.0 * processed * (trunk + low) + 2.0 * head_tokens * head + pairs * attention


def processed_tokens(micro_batches: Sequence[Sequence[Example]], variant: Variant) -> int:
    """Tokens that one forward over the step processes, padding included."""
    return sum(_count(rows, variant)[0] for rows in micro_batches)


def _count(rows: Sequence[Example], variant: Variant) -> tuple[int, int, float]:
    """(processed tokens, scored tokens, pairs of query and key) of one micro-batch."""
    forest = [pair for e in rows for pair in zip(e.prompts, e.responses, strict=True)]
    paths = [(len(x), len(y)) for x, ys in forest for y in ys]
    scored = sum(r for _, r in paths)
    if variant.layout == "plain":
        longest = max(p + r for p, r in paths)
        return len(paths) * longest, scored, len(paths) * longest**2 / 2
    counted = [unshared(e) for e in rows] if variant.layout == "packed" else rows
    processed = sum(tokens(e, "shared") for e in counted)
    pairs = sum((p + r) ** 2 / 2 for p, r in paths)
    if variant.layout == "shared":  # a prompt attends to itself once
        pairs -= sum((len(ys) - 1) * len(x) ** 2 / 2 for x, ys in forest)
    return processed, scored, pairs
