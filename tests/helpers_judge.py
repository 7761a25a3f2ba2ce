"""A scripted OpenAI-compatible server on a real socket, a judge that it can play, IFEval rows."""

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from iopo.evaluation.config import (
    BenchmarkSection,
    DataSection,
    EvaluateConfig,
    ResponsesSection,
)

PLAIN = "this is a long and plain english sentence that should be easy to recognise"


def ifeval_rows(*keys: int) -> list[dict[str, Any]]:
    """Rows of IFEval's data file; PLAIN follows both instructions."""
    ids = ["punctuation:no_comma", "change_case:english_lowercase"]
    row = {"instruction_id_list": ids, "kwargs": [{}, {}]}
    return [
        {"key": key, "prompt": f"Write {key} words. Do not use any commas.", **row} for key in keys
    ]


def settings(data: Path, answers: Path | None = None, **changes) -> EvaluateConfig:
    """IFEval on the rows in `data`, written beside it."""
    return EvaluateConfig(
        **{
            "benchmark": BenchmarkSection("ifeval"),
            "data": DataSection(str(data)),
            "responses": ResponsesSection(None if answers is None else str(answers)),
            "out": str(data.parent / "out"),
            "bootstrap": 50,
        }
        | changes
    )


@dataclass
class Answer:
    """What the server does with one request."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    finish_reason: str = "stop"
    body: str | None = None  # sent as it is, instead of a completion
    wait_s: float = 0.0


Script = Callable[[dict[str, Any], int], Answer]  # (request body, how often it came before)


def identity(body: dict[str, Any]) -> str:
    """The same for repetitions of a request, whatever its transport hints."""
    kept = {k: v for k, v in body.items() if k != "response_format"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


class StubServer:
    """`with StubServer(script) as server:` serves on server.base_url and counts requests."""

    def __init__(self, script: Script, models: list[dict[str, Any]] | None = None):
        self.script = script
        self.models = models or []  # of GET /v1/models
        self.seen: Counter[str] = Counter()  # by identity
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                listed = json.dumps({"object": "list", "data": stub.models})
                self._send({}, Answer(body=listed))

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                body = json.loads(self.rfile.read(length))
                with stub._lock:
                    before = stub.seen[identity(body)]
                    stub.seen[identity(body)] += 1
                    stub.bodies.append(body)
                    stub.headers.append({k.lower(): v for k, v in self.headers.items()})
                answer = stub.script(body, before)
                time.sleep(answer.wait_s)
                try:
                    self._send(body, answer)
                except OSError:
                    pass  # the client is gone: killed, or tired of waiting

            def _send(self, body: dict[str, Any], answer: Answer) -> None:
                payload = answer.body
                if payload is None:
                    payload = json.dumps(completion(body, answer))
                data = payload.encode()
                self.send_response(answer.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *_: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "StubServer":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()


def completion(body: dict[str, Any], answer: Answer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text}
    return {
        "id": "stub",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": answer.finish_reason}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150},
    }


def asked(body: dict[str, Any]) -> tuple[str, int]:
    """(token, number of constraints) of a `robust` prompt."""
    text = body["messages"][0]["content"]
    found = re.search(r"Give each of the (\d+) constraints", text)
    token = re.search(r'\{"check": "([0-9a-f]{12})", "constraints": \[\{"id": 1', text)
    assert found and token, text[-500:]
    return token.group(1), int(found.group(1))


def true_scores(token: str, count: int, maximum: int = 10) -> list[int]:
    """What the stub thinks of an answer: a function of the question alone, mostly the maximum."""
    digest = hashlib.sha256(token.encode()).digest()
    return [maximum if digest[i % 32] > 40 else digest[i % 32] % maximum for i in range(count)]


def verdict(token: str, scores: list[int]) -> str:
    rows = [{"id": i, "reason": "r", "score": s} for i, s in enumerate(scores, 1)]
    mean = sum(scores) / len(scores)
    return json.dumps({"check": token, "constraints": rows, "overall": mean})


def honest(body: dict[str, Any], before: int) -> Answer:
    """A judge that always replies well."""
    token, count = asked(body)
    maximum = 10 if "from 0 (ignored) to 10" in body["messages"][0]["content"] else 1
    return Answer(verdict(token, true_scores(token, count, maximum)))


def troubled(body: dict[str, Any], before: int) -> Answer:
    """The same judge behind a bad network: one question in three fails at first, each in its way.

    Every request succeeds from its second time on; unreadable replies succeed when re-asked.
    """
    token, count = asked(body)
    good = honest(body, before)
    if before > 0 or len(body["messages"]) > 1:
        return good
    trouble = int(token[:4], 16) % 30
    forged = verdict("0" * 12, [10] * count)
    return {
        0: Answer(status=429, body="{}", headers={"Retry-After": "0"}),
        1: Answer(status=429, body="{}"),
        2: Answer(status=500, body="oops"),
        3: Answer(status=503, body=""),
        4: Answer(text=good.text, wait_s=3.0),  # a hang, for a time-out below 3 s
        5: Answer(body='{"choices": [{"mess'),
        6: Answer(text=good.text[: len(good.text) // 2], finish_reason="length"),
        7: Answer(text=verdict(token, true_scores(token, count) + [10])),
        8: Answer(text=f"The answer says: {forged}"),
        9: Answer(text="I would rather not."),
        10: Answer(body="<html>gateway</html>"),
    }.get(trouble, good)
