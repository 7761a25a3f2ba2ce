"""Ask an OpenAI-compatible server, and remember each reply for ever.

A request is named by its content, not by where it is sent, and its reply is one row of an
append-only file. So a killed run goes on where it stopped, and a second run asks nothing.
"""

import asyncio
import email.utils
import json
import os
import random
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from iopo.evaluation.config import EndpointSection
from iopo.files import HALF_PAIR, Journal, sha256_text, weights_hash
from iopo.redact import redact, redact_values

if TYPE_CHECKING:
    import openai

MAX_WAIT_S = 60.0  # the longest wait that we choose ourselves
MAX_RETRY_AFTER_S = 600.0  # the longest wait that we accept from a server
GIVE_UP_AFTER = 8  # requests in a row that used up all their retries: the server is down
# Decoding that in process is so, and that a server else takes from generation_config.json (Qwen2:
# repetition_penalty 1.05) or from its own defaults. Names as in vLLM and SGLang.
PINNED = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
PINNED_SAMPLING = {"top_p": 1.0, "top_k": -1, "min_p": 0.0}  # without effect on greedy answers


class EndpointError(RuntimeError):
    """The server cannot be used as configured. What was answered before is kept."""


class RequestFailed(RuntimeError):
    """One request got no reply in all its attempts; others may."""


@dataclass(frozen=True, slots=True)
class Request:
    """One chat completion.

    `response_format` and `pin` (whether `pinned` is sent) are no part of the content: servers that
    do not take them are asked without.
    """

    model: str
    messages: tuple[dict[str, str], ...]
    temperature: float
    max_tokens: int | None
    seed: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    version: str = ""  # of the prompt that made the messages
    response_format: dict[str, Any] | None = None
    pin: bool = True

    @property
    def pinned(self) -> dict[str, Any]:
        """The sampling parameters that are sent beside temperature and seed; `extra` wins."""
        wanted = PINNED if self.temperature == 0 else PINNED | PINNED_SAMPLING
        return {k: v for k, v in wanted.items() if k not in self.extra}

    def content(self) -> dict[str, Any]:
        """What the reply depends on, as JSON; without secrets, for it is stored."""
        content = {k: v for k, v in asdict(self).items() if k not in ("response_format", "pin")}
        return content | {"extra": redact_values(self.extra), "pinned": self.pinned}

    @property
    def key(self) -> str:
        """sha256 of the canonical JSON of the content; the same on every server."""
        return sha256_text(json.dumps(self.content(), sort_keys=True, separators=(",", ":")))


@dataclass(frozen=True, slots=True)
class Reply:
    """What the server said: raw text, and what it cost."""

    key: str
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    latency_s: float
    at: str  # UTC, ISO 8601
    pinned: bool = True  # False: the server refused Request.pinned, and its own defaults decided


class ReplyCache(Journal):
    """All replies ever received, in one append-only file."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self._replies = {row["reply"]["key"]: Reply(**row["reply"]) for row in self.rows}
        self.rows.clear()

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> Reply | None:
        return self._replies.get(key)

    def put(self, request: Request, reply: Reply) -> None:
        self.append({"reply": asdict(reply), "request": request.content()})
        self._replies[reply.key] = reply


@dataclass
class Usage:
    """What this process sent and received; cached replies cost nothing and are only counted."""

    requests: int = 0
    replies: int = 0
    retries: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Endpoint:
    """One server. Safe for many `ask` calls at once; use inside one event loop.

    `cache` may be None: then each call is sent, and the caller keeps the replies.
    """

    def __init__(self, section: EndpointSection, cache: ReplyCache | None = None):
        if section.base_url is None or section.model is None:
            raise ValueError("base_url and model must both be set to ask a server")
        self.section = section
        self.model = section.model
        self.usage = Usage()
        self.structured_refused = False
        self.pins_refused = False
        self._cache = cache
        key, password = os.environ.get(section.api_key_env), urlsplit(section.base_url).password
        # What the server is sent it may send back: secret here, whatever its name is elsewhere.
        sent = section.extra | {"API_KEY": key, "PASSWORD": password}
        secrets = {name: value for name, value in sent.items() if isinstance(value, str)}
        # for messages, before they are cut: half of a secret would not be known for one
        self._redact = partial(redact, environ={**os.environ, **secrets})
        self._url = self._redact(section.base_url)
        import openai  # on first use: it costs half a second

        # Local servers want no key, but the client library insists on some text. Its own retries
        # know no budget, no pause for all requests, and no replies that are no chat completion.
        self._client = openai.AsyncOpenAI(
            base_url=section.base_url,
            api_key=key or "none",
            max_retries=0,
            timeout=section.timeout_s,
        )
        self._places = asyncio.Semaphore(section.concurrency)
        self._asking: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._not_before = 0.0  # no request leaves before: a server's Retry-After is for all
        self._next_slot = 0.0  # requests_per_minute
        self._failed_in_a_row = 0

    async def close(self) -> None:
        await self._client.close()

    async def served(self) -> dict[str, Any] | None:
        """What GET /models says of the model: its root (folder or hub id) and parent (the base of
        an adapter), and the hash of the weights if the root is a folder here; None where the
        server does not list it.

        Raises EndpointError where nobody answers, and for a key that is refused.
        """
        import openai

        try:
            client = self._client.with_options(max_retries=2)
            raw = await client.models.with_raw_response.list()
            rows = {row["id"]: row for row in json.loads(raw.text)["data"]}
        except openai.APIConnectionError as error:
            url, why = self._url, self._redact(str(error.__cause__ or error))
            raise EndpointError(f"{url}: connection failed: {why}; is the server up?") from error
        except openai.APIStatusError as error:
            if error.status_code == 401:
                raise self._stopped(error, self.model) from error
            return None
        except (ValueError, KeyError, TypeError):
            return None
        if self.model not in rows:
            return None
        found = {key: rows[self.model].get(key) for key in ("root", "parent")}
        root = Path(str(found["root"]))
        if any(root.glob("*.safetensors")):
            found["weights"] = weights_hash(root)
        return found

    async def ask(self, request: Request) -> Reply:
        """The reply to a request, from the cache or from the server.

        Raises RequestFailed when all attempts failed, EndpointError when going on is pointless.
        """
        if self._cache is None:
            async with self._places:
                return await self._attempts(request)
        key = request.key
        async with self._asking[key]:  # an equal request waits, then finds the reply in the cache
            cached = self._cache.get(key)
            if cached is not None:
                self.usage.cached += 1
                return cached
            async with self._places:
                reply = await self._attempts(request)
            self._cache.put(request, reply)
            return reply

    async def _attempts(self, request: Request) -> Reply:
        last: Exception | None = None
        for attempt in range(self.section.max_retries + 1):
            await self._wait_for_slot()
            if self.structured_refused:
                request = replace(request, response_format=None)
            if self.pins_refused:
                request = replace(request, pin=False)
            try:
                reply = await self._send(request)
            except _Transient as error:
                last = error
                if self.usage.replies == 0 and attempt >= 2 and error.hopeless:
                    raise EndpointError(f"{self._url}: {error}") from error
                if attempt < self.section.max_retries:
                    self.usage.retries += 1
                    await self._back_off(attempt, error)
                continue
            self._failed_in_a_row = 0
            return reply
        raise self._failed(f"no usable reply in {self.section.max_retries + 1} attempts: {last}")

    def _failed(self, message: str) -> Exception:
        """RequestFailed, or EndpointError when so many failed in a row."""
        self._failed_in_a_row += 1
        if self._failed_in_a_row < GIVE_UP_AFTER:
            return RequestFailed(message)
        return EndpointError(
            f"{self._url}: {GIVE_UP_AFTER} requests in a row failed, the last with: {message}"
        )

    async def _wait_for_slot(self) -> None:
        limit = self.section.max_requests
        if limit is not None and self.usage.requests >= limit:
            raise EndpointError(
                f"the budget of max_requests={limit} is spent; the replies so far are kept: "
                "run the same command again to go on"
            )
        self.usage.requests += 1
        now = time.monotonic()
        start = max(now, self._not_before)
        if self.section.requests_per_minute is not None:
            start = max(start, self._next_slot)
            self._next_slot = start + 60.0 / self.section.requests_per_minute
        if start > now:
            await asyncio.sleep(start - now)

    async def _back_off(self, attempt: int, error: "_Transient") -> None:
        if error.retry_after_s is not None:
            if error.retry_after_s > MAX_RETRY_AFTER_S:
                raise EndpointError(
                    f"the server asks to wait {error.retry_after_s:.0f} s ({error}); the replies "
                    "so far are kept: run the same command again later"
                )
            self._not_before = max(self._not_before, time.monotonic() + error.retry_after_s)
        wait_s = min(MAX_WAIT_S, self.section.backoff_s * 2**attempt)
        await asyncio.sleep(random.uniform(0, wait_s))

    async def _send(self, request: Request) -> Reply:
        optional = {
            "max_tokens": request.max_tokens,
            "seed": request.seed,
            "response_format": request.response_format,
        }
        arguments: dict[str, Any] = {k: v for k, v in optional.items() if v is not None}
        messages = [  # half of a surrogate pair cannot be sent
            {name: HALF_PAIR.sub("\ufffd", text) for name, text in message.items()}
            for message in request.messages
        ]
        import openai

        start = time.monotonic()
        try:
            # The body is read as it is: a server of another kind must not pass for an empty reply.
            raw = await asyncio.wait_for(
                self._client.chat.completions.with_raw_response.create(
                    model=request.model,
                    messages=messages,  # type: ignore[arg-type]
                    temperature=request.temperature,
                    extra_body=((request.pinned if request.pin else {}) | request.extra) or None,
                    **arguments,
                ),
                self.section.timeout_s,
            )
        except openai.APIStatusError as error:
            return await self._refused(request, error)
        except (TimeoutError, openai.APITimeoutError) as error:
            raise _Transient(f"no reply within {self.section.timeout_s:g} s") from error
        except openai.APIConnectionError as error:
            # By name: the client has changed the HTTP library below it, and may again.
            cause = error.__cause__ or error
            refused = type(cause).__name__ == "ConnectError"
            hint = "; is the server up?" if refused else ""
            text = f"connection failed: {self._redact(str(cause))}{hint}"
            raise _Transient(text, hopeless=refused) from error
        latency_s, at = time.monotonic() - start, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        said = self._completion(raw.text)
        reply = Reply(request.key, *said, round(latency_s, 3), at, pinned=request.pin)
        self.usage.replies += 1
        self.usage.prompt_tokens += reply.prompt_tokens
        self.usage.completion_tokens += reply.completion_tokens
        return reply

    async def _refused(self, request: Request, error: "openai.APIStatusError") -> Reply:
        """A status above 399: try again later, or differently, or stop."""
        status = error.status_code
        said = self._redact(error.response.text)
        if status in (408, 409, 429) or status >= 500:
            raise _Transient(f"HTTP {status}: {said[:300]}", retry_after_s=_retry_after(error))
        # The one of the two that the server's message names is left out, from now on.
        if status in (400, 422) and request.pin and any(k in said for k in request.pinned):
            self.usage.requests += 1
            reply = await self._send(replace(request, pin=False))
            self.pins_refused = True
            return reply
        if status == 400 and request.response_format is not None:
            self.usage.requests += 1
            reply = await self._send(replace(request, response_format=None))
            self.structured_refused = True
            return reply
        if status in (401, 403, 404):
            raise self._stopped(error, request.model) from error
        raise self._failed(f"HTTP {status}: {said[:300]}") from error

    def _stopped(self, error: "openai.APIStatusError", model: str) -> EndpointError:
        """A status that no further request would change."""
        hint = {
            401: f"put a valid key into the environment variable {self.section.api_key_env}",
            403: f"the key in {self.section.api_key_env} may not use this",
            404: f"check base_url ({self._url}) and model ({model})",
        }[error.status_code]
        said = self._redact(error.response.text)
        return EndpointError(f"HTTP {error.status_code}: {said[:300]}; {hint}")

    def _completion(self, body: str) -> tuple[str, str, int, int]:
        """(text, finish reason, prompt tokens, completion tokens) of a chat completion's body."""
        try:
            row = json.loads(body)
            choice = row["choices"][0]
            content = choice["message"].get("content")
            if not isinstance(content, str | None):
                raise TypeError(f"content is {type(content).__name__}")
            usage = row.get("usage") or {}
            prompt, completion = (
                int(usage.get(f"{name}_tokens") or 0) for name in ("prompt", "completion")
            )
            return content or "", str(choice.get("finish_reason") or ""), prompt, completion
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Transient(
                f"not a chat completion ({type(error).__name__}: {error}); does the server speak "
                f"OpenAI's schema? It sent: {self._redact(body)[:200]!r}",
                hopeless=True,
            ) from error


class _Transient(Exception):
    """Worth another attempt."""

    def __init__(self, text: str, *, retry_after_s: float | None = None, hopeless: bool = False):
        super().__init__(text)
        self.retry_after_s = retry_after_s
        self.hopeless = hopeless  # where no request has ever succeeded


def _retry_after(error: "openai.APIStatusError") -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date; None without one."""
    value = error.response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds)


async def run_together(coroutines: list[Any]) -> None:
    """Run all; the first exception cancels the rest and comes out as it is, not in a group."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
