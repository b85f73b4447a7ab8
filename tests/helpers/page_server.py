"""A stand-in for `dejavu serve`, for tests of its page: the page's own files, and answers that a test has written beforehand.

In: what GET v1/models says, and for each mode (dense, sparse) the steps of its answer. Out: a server at `url`, and the `requests` that
it got. A step is the JSON of a chunk, an Event (wait for it, so that a test sees the page between two chunks), bytes (sent as they are)
or CUT (drop the connection). A Reply in place of steps is an ordinary answer. Nothing here runs a model, or sleeps.
"""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "src" / "dejavu" / "serve" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
CUT = object()
BINS, PATIENCE = 64, 20.0  # seconds until a test that never opens its gate is let go
SHAPE = {"layers": 3, "bins": BINS, "heads": 4, "neurons": 640}
Steps = Sequence[Any]


@dataclass(frozen=True)
class Reply:
    """An ordinary answer: its status, the message in OpenAI's envelope, more headers."""

    status: int
    message: str
    headers: Mapping[str, str] = field(default_factory=dict)


def models(*, adapter: bool = True, chat: bool = False) -> list[dict[str, Any]]:
    """What GET v1/models lists."""
    about = {"layers": SHAPE["layers"], "neurons": SHAPE["neurons"], "heads": SHAPE["heads"], "chat": chat}
    about |= {"backend": "native", "dtype": "fp32"}
    modes = {"tiny": "sparse", "tiny:dense": "dense"} if adapter else {"tiny": "dense"}
    return [{"id": name, "object": "model", "dejavu": about | {"mode": mode}} for name, mode in modes.items()]


def trace(token: int) -> dict[str, Any]:
    """What fired for token number `token`: none is known of the first; of the others bin `token` of layer 0 in full, all of the last
    layer, and head `token` of each layer."""
    if token == 0:
        return {"mlp_density": None, "head_density": None, "neurons": None, "heads": None}
    layers, heads = SHAPE["layers"], SHAPE["heads"]
    neurons = bytearray(layers * BINS)
    neurons[token % BINS] = 255
    neurons[-BINS:] = b"\xff" * BINS
    on = bytes(int(head == token % heads) for _ in range(layers) for head in range(heads))
    density = sum(neurons) / 255 / len(neurons)
    packed = {"neurons": base64.b64encode(neurons).decode(), "heads": base64.b64encode(on).decode()}
    return {"mlp_density": density, "head_density": 1 / heads, **packed}


def text_chunk(text: str, *, chat: bool = False, **more: Any) -> dict[str, Any]:
    """A chunk with some text; more: of the chunk."""
    choice = {"delta": {"content": text}} if chat else {"text": text}
    return {"choices": [{"index": 0, "finish_reason": None, **choice}], **more}


def answer(pieces: Sequence[str], *, traced: bool, tok_s: float, chat: bool = False, reason: str = "length") -> list[Any]:
    """The steps of an answer of one token a piece, as the server sends them: without figures where no step decoded a token."""
    steps: list[Any] = [{"choices": [{"index": 0, "finish_reason": None, "delta": {"role": "assistant", "content": ""}}]}] if chat else []
    for token, piece in enumerate(pieces):
        extra = {"dejavu": {"trace": [trace(token)]} | ({"shape": SHAPE} if token == 0 else {})} if traced else {}
        steps.append(text_chunk(piece, chat=chat, **extra))
    sums = {"mlp_density": 0.349 if traced else 1.0, "head_density": 0.25 if traced else 1.0, "tok_s": tok_s} if len(pieces) > 1 else {}
    steps.append({"choices": [{"index": 0, "finish_reason": reason, **({"delta": {}} if chat else {"text": ""})}], "dejavu": sums})
    return [*steps, {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(pieces)}}, b"data: [DONE]\n\n"]


class PageServer:
    """See the file. answers: mode -> steps or Reply; key: the API key it wants, if any. requests: (path, headers, body), in order."""

    def __init__(self, listed: list[dict[str, Any]], answers: Mapping[str, Steps | Reply], *, key: str | None = None) -> None:
        self.listed, self.answers, self.key = listed, dict(answers), key
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.gone = threading.Event()  # a client closed its connection before the end
        handler = type("Handler", (_Handler,), {"page": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def mode(self, model: str) -> str:
        return next(entry["dejavu"]["mode"] for entry in self.listed if entry["id"] == model)

    def requested(self, mode: str) -> dict[str, Any]:
        """The body of the last request for that mode."""
        return next(body for _, _, body in reversed(self.requests) if self.mode(body["model"]) == mode)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextlib.contextmanager
    def running(self) -> Generator[PageServer]:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield self
        finally:
            self.close()


class _Handler(BaseHTTPRequestHandler):
    page: PageServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._json(200, {"object": "list", "data": self.page.listed}) if self._welcome() else None
            return
        path = PAGE / (self.path.lstrip("/") or "index.html")
        if path.parent != PAGE or not path.is_file():
            self._json(404, {"error": {"message": f"no {self.path}"}})
            return
        self._send(200, path.read_bytes(), {"Content-Type": TYPES[path.suffix], "Content-Security-Policy": POLICY})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.page.requests.append((self.path, dict(self.headers), body))
        if not self._welcome():
            return
        steps = self.page.answers[self.page.mode(body["model"])]
        if isinstance(steps, Reply):
            self._json(steps.status, {"error": {"message": steps.message, "type": "x", "param": None, "code": None}}, steps.headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for step in steps:
                if step is CUT:
                    break
                if isinstance(step, threading.Event):
                    step.wait(PATIENCE)
                else:
                    self.wfile.write(step if isinstance(step, bytes) else f"data: {json.dumps(step)}\n\n".encode())
                    self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            self.page.gone.set()

    def _welcome(self) -> bool:
        if self.page.key is None or self.headers.get("Authorization") == f"Bearer {self.page.key}":
            return True
        self._json(401, {"error": {"message": "wrong key"}})
        return False

    def _json(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
