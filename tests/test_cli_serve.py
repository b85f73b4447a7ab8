"""`dejavu serve` in a process of its own: what it says, that it answers, that it ends; and its mistakes, each one line."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

from conftest import Tiny
from dejavu.cli.main import run
from dejavu.config import SamplingConfig
from dejavu.loading import load
from dejavu.model.bundle import export
from dejavu.model.tokenizer import Tokenizer
from helpers.adapters import make_adapter
from helpers.command_line import ENVIRONMENT
from helpers.fake_worker import DEADLINE_S

TEMPLATE = "{{ messages[0].content }}"


@pytest.fixture(scope="module")
def work(tiny: Tiny, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model (`model`), which has an adapter, and chat templates."""
    path = tmp_path_factory.mktemp("serve")
    model = tiny("opt")
    sampling = SamplingConfig(temperature=0.5, top_p=0.9)
    export(model, tokenizer, path / "model")
    lm = load(path / "model")
    export(model, tokenizer, path / "model", adapter=make_adapter(lm.config, lm.base_hash), sampling=sampling)
    (path / "plain.jinja").write_text(TEMPLATE)
    (path / "broken.jinja").write_text("{% for")
    return path


@contextmanager
def served(work: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The command, whose output has begun; killed where it does not end by itself."""
    command = [sys.executable, "-m", "dejavu", "serve", "model", "--port", "0", "--backend", "torch", "--threads", "1", *options]
    # A job that a shell started in the background ignores the signal, and its children would too.
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, cwd=work, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listening
    ) as process:
        watch = threading.Timer(60, process.kill)  # a read of its output would wait for ever
        watch.start()
        try:
            yield process
        finally:
            watch.cancel()
            process.kill()


def ended(process: subprocess.Popen[str], by: signal.Signals) -> tuple[int, str]:
    """Status and stderr of the command after a signal."""
    process.send_signal(by)
    _, error = process.communicate(timeout=DEADLINE_S)
    return process.returncode, error


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_it_serves_until_it_is_interrupted(work: Path) -> None:
    with served(
        work, "--json", "--api-key", "sesame", "--chat-template", "plain.jinja", "--slots", "2", "--max-model-len", "40"
    ) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert said["model"] == "model" and said["models"] == ["model", "model:dense"] and said["sparse"] is True
        assert (said["slots"], said["max_model_len"], said["backend"]) == (2, 40, "torch")
        client = httpx.Client(base_url=said["url"], headers={"Authorization": "Bearer sesame"})
        with client:
            assert client.get("/health").json()["status"] == "ok"
            for name, low, high in (("model", 0, 0.999), ("model:dense", 1, 1)):
                requested = {"model": name, "prompt": "the cat", "max_tokens": 5, "ignore_eos": True, "temperature": 0}
                answer = client.post("/v1/completions", json=requested).json()
                assert answer["usage"]["completion_tokens"] == 5 and low <= answer["dejavu"]["mlp_density"] <= high
            messages = [{"role": "user", "content": "the cat"}]
            answer = client.post("/v1/chat/completions", json={"model": "model", "messages": messages, "max_tokens": 3})
            assert answer.status_code == 200
            assert httpx.get(f"{said['url']}/v1/models").status_code == 401
            with client.stream(
                "POST", "/v1/completions", json={"model": "model", "prompt": "the", "stream": True, "max_tokens": 9}
            ) as stream:
                assert next(stream.iter_lines()).startswith("data: ")
        assert ended(process, signal.SIGINT) == (130, "")


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_it_says_what_runs_and_where(work: Path) -> None:
    with served(work, "--dense", "--host", "0.0.0.0") as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(6)]
        assert "model" in lines[0] and "backend torch" in lines[0] and "dense" in lines[0]
        url = re.match(r"Serving at (http://127\.0\.0\.1:\d+) ", lines[1])
        assert url is not None and lines[2] == "Models: model · no API key\n"
        assert lines[3] == "8 texts at a time, 64 may wait, 64 tokens a text\n"
        assert lines[4] == "A request that does not say how to draw: temperature 0.5, top_p 0.9\n"
        assert re.fullmatch(
            r"Keys and values of 512 tokens are kept; free memory has room for [\d,]+ tokens, [\d,]+ texts of 64\n", lines[5]
        )
        assert httpx.get(f"{url[1]}/v1/models").json()["data"][0]["dejavu"]["mode"] == "dense"
        status, error = ended(process, signal.SIGTERM)
        assert status in (0, -signal.SIGTERM) and error.count("\n") == 1 and "other machines can reach this address" in error


MISTAKES = {
    "slots": (("--slots", "0"), r"slots must be at least 1, not 0"),
    "queue": (("--queue", "-1"), r"queue must be 0 or more, not -1"),
    "cache": (("--cache-tokens", "1"), r"cache_tokens must be at least 2.*not 1"),
    "chunk": (("--prefill-chunk", "0"), r"prefill_chunk must be at least 1, not 0"),
    "length": (("--max-model-len", "65"), r"max_model_len 65 exceeds the model's context of 64"),
    "port": (("--port", "65536"), r"port must lie between 0.*65535, not 65536"),
    "host": (("--host", "300.1.2.3"), r"host '300.1.2.3' is no address of this machine"),
    "a foreign host": (("--host", "192.0.2.1"), r"port 0 of 192.0.2.1 cannot be used: .*--port"),
    "an empty key": (("--api-key", ""), r"--api-key must be a word without spaces"),
    "no template": (("--chat-template", "nowhere.jinja"), r"nowhere.jinja does not exist"),
    "a folder for a template": (("--chat-template", "."), r"is a folder; give the path of a file with a Jinja template"),
    "a broken template": (("--chat-template", "broken.jinja"), r"--chat-template broken.jinja: the chat template cannot be rendered"),
    "adapter and dense": (("--dense", "--adapter", "x"), r"--dense.*--adapter"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options, message = MISTAKES[name]
    monkeypatch.chdir(work)
    port = () if "--port" in options else ("--port", "0")
    assert run(["serve", "model", "--backend", "torch", *port, *options, "--json"]) == 2
    out, error = capsys.readouterr()
    assert error.count("\n") == 1 and re.search(message, error), error
    assert out == ""


def test_a_cache_that_does_not_fit_is_a_mistake(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(work)
    for what, options in (("cache", ("--cache-tokens", str(10**15))), ("slots", ("--slots", str(10**13)))):
        for backend in ("native", "torch"):
            assert run(["serve", "model", "--backend", backend, "--port", "0", *options, "--json"]) == 2, what
            out, error = capsys.readouterr()
            assert out == "" and error.count("\n") == 1 and re.search("does not fit into memory.*--cache-tokens.*--slots", error), error


def test_a_port_in_use_is_said_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["serve", "no-such-model", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"port {port} of 127.0.0.1 cannot be used" in error and "--port" in error


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    assert run(["serve", "opt-mini"]) == 2
    assert capsys.readouterr().err == "dejavu: dejavu serve needs uvicorn; install what is missing with: pip install 'dejavu-llm[serve]'\n"


def test_the_command_line_needs_none_of_it() -> None:
    code = "import sys, dejavu.cli.main; assert not {'fastapi', 'uvicorn', 'pydantic', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)
