"""The small server, over real HTTP, and the same answers in process."""

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from helpers_models import tiny_llama
from helpers_tokenizer import CHATML, THINKING, tiny_tokenizer

from iopo.data.chat import Chat
from iopo.evaluation.config import (
    BenchmarkSection,
    DataSection,
    EvaluateConfig,
    GenerateSection,
    ModelSection,
)
from iopo.evaluation.run import evaluate
from iopo.evaluation.serve import ChatRequest, Served, make_server
from iopo.files import read_records, write_records
from iopo.model.generate import Decoding, generate

MODEL, TOKENIZER = tiny_llama(vocab=400), tiny_tokenizer()
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Name three fruits."}],
    [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Write 你好 about a cat."},
    ],
]


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    server = make_server(Served("tiny", MODEL, Chat(TOKENIZER)), "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[0], server.server_address[1]
    server.shutdown()
    server.server_close()


def client(address: tuple[str, int]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://{address[0]}:{address[1]}/v1", api_key="none")


def in_process(messages: list[dict[str, str]], **changes: Any):
    fields = {"max_new_tokens": 24, "batch_size": 1} | changes
    return generate(MODEL, Chat(TOKENIZER), [messages], Decoding(**fields))[0]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_greedy_answers_are_those_of_this_process(address, messages) -> None:
    expected = in_process(messages)
    found = client(address).chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=24
    )
    choice = found.choices[0]
    assert choice.message.content == expected.text and expected.text
    assert choice.finish_reason == expected.finish_reason
    assert found.usage.completion_tokens == expected.tokens


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_a_stream_holds_the_same_answer(address, messages) -> None:
    chunks = list(
        client(address).chat.completions.create(
            model="tiny", messages=messages, temperature=0, max_tokens=24, stream=True
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == in_process(messages).text
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_samples_repeat_with_their_seed(address) -> None:
    def ask(seed: int, stream: bool) -> str:
        found = client(address).chat.completions.create(
            model="tiny", messages=CONVERSATIONS[0], temperature=1.5, seed=seed, max_tokens=24,
            stream=stream,
        )  # fmt: skip
        if not stream:
            return found.choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in found)

    for stream in (False, True):
        assert ask(1, stream) == ask(1, stream) != ask(2, stream)
    assert ask(1, False) == in_process(CONVERSATIONS[0], temperature=1.5, seed=1).text


def test_models_are_listed(address) -> None:
    assert [model.id for model in client(address).models.list()] == ["tiny"]


def post(address: tuple[str, int], body: bytes, path: str = "/v1/chat/completions"):
    connection = http.client.HTTPConnection(*address, timeout=20)
    connection.request("POST", path, body)
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())["error"]["message"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages\n  List should have at least 1 item"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages.0.role\n  Input should be"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "messages.0.content\n  Input should"),
        ({"model": "other"}, "not served here"),
        ({"max_tokens": 0}, "max_tokens\n  Input should be greater than or equal to 1"),
        ({"max_tokens": "many"}, "max_tokens\n  Input should be a valid integer"),
        ({"temperature": -1}, "temperature\n  Input should be greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature\n  Input should be a valid number"),
        ({"top_p": 0}, "top_p\n  Input should be greater than 0"),
        ({"n": 2}, "n\n  Input should be 1"),
        ({"stop": ["x"]}, "stop\n  Input should be null"),
        ({"stream": "yes"}, "stream\n  Input should be a valid boolean"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "fills all 512 positions"),
        ({"messages": [{"role": "user", "content": "word " * 600}], "stream": True}, "fills all"),
    ],
)
def test_bad_requests_say_why(address, change: dict, message: str) -> None:
    body = {"model": "tiny", "messages": CONVERSATIONS[0], "max_tokens": 4} | change
    status, text = post(address, json.dumps(body).encode())
    assert status == 400 and message in text


def test_bodies_that_are_not_json(address) -> None:
    for body in (b"", b"{", b"\xff\xfe", b"[1]"):
        assert post(address, body)[0] == 400
    assert post(address, b"{}", "/v1/completions")[0] == 404
    connection = http.client.HTTPConnection(*address, timeout=20)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Length", str(10**9))
    connection.endheaders()
    assert connection.getresponse().status == 413


def test_a_benchmark_gives_the_same_answers_in_process_and_over_http(address, tmp_path) -> None:
    folder, data = tmp_path / "model", tmp_path / "ifeval.jsonl"
    MODEL.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    rows = [
        {
            "key": 100 + i,
            "prompt": f"Name {i} fruits. Do not use any commas.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        }
        for i in range(6)
    ]
    write_records(data, rows)

    def run(name: str, **changes: Any) -> tuple[Path, dict]:
        config = EvaluateConfig(
            benchmark=BenchmarkSection("ifeval"),
            data=DataSection(str(data)),
            out=str(tmp_path / name),
            bootstrap=50,
            **changes,
        )
        return tmp_path / name, evaluate(config)

    local, scores = run(
        "local",
        model=ModelSection(str(folder), device="cpu"),
        generate=GenerateSection(max_new_tokens=12, batch_size=1),
    )
    url = f"http://{address[0]}:{address[1]}/v1"
    remote, remote_scores = run(
        "remote", generate=GenerateSection(base_url=url, model="tiny", max_new_tokens=12)
    )
    answers = [
        sorted(
            (row["key"], row["response"], row["tokens"])
            for row in read_records(f / "responses.jsonl")
        )
        for f in (local, remote)
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 6
    assert scores["scores"] == remote_scores["scores"]
    kept = read_records(local / "responses.jsonl")
    (local / "responses.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in kept[:2]) + '{"key": 10'
    )
    run(
        "local",
        model=ModelSection(str(folder), device="cpu"),
        generate=GenerateSection(max_new_tokens=12, batch_size=1),
    )
    assert read_records(local / "responses.jsonl") == kept, "resumed as if never interrupted"
    with pytest.raises(ValueError, match="other settings.*max_new_tokens: there 12, now 13"):
        run(
            "local",
            model=ModelSection(str(folder), device="cpu"),
            generate=GenerateSection(max_new_tokens=13, batch_size=1),
        )


def test_template_options_of_a_request_go_before_those_of_the_server() -> None:
    served = Served("t", MODEL, Chat(tiny_tokenizer(THINKING), options={"enable_thinking": False}))
    body: dict[str, Any] = {"messages": CONVERSATIONS[0]}
    lengths = []
    for options in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        request = ChatRequest.model_validate(body | {"chat_template_kwargs": options})
        lengths.append(served.prompt_tokens(request))
    assert lengths[0] == lengths[1] > lengths[2]
    with pytest.raises(ValueError, match="never reads tone; expected some of enable_thinking"):
        served.answer(ChatRequest.model_validate(body | {"chat_template_kwargs": {"tone": 1}}))


def test_a_template_that_asks_for_the_date_gets_the_one_of_training() -> None:
    dated = tiny_tokenizer("{{ strftime_now('%d %b %Y') }}" + CHATML)
    messages = [{"role": "user", "content": "ask"}]
    prompt = Chat(dated).prompt("ask")
    assert prompt.startswith("26 Jul 2024")
    served = Served("dated", MODEL, Chat(dated))
    seen: list[list[int]] = []
    hook = MODEL.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    body = {"messages": messages, "max_tokens": 1, "temperature": 0}
    request = ChatRequest.model_validate(body)
    assert served.prompt_tokens(request) == len(dated(prompt)["input_ids"])
    served.answer(request)
    hook.remove()
    assert seen == [dated(prompt)["input_ids"]]
