"""How well a model still predicts ordinary prose, which no training here is about.

The text is the language reference that comes with every CPython (`pydoc_data.topics`): English
prose by people, on any machine. It differs between Python versions, so its hash goes with the
number, and numbers are compared where the hashes are equal.
"""

import math
from pydoc_data import topics
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iopo.files import sha256_text

BLOCKS, BLOCK_TOKENS = 16, 512
BLOCK_CHARACTERS = 8 * BLOCK_TOKENS  # more than 512 tokens of English are ever made of


def reference_text() -> str:
    """All topics by name, without the lines that underline headings."""
    return "\n\n".join(text for _, text in sorted(topics.topics.items())).replace("***", "")


@torch.inference_mode()
def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Perplexity on 16 blocks of 512 tokens, spread evenly over the text, each on its own.

    model: in eval mode, with its stock attention. Returns {"perplexity", "nats_per_token" (a list,
    one mean per block of 511 predictions), "sha256" of the text}.
    """
    text = reference_text()
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
