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
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel

from iopo.data.chat import Chat
from iopo.evaluation.config import DTYPES, ModelSection
from iopo.evaluation.responses import load_chat, load_model
from iopo.model.generate import Decoding, Generation, generate

MAX_BODY_BYTES = 8 * 2**20


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions. Other keys are ignored; null is the default."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = False
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    # not supported by this small server: only values without an effect
    repetition_penalty: float | None = Field(None, ge=1, le=1)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    min_p: float | None = Field(None, ge=0, le=0)
    top_k: Literal[-1, 0] | None = None
    n: Literal[1] | None = None
    stop: None = None
    tools: None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)  # as vLLM's

    @property
    def conversation(self) -> list[dict[str, str]]:
        return [{"role": message.role, "content": message.content} for message in self.messages]


class Served:
    """A model that answers one conversation at a time."""

    def __init__(self, name: str, model: PreTrainedModel, chat: Chat, root: str = ""):
        self.name, self.root = name, root  # root: the folder, for /v1/models
        self.started = int(time.time())
        self._model = model
        self._chat = chat
        self._lock = threading.Lock()  # one forward at a time: threads only wait

    def chat(self, request: ChatRequest) -> Chat:
        """The chat with the request's template options. Raises ValueError for unknown ones."""
        options = self._chat.options | request.chat_template_kwargs
        return replace(self._chat, options=options)

    def prompt_tokens(self, request: ChatRequest) -> int:
        return len(self.chat(request).prompt_ids(request.conversation))

    def answer(self, request: ChatRequest) -> Generation:
        """The whole answer. Raises ValueError if another model is asked or the prompt is too
        long."""
        if request.model not in (None, self.name):
            raise ValueError(f"model {request.model!r} is not served here; expected {self.name!r}")
        positions = self._model.config.get_text_config().max_position_embeddings
        room = positions - self.prompt_tokens(request)
        if room < 1:
            raise ValueError(f"the conversation fills all {positions} positions of the model")
        decoding = Decoding(
            min(request.max_completion_tokens or request.max_tokens or room, room),
            1.0 if request.temperature is None else request.temperature,
            request.top_p or 1.0,
            batch_size=1,
            seed=request.seed or 0,
        )
        with self._lock:
            return generate(self._model, self.chat(request), [request.conversation], decoding)[0]


def make_server(served: Served, host: str, port: int) -> ThreadingHTTPServer:
    """A server that is not running yet; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path.rstrip("/") != "/v1/models":
                return self._json(404, _error(f"no such route: {self.path}"))
            entry = {"id": served.name, "object": "model", "created": served.started}
            entry |= {"owned_by": "local", "root": served.root}
            self._json(200, {"object": "list", "data": [entry]})

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "0")
            if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
                self.close_connection = True  # the body stays unread
                return self._json(413, _error(f"expected a body of at most {MAX_BODY_BYTES} bytes"))
            data = self.rfile.read(int(length))
            if self.path.rstrip("/") != "/v1/chat/completions":
                return self._json(404, _error(f"no such route: {self.path}"))
            try:
                request = ChatRequest.model_validate_json(data)
                row = _completion(served, request)
                if request.stream:
                    events = f"data: {json.dumps(row)}\n\ndata: [DONE]\n\n"
                    return self._send(200, events, "text/event-stream")
                self._json(200, row)
            except ValueError as error:  # from pydantic, too
                self._json(400, _error(str(error)))

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
    prompt = served.prompt_tokens(request)
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
    options = "variables of the chat template as JSON, such as '{\"enable_thinking\": false}'"
    parser.add_argument("--template-options", type=json.loads, default={}, help=options)
    args = parser.parse_args(arguments)
    try:
        section = ModelSection(
            args.path, args.adapter, args.dtype, args.device, args.template_options
        )
        chat = load_chat(section)
        model = load_model(section)
    except ValueError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    name = args.name or Path(args.adapter or args.path).name
    root = Path(args.adapter or args.path).resolve()
    server = make_server(Served(name, model, chat, str(root)), args.host, args.port)
    print(f"serving {name} on http://{args.host}:{server.server_port}/v1", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
