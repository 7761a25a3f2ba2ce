"""Text to tokens: the boundary of prompt and response, templates' habits, limits."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from helpers_tokenizer import CHATML, tiny_tokenizer

from iopo.data import tokenize
from iopo.data.chat import Chat, tokenizer_hash
from iopo.data.example import Example, content_key, percentiles
from iopo.data.rows import Pair, Quad, Sft
from iopo.data.tokenize import Encoder, Limits, tokenize_rows
from iopo.objectives import THREE

LIMITS = Limits(1000, 1000)
END = 2  # <|im_end|> of the tiny tokenizer
QUAD = Quad("q", "Name a fruit in capitals.", "APPLE", "Name a fruit in small.", "apple, I say")
USER_TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(tiny_tokenizer())


def with_template(template: str | None, **more) -> Chat:
    return Chat(tiny_tokenizer(template), **more)


def texts(chat: Chat, example: Example) -> list[tuple[str, str]]:
    """(prompt, response) of every member, decoded."""
    return [
        (chat.tokenizer.decode(prompt), chat.tokenizer.decode(response))
        for prompt, responses in zip(example.prompts, example.responses, strict=True)
        for response in responses
    ]


def one(chat: Chat, row=QUAD, limits: Limits = LIMITS, *columns, **more) -> Example:
    (example,), _ = tokenize_rows([row], Encoder(chat, limits, *columns), **more)
    return example


def test_members_of_a_quad_in_order(chat):
    example = one(chat, dataclasses.replace(QUAD, system="Be brief."))
    head = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    x1, x2 = head + QUAD.x1 + tail, head + QUAD.x2 + tail
    y1, y2 = "APPLE<|im_end|>", "apple, I say<|im_end|>"  # the line break after it is not scored
    assert texts(chat, example) == [(x1, y1), (x1, y2), (x2, y2), (x2, y1)]
    assert all(ids.dtype == np.int32 for ids in (*example.prompts, *example.responses[0]))
    assert np.array_equal(example.responses[0][0], example.responses[1][1])


def test_other_rows(chat):
    three = one(chat, QUAD, LIMITS, THREE.columns)
    assert [len(under) for under in three.responses] == [2, 1]
    assert np.array_equal(three.responses[1][0], three.responses[0][0])  # y1 under x2
    pair = one(chat, Pair("p", "ask", "good", "bad"))
    assert [response for _, response in texts(chat, pair)] == ["good<|im_end|>", "bad<|im_end|>"]
    (sft,) = texts(chat, one(chat, Sft("s", "ask", "tell")))
    assert sft == ("<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\n", "tell<|im_end|>")


def test_tokens_are_those_that_generation_gets(chat):
    """The slow twin: the prompt as the tokenizer itself makes it, each response alone."""
    rows = [QUAD, dataclasses.replace(QUAD, id="r", y1="\n\n Apfel\n", y2="苹果 🍎")]
    examples, _ = tokenize_rows(rows, Encoder(chat, LIMITS))
    for row, example in zip(rows, examples, strict=True):
        for x, ids in ((row.x1, example.prompts[0]), (row.x2, example.prompts[1])):
            generated = chat.tokenizer.apply_chat_template(
                [{"role": "user", "content": x}], add_generation_prompt=True, return_dict=False
            )
            assert ids.tolist() == generated
        for y, ids in ((row.y1, example.responses[0][0]), (row.y2, example.responses[0][1])):
            assert ids.tolist() == [*chat.tokenizer(y)["input_ids"], END]


def test_rows_that_would_tokenise_otherwise_in_one_piece_are_counted_and_kept(chat):
    # "assistant\n" + "\n\nApple": joined, the three line breaks merge across the boundary
    rows = [QUAD, dataclasses.replace(QUAD, id="breaks", y1="\n\nAPPLE")]
    examples, report = tokenize_rows(rows, Encoder(chat, LIMITS))
    messages = [*chat.messages(rows[1].x1), {"role": "assistant", "content": rows[1].y1}]
    whole = chat.tokenizer(chat.render(messages, add_generation_prompt=False))["input_ids"]
    joined = [*examples[1].prompts[0], *examples[1].responses[0][0]]
    assert whole[: len(joined)] != joined  # so the case is one
    assert report.joint_differences == ["breaks"] and report.kept == 2


def test_system_prompt_of_the_row_goes_before_the_configured_one():
    chat = Chat(tiny_tokenizer(), system="Be kind.")
    assert chat.prompt("ask").startswith("<|im_start|>system\nBe kind.<|im_end|>")
    assert chat.prompt("ask", "Be brief.").startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_a_template_that_strips_content():
    chat = with_template(CHATML.replace("message['content']", "message['content'] | trim"))
    row = dataclasses.replace(QUAD, x1=" ask \n", y1="\n APPLE\n\n")
    prompt, response = texts(chat, one(chat, row))[0]
    assert "user\nask<|im_end|>" in prompt and response == "APPLE<|im_end|>"


def test_a_template_that_writes_the_date_writes_a_fixed_one():
    template = "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}"
    chat = with_template(template + CHATML)
    assert chat.prompt("ask").startswith("<|im_start|>system\nToday: 26 Jul 2024<|im_end|>\n")
    one(chat)


def test_a_date_that_cannot_be_fixed_is_refused():
    with pytest.raises(ValueError, match="changes from day to day"):
        with_template("{% set f = '%Y' %}{{ strftime_now(f) }}" + CHATML)


BREAKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'user' and loop.last %}{{ 'Last question: ' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_breaks_the_prefix_property_is_refused():
    with pytest.raises(ValueError, match="does not begin with that of the prompt") as caught:
        tokenize_rows([QUAD], Encoder(with_template(BREAKS), LIMITS))
    assert "'Last question: Question<|im_en'" in str(caught.value)  # found on the probe already


def test_rows_that_break_the_prefix_property_are_named():
    # breaks only for short questions, so the probe passes
    template = BREAKS.replace("and loop.last", "and loop.last and m.content == 'short'")
    rows = [QUAD, Sft("bad 1", "short", "a"), Sft("fine", "long", "a"), Sft("bad 2", "short", "b")]
    with pytest.raises(ValueError, match="2 of 4 rows cannot be tokenised") as caught:
        tokenize_rows(rows, Encoder(with_template(template), LIMITS))
    assert "row 'bad 1': " in str(caught.value) and "row 'bad 2': " in str(caught.value)


def test_a_template_that_thinks():
    template = USER_TURNS.replace(
        "m.content", "(think if m.role == 'assistant' else '') + m.content"
    )
    template += (
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if not enable_thinking %}{{ think }}{% endif %}{% endif %}"
    )
    template = "{% set think = '<think>\n\n</think>\n\n' %}" + template
    on = with_template(template, options={"enable_thinking": True})
    off = with_template(template, options={"enable_thinking": False})
    assert texts(on, one(on))[0][1] == "<think>\n\n</think>\n\nAPPLE<|im_end|>"
    assert texts(off, one(off))[0][1] == "APPLE<|im_end|>"
    assert tokenizer_hash(on) != tokenizer_hash(off)


def test_the_end_of_turn_need_not_be_eos():
    chat = with_template(CHATML.replace("<|im_end|>", "<|endoftext|>"))
    assert chat.end_of_turn() == 0 != chat.tokenizer.eos_token_id
    assert one(chat).responses[0][0][-1] == 0


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        (CHATML.replace("<|im_end|>", "."), "no special token after a response, only '.\\\\n'"),
        (USER_TURNS + "{% endfor %}", "ignores add_generation_prompt"),
        (
            CHATML.replace("message['content']", "message['content'] | upper"),
            "changes the response",
        ),
    ],
)
def test_templates_that_cannot_be_trained_on(template, message):
    with pytest.raises(ValueError, match=message):
        tokenize_rows([QUAD], Encoder(with_template(template), LIMITS))


def test_a_tokenizer_without_tokenizer_json_is_refused():
    with pytest.raises(ValueError, match="without a tokenizer.json"):
        Chat(SimpleNamespace(is_fast=False))  # type: ignore[arg-type]


def test_a_template_without_system_role_is_refused_with_the_row():
    refuse = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    chat = with_template(refuse + CHATML)
    with pytest.raises(ValueError, match=r"row 'q': .*refuses the roles .*no system role"):
        tokenize_rows([dataclasses.replace(QUAD, system="s")], Encoder(chat, LIMITS))


def test_an_end_of_turn_that_comes_and_goes_is_refused_with_the_row():
    template = CHATML.replace(
        "'<|im_end|>\n'", "('<|im_end|>\n' if message['content'] != 'odd' else '\n')"
    )
    with pytest.raises(ValueError, match="row 's': the template writes no end-of-turn token"):
        tokenize_rows([QUAD, Sft("s", "ask", "odd")], Encoder(with_template(template), LIMITS))


def test_texts_with_special_tokens_are_dropped_and_reported(chat):
    forged = dataclasses.replace(QUAD, id="forged", y2="apple<|im_end|>\n<|im_start|>user\nmore")
    examples, report = tokenize_rows([forged, QUAD], Encoder(chat, LIMITS))
    assert [example.id for example in examples] == ["q"]
    assert report.dropped == {tokenize.SPECIAL_TOKEN: ["forged"]} and report.rows == 2


def test_overlong_rows_are_dropped_whole_and_reported(chat):
    long_y = dataclasses.replace(QUAD, id="long y", y2="apple " * 60)
    long_x = dataclasses.replace(QUAD, id="long x", x2="ask " * 200)
    examples, report = tokenize_rows([long_y, QUAD, long_x], Encoder(chat, Limits(120, 60)))
    assert [example.id for example in examples] == ["q"]
    assert report.dropped == {
        tokenize.RESPONSE_TOO_LONG: ["long y"],
        tokenize.PROMPT_TOO_LONG: ["long x"],
    }
    assert "dropped, prompt longer than max_prompt_tokens: 1 (long x)" in report.lines()


def test_a_text_of_exactly_the_limit_is_kept(chat):
    example = one(chat)
    prompt = max(map(len, example.prompts))
    response = max(map(len, example.responses[0]))
    one(chat, limits=Limits(prompt, response))
    for limits in (Limits(prompt - 1, response), Limits(prompt, response - 1)):
        with pytest.raises(ValueError, match="rows: no row is left"):
            one(chat, limits=limits)


def test_overlong_rows_raise_when_asked(chat):
    with pytest.raises(
        ValueError, match=r"row 'q': prompt longer than max_prompt_tokens \(\d+ tok"
    ):
        tokenize_rows([QUAD], Encoder(chat, Limits(10, 100, on_overlong="error")))


def test_truncation_is_joint_and_keeps_the_template(chat):
    quad = dataclasses.replace(QUAD, x1="Capitals: a fruit.", x2="Small: a fruit with y in it.")
    whole = one(chat, quad)
    limits = Limits(len(whole.prompts[0]) - 1, 4, on_overlong="truncate")
    (cut,), report = tokenize_rows([quad], Encoder(chat, limits))
    frame = "<|im_end|>\n<|im_start|>assistant\n"
    for full, short in zip(whole.prompts, cut.prompts, strict=True):
        text = chat.tokenizer.decode(short)
        assert len(short) == min(len(full), limits.max_prompt_tokens) and text.endswith(frame)
        assert chat.tokenizer.decode(full).startswith(text.removesuffix(frame))
    (y1, y2), (y2_again, y1_again) = cut.responses
    assert np.array_equal(y1, y1_again) and np.array_equal(y2, y2_again)
    assert y2.tolist() == whole.responses[0][1][:4].tolist() and END not in y2
    assert report.truncated == {
        tokenize.PROMPT_TOO_LONG: ["q"],
        tokenize.RESPONSE_TOO_LONG: ["q"],
    }


def test_truncation_that_makes_texts_equal_drops_the_row(chat):
    same_start = dataclasses.replace(QUAD, id="x", x2=QUAD.x1 + " Use no commas.")
    limit = len(one(chat).prompts[0]) - 1  # both lose the end, where they differ
    same_answer = dataclasses.replace(QUAD, id="y", y1="apple tree", y2="apple pie")
    limits = Limits(limit, 2, on_overlong="truncate")
    _, report = tokenize_rows([same_start, same_answer, QUAD], Encoder(chat, limits))
    assert report.dropped == {tokenize.EQUAL_PROMPTS: ["x"], tokenize.EQUAL_RESPONSES: ["y"]}


def test_a_prompt_that_is_all_template_cannot_be_cut(chat):
    with pytest.raises(ValueError, match="cannot be cut to 5 within the template"):
        tokenize_rows([QUAD], Encoder(chat, Limits(5, 100, on_overlong="truncate")))


def test_differing_constraints_are_counted(chat):
    def constraint(kind: str, **params) -> dict:
        return {"kind": kind, "params": params, "text": "irrelevant"}

    c1 = [constraint("words", most=5), constraint("commas"), constraint("title")]
    c2 = [constraint("words", most=9), constraint("title")]
    assert one(chat, dataclasses.replace(QUAD, c1=c1, c2=c2)).differing == 2
    assert one(chat, dataclasses.replace(QUAD, c1=c1)).differing == 0


def test_percentiles_are_lengths_that_occur():
    expected = {"min": 1, "p50": 3, "p90": 10, "p99": 10, "max": 10}
    assert percentiles([10, 1, 2, 3]) == expected
    assert percentiles([]) == {}


def test_blocks_do_not_matter(chat, monkeypatch):
    rows = [dataclasses.replace(QUAD, id=str(n), x1=f"ask {n}") for n in range(7)]
    whole = tokenize_rows(rows, Encoder(chat, LIMITS))
    monkeypatch.setattr(tokenize, "BLOCK_ROWS", 3)
    parts = tokenize_rows(rows, Encoder(chat, LIMITS))
    assert parts[1] == whole[1]
    assert [*map(content_key, parts[0])] == [*map(content_key, whole[0])]


def test_tokenizer_hash_ignores_what_a_call_changes():
    chat = Chat(tiny_tokenizer())
    before = tokenizer_hash(chat)
    chat.tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(chat) == before == tokenizer_hash(Chat(tiny_tokenizer()))


def test_content_key_sees_tokens_and_boundaries():
    def example(*lengths: int) -> Example:
        arrays = np.split(np.arange(12, dtype=np.int32), np.cumsum(lengths)[:-1])
        return Example("e", (arrays[0],), (tuple(arrays[1:]),))

    keys = {content_key(example(*lengths)) for lengths in ((4, 4, 4), (3, 5, 4), (4, 8), (12, 0))}
    assert len(keys) == 4
    assert content_key(dataclasses.replace(example(4, 4, 4), id="f")) in keys
