"""Batched generation against a plain one-by-one loop without a cache."""

import numpy as np
import pytest
import torch
from helpers_models import SMALL, norms_in_own_dtype, tiny_llama, tiny_qwen2
from helpers_tokenizer import CHATML, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from iopo.data.chat import Chat
from iopo.data.rows import Sft
from iopo.data.tokenize import Encoder, Limits, tokenize_rows
from iopo.model.generate import (
    Decoding,
    GrowingLayer,
    end_of_turn_ids,
    generate,
    inference,
    sample,
)
from iopo.model.load import tiny_causal_lm

PROMPTS = ("Hi", "Write a short story about a cat.", "Name three fruits. Do it now, please.", "a b")


def conversations():
    return [[{"role": "user", "content": text}] for text in PROMPTS]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def tiny_gemma3(vocab):
    """One layer with a window that is shorter than the prompts differ in length."""
    kinds = ["sliding_attention", "full_attention"]
    keys = {"head_dim": 16, "sliding_window": 8, "layer_types": kinds, "query_pre_attn_scalar": 16}
    config = {"model_type": "gemma3_text", "vocab_size": vocab, **SMALL, **keys}
    model = tiny_causal_lm(config, seed=0, dtype=torch.float32, attention="sdpa")
    norms_in_own_dtype(model)
    return model


@pytest.fixture(
    scope="module",
    params=[tiny_llama, tiny_qwen2, tiny_gemma3],
    ids=["llama", "qwen2", "gemma3"],
)
def model(request, tokenizer):
    return request.param(vocab=len(tokenizer)).double()


def answers(model, tokenizer, on_progress=None, **decoding):
    return generate(model, Chat(tokenizer), conversations(), Decoding(**decoding), on_progress)


def one_by_one(model, tokenizer, conversation, max_new_tokens, choose):
    """Slow twin: the whole text through the model again for every token."""
    ids = Chat(tokenizer).prompt_ids(conversation)
    out = []
    for step in range(max_new_tokens):
        with torch.no_grad():
            logits_V = model(torch.tensor([ids + out])).logits[0, -1]
        out.append(choose(logits_V, step))
        if out[-1] in end_of_turn_ids(model, Chat(tokenizer)):
            return tokenizer.decode(out[:-1], skip_special_tokens=True), "stop", len(out)
    return tokenizer.decode(out, skip_special_tokens=True), "length", len(out)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_greedy_equals_one_by_one(model, tokenizer, batch_size):
    found = answers(model, tokenizer, max_new_tokens=24, batch_size=batch_size)
    expected = [
        one_by_one(model, tokenizer, c, 24, lambda logits_V, _: int(logits_V.argmax()))
        for c in conversations()
    ]
    assert [(g.text, g.finish_reason, g.tokens) for g in found] == expected


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_sampling_depends_on_seed_and_place_only(model, tokenizer, batch_size):
    temperature = 3.0  # flat, so that the end of turn is drawn now and then
    found = answers(
        model,
        tokenizer,
        max_new_tokens=40,
        temperature=temperature,
        batch_size=batch_size,
        seed=7,
    )
    expected = []
    for i, conversation in enumerate(conversations()):
        uniforms = np.random.default_rng((7, i)).random(40)

        def choose(logits_V, step, uniforms=uniforms):
            cumulative_V = (logits_V.float() / temperature).softmax(-1).double().cumsum(-1)
            return int((cumulative_V <= uniforms[step] * cumulative_V[-1]).sum())

        expected.append(one_by_one(model, tokenizer, conversation, 40, choose))
    assert [(g.text, g.finish_reason, g.tokens) for g in found] == expected
    others = answers(model, tokenizer, max_new_tokens=40, temperature=temperature, seed=8)
    assert [g.text for g in others] != [g.text for g in found]


def test_stops_are_reported_and_cut(tokenizer):
    model = tiny_llama(vocab=len(tokenizer))
    stops = end_of_turn_ids(model, Chat(tokenizer))
    with torch.no_grad():  # every token leads to the end of turn
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
        model.lm_head.bias[tokenizer.eos_token_id] = 1.0
    assert tokenizer.eos_token_id in stops
    for answer in answers(model, tokenizer, max_new_tokens=5):
        assert (answer.text, answer.finish_reason, answer.tokens) == ("", "stop", 1)


def test_the_token_that_training_ends_with_stops_generation_too():
    """A base model with a chat template: neither eos nor the generation config knows its end."""
    base = tiny_tokenizer(CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}"))
    base.eos_token = "<|endoftext|>"
    model = tiny_llama(vocab=len(base))
    model.generation_config.eos_token_id = base.eos_token_id
    with torch.no_grad():  # every token leads to <|im_end|>
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.eye(len(base))[2])
    assert end_of_turn_ids(model, Chat(base)) == {0, 2}
    for answer in answers(model, base, max_new_tokens=5):  # thinking that the prompt began
        assert (answer.text, answer.finish_reason, answer.tokens) == ("<think>", "stop", 1)


def test_progress_and_modes(tokenizer):
    model = tiny_llama(vocab=len(tokenizer))
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    calls = []
    answers(
        model,
        tokenizer,
        max_new_tokens=3,
        batch_size=2,
        on_progress=lambda done, of: calls.append((done, of)),
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(RuntimeError, match="planned"), inference(model):
        raise RuntimeError("planned")
    assert model.training


def test_the_growing_cache_holds_what_transformers_own_holds():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = GrowingLayer(), DynamicLayer()
    for length in (5, 1, 1, 140, 1):  # past its room, and on
        new = torch.randn(2, 4, 3, length, 8, generator=generator)
        kept = [layer.update(*new) for layer in (ours, theirs)]
        assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()
    for layer in (ours, theirs):
        layer.batch_select_indices(torch.tensor([3]))
        layer.batch_repeat_interleave(2)
    new = torch.randn(2, 2, 3, 1, 8, generator=generator)
    kept = [layer.update(*new) for layer in (ours, theirs)]
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_no_conversations(tokenizer):
    assert generate(tiny_llama(vocab=len(tokenizer)), Chat(tokenizer), [], Decoding(3)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_new_tokens": 510}, "room for 510 new ones in the model's 512 positions"),
    ],
)
def test_refuses(tokenizer, change, message):
    model = tiny_llama(vocab=len(tokenizer))
    with pytest.raises(ValueError, match=message):
        answers(model, tokenizer, **{"max_new_tokens": 4, **change})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 1.0), st.sampled_from([5, 40, 700]))
def test_nucleus_is_the_smallest_set_with_the_mass(seed, top_p, vocab):
    generator = torch.Generator().manual_seed(seed)
    scores_SV = torch.randn(3, vocab, generator=generator) * 2
    uniform_S = torch.rand(3, generator=generator)
    token_S = sample(scores_SV, uniform_S, top_p)
    for row, token in enumerate(token_S.tolist()):
        probability_V = scores_SV[row].softmax(-1)
        likelier = probability_V[probability_V > probability_V[token]].sum()
        assert likelier < top_p + 1e-6


def test_sample_covers_the_distribution():
    scores = torch.tensor([0.1, 0.2, 0.7]).log()
    uniforms = torch.linspace(0, 1, 1001)[:-1]
    counts = torch.bincount(sample(scores.expand(1000, 3), uniforms, 1.0), minlength=3)
    assert counts.tolist() == pytest.approx([100, 200, 700], abs=1)
    kept = torch.bincount(sample(scores.expand(1000, 3), uniforms, 0.8), minlength=3)
    assert kept[0] == 0 and kept.tolist()[1:] == pytest.approx([222, 778], abs=1)


def test_generation_reads_the_ids_that_training_reads():
    """A template that asks for today's date gets the same fixed one in both."""
    dated = tiny_tokenizer("{{ strftime_now('%d %b %Y') }}" + CHATML)
    model, chat, seen = tiny_llama(vocab=len(dated)), Chat(dated), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    generate(model, chat, [chat.messages("ask")], Decoding(1))
    (example,), _ = tokenize_rows([Sft("s", "ask", "tell")], Encoder(chat, Limits(99, 99)))
    assert seen == [example.prompts[0].tolist()]
    assert dated.decode(seen[0]).startswith("26 Jul 2024")
