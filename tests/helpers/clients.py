"""What talks to a server in a test: a client with a socket of its own, the error of a response, a chat template."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any
from urllib.parse import urlsplit

import httpx

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no ' + m['role']) }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


class Caller:
    """A client with a socket of its own, which it can close in the middle of an answer."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self._socket = socket.create_connection((parts.hostname, parts.port), timeout=20)
        self.heard = b""

    def send(self, raw: bytes) -> None:
        self._socket.sendall(raw)

    def ask(self, **fields: Any) -> None:
        body = json.dumps({"model": "tiny", "prompt": "the cat"} | fields).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.send(head.encode() + body)

    def hear(self, what: bytes) -> None:
        """Read until something has come."""
        while what not in self.heard:
            part = self._socket.recv(65536)
            assert part, self.heard
            self.heard += part

    def hear_all(self) -> bytes:
        """All that comes until the server closes the connection."""
        while part := self._socket.recv(65536):
            self.heard += part
        return self.heard

    def leave(self, *, rudely: bool = False) -> None:
        if rudely:  # a reset in place of a goodbye
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, which has OpenAI's envelope and nothing else."""
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json" and body["error"]["message"]
    return body["error"]
