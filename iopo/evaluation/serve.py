"""Serve a checkpoint over HTTP as OpenAI's API does: `python -m iopo.evaluation.serve PATH`.

For smoke tests and small models: one request is answered at a time, without batching. Use vLLM for
anything more. Routes: GET /v1/models, POST /v1/chat/completions (with "stream": true the whole
answer is one event).
At temperature 0 the answers are those of greedy generation in this process with batch size 1.
"""

import argparse
import json
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iopo.data.chat import Chat
from iopo.evaluation.config import DTYPES, ModelSection
from iopo.evaluation.responses import load_model
from iopo.model.generate import Decoding, Generation, generate

MAX_BODY_BYTES = 8 * 2**20
ROLES = ("system", "user", "assistant")


class BadRequest(ValueError):
    """The client's fault: answered with status 400 and this text."""


class Served:
    """A model that answers one conversation at a time."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.name = name
        self.started = int(time.time())
        self._model = model
        self._tokenizer = tokenizer
        self._chat = Chat(tokenizer)
        self._lock = threading.Lock()  # one forward at a time: threads only wait

    def prompt_tokens(self, messages: list[dict[str, str]]) -> int:
        return len(self._chat.prompt_ids(messages))

    def answer(self, request: "ChatRequest") -> Generation:
        """The whole answer. Raises BadRequest if the prompt does not fit."""
        with self._lock:
            try:
                decoding = Decoding(
                    self._room(request),
                    request.temperature,
                    request.top_p,
                    batch_size=1,
                    seed=request.seed,
                )
                (found,) = generate(self._model, self._chat, [request.messages], decoding)
            except ValueError as error:
                raise BadRequest(str(error)) from error
        return found

    def _room(self, request: "ChatRequest") -> int:
        """Tokens that may be generated: as asked, or as many as fit."""
        positions = self._model.config.get_text_config().max_position_embeddings
        room = positions - self.prompt_tokens(request.messages)
        if room < 1:
            raise BadRequest(f"the conversation fills all {positions} positions of the model")
        return min(request.max_tokens or room, room)


class ChatRequest:
    """A checked body of POST /v1/chat/completions. Raises BadRequest."""

    def __init__(self, body: Any, served: Served):
        if not isinstance(body, dict):
            raise BadRequest("expected a JSON object")
        model = body.get("model", served.name)
        if model != served.name:
            raise BadRequest(f"model {model!r} is not served here; expected {served.name!r}")
        self.messages = _messages(body.get("messages"))
        self.stream = _typed(body, "stream", bool, False)
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise BadRequest(f"max_tokens is {limit!r}; expected a whole number above 0")
        self.max_tokens: int | None = limit
        self.temperature = float(_typed(body, "temperature", (int, float), 1.0))
        self.top_p = float(_typed(body, "top_p", (int, float), 1.0))
        self.seed = _typed(body, "seed", int, 0)
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1:
            raise BadRequest("expected temperature of 0 or more, and top_p above 0, at most 1")
        if body.get("n", 1) != 1 or body.get("stop") or body.get("tools"):
            raise BadRequest("n above 1, stop and tools are not supported by this small server")


def _typed(body: dict[str, Any], name: str, kind: Any, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise BadRequest(f"{name} is {value!r}; expected {kind}")
    return value


def _messages(found: Any) -> list[dict[str, str]]:
    if not isinstance(found, list) or not found:
        raise BadRequest("messages: expected a list of at least one message")
    messages = []
    for message in found:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise BadRequest(f"messages: expected objects with a role among {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise BadRequest("messages: expected text as content")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def make_server(served: Served, host: str, port: int) -> ThreadingHTTPServer:
    """A server that is not running yet; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path.rstrip("/") != "/v1/models":
                return self._json(404, _error(f"no such route: {self.path}"))
            entry = {"id": served.name, "object": "model", "created": served.started}
            self._json(200, {"object": "list", "data": [entry | {"owned_by": "local"}]})

        def do_POST(self) -> None:
            try:
                length = int(self.headers.get("Content-Length", 0))
            except ValueError:
                length = -1
            if not 0 <= length <= MAX_BODY_BYTES:
                self.close_connection = True  # the body stays unparsed
                return self._json(413, _error(f"expected a body of at most {MAX_BODY_BYTES} bytes"))
            data = self.rfile.read(length)
            if self.path.rstrip("/") != "/v1/chat/completions":
                return self._json(404, _error(f"no such route: {self.path}"))
            try:
                request = ChatRequest(json.loads(data), served)
                row = _completion(served, request)
                if request.stream:
                    events = f"data: {json.dumps(row)}\n\ndata: [DONE]\n\n"
                    return self._send(200, events, "text/event-stream")
                self._json(200, row)
            except BadRequest as error:
                self._json(400, _error(str(error)))
            except ValueError as error:  # not JSON, or not UTF-8
                self._json(400, _error(f"the body is not JSON: {error}"))

        def _json(self, status: int, row: dict[str, Any]) -> None:
            self._send(status, json.dumps(row), "application/json")

        def _send(self, status: int, text: str, content_type: str) -> None:
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, address: Any) -> None:
            error = sys.exception()
            if not isinstance(error, ConnectionError):  # a client that left is no error
                super().handle_error(request, address)

    return Server((host, port), Handler)


def _completion(served: Served, request: ChatRequest) -> dict[str, Any]:
    """The answer as a chat completion, or as the only chunk of a stream."""
    found = served.answer(request)
    message = {"role": "assistant", "content": found.text}
    field = "delta" if request.stream else "message"
    prompt = served.prompt_tokens(request.messages)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk" if request.stream else "chat.completion",
        "created": int(time.time()),
        "model": served.name,
        "choices": [{"index": 0, field: message, "finish_reason": found.finish_reason}],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": found.tokens,
            "total_tokens": prompt + found.tokens,
        },
    }


def _error(text: str) -> dict[str, Any]:
    return {"error": {"message": text, "type": "invalid_request_error", "code": None}}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", help="model folder, or demo")
    parser.add_argument("--adapter", help="folder of a PEFT adapter on that model")
    parser.add_argument("--name", help="the name clients use; default: the folder's name")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    try:
        model, tokenizer = load_model(
            ModelSection(args.path, args.adapter, args.dtype, args.device)
        )
    except ValueError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    name = args.name or Path(args.adapter or args.path).name
    server = make_server(Served(name, model, tokenizer), args.host, args.port)
    print(f"serving {name} on http://{args.host}:{server.server_port}/v1", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
