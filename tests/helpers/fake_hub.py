"""A Hugging Face hub on the loopback address: the routes that huggingface_hub asks for models, errors as the hub words them, and a log.

    with FakeHub() as hub:
        hub.add("me/tiny", {"config.json": b"{}", "model.safetensors": b"..."})
        hub.url, hub.log                     # http://127.0.0.1:PORT, ["GET /api/models/me/tiny", ...]

Files ending in .safetensors, .gguf or .bin are large ones: their content is at another address, as of a content network.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".gguf", ".bin")


@dataclass
class Repository:
    """files by revision; its commit is that of its content, `main` the first."""

    files: dict[str, dict[str, bytes]]
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        """The commit of a branch or a commit's own name; None where there is none."""
        commits = {name: hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest() for name, files in self.files.items()}
        return revision if revision in commits.values() else commits.get(revision)

    def at(self, revision: str) -> dict[str, bytes]:
        return next(files for name, files in self.files.items() if self.commit(name) == self.commit(revision))

    def push(self, files: dict[str, bytes]) -> None:
        self.files = {**self.files, "main": files, "before": self.files["main"]}


@dataclass
class FakeHub:
    """cut_after: bytes of a large file after which the connection is lost, from then on always. status: of every answer.

    lost: a file that is listed and not there. pushed: what the branch main holds once a large file has been asked for. told: the answer to
    what there is, instead.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    cut_after: int | None = None
    status: int | None = None
    lost: str | None = None
    pushed: dict[str, bytes] | None = None
    told: bytes | None = None

    def add(self, name: str, files: dict[str, bytes], *, gated: bool = False, **revisions: dict[str, bytes]) -> None:
        self.repositories[name] = Repository({"main": files, **revisions}, gated)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> FakeHub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def etag(name: str, content: bytes) -> str:
    """SHA-256 of a large file, else git's hash of it."""
    return hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/agent-harnesses":  # asked for by huggingface_hub itself before its first request; a process keeps the answer
            return self._send(404)
        seen = self.headers.get("Range")
        self.hub.log.append(f"{self.command} {path}" + (f" {seen}" if seen else ""))
        match path.strip("/").split("/"):
            case _ if self.hub.status is not None:
                self._send(self.hub.status)
            case ["api", *_] if self.hub.told is not None:
                self._send(200, self.hub.told, {"Content-Type": "application/json"})
            case ["api", "models", owner, name, *rest]:
                self._api(f"{owner}/{name}", rest)
            case [owner, name, "resolve", revision, *file]:
                self._file(f"{owner}/{name}", revision, "/".join(file))
            case ["content", owner, name, revision, *file]:
                repository = self.hub.repositories[f"{owner}/{name}"]
                content = repository.at(revision)["/".join(file)]
                if self.hub.pushed is not None:
                    repository.push(self.hub.pushed)
                    self.hub.pushed = None
                self._content(content)
            case _:
                self._send(404)

    def _api(self, repo: str, rest: list[str]) -> None:
        repository = self.hub.repositories.get(repo)
        if repository is None:
            return self._send(401, error="RepoNotFound")
        if rest == ["auth-check"]:
            return self._send(403, error="GatedRepo") if repository.gated else self._send(200)
        revision = "/".join(rest[1:]) if rest[:1] == ["revision"] else "main"
        commit = repository.commit(revision)
        if commit is None:
            return self._send(404, error="RevisionNotFound")
        siblings: list[dict[str, Any]] = []
        for name, content in repository.at(revision).items():
            large = {"lfs": {"size": len(content), "sha256": etag(name, content), "pointerSize": 130}} if name.endswith(LARGE) else {}
            siblings.append({"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest(), **large})
            if not large:
                siblings[-1]["blobId"] = etag(name, content)
        told = {"id": repo, "sha": commit, "private": False, "gated": "auto" if repository.gated else False, "siblings": siblings}
        self._send(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: str, revision: str, file: str) -> None:
        repository = self.hub.repositories.get(repo)
        if repository is None:
            return self._send(401, error="RepoNotFound")
        commit = repository.commit(revision)
        if commit is None:
            return self._send(404, error="RevisionNotFound")
        if repository.gated:
            return self._send(403, error="GatedRepo")
        content = repository.at(revision).get(file)
        if content is None or file == self.hub.lost:
            return self._send(404, error="EntryNotFound", headers={"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag(file, content)}"'}
        if file.endswith(LARGE):
            elsewhere = f"http://localhost:{self.hub.server.server_port}/content/{repo}/{commit}/{file}"
            linked = {"X-Linked-Etag": f'"{etag(file, content)}"', "X-Linked-Size": str(len(content)), "Location": elsewhere}
            return self._send(302, headers=headers | linked)
        return self._send(200, content, headers)

    def _content(self, content: bytes) -> None:
        requested = self.headers.get("Range")
        start = 0 if requested is None else int(requested.removeprefix("bytes=").partition("-")[0])
        headers = {} if requested is None else {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self._send(200 if requested is None else 206, content[start:], headers, cut=self.hub.cut_after, start=start)

    def _send(
        self,
        status: int,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        *,
        error: str = "",
        cut: int | None = None,
        start: int = 0,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **({"X-Error-Code": error} if error else {}), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[: max(0, cut - start)])
