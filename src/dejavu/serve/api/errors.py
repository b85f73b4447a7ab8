"""What a client is told when its request is not answered: OpenAI's error envelope, and the status of each mistake and failure.

In: a mistake found in a request, or an exception of the worker. Out: an ApiError, whose `body` is the envelope. What an engine gives as a
reason has no path of the server's files in it; of an error without a reason the kind alone is told, and the log has the rest.
"""

from __future__ import annotations

import re
from typing import Any

from dejavu.serve.core.interface import EngineFailed, NotRunning, QueueFull, TooLong

PATH = re.compile(r"(?<![\w/.:-])(?:~|[A-Za-z]:)?[/\\][^\s'\",:;()]+")
TOO_LONG = "context_length_exceeded"
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}  # others: by whose fault it is


class ApiError(Exception):
    """A request that is refused or failed. status: of HTTP; param: the field at fault; code: a word for programs.

    retry_after_s: seconds after which another try makes sense. headers: sent with the envelope.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(retry_after_s)

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be answered as it is: 400."""
    return ApiError(400, message, param=param, code=code)


def from_worker(error: QueueFull | TooLong | EngineFailed, *, param: str) -> ApiError:
    """What the worker raised, for a client. param: the field that holds the prompt."""
    if isinstance(error, QueueFull):
        message = f"the server is busy: its queue is full; try again in {error.retry_after_s} s"
        return ApiError(429, message, code="queue_full", retry_after_s=error.retry_after_s)
    if isinstance(error, TooLong):
        return invalid(str(error), param=param, code=TOO_LONG)
    if isinstance(error, NotRunning):
        return not_running(None)
    return ApiError(500, f"the model failed on this request: {without_paths(str(error))}; the server's log has more", code="engine_failed")


def not_running(last_error: str | None) -> ApiError:
    """last_error: what the worker says of it, of which its kind is told."""
    why = "" if last_error is None else f" ({last_error.partition(':')[0]})"
    return ApiError(
        503, f"the model is not running{why}; the server's log has more, and it may have to be started again", code="not_running"
    )


def without_paths(text: str) -> str:
    """A message with every path of a file replaced."""
    return PATH.sub("[path]", text)


def internal() -> ApiError:
    """A mistake of ours."""
    return ApiError(500, "the server made a mistake; its log says which", code="internal_error")


def stopping() -> ApiError:
    """The server is told to end."""
    return ApiError(503, "the server is being stopped; try again when it is back", code="stopping")
