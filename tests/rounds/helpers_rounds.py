"""A tiny model that says whole sentences, for rounds that must make rows; trained in the test."""

import random
import string
from pathlib import Path

import torch
from helpers_models import tiny_llama

from iopo.data.chat import Chat
from iopo.model.load import byte_tokenizer

TEXTS = (
    "The town is small and the people like it.",
    "It is for you and for all of us, my friend!",
    "You will find that the sea is cold, blue and deep.",
    "This is a plan for the day and for the night. Enjoy!",
)
STEPS, ROWS = 400, 8
LETTERS = string.ascii_letters + string.digits + " .,:'!"


def make_talker(folder: Path) -> Path:
    """A model folder; whatever it is asked, it answers with about one of TEXTS."""
    torch.manual_seed(0)
    rng, tokenizer = random.Random(0), byte_tokenizer()
    model = tiny_llama(vocab=300, max_position_embeddings=2048)
    model.config.eos_token_id = model.generation_config.eos_token_id = 257
    chat = Chat(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / STEPS)
        ids, labels = [], []
        for _ in range(ROWS):
            asked = "".join(rng.choices(LETTERS, k=rng.randint(20, 220)))
            prompt = chat.prompt(asked)
            said = chat.response(prompt, asked, rng.choice(TEXTS))
            head, tail = (
                tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, said)
            )
            ids.append(torch.tensor(head + tail))
            labels.append(torch.tensor([-100] * len(head) + tail))
        batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        wanted = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        loss = model(input_ids=batch, labels=wanted).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
