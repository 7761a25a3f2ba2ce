"""A tokenizer and a random model of toy size, so that the whole program runs without any download.

Used by `+experiment=tiny_random` and by tests; never for results.
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte (256) plus <|im_start|>, <|im_end|> (end of turn and padding)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )


def tiny_model(config: dict, seed: int = 0) -> PreTrainedModel:
    """A causal LM with random weights from transformers' config keys, `model_type` among them.

    Raises ValueError if the vocabulary is smaller than the byte tokenizer's 258 tokens.
    """
    if config.get("vocab_size", 0) < 258:
        raise ValueError(
            f"model.tiny.vocab_size: found {config.get('vocab_size')}, expected 258 or more "
            "(256 bytes and two special tokens)"
        )
    keys = {"eos_token_id": 257, "pad_token_id": 257, "bos_token_id": None} | config
    model_type = keys.pop("model_type")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **keys))
