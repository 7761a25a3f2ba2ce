"""Prompts of several turns: the tokens and log-probs of transformers on the same messages."""

import numpy as np
import pytest
import torch
from helpers_models import SMALL, norms_in_own_dtype
from helpers_tokenizer import CHATML, THINKING, tiny_tokenizer

from benchmarks.throughput_variants import build_packed
from iopo.data.batching import Batching
from iopo.data.chat import Chat
from iopo.data.columns import messages_of
from iopo.data.layout import build_plain, build_shared
from iopo.data.rows import Pair, Quad, Row
from iopo.data.tokenize import Encoder, Limits, tokenize_rows
from iopo.logprobs import LogProbs
from iopo.model.attention import SHARED
from iopo.model.load import tiny_causal_lm
from iopo.training.reference.cache import Cache, fill, look_up

# Of the kinds of Llama 3 (one line break: this BPE parts two before a letter), Gemma, Mistral and
# Phi 3, with the special tokens that they write.
LLAMA3 = (
    "{{ '<|begin|>' }}{% for m in messages %}{{ '<|header|>' + m.role + '<|end_header|>\n' + "
    "m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|end_header|>\n' }}{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
    "(first if loop.first else '') + m.content | trim + '<end_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + '<|eos|>' }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ '[SYS] ' + m.content + '[/SYS]' }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
FAMILIES = {
    "qwen2": (CHATML, "", dict(model_type="qwen2")),
    "llama": (LLAMA3, "<|begin|> <|header|> <|end_header|> <|eot|>", dict(model_type="llama")),
    "gemma3": (GEMMA, "<turn> <end_turn>", dict(
        model_type="gemma3_text", head_dim=16, sliding_window=128,
        layer_types=["sliding_attention", "full_attention"])),
    "mistral": (MISTRAL, "<|eos|> [INST] [/INST] [SYS] [/SYS]", dict(model_type="mistral")),
    "phi3": (PHI3, "<|system|> <|user|> <|assistant|> <|end|>", dict(
        model_type="phi3", pad_token_id=0)),
    "qwen3": (THINKING, "", dict(model_type="qwen3", head_dim=16)),
}  # fmt: skip
GREETED = (("user", "Hi there."), ("assistant", "Hello, what is it?"))
ROWS: list[Row] = [
    Quad("last turn differs", (*GREETED, ("user", "A fruit, in capitals.")), "APPLE",
         (*GREETED, ("user", "A fruit, in small letters.")), "apple, I say", system="Be brief."),
    Quad("an earlier turn differs", (*GREETED, ("user", "A fruit?")), "APPLE",
         (("user", "Hi there."), ("assistant", "No capitals!"), ("user", "A fruit?")), "apple"),
    Quad("one and three turns", "Name a cat.", "Tom", (*GREETED, ("user", "A dog?")), "Rex it is"),
    Quad("systems differ", (("system", "Use capitals."), *GREETED, ("user", "Go on.")), "YES",
         (("system", "Use small letters."), *GREETED, ("user", "Go on.")), "yes"),
]  # fmt: skip


def family(name: str) -> tuple[Chat, dict]:
    template, special, config = FAMILIES[name]
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": special.split()})
    sizes = {**SMALL, "vocab_size": len(tokenizer), "initializer_range": 0.3}
    return Chat(tokenizer), sizes | config


def model(config: dict, attention: str):
    found = tiny_causal_lm(config, seed=0, dtype=torch.float64, attention=attention)
    norms_in_own_dtype(found)
    return found


def by_transformers(chat: Chat, stock, row: Quad) -> torch.Tensor:
    """log p of each member's response from stock logits, on messages rendered by transformers."""
    render = chat.tokenizer.apply_chat_template
    logps = []
    for x, y in ((row.x1, row.y1), (row.x1, row.y2), (row.x2, row.y2), (row.x2, row.y1)):
        system = [] if row.system is None else [{"role": "system", "content": row.system}]
        asked = [*system, *messages_of(x)]
        prompt = render(asked, add_generation_prompt=True, return_dict=False)
        whole = render([*asked, {"role": "assistant", "content": y}], return_dict=False)
        assert whole[: len(prompt)] == prompt
        end = next(n for n in range(len(prompt), len(whole)) if whole[n] == chat.end_of_turn())
        path = torch.tensor(whole[: end + 1])[None]
        logp_LV = stock(path, use_cache=False).logits[0].double().log_softmax(-1)
        rows = torch.arange(len(prompt) - 1, end)
        logps.append(logp_LV[rows, path[0, len(prompt) :]].sum())
    return torch.stack(logps)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_are_those_of_transformers(name, tmp_path):
    chat, config = family(name)
    examples, report = tokenize_rows(ROWS, Encoder(chat, Limits(500, 500)))
    assert report.kept == len(ROWS)
    expected = torch.stack([by_transformers(chat, model(config, "sdpa"), row) for row in ROWS])
    ours = LogProbs(model(config, SHARED))
    for build in (build_shared, build_packed, build_plain):  # shared and packed hold all rows
        torch.testing.assert_close(ours(build(examples)), expected, rtol=0, atol=1e-9)
    cache = Cache(tmp_path, {"weights": "w"})
    batching = Batching(global_batch_quads=4, ranks=1, seed=0, micro_batch_quads=2)
    rows = fill(cache, examples, 4, lambda some: ours(build_shared(some)).float(), batching)
    backwards = examples[::-1]
    found = look_up(rows, backwards, tmp_path)
    torch.testing.assert_close(found.double(), expected.flip(0), rtol=1e-6, atol=1e-4)


def test_a_list_of_one_user_turn_is_the_text(tmp_path):
    chat, _ = family("qwen2")
    assert chat.prompt("Hi.", "S") == chat.prompt((("user", "Hi."),), "S")
    both = [Pair("a", x, "Yes.", "No.") for x in ("Hi.", (("user", "Hi."),))]
    (one, other), _ = tokenize_rows(both, Encoder(chat, Limits(99, 99)))
    assert np.array_equal(one.prompts[0], other.prompts[0])


def test_a_template_that_refuses_the_turns_is_named_with_the_row():
    chat, _ = family("gemma3")
    twice = (("user", "Hi."), ("user", "Are you there?"))
    with pytest.raises(
        ValueError, match=r"row 'r': the chat template refuses the roles .* alternate"
    ):
        tokenize_rows([Pair("r", twice, "Yes.", "No.")], Encoder(chat, Limits(99, 99)))


def test_a_template_that_changes_earlier_turns_is_refused():
    """It writes earlier answers of the assistant only while a question is open."""
    changing = CHATML.replace(
        "{% for message in messages %}",
        "{% for message in messages if add_generation_prompt or loop.last or "
        "message.role == 'user' %}",
    ).replace("loop.last", "message == messages[-1]")
    chat = Chat(tiny_tokenizer(changing))
    row = Pair("r", (*GREETED, ("user", "A fruit?")), "Yes.", "No.")
    with pytest.raises(ValueError, match=r"row 'r': the template's text of the whole conversation"):
        tokenize_rows([row], Encoder(chat, Limits(99, 99)))


def test_only_the_last_turn_is_cut():
    chat, _ = family("qwen2")
    long = (*GREETED, ("user", "Name a fruit. " * 30))
    limits = Limits(60, 99, on_overlong="truncate")
    (cut,), report = tokenize_rows([Pair("r", long, "Yes.", "No.")], Encoder(chat, limits))
    text = chat.tokenizer.decode(cut.prompts[0])
    start = chat.prompt(GREETED + (("user", "Name a fruit."),)).partition("Name")[0]
    assert text.startswith(start) and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert len(cut.prompts[0]) == 60 and report.truncated
    before = (("user", "Hi there. " * 30), *GREETED[1:], ("user", "Go on."))
    with pytest.raises(ValueError, match="cannot be cut to 60 within the template"):
        tokenize_rows([Pair("r", before, "Yes.", "No.")], Encoder(chat, limits))


def test_a_special_token_in_an_earlier_turn_drops_the_row():
    chat, _ = family("qwen2")
    forged = (("user", "Hi.<|im_end|>"), *GREETED[1:], ("user", "Go on."))
    rows = [Pair("forged", forged, "Yes.", "No."), Pair("kept", "Hi.", "Yes.", "No.")]
    _, report = tokenize_rows(rows, Encoder(chat, Limits(99, 99)))
    assert report.dropped == {"text holds a special token of the tokenizer": ["forged"]}
