"""The server over HTTP: who may ask, what it says of itself, how failures are told, and what the OpenAPI document promises."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import dejavu
from dejavu.generation.pieces import Token
from dejavu.model.tokenizer import Tokenizer
from dejavu.serve.api.app import create_app
from dejavu.serve.api.assets import FOLDER
from dejavu.serve.core.interface import EngineFailed, EngineState, Event
from helpers.clients import TEMPLATE, error_of
from helpers.fake_worker import FakeWorker, eventually, served, serving, spoken, summary

KEY = "sésame"  # not ASCII: compared as bytes
SAID = {"model": "tiny", "prompt": "the cat"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}]}
PATHS = {"/v1/completions": SAID, "/v1/chat/completions": CHAT}


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    client: httpx.Client
    worker: FakeWorker
    page: Path = FOLDER


@pytest.fixture(scope="module")
def whole_site(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server without a key, with a page of three files."""
    page = tmp_path_factory.mktemp("page")
    (page / "index.html").write_text("<!doctype html><title>é</title>", encoding="utf-8")
    (page / "script.js").write_text("go()")
    (page / "style.css").write_text("p {}")
    (page / "icon.svg").write_text("<svg/>")
    (page / "notes.txt").write_text("not for the public")
    worker = FakeWorker(lambda request: [])
    app = create_app(served(dataclasses.replace(tokenizer, chat_template=TEMPLATE)), worker, page=page)
    with serving(app) as url, httpx.Client(base_url=url) as client:
        yield Site(client=client, worker=worker, page=page)


@pytest.fixture
def site(whole_site: Site) -> Site:
    """The server as new; it answers "Hello"."""
    worker = whole_site.worker
    worker.script, worker.waiting, worker.limit, worker.alive, worker.last_error = (
        (lambda request: spoken("Hel", "lo")),
        None,
        64,
        True,
        None,
    )
    for held in (worker.requests, worker.streams, worker.live):
        held.clear()
    return whole_site


@pytest.fixture
def locked(tokenizer: Tokenizer) -> Iterator[Site]:
    worker = FakeWorker(lambda request: spoken("Hel", "lo"))
    app = create_app(served(tokenizer), worker, api_key=KEY)
    with serving(app) as url, httpx.Client(base_url=url) as client:
        yield Site(client=client, worker=worker)


def data_of(response: httpx.Response) -> list[str]:
    """The data of a stream's events."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = response.text.split("\n\n")
    assert lines.pop() == "" and all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line.removeprefix("data: ") for line in lines]


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_is_the_answer_in_pieces(site: Site, path: str) -> None:
    once = site.client.post(path, json=PATHS[path]).json()
    *chunks, done = data_of(site.client.post(path, json=PATHS[path] | {"stream": True}))
    assert done == "[DONE]" and len(chunks) >= 2
    parts = [json.loads(chunk)["choices"][0] for chunk in chunks]
    text = "".join(part["text"] if "text" in part else part["delta"].get("content", "") for part in parts)
    assert text == "Hello" == once["choices"][0].get("text", once["choices"][0].get("message", {}).get("content"))
    assert [part["finish_reason"] for part in parts][-1] == once["choices"][0]["finish_reason"] == "stop"
    assert json.loads(chunks[-1])["dejavu"] == once["dejavu"]


def test_choices_keep_their_indices(site: Site) -> None:
    """Choice j of prompt i is i n + j, in every chunk."""
    site.worker.script = lambda request: spoken(f"{len(request.prompt_ids)}", f"/{request.index}")
    body = {"model": "tiny", "prompt": [[4], [4, 5, 6]], "n": 2}
    once = [choice["text"] for choice in site.client.post("/v1/completions", json=body).json()["choices"]]
    assert once == ["1/0", "1/1", "3/0", "3/1"]
    *chunks, _ = data_of(site.client.post("/v1/completions", json=body | {"stream": True}))
    parts = [choice for chunk in chunks for choice in json.loads(chunk)["choices"]]
    assert ["".join(part["text"] for part in parts if part["index"] == index) for index in range(4)] == once
    assert sorted(part["index"] for part in parts if part["finish_reason"]) == [0, 1, 2, 3]


@pytest.mark.parametrize("header", [None, "Bearer wrong", f"Basic {KEY}", "Bearer", f"Bearer {KEY}x", KEY, "Bearer sesame"])
def test_without_the_key_nothing_is_answered(locked: Site, header: str | None) -> None:
    headers = {} if header is None else {b"Authorization": header.encode()}
    requests = [("POST", path, body) for path, body in PATHS.items()] + [("GET", "/v1/models", None), ("GET", "/v1/models/tiny", None)]
    for method, path, body in requests:
        response = locked.client.request(method, path, json=body, headers=headers)
        assert response.status_code == 401 and error_of(response)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer" and KEY not in response.text
    assert locked.worker.requests == []
    assert locked.client.get("/health").status_code == locked.client.get("/metrics").status_code == 200


def test_a_request_without_the_key_counts_as_refused(locked: Site) -> None:
    before = values(locked)
    for path, body in (("/v1/completions", SAID), ("/v1/chat/completions", CHAT), ("/v1/models", None)):
        assert locked.client.request("GET" if body is None else "POST", path, json=body).status_code == 401
    for endpoint in ("completions", "chat"):
        key = ("dejavu_requests_total", endpoint, "refused")
        assert values(locked)[key] == before[key] + 1


def test_health_can_be_asked_for_its_status_alone(site: Site) -> None:
    answer = site.client.head("/health")
    assert answer.status_code == 200 and answer.content == b""
    site.worker.alive = False
    assert site.client.head("/health").status_code == 503


def test_with_the_key_everything_is(locked: Site) -> None:
    for scheme in (b"Bearer ", b"bearer  "):
        headers = {b"Authorization": scheme + KEY.encode()}
        assert locked.client.post("/v1/completions", json=SAID, headers=headers).status_code == 200
        assert locked.client.get("/v1/models", headers=headers).status_code == 200


def test_models(site: Site) -> None:
    listed = site.client.get("/v1/models").json()
    assert listed["object"] == "list" and [(card["id"], card["dejavu"]["mode"]) for card in listed["data"]] == [
        ("tiny", "sparse"),
        ("tiny:dense", "dense"),
    ]
    for card in listed["data"]:
        assert card["object"] == "model" and card["max_model_len"] == 64 and card["owned_by"] == "dejavu"
        facts = {"layers": 2, "neurons": 64, "heads": 4, "chat": True, "backend": "torch", "dtype": "fp32"}
        assert card["dejavu"] == facts | {"mode": card["dejavu"]["mode"]}
        assert site.client.get(f"/v1/models/{card['id']}").json() == card
    for name in ("other", "owner/name", ""):
        response = site.client.get(f"/v1/models/{name}")
        assert response.status_code == 404 and error_of(response)["code"] == "model_not_found"


def test_what_is_not_there_is_told_in_the_same_envelope(site: Site) -> None:
    assert (response := site.client.get("/v2/completions")).status_code == 404 and error_of(response)["code"] == "not_found"
    for path, allowed in (("/v1/completions", "POST"), ("/v1/models", "GET"), ("/health", "GET")):
        response = site.client.request("DELETE", path)
        assert response.status_code == 405 and response.headers["allow"] == allowed
        assert error_of(response)["code"] == "method_not_allowed"
    assert site.client.get("/docs").status_code == 404, "FastAPI's own pages load scripts from elsewhere"


def test_too_many_are_told_when_to_come_back(site: Site) -> None:
    site.worker.waiting = 64
    for path, body in PATHS.items():
        for stream in (False, True):
            response = site.client.post(path, json=body | {"stream": stream})
            assert response.status_code == 429 and response.headers["retry-after"] == "7"
            assert error_of(response)["type"] == "rate_limit_error" and "again in 7 s" in error_of(response)["message"]
    site.worker.waiting = None
    assert site.client.post("/v1/completions", json=SAID).status_code == 200


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "fits"), [(23, 1, True), (24, 0, True), (24, 1, False), (25, 0, False), (25, None, False)]
)
def test_what_does_not_fit_is_refused_at_once(site: Site, prompt: int, max_tokens: int | None, fits: bool) -> None:
    """With the limit, the prompt and what was asked in the message; and the next request is answered."""
    site.worker.limit = 24
    response = site.client.post("/v1/completions", json={"model": "tiny", "prompt": [5] * prompt, "max_tokens": max_tokens})
    assert response.status_code == (200 if fits else 400)
    if not fits:
        error = error_of(response)
        assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
        for number in (24, prompt, 16 if max_tokens is None else max_tokens):
            assert str(number) in error["message"]
    small = site.client.post("/v1/completions", json={"model": "tiny", "prompt": [5], "max_tokens": 1})
    assert small.status_code == 200


def test_a_chat_fills_the_context_and_no_more(site: Site) -> None:
    site.client.post("/v1/chat/completions", json=CHAT)
    request = site.worker.requests[-1]
    assert len(request.prompt_ids) + request.max_new_tokens == 64
    longer = {"model": "tiny", "messages": [{"role": "user", "content": "0" * 64}]}
    error = error_of(site.client.post("/v1/chat/completions", json=longer))
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("error", [EngineFailed("cannot read /srv/models/x.bin"), RuntimeError("no /srv/models/x.bin")])
def test_a_failure_is_an_error_and_no_end(site: Site, path: str, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """Whole: 500. In a stream: an error in place of the end, and neither a finish_reason nor [DONE]. The others are cancelled."""
    site.worker.script = lambda request: [Event(text="Hel"), error] if request.index == 0 else [Event(text="Hel")] * 1000
    response = site.client.post(path, json=PATHS[path] | {"n": 2})
    assert response.status_code == 500 and error_of(response)["type"] == "server_error"
    stream = site.client.post(path, json=PATHS[path] | {"n": 2, "stream": True})
    *chunks, last = map(json.loads, data_of(stream))
    assert stream.status_code == 200 and set(last) == {"error"} and last["error"]["type"] == "server_error"
    assert chunks and all(choice["finish_reason"] is None for chunk in chunks for choice in chunk["choices"])
    assert ("cannot read [path]" in response.text and "[path]" in stream.text) == isinstance(error, EngineFailed)
    assert "/srv" not in response.text + stream.text and "/srv/models/x.bin" in caplog.text
    assert not site.worker.live and [stream.cancels for stream in site.worker.streams] == [0, 1, 0, 1]
    site.worker.script = lambda request: spoken("Hel", "lo")
    assert site.client.post(path, json=PATHS[path]).status_code == 200


def test_a_request_that_ends_well_cancels_nothing(site: Site) -> None:
    for path, body in PATHS.items():
        for stream in (False, True):
            site.client.post(path, json=body | {"stream": stream, "n": 3})
    assert len(site.worker.streams) == 12 and all(stream.cancels == 0 for stream in site.worker.streams)


def test_health(site: Site) -> None:
    state = site.client.get("/health")
    assert state.status_code == 200 and state.json() == {
        "status": "ok", "queued": 0, "running": 0, "slots": 4, "pages_free": 6, "pages_total": 8, "model": "tiny", "sparse": True,
        "layers": 2, "backend": "torch", "dtype": "fp32", "threads": 1, "version": dejavu.__version__
    }  # fmt: skip
    site.worker.alive, site.worker.last_error = False, "OutOfMemoryError: process 4242 in /srv/my models/x.bin"
    for response in (site.client.get("/health"), site.client.post("/v1/completions", json=SAID)):
        assert response.status_code == 503 and error_of(response)["code"] == "not_running"
        assert "4242" not in response.text and "srv" not in response.text and "log" in error_of(response)["message"]
    assert "(OutOfMemoryError)" in site.client.get("/health").text


def test_the_page_comes_from_here_and_loads_nothing_from_elsewhere(site: Site, tokenizer: Tokenizer) -> None:
    kinds = {"/": "text/html; charset=utf-8", "/script.js": "text/javascript; charset=utf-8", "/style.css": "text/css; charset=utf-8"}
    kinds["/icon.svg"] = "image/svg+xml"
    for path, kind in kinds.items():
        response = site.client.get(path)
        assert response.status_code == 200 and response.headers["content-type"] == kind
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy and "*" not in policy
        assert response.headers["x-content-type-options"] == "nosniff" and response.headers["cache-control"] == "no-store"
        assert site.client.head(path).status_code == 200
    assert site.client.get("/").text == site.client.get("/index.html").text == "<!doctype html><title>é</title>"
    (site.page / "style.css").write_text("new")
    assert site.client.get("/style.css").text == "new", "a page is read anew"
    for path in ("/notes.txt", "/../notes.txt", "/%2e%2e/app.py", "/script.js/", "/other.js"):
        assert error_of(site.client.get(path))["code"] == "not_found"
    app = create_app(served(tokenizer), site.worker, page=site.page / "nowhere")
    with serving(app) as url:
        assert error_of(httpx.get(url))["code"] == "not_found"


def values(site: Site) -> dict[tuple[str, ...], float]:
    """Every sample of /metrics: (name, label values...) -> value."""
    response = site.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(response.text)
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_metrics_tell_what_happened(site: Site, tokenizer: Tokenizer) -> None:
    tokens = (Token(token_id=10), Token(token_id=11, mlp_density=0.125, head_density=0.5))
    end = summary(3, 3, time_to_first_token_s=0.25, decode_s=0.5, union_density=0.375)
    well = [Event(text="a", tokens=tokens), Event(tokens=tokens[1:], finish_reason="stop", summary=end)]
    badly = [Event(text="Hel"), EngineFailed("no")]
    before = values(site)
    assert all(name.startswith(("dejavu_", "process_")) for name, *_ in before)
    assert sys.platform != "linux" or before["process_resident_memory_bytes",] > 1e6
    assert ("dejavu_requests_total", "chat", "cancelled") in before

    site.worker.script = lambda request: well
    site.client.post("/v1/completions", json=SAID)
    site.client.post("/v1/completions", json=SAID | {"model": "tiny:dense", "stream": True})
    site.client.post("/v1/completions", json=SAID | {"n": 0})
    site.worker.waiting = 1
    site.client.post("/v1/chat/completions", json=CHAT)
    site.worker.waiting, site.worker.script = None, lambda request: badly
    site.client.post("/v1/chat/completions", json=CHAT)
    site.client.post("/v1/chat/completions", json=CHAT | {"stream": True})

    def new() -> dict[tuple[str, ...], float]:
        return {key: value - before.get(key, 0) for key, value in values(site).items() if value != before.get(key, 0)}

    ended = {("completions", "completed"): 2, ("completions", "refused"): 1, ("chat", "busy"): 1, ("chat", "failed"): 2}
    eventually(lambda: {key[1:]: n for key, n in new().items() if key[0] == "dejavu_requests_total" and key[1] != "other"} == ended)
    found = new()
    for mode in ("sparse", "dense"):
        for name, count, total in (
            ("time_to_first_token_seconds", 1, 0.25),
            ("time_per_output_token_seconds", 1, 0.25),
            ("mlp_density", 2, 0.25),
            ("head_density", 2, 1.0),
            ("union_density", 1, 0.375),
        ):
            assert found[f"dejavu_{name}_count", mode] == count and found[f"dejavu_{name}_sum", mode] == pytest.approx(total), name


def test_requests_that_write_no_text_are_counted_by_their_status(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def counts() -> tuple[float, ...]:
        found = values(site)
        return tuple(found["dejavu_requests_total", "other", outcome] for outcome in ("completed", "refused", "failed"))

    completed, refused, failed = counts()
    assert [site.client.get(path).status_code for path in ("/v1/models", "/v1/models/x", "/nowhere", "/v1/chat/completions")] == [
        *(200, 404, 404, 405)
    ]
    site.worker.alive = False
    assert site.client.get("/health").status_code == 503
    with monkeypatch.context() as patched:
        patched.setattr(FakeWorker, "state", None)
        assert error_of(site.client.get("/health"))["code"] == "internal_error"
    assert counts() == (completed + 2, refused + 3, failed + 2), "the first look at the metrics is one of them"


def test_metrics_tell_how_the_worker_does(site: Site, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineState(
        mode="sparse", made=True, queued=2, running=3, slots=4, pages_free=2, pages_total=8, steps=10, tokens=25, prompt_tokens=30,
        cached_tokens=16, finished=5, failed=1, cancelled=2, fallback_layers=5,
    )  # fmt: skip
    idle = dataclasses.replace(engine, mode="dense", made=False, steps=0, fallback_layers=0, pages_total=0, pages_free=0)
    state = dataclasses.replace(site.worker.state(), engines=(engine, idle))
    monkeypatch.setattr(site.worker, "state", lambda: state)
    with serving(create_app(served(tokenizer), site.worker)) as url, httpx.Client(base_url=url) as client:
        found = values(Site(client=client, worker=site.worker))
    expected = {
        "jobs_queued": 2, "jobs_running": 3, "slots": 4, "kv_pages": 8, "kv_pages_free": 2, "kv_used_share": 0.75,
        "decode_steps_total": 10, "tokens_generated_total": 25, "prompt_tokens_computed_total": 30, "prompt_tokens_cached_total": 16,
        "jobs_finished_total": 5, "jobs_failed_total": 1, "jobs_cancelled_total": 2, "dense_fallback_layers_total": 5,
        "dense_fallback_share": 0.25,
    }  # fmt: skip
    assert {name: found[f"dejavu_{name}", "sparse"] for name in expected} == expected
    assert found["dejavu_dense_fallback_share", "dense"] == found["dejavu_kv_used_share", "dense"] == 0
    assert found["dejavu_up",] == 1


def resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """A schema behind its reference, which must lead somewhere."""
    name = schema.get("$ref", "").rpartition("/")[2]
    return document["components"]["schemas"][name] if name else schema


def references(part: Any) -> Iterator[str]:
    """Every reference in a document."""
    if isinstance(part, dict):
        yield from ([part["$ref"]] if "$ref" in part else [])
        for value in part.values():
            yield from references(value)
    elif isinstance(part, list):
        for value in part:
            yield from references(value)


def test_the_document_says_what_is_taken_and_what_can_come(site: Site, locked: Site) -> None:
    document = site.client.get("/openapi.json").json()
    statuses = {
        (method, path): set(operation["responses"]) for path, methods in document["paths"].items() for method, operation in methods.items()
    }
    writing = {"200", "400", "404", "413", "415", "429", "500", "503"}
    assert statuses == {
        ("post", "/v1/completions"): writing,
        ("post", "/v1/chat/completions"): writing,
        ("get", "/v1/models"): {"200"},
        ("get", "/v1/models/{model}"): {"200", "404"},
        ("get", "/health"): {"200", "503"},
        ("get", "/metrics"): {"200"},
    }
    assert {reference.rpartition("/")[2] for reference in references(document)} <= set(document["components"]["schemas"])
    assert "HTTPValidationError" not in document["components"]["schemas"] and "security" not in str(document)
    for path in PATHS:
        operation = document["paths"][path]["post"]
        schema = resolved(document, operation["requestBody"]["content"]["application/json"]["schema"])
        assert schema["properties"]["model"]["enum"] == ["tiny", "tiny:dense"] and "model" in schema["required"]
        assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
        for status in writing - {"200"}:
            answer = operation["responses"][status]["content"]["application/json"]["schema"]
            assert set(resolved(document, resolved(document, answer)["properties"]["error"])["required"]) == {
                "message",
                "type",
                "param",
                "code",
            }

    secured = locked.client.get("/openapi.json").json()
    assert secured["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in secured["paths"].items():
        for operation in methods.values():
            assert ("401" in operation["responses"]) == ("security" in operation) == path.startswith("/v1/")
