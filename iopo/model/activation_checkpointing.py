"""Activation checkpointing of a decoder block: what its backward finds, and what it computes again.

whole      the block keeps its input and computes everything again: one more forward
selective  it also keeps what is dear to compute, the outputs of its matrix products and of its
           attention, and computes the rest again (norms, rotary embedding, activation function,
           the thin products of adapters): a few percent of a forward, for about half the memory
           that a block without checkpointing keeps

Letters: T packed tokens, K inner dimension of a product.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from iopo.model import attention  # noqa: F401  (defines the operators by segments)

aten = torch.ops.aten
# operator -> which argument is the product's left side, [T, K]
PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1}
ATTENTION = {
    torch.ops.iopo.segment_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_attention_math.default,
}


def checkpointed(forward: Callable[..., Any], *, selective: bool, width: int) -> Callable[..., Any]:
    """`forward` of a block, recomputed in the backward; the same numbers, bit for bit.

    width: of the model. A product is kept if each of its elements took half as many multiplications
    or more: not those with an adapter's rank inside, whose results are wide and cheap.
    """
    if not selective:
        return partial(checkpoint, forward, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, partial(_keep, width // 2))
    return partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)


def _keep(least_inner: int, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    dear = op in ATTENTION or (op in PRODUCTS and args[PRODUCTS[op]].shape[1] >= least_inner)
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE
