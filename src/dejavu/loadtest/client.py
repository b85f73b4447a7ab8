"""One streamed request to an OpenAI-compatible server, and when each piece of its answer arrived.

In: a `Target`, a model, a prompt. Out: a `Reply`. Nothing raises for what a server does: whatever is not a whole answer is an `error` of
the reply. Times are those of the clock that is given, at which bytes were read; a piece of text may hold several tokens.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

MESSAGE_LENGTH = 300  # of a server's words that are kept
TOO_MANY = 429


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where to ask and how. url: without /v1. timeout_s: of a whole answer. ignore_eos: an extension that most servers have."""

    url: str
    api_key: str | None = None
    chat: bool = False
    ignore_eos: bool = True
    timeout_s: float = 600.0

    def client(self) -> httpx.AsyncClient:
        """A client without a limit of connections: a request that waits for one would wait unseen."""
        headers = {"Accept-Encoding": "identity"} | ({} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"})
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=None, limits=limits, trust_env=False)

    @property
    def endpoint(self) -> str:
        return "chat/completions" if self.chat else "completions"

    def body(self, model: str, prompt: str, max_tokens: int) -> dict[str, Any]:
        prompted = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        options = {"max_tokens": max_tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        return {"model": model, **prompted, **options, **({"ignore_eos": True} if self.ignore_eos else {})}


@dataclass(slots=True, kw_only=True)
class Reply:
    """What came. texts: when each piece of text arrived. error: in a word or two, None for a whole answer. Tokens: None where not told."""

    sent: float
    ended: float = 0.0
    texts: list[float] = field(default_factory=list)
    status: int | None = None
    error: str | None = None
    message: str = ""
    retry_after_s: float | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int = 0
    densities: dict[str, Any] = field(default_factory=dict)  # of the field `dejavu`

    @property
    def tokens(self) -> int:
        """Tokens of the answer; its pieces where the server does not count them."""
        return len(self.texts) if self.completion_tokens is None else self.completion_tokens

    @property
    def first(self) -> float:
        """When the first text arrived; the end, where no token made text."""
        return self.texts[0] if self.texts else self.ended


class _ReplyError(Exception):
    """error, message of a reply that is no whole answer."""


async def ask(client: httpx.AsyncClient, target: Target, model: str, prompt: str, max_tokens: int, *, clock: Callable[[], float]) -> Reply:
    """Send one request and read its answer to the end."""
    reply = Reply(sent=clock())
    try:
        async with (
            asyncio.timeout(target.timeout_s),
            client.stream("POST", f"/v1/{target.endpoint}", json=target.body(model, prompt, max_tokens)) as response,
        ):
            reply.status = response.status_code
            if response.status_code != httpx.codes.OK:
                reply.retry_after_s = retry_after(response.headers.get("retry-after"))
                raise _ReplyError(f"http {response.status_code}", _said(await response.aread()))
            await _read(reply, response, clock)
    except _ReplyError as failed:
        reply.error, reply.message = failed.args
    except TimeoutError:
        reply.error, reply.message = "timeout", f"no whole answer within {target.timeout_s:g} s"
    except httpx.HTTPError as error:
        reply.error, reply.message = "connection", f"{type(error).__name__}: {error}"
    reply.ended = reply.ended or clock()
    return reply


async def _read(reply: Reply, response: httpx.Response, clock: Callable[[], float]) -> None:
    """Read the events of an answer. Raises _ReplyError where they are not a whole one."""
    kind = response.headers.get("content-type", "")
    if not kind.startswith("text/event-stream"):
        raise _ReplyError("no stream", f"asked for an event stream, got {kind!r}")
    async for line in byte_lines(response.aiter_bytes()):
        if not line.startswith(b"data:"):
            continue  # a comment, an event's name, or the empty line behind it
        data = line[len(b"data:") :].strip()
        if data == b"[DONE]":
            reply.ended = clock()  # what follows is read, so that the connection can be used again
            continue
        try:
            _note(reply, data, clock())
        except (ValueError, TypeError, AttributeError) as error:
            raise _ReplyError("malformed", f"{error}: {data[:80]!r}") from error
    if reply.finish_reason is None or not reply.ended:
        missing = "finish_reason" if reply.finish_reason is None else "[DONE]"
        raise _ReplyError("cut short", f"the stream ended without {missing}, after {len(reply.texts)} pieces of text")
    if reply.tokens == 0:
        raise _ReplyError("empty", f"an answer without a token (finish_reason {reply.finish_reason!r})")


def _note(reply: Reply, data: bytes, now: float) -> None:
    """Keep what an event tells. Raises ValueError, TypeError or AttributeError where it has another form than OpenAI's."""
    event = json.loads(data)
    if event.get("error") is not None:
        raise _ReplyError("stream error", _said(data))
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
            reply.texts.append(now)
        reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
    if usage := event.get("usage"):
        reply.prompt_tokens, reply.completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        reply.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    if isinstance(event.get("dejavu"), dict):
        reply.densities |= {key: value for key, value in event["dejavu"].items() if value is not None and key not in ("trace", "shape")}


async def byte_lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The lines of a body. Only a line feed ends one: httpx's own splits at U+2028 and the like, which JSON text may hold as they are."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r")
    if rest:
        yield rest


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds a number of them or a date; None where it holds neither."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _said(body: bytes) -> str:
    """The message of an error's envelope, or the body where it has none."""
    try:
        error = json.loads(body)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        text = body.decode(errors="replace")
    return " ".join(text.split())[:MESSAGE_LENGTH]
