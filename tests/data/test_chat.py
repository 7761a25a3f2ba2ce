"""One chat for training, asking and exporting: boundary, options, date, end of turn, thinking."""

import numpy as np
import pytest
from helpers_tokenizer import CHATML, THINKING, blank_first_tokenizer, tiny_tokenizer
from transformers import AutoTokenizer

from iopo.constraints import follows, follows_loosely, make
from iopo.constraints.text import after_thinking, thinking_note
from iopo.data.chat import Chat, tokenizer_hash
from iopo.data.rows import Quad
from iopo.data.tokenize import Encoder, Limits, tokenize_rows
from iopo.model.load import byte_tokenizer
from iopo.model.portable import save_tokenizer

# of the kinds of Mistral 7B v0.1 and of Zephyr
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
BARS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ROWS = [
    Quad("plain", "Name a fruit in capitals.", "APPLE", "Name a fruit in small.", "apple, I say"),
    Quad("breaks", "Two lines.", "a\nb", "One line, indented.", "  a b"),
    Quad("first", "A break first.", "\n\nan apple", "A bracket first.", "[/] in two sentences"),
]
TOKENIZERS = {
    "bytes": byte_tokenizer,
    "byte-level": tiny_tokenizer,
    "thinking": lambda: tiny_tokenizer(THINKING),
    "inst": lambda: blank_first_tokenizer(INST),
    "bars": lambda: blank_first_tokenizer(BARS),
}


def encode(rows: list[Quad], chat: Chat):
    return tokenize_rows(rows, Encoder(chat, Limits(500, 500)))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_response_is_what_follows_the_prompt_in_the_whole(kind):
    """The slow twin: each member's conversation tokenised in one piece."""
    chat = Chat(TOKENIZERS[kind]())

    def ids(text: str) -> list[int]:
        return chat.tokenizer(text, add_special_tokens=False)["input_ids"]

    examples, report = encode(ROWS, chat)
    alone = 0
    for row, example in zip(ROWS, examples, strict=True):
        members = [(row.x1, row.y1), (row.x1, row.y2), (row.x2, row.y2), (row.x2, row.y1)]
        for (x, y), (prompt, response) in zip(members, example.members(), strict=True):
            text = chat.prompt(x)
            rest = chat.response(text, x, y)
            assert prompt.tolist() == ids(text)
            whole, by_itself = ids(text + rest), ids(rest)[: len(response)] == response.tolist()
            found = [*prompt.tolist(), *response.tolist()]
            if whole[: len(prompt)] == prompt.tolist():
                assert whole[: len(found)] == found
            else:
                assert by_itself and row.id in report.joint_differences
            alone += by_itself
    if kind in ("inst", "bars"):  # by itself, every response would begin with a blank too many
        assert alone == 2 * len(report.joint_differences) <= 2
    else:
        assert alone == 4 * len(ROWS)  # these tokenizers never see what stands before


def test_a_response_has_the_same_tokens_under_both_prompts():
    """Where the boundary merges under one prompt only, neither prompt's whole decides."""
    chat = Chat(tiny_tokenizer("{% for m in messages %}{{ m.content }}{{ '<|im_end|>' if m.role == "
                               "'assistant' }}{% endfor %}"))  # fmt: skip
    row = Quad("q", "Answer in s", "hort", "Answer in two sen", "tences, as you asked")
    encoder = Encoder(chat, Limits(99, 99))
    (example,), report = tokenize_rows([row], encoder)
    (y1, y2), (y2_again, y1_again) = example.responses
    assert np.array_equal(y1, y1_again) and np.array_equal(y2, y2_again)
    assert report.joint_differences == ["q"]
    assert chat.tokenizer.decode(y2) == "tences, as you asked<|im_end|>"


def test_a_prompt_that_merges_with_nearly_all_responses_is_explained():
    letter = "+ (message['role'] == 'assistant' and 'a' or '') + message['content']"
    template = CHATML.replace("assistant\n' }}", "assistant\na' }}")
    chat = Chat(tiny_tokenizer(template.replace("+ message['content']", letter)))
    rows = [Quad(str(n), f"Ask {n}", f"nswer {n}", f"Ask {n}!", f"nd {n}") for n in range(3)]
    lines = "\n".join(encode(rows, chat)[1].lines())
    assert "tokenised together: 3 (0, 1, 2)" in lines and "most rows: the tokenizer merges" in lines
    assert "most rows" not in "\n".join(encode(ROWS, Chat(tiny_tokenizer()))[1].lines())


def test_options_that_the_template_never_reads_are_refused():
    with pytest.raises(ValueError, match="never reads enabel_thinking; expected some of enable_th"):
        Chat(tiny_tokenizer(THINKING), options={"enabel_thinking": False})
    with pytest.raises(ValueError, match="never reads messages, tone; expected none"):
        Chat(tiny_tokenizer(), options={"tone": "kind", "messages": []})
    conditional = (
        "{% if not tone is defined %}{% set tone = 'kind' %}{% endif %}{{ tone }}" + CHATML
    )
    for value in ("sharp", 'it\'s "so" \\ {{ x }}'):
        assert Chat(tiny_tokenizer(conditional), options={"tone": value}).prompt("a")[0] == value[0]


@pytest.mark.parametrize("before", ["", "\n", "  {% if true %}", "\n {%- if true %}\n"])
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
def test_the_saved_template_asks_with_the_text_of_training(tmp_path, before, options):
    dated = before + "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + THINKING
    chat = Chat(tiny_tokenizer(dated + "{% endif %}" * ("if" in before)), options=options)
    kept = chat.tokenizer.chat_template
    save_tokenizer(chat.tokenizer, tmp_path, chat.saved_template())
    assert chat.tokenizer.chat_template == kept
    stock = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "ask"}]

    def asked(**more) -> str:
        return stock.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **more
        )

    assert asked() == chat.prompt("ask")
    assert "Today: 26 Jul 2024" in asked()
    assert asked().endswith("</think>\n\n") == (options == {"enable_thinking": False})
    for value in (True, False):  # what a request says goes before
        other = Chat(chat.tokenizer, options={"enable_thinking": value})
        assert asked(enable_thinking=value) == other.prompt("ask")
    again = Chat(stock)
    assert again.prompt("ask") == chat.prompt("ask")
    assert chat.record()["date"] == "2024-07-26" and again.record()["date"] is None


def test_the_hash_sees_date_options_and_end_of_turn():
    dates = [f"{{{{ strftime_now('{form}') }}}}" + CHATML for form in ("%d", "%m")]
    ends = CHATML.replace("<|im_end|>", "<|endoftext|>")
    chats = [Chat(tiny_tokenizer(template)) for template in (*dates, CHATML, ends, THINKING)]
    chats += [Chat(tiny_tokenizer(THINKING), options={"enable_thinking": on}) for on in (0, False)]
    assert len({tokenizer_hash(chat) for chat in chats}) == len(chats)


def test_what_a_template_puts_before_responses_is_told():
    (note,) = Chat(tiny_tokenizer(THINKING)).notes()
    assert repr("<think>\n\n</think>\n\n") in note
    assert Chat(tiny_tokenizer(THINKING), options={"enable_thinking": False}).notes() == []
    assert (
        "always 2024-07-26" in Chat(tiny_tokenizer("{{ strftime_now('%Y') }}" + CHATML)).notes()[0]
    )


def test_without_an_end_of_turn_a_model_can_be_asked_but_not_trained():
    for template in (
        CHATML.replace("<|im_end|>", "."),
        CHATML.replace("content']", "content']|upper"),
    ):
        chat = Chat(tiny_tokenizer(template))
        assert chat.end_of_turn() is None
        with pytest.raises(ValueError, match="no special token|changes the response"):
            chat.trained_end_of_turn()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("Nile, Rhine", "Nile, Rhine"),
        (" Nile\n", " Nile\n"),
        ("<think>\nA, B?\n</think>\n\nNile\n", "Nile\n"),
        ("A, B?\n</think>\nNile", "Nile"),  # the prompt opened it
        ("<think>a</think> <think>b</think> Nile", "Nile"),
        ("<think>\nA, B", ""),
        ("<think>a</think> no <think>b", ""),
        ("<think>a</think>", ""),
    ],
)
def test_what_stands_before_the_end_of_thinking_is_not_scored(raw, said):
    assert after_thinking(raw) == said
    rules = [make("words", relation="at most", number=2)]
    for verdict in (follows, follows_loosely):
        assert verdict(rules, raw) == [bool(said)]


def test_thinking_is_counted():
    assert thinking_note(["Nile"]) is None
    note = thinking_note(["Nile", "<think>a</think>b", "a</think>b", "<think>a"])
    assert note is not None and "from 3 answers, 1 unclosed" in note
