"""Tiny random models for tests: two layers, width 32, CPU, fp32, the same for the same seed."""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from iopo.model.load import tiny_causal_lm

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def tiny_llama(
    vocab: int = 300,
    seed: int = 0,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    **overrides: Any,
) -> PreTrainedModel:
    """A random Llama; `overrides` are keys of its transformers config."""
    config = {"model_type": "llama", "vocab_size": vocab, "tie_word_embeddings": tied}
    return tiny_causal_lm(
        {**config, **SMALL, **overrides}, seed=seed, dtype=dtype, attention=attention
    )


def tiny_qwen2(
    vocab: int = 300,
    seed: int = 0,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    **overrides: Any,
) -> PreTrainedModel:
    """A random Qwen2 (biases on q, k and v); `overrides` are keys of its transformers config."""
    config = {"model_type": "qwen2", "vocab_size": vocab, "tie_word_embeddings": tied}
    return tiny_causal_lm(
        {**config, **SMALL, **overrides}, seed=seed, dtype=dtype, attention=attention
    )


def norms_in_own_dtype(model: nn.Module) -> None:
    """Let the model's norms compute in its dtype: their own code rounds to float32 in between."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_rms_norm, module)


def _rms_norm(module, x):
    if type(module).__name__.startswith("Gemma"):
        eps, gain = module.eps, 1 + module.weight
    else:
        eps, gain = module.variance_epsilon, module.weight
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain
