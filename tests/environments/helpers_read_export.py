"""Read a model folder with transformers or PEFT alone, of any version: a program for other
environments, so it imports nothing of the project.

    python helpers_read_export.py MODEL OUT.npz PROMPT ... [--adapter DIR]
"""

import argparse
import json

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def read(model: str, prompts: list[str], adapter: str | None) -> tuple[list[str], list]:
    """Greedy texts, and the logits of the first prompt with its answer."""
    stock = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").float().eval()
    if adapter is not None:
        from peft import PeftModel

        stock = PeftModel.from_pretrained(stock, adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter or model)
    texts, logits = [], []
    for prompt in prompts:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([tokenizer(asked, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            out = stock.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=24,
                do_sample=False,
                pad_token_id=0,
            )
            logits.append(stock(input_ids=out).logits[0].numpy())
        texts.append(tokenizer.decode(out[0]))
    return texts, logits


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--adapter")
    args = parser.parse_args()
    texts, logits = read(args.model, args.prompts, args.adapter)
    np.savez(args.out, *logits, texts=json.dumps(texts))
