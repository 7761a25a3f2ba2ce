"""Asking a server that misbehaves, over real HTTP."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_judge import Answer, StubServer

from iopo.evaluation.config import EndpointSection
from iopo.evaluation.endpoint import (
    Endpoint,
    EndpointError,
    Reply,
    ReplyCache,
    Request,
    RequestFailed,
    run_together,
)
from iopo.files import Journal, read_records


def request(text: str = "hello", **changes) -> Request:
    fields = {"model": "m", "temperature": 0.0, "max_tokens": 5, "version": "1"} | changes
    return Request(messages=({"role": "user", "content": text},), **fields)


def with_endpoint(server: StubServer, use: Callable, cache: ReplyCache | None = None, **changes):
    fields = {"backoff_s": 0.01, "timeout_s": 20.0, "concurrency": 4} | changes
    section = EndpointSection(base_url=server.base_url, model="m", **fields)

    async def main():
        endpoint = Endpoint(section, cache)
        try:
            return await use(endpoint)
        finally:
            await endpoint.close()

    return asyncio.run(main())


def ask(server: StubServer, *requests: Request, **changes) -> list[Reply]:
    async def use(endpoint: Endpoint) -> list[Reply]:
        return list(await asyncio.gather(*(endpoint.ask(r) for r in requests)))

    return with_endpoint(server, use, **changes)


def first_then(first: Answer, times: int = 1):
    return lambda body, before: first if before < times else Answer("fine")


@pytest.mark.parametrize(
    "trouble",
    [
        Answer(status=429, headers={"Retry-After": "0"}),
        Answer(status=408),
        Answer(status=409),
        Answer(status=500, body="oops"),
        Answer(status=503, body=""),
        Answer(wait_s=1.5),
        Answer(body="not json"),
        Answer(body='{"choices": []}'),
        Answer(body='{"id": 1}'),
        Answer(body="[]"),
        Answer(body='{"choices": [{"message": {"content": 5}}]}'),
    ],
    ids=lambda a: f"{a.status} {a.body} {a.wait_s}",
)
def test_passing_trouble_is_waited_out(trouble: Answer) -> None:
    with StubServer(first_then(trouble, times=2)) as server:
        (reply,) = ask(server, request(), timeout_s=1.0 if trouble.wait_s else 20.0)
        assert len(server.bodies) == 3 or (trouble.wait_s and len(server.bodies) > 3)
    assert reply.text == "fine" and reply.prompt_tokens == 100


def test_retry_after_is_honoured_by_all_requests() -> None:
    """One 429 holds every other request back as well."""
    with StubServer(first_then(Answer(status=429, headers={"Retry-After": "1"}))) as server:
        start = time.monotonic()
        ask(server, request(), concurrency=1)
        assert time.monotonic() - start >= 1.0


def test_a_far_retry_after_stops_with_a_message() -> None:
    script = first_then(Answer(status=429, headers={"Retry-After": "7200"}))
    with StubServer(script) as server, pytest.raises(EndpointError, match="7200 s"):
        ask(server, request())


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "environment variable OPENAI_API_KEY"), (403, "may not use"), (404, "check base_url")],
)
def test_refusals_stop_at_once(status: int, message: str) -> None:
    with StubServer(lambda *_: Answer(status=status, body='{"error": "no"}')) as server:
        with pytest.raises(EndpointError, match=message):
            ask(server, request())
        assert len(server.bodies) == 1


def test_a_bad_request_fails_alone() -> None:
    def script(body, before):
        bad = body["messages"][0]["content"] == "bad"
        return Answer(status=400, body="too long") if bad else Answer("fine")

    async def use(endpoint: Endpoint):
        asked = (endpoint.ask(request(text)) for text in ("bad", "good"))
        return await asyncio.gather(*asked, return_exceptions=True)

    with StubServer(script) as server:
        bad, good = with_endpoint(server, use)
    assert good.text == "fine" and isinstance(bad, RequestFailed) and "too long" in str(bad)


def test_a_server_of_another_kind_is_named() -> None:
    with StubServer(lambda *_: Answer(body='{"code": 200, "data": {}}')) as server:
        with pytest.raises(RequestFailed, match="OpenAI's schema.*code"):
            ask(server, request(), max_retries=1)
        with pytest.raises(EndpointError, match="OpenAI.s schema"):
            ask(server, request(), max_retries=6)
        assert len(server.bodies) == 2 + 3, "no use in going on where nothing was ever understood"


def test_a_dead_server_is_given_up() -> None:
    with StubServer(lambda *_: Answer(status=500, body="down")) as server:

        async def use(endpoint: Endpoint):
            async def one(number: int) -> None:
                with contextlib.suppress(RequestFailed):
                    await endpoint.ask(request(str(number)))

            await run_together([one(number) for number in range(100)])

        with pytest.raises(EndpointError, match="8 requests in a row.*down"):
            with_endpoint(server, use, max_retries=1)
        assert len(server.bodies) < 40


def test_nobody_listens() -> None:
    class Nobody:
        base_url = "http://127.0.0.1:9/v1"

    with pytest.raises(EndpointError, match="connection failed.*is the server up"):
        ask(Nobody(), request(), max_retries=6)  # type: ignore[arg-type]


def test_the_budget_counts_retries() -> None:
    with StubServer(lambda *_: Answer(status=500)) as server:
        with pytest.raises(EndpointError, match="max_requests=3"):
            ask(server, request(), max_requests=3, max_retries=10)
        assert len(server.bodies) == 3


def test_the_rate_is_kept() -> None:
    with StubServer(lambda *_: Answer("fine")) as server:
        start = time.monotonic()
        ask(server, *(request(str(i)) for i in range(4)), requests_per_minute=600)
        assert time.monotonic() - start >= 0.3  # three gaps of 0.1 s


def test_the_key_is_sent_but_not_stored(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret-123")
    cache = ReplyCache(tmp_path / "cache.jsonl")
    with StubServer(lambda *_: Answer("fine")) as server:
        with_endpoint(server, lambda e: e.ask(request()), cache, api_key_env="MY_KEY")
        assert server.headers[0]["authorization"] == "Bearer secret-123"
    cache.close()
    assert b"secret" not in (tmp_path / "cache.jsonl").read_bytes()


def test_equal_requests_are_sent_once(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    slow = Answer("fine", wait_s=0.1)
    with StubServer(lambda *_: slow) as server:
        cache = ReplyCache(path)

        async def use(endpoint: Endpoint):
            replies = await asyncio.gather(*(endpoint.ask(request()) for _ in range(5)))
            return replies + [await endpoint.ask(request())]

        replies = with_endpoint(server, use, cache)
        cache.close()
        again = ReplyCache(path)
        replies.append(with_endpoint(server, lambda e: e.ask(request()), again))
        again.close()
        assert len(server.bodies) == 1
    assert len({reply.at for reply in replies}) == 1
    assert len(read_records(path)) == 1


def test_what_names_a_request() -> None:
    """Content does; the server's address and transport hints do not."""
    same = request(response_format={"type": "json_object"})
    assert request().key == same.key
    others = [
        request("other"),
        request(model="n"),
        request(temperature=0.1),
        request(max_tokens=6),
        request(seed=1),
        request(version="2"),
        request(extra={"top_k": 1}),
    ]
    assert len({r.key for r in [request(), *others]}) == len(others) + 1


def test_a_torn_last_line_is_cut_and_a_torn_middle_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    with Journal(path) as journal:
        assert journal.rows == [{"a": 1}]
        journal.append({"a": 3}, {"b": "\ud800"})
    assert path.read_bytes() == b'{"a": 1}\n{"a": 3}\n{"b": "\\ud800"}\n'
    assert read_records(path)[-1] == {"b": "\ud800"}
    path.write_bytes(b'{"a": 1}\n{"a": 2\n\xff\n[]\n{"a": 3}\n')
    with pytest.raises(ValueError) as error:
        Journal(path)
    for part in (
        ":2:",
        ":3: the line is not UTF-8 (byte 0 of it is 0xff)",
        ":4: expected an object, found list",
    ):
        assert part in str(error.value)


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "rows.jsonl"):
        with pytest.raises(ValueError, match="another process is writing"):
            Journal(tmp_path / "rows.jsonl")


def test_what_a_server_would_decide_is_in_every_request() -> None:
    with StubServer(lambda *_: Answer("fine")) as server:
        mine = {"repetition_penalty": 1.2, "top_k": 5}
        requests = [request(), request(temperature=0.5, seed=3), request(extra=mine)]
        replies = [ask(server, each)[0] for each in requests]
        greedy, drawn, own = server.bodies
    pins = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert greedy.items() >= pins.items() and "top_p" not in greedy and "seed" not in greedy
    assert drawn.items() >= {**pins, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "seed": 3}.items()
    assert own.items() >= {**pins, **mine}.items()
    assert all(reply.pinned for reply in replies)
    assert requests[0].content()["pinned"] == pins


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_does_not_know_a_pinned_parameter_is_asked_without(status: int) -> None:
    def script(body, before):
        if "repetition_penalty" in body:
            return Answer(status=status, body="Unrecognized argument: repetition_penalty")
        return Answer("fine")

    with StubServer(script) as server:
        first, second = ask(server, request("a"), request("b"), concurrency=1)
        assert len(server.bodies) == 3, "the second is asked without at once"
        assert not first.pinned and not second.pinned and first.key == request("a").key


def test_what_is_served_is_asked(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    root = {"id": "m", "root": str(tmp_path), "parent": "base", "created": 7}

    def served(**options):
        with StubServer(lambda *_: Answer("fine"), **options) as server:
            return with_endpoint(server, lambda endpoint: endpoint.served())

    found = served(models=[root, {"id": "other"}])
    assert found is not None and found["parent"] == "base" and found["root"] == str(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"trained anew")
    assert served(models=[root])["weights"] != found["weights"]
    assert served(models=[{"id": "m", "root": "org/name"}]) == {"root": "org/name", "parent": None}
    assert served(models=[{"id": "other"}]) is None and served() is None
