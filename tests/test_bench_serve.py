"""`dejavu bench-serve` over HTTP: what of a stream counts when, failures that never count as answers, leaks, its own server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import openai
import pytest

from conftest import Tiny
from dejavu.bench.rows import read_rows
from dejavu.cli.main import run
from dejavu.loadtest.benchmark import ServingBench, bench_serving
from dejavu.loadtest.client import Reply, Target, ask, byte_lines, retry_after
from dejavu.loadtest.process import served
from dejavu.loadtest.rows import ServeRow
from dejavu.loadtest.run import probe, warm_up
from dejavu.loadtest.server_stats import LeakReport, pick_models
from dejavu.loadtest.workload import Load, Mix
from dejavu.model.bundle import export
from dejavu.model.tokenizer import Tokenizer
from helpers.command_line import ENVIRONMENT
from helpers.fake_openai import Answer, FakeServer, running
from helpers.loads import PROMPTS, TEXT, load, replied

FAKE = (sys.executable, str(Path(__file__).parent / "helpers" / "fake_openai.py"))


def reply_of(server: FakeServer, *, chat: bool = False, tokens: int = 4, timeout_s: float = 20.0, **options: Any) -> Reply:
    """One request to a fake server."""

    async def work(url: str) -> Reply:
        target = Target(url=url, chat=chat, timeout_s=timeout_s, **options)
        async with target.client() as client:
            return await ask(client, target, "tiny", "a prompt of 24 characters", tokens, clock=time.perf_counter)

    with running(server) as url:
        return asyncio.run(work(url))


class TestClient:
    @pytest.mark.parametrize("chat", [False, True])
    def test_when_pieces_arrive(self, chat: bool) -> None:
        """Real delays: no piece comes before the server wrote it, and none much later."""
        told = {"mode": "sparse", "mlp_density": 0.25, "trace": None}
        server = FakeServer(answers=[Answer(first_s=0.08, each_s=0.04, dejavu=told)])
        reply = reply_of(server, chat=chat, api_key="key")
        assert (reply.error, reply.status, reply.finish_reason, reply.tokens, len(reply.texts)) == (None, 200, "length", 4, 4)
        assert 0.08 <= reply.texts[0] - reply.sent < 5 and 0.2 <= reply.texts[-1] - reply.sent < 10 and reply.texts == sorted(reply.texts)
        assert reply.sent < reply.texts[-1] <= reply.ended
        assert (reply.prompt_tokens, reply.completion_tokens, reply.cached_tokens) == (7, 4, 1)
        assert reply.densities == {"mode": "sparse", "mlp_density": 0.25}
        [body] = server.requested
        assert body["stream"] and body["ignore_eos"] and body["temperature"] == 0 and body["model"] == "tiny" and body["max_tokens"] == 4
        assert ("messages" in body, "prompt" in body) == (chat, not chat) and server.headers[0]["authorization"] == "Bearer key"

    def test_line_separators_within_text_do_not_cut_an_event(self) -> None:
        reply = reply_of(FakeServer(answers=[Answer(text="\u2028a\x85\x0b")]), ignore_eos=False)
        assert reply.error is None and len(reply.texts) == 4

    def test_a_server_that_does_not_count(self) -> None:
        reply = reply_of(FakeServer(answers=[Answer(usage=False)]))
        assert (reply.error, reply.completion_tokens, reply.tokens) == (None, None, 4)

    @pytest.mark.parametrize(
        ("answer", "error", "message"),
        [
            (Answer(fails="http"), "http 500", "went http"),
            (Answer(fails="busy", retry_after="7"), "http 429", "went busy"),
            (Answer(fails="event"), "stream error", "the step failed"),
            (Answer(fails="no finish"), "cut short", "without finish_reason, after 4 pieces"),
            (Answer(fails="not done"), "cut short", "without [DONE]"),
            (Answer(fails="malformed"), "malformed", "choices"),
            (Answer(fails="other form"), "malformed", "choices"),
            (Answer(fails="reset"), "connection", "RemoteProtocolError"),
            (Answer(fails="no stream"), "no stream", "application/json"),
            (Answer(tokens=0), "empty", "without a token"),
        ],
        ids=lambda value: value.fails or "empty" if isinstance(value, Answer) else "",
    )
    def test_what_is_no_whole_answer_is_an_error(self, answer: Answer, error: str, message: str) -> None:
        reply = reply_of(FakeServer(answers=[answer]))
        assert reply.error == error and message in reply.message and reply.ended > reply.sent
        assert reply.retry_after_s == (7.0 if answer.retry_after else None)

    def test_an_answer_that_hangs_ends_at_the_timeout(self) -> None:
        reply = reply_of(FakeServer(answers=[Answer(fails="hangs")]), timeout_s=1.0)
        assert reply.error == "timeout" and len(reply.texts) == 1 and 1.0 <= reply.ended - reply.sent < 20

    def test_nobody_listens(self) -> None:
        async def work() -> Reply:
            target = Target(url="http://127.0.0.1:9")
            async with target.client() as client:
                return await ask(client, target, "tiny", "a", 4, clock=time.perf_counter)

        assert asyncio.run(work()).error == "connection"

    @pytest.mark.parametrize("size", [1, 3, 1000])
    def test_lines_of_a_body_in_pieces(self, size: int) -> None:
        body = 'data: a\r\n\r\ndata: "\u2028é"\n\ndata: [DONE]'.encode()

        async def chunks() -> Any:
            for start in range(0, len(body), size):
                yield body[start : start + size]

        async def collect() -> list[bytes]:
            return [line async for line in byte_lines(chunks())]

        assert asyncio.run(collect()) == [b"data: a", b"", 'data: "\u2028é"'.encode(), b"", b"data: [DONE]"]

    def test_retry_after(self) -> None:
        assert [retry_after(value) for value in (None, "3", " 0 ", "soon", "inf", "-1")] == [None, 3.0, 0.0, None, None, None]
        then = retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True))
        assert then is not None and 90 < then <= 100
        assert retry_after(format_datetime(datetime.now(UTC) - timedelta(seconds=100), usegmt=True)) == 0.0


def test_openai_client_reads_what_bench_serve_reads() -> None:
    """The fake is as the official client expects a server, so what bench-serve reads of it is what it would of any."""
    server = FakeServer(answers=[Answer(text=" w\u00f6rd"), Answer(fails="event"), Answer(fails="http")])
    with running(server) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list().data] == ["tiny", "tiny:dense"]
        options: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}}
        chunks = list(client.completions.create(prompt="a prompt of 24 characters", **options))
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == " w\u00f6rd" * 4
        assert chunks[-1].usage is not None and (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (7, 4)
        with pytest.raises(openai.APIError, match="the step failed"):
            list(client.chat.completions.create(messages=[{"role": "user", "content": "a"}], **options))
        with pytest.raises(openai.InternalServerError, match="went http"):
            client.completions.create(prompt="a", **options)
        chat = client.chat.completions.create(messages=[{"role": "user", "content": "a"}], **options)
        assert "".join(choice.delta.content or "" for chunk in chat for choice in chunk.choices) == " w\u00f6rd" * 4


class TestBench:
    def bench(self, server: FakeServer, given: Load | None = None, **options: Any) -> ServingBench:
        async def work(url: str) -> ServingBench:
            return await bench_serving(Target(url=url), given or load(), TEXT, **options)

        with running(server) as url:
            return asyncio.run(work(url))

    def test_dense_and_sparse_in_turns(self) -> None:
        told = [{"mode": mode, "mlp_density": density} for mode, density in (("sparse", 0.2), ("dense", 1.0))]
        server = FakeServer(answers=[Answer(dejavu=told[0], usage=True)] * 3 + [Answer(dejavu=told[1])] * 6 + [Answer(dejavu=told[0])] * 3)
        found = self.bench(server, rounds=2, warm_up_requests=0)
        assert [(row.model, row.mode, row.mlp_density, row.completed) for row in found.rows] == [
            ("tiny", "sparse", 0.2, 6),
            ("tiny", "dense", 1.0, 6),
        ]
        loads = [(body["model"], body["prompt"]) for body in server.requested if body["max_tokens"] > 1]
        assert [model for model, _ in loads] == ["tiny"] * 3 + ["tiny:dense"] * 6 + ["tiny"] * 3
        assert {prompt for model, prompt in loads if model == "tiny"} == {prompt for model, prompt in loads if model != "tiny"}
        row = found.rows[0]
        assert (row.server, row.backend, row.dtype, row.threads, row.layers) == ("dejavu 9.9", "native", "int8", 2, 6)
        assert row.context == 8 and not found.failed and found.leaks is None
        assert found.ratios[0]["mode"] == "sparse" and found.ratios[0]["tok_s"] == pytest.approx(
            (row.tok_s or 0) / (found.rows[1].tok_s or 1)
        )

    @pytest.mark.parametrize(("characters", "extra"), [(4, 1), (3, 40), (7, 0)])
    def test_prompts_have_the_tokens_asked_for(self, characters: int, extra: int) -> None:
        server = FakeServer(characters=characters, extra_tokens=extra)
        given = load(prompt_tokens=Mix(lengths=(200,), shares=(1.0,)), requests=4)
        [row] = self.bench(server, given, models=["tiny"]).rows
        assert row.context == pytest.approx(200, rel=0.03) and row.rounds == 1

    def test_warm_up_is_none_of_the_load(self) -> None:
        server = FakeServer()
        [row] = self.bench(server, load(requests=3, concurrency=5, output_tokens=Mix(lengths=(40,), shares=(1.0,))), models=["tiny"]).rows
        lengths = [body["max_tokens"] for body in server.requested]
        assert sorted(lengths) == [1, 1, 16, 16, 16, 16, 16, 40, 40, 40] and (row.requests, row.output_tokens) == (3, 120)

    def test_a_failed_warm_up_is_noted(self) -> None:
        found = self.bench(FakeServer(answers=[Answer(fails="http"), *[Answer()] * 6]), models=["tiny"], warm_up_requests=1)
        assert any("warm-up: 1 of 1 requests to tiny failed, e.g. http 500: went http" in note for note in found.notes) and not found.failed

    @pytest.mark.parametrize("tells", ["health", "metrics"])
    def test_pages_that_do_not_come_back(self, tells: str) -> None:
        found = self.bench(FakeServer(pages_lost=2, tells=[tells]), check_leaks=True, settle_s=0.1, models=["tiny"], warm_up_requests=3)
        assert found.leaks is not None and found.failed and found.leaks.to_dict()["pages_lost"] == 12
        assert (found.leaks.pages_before, found.leaks.pages_after, found.leaks.pages_total) == (94, 82, 100)
        assert any("12 of 100 pages did not come back" in note for note in found.notes)

    def test_memory_that_grows(self) -> None:
        def check(grows: int) -> ServingBench:
            return self.bench(FakeServer(memory_grows=grows, tells=["memory"]), check_leaks=True, settle_s=0.1, models=["tiny"], rounds=4)

        steady, growing = check(0), check(20_000_000)
        assert steady.leaks is not None and not steady.failed and steady.leaks.memory_mb == pytest.approx((300.0,) * 5)
        assert growing.leaks is not None and growing.failed and growing.leaks.growth_mb == pytest.approx(40.0)
        assert any("grew by 40 MB" in note for note in growing.notes)

    def test_a_server_that_tells_nothing_of_itself(self) -> None:
        """Its memory is known where its process is; else there is nothing to compare."""
        with pytest.raises(ValueError, match="--check-leaks"):
            self.bench(FakeServer(tells=[]), check_leaks=True, models=["tiny"])
        found = self.bench(FakeServer(tells=[]), check_leaks=True, models=["tiny"], process=os.getpid())
        assert found.leaks is not None and found.leaks.pages_before is None and all(each > 10 for each in found.leaks.memory_mb)
        assert any("only its memory was compared" in note for note in found.notes)

    def test_nothing_leaks(self) -> None:
        found = self.bench(FakeServer(), check_leaks=True)
        assert found.leaks is not None and not found.leaks.leaks and found.leaks.pages_after == 100 and len(found.leaks.memory_mb) == 5

    @pytest.mark.parametrize(
        ("memory", "pages", "leaks"),
        [((100.0, 160.0, 161.0), 9, False), ((100.0, 101.0, 130.0), 9, True), ((100.0, 200.0), 9, False), ((), 8, True), ((), 10, False)],
    )
    def test_what_counts_as_a_leak(self, memory: tuple[float, ...], pages: int, leaks: bool) -> None:
        """What grows in the first half is made once; one sample after another says nothing; a page that is missing always counts."""
        assert LeakReport(pages_before=9, pages_after=pages, pages_total=10, memory_mb=memory).leaks is leaks

    def test_a_model_that_is_not_there(self) -> None:
        with pytest.raises(ValueError, match="no model 'other'; it has tiny, tiny:dense"):
            self.bench(FakeServer(), models=["other"])
        assert pick_models([], {"a:dense": None, "a": None}, ":dense") == ["a", "a:dense"]
        assert pick_models(["b", "b"], {"a": None, "b": None}, ":dense") == ["b"]
        with pytest.raises(ValueError, match="2 models; choose with --model: a, b"):
            pick_models([], {"a": None, "b": None}, ":dense")
        with pytest.raises(ValueError, match="none is listed"):
            pick_models([], {}, ":dense")

    def test_a_model_without_an_adapter_is_asked_once(self) -> None:
        assert [row.model for row in self.bench(FakeServer(runs_dense=True)).rows] == ["tiny"]
        assert [row.mode for row in self.bench(FakeServer(runs_dense=True), models=["tiny:dense"]).rows] == ["dense"]

    def test_a_server_that_does_not_count_tokens(self) -> None:
        async def silent(model: str, prompt: str, max_tokens: int) -> Reply:
            return replied(0.0, 1.0)

        prompts, note = asyncio.run(probe(silent, "m", TEXT, 50))
        assert prompts.length(50) == 200 and note is not None and "does not count tokens" in note

    def test_a_server_that_counts_nonsense_or_refuses(self) -> None:
        async def constant(model: str, prompt: str, max_tokens: int) -> Reply:
            return replied(0.0, 1.0, prompt_tokens=5)

        async def refusing(model: str, prompt: str, max_tokens: int) -> Reply:
            return Reply(sent=0.0, error="http 401", message="wrong key")

        with pytest.raises(ValueError, match="counts 5 tokens"):
            asyncio.run(probe(constant, "m", TEXT, 50))
        with pytest.raises(ValueError, match="http 401: wrong key"):
            asyncio.run(probe(refusing, "m", TEXT, 50))
        assert asyncio.run(warm_up(load(), {"m": PROMPTS}, refusing)) == ["warm-up: 2 of 2 requests to m failed, e.g. http 401: wrong key"]


class TestProcess:
    def test_a_server_is_started_and_ended(self) -> None:
        with served(["small"], command=FAKE, start_s=60) as server:
            assert not server.ended
            found = asyncio.run(bench_serving(Target(url=server.url), load(requests=4), TEXT))
        assert server.ended and [row.completed for row in found.rows] == [4, 4]

    def test_a_server_is_ended_where_the_benchmark_fails(self) -> None:
        with pytest.raises(KeyboardInterrupt), served(["small"], command=FAKE, start_s=60) as server:
            raise KeyboardInterrupt
        assert server.ended

    def test_a_server_that_does_not_start(self) -> None:
        with (
            pytest.raises(ValueError, match="ended with status 2: no such model: 'refuses'"),
            served(["refuses"], command=FAKE, start_s=60),
        ):
            pytest.fail("it did not start")
        with pytest.raises(ValueError, match=r"within 0\.5 s"), served(["hangs"], command=FAKE, start_s=0.5):
            pytest.fail("it is not healthy")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """`dejavu bench-serve` with these arguments, in a folder with text.txt; its status, stdout and stderr."""
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str) -> tuple[int, str, str]:
        status = run(["bench-serve", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return invoke


SMALL = ("--text", "text.txt", "--prompt-tokens", "16:0.5,32:0.5", "--output-tokens", "4")


class TestCommand:
    def test_one_of_four_fails(self, command) -> None:
        """The count of answers is 3, the failure is named, and the status says that the test failed."""
        answers = [Answer(), Answer(), Answer(fails="event"), Answer()]
        with running(FakeServer(answers=answers)) as url:
            status, out, err = command("--url", url, "--model", "tiny", *SMALL, "--requests", "4", "--warm-up", "0", "--json")
        [row] = json.loads(out)["rows"]
        assert status == 1 and (row["requests"], row["completed"], row["failed"], row["errors"]) == (4, 3, 1, {"stream error": 1})
        assert "1 of 4 requests failed" in err and row["output_tokens"] == 12

    def test_busy_replies(self, command) -> None:
        answers = [Answer(), Answer(fails="busy", retry_after="0")]
        arguments = ("--model", "tiny", *SMALL, "--requests", "4", "--concurrency", "1", "--warm-up", "0", "--json")
        with running(FakeServer(answers=answers)) as url:
            status, out, _ = command("--url", url, *arguments)
            row = json.loads(out)["rows"][0]
            assert status == 1 and (row["completed"], row["failed"], row["rejected"], row["errors"]) == (2, 2, 2, {"http 429": 2})
            status, out, err = command("--url", url, *arguments, "--retries", "1")
            row = json.loads(out)["rows"][0]
        assert (status, err) == (0, "") and (row["completed"], row["failed"], row["rejected"], row["errors"]) == (4, 0, 3, {})

    def test_for_people(self, command) -> None:
        with running(FakeServer(answers=[Answer(dejavu={"mode": "sparse", "mlp_density": 0.125})])) as url:
            arguments = ("--url", f"{url}/v1/", "--model", "tiny", *SMALL, "--rate", "200", "--seconds", "0.2", "--check-leaks")
            status, out, err = command(*arguments, "--ttft-limit", "5000", "--itl-limit", "5000", "--results", "serving.jsonl")
        assert (status, err) == (0, "")
        for part in (
            "Serving tiny: 200 requests/s (Poisson)",
            "16:0.5,32:0.5",
            "goodput/s",
            "100%",
            "0.125",
            "time to first token",
            "leaks: none found",
        ):
            assert part in out
        [row] = read_rows(Path("serving.jsonl"), ServeRow)
        assert row.rate == 200 and row.concurrency is None and row.completed > 5 and row.rounds == 4 and row.commit is not None

    def test_its_own_server(self, command, monkeypatch: pytest.MonkeyPatch) -> None:
        requested: list[list[str]] = []

        def fake(arguments: list[str]) -> Any:
            requested.append(arguments)
            return served(arguments[:1], command=FAKE, start_s=60)

        monkeypatch.setattr("dejavu.loadtest.process.served", fake)
        options = (
            "--backend",
            "torch",
            "--dtype",
            "fp32",
            "--threads",
            "1",
            "--adapter",
            "folder",
            "--server-options",
            "--slots 3 --host-name 'a b'",
        )
        status, out, err = command("small", *SMALL, "--requests", "4", *options, "--json")
        assert (status, err) == (0, "") and [row["model"] for row in json.loads(out)["rows"]] == ["small", "small"]
        given = ["--adapter", "folder", "--backend", "torch", "--dtype", "fp32", "--threads", "1", "--slots", "3", "--host-name", "a b"]
        assert requested == [["small", *given]]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ((), "MODEL"),
            (("small", "--url", "http://x"), "one of the two"),
            (("--url", "127.0.0.1:8000"), "'127.0.0.1:8000'"),
            (("--url", "http://x", "--threads", "2"), "--threads"),
            (("--url", "http://x", "--server-options", "--slots 2"), "--slots"),
            (("small", "--api-key", "k"), "--api-key"),
            (("--url", "http://x", "--rate", "0"), "rate must be positive"),
            (("--url", "http://x", "--rate", "x"), "'x'"),
            (("--url", "http://x", "--rate", "3", "--concurrency", "2"), "one of the two"),
            (("--url", "http://x", "--requests", "3", "--seconds", "2"), "one of the two"),
            (("--url", "http://x", "--requests", "0"), "requests must be at least 1, not 0"),
            (("--url", "http://x", "--prompt-tokens", "1:2"), "--prompt-tokens"),
            (("--url", "http://x", "--output-tokens", "a"), "--output-tokens"),
            (("--url", "http://x", "--ttft-limit", "0"), "--ttft-limit"),
            (("--url", "http://x", "--itl-limit", "-1"), "--itl-limit"),
            (("--url", "http://x", "--retries", "-1"), "--retries"),
            (("--url", "http://x", "--rounds", "0"), "--rounds"),
            (("--url", "http://x", "--text", "none.txt"), "none.txt"),
            (("--url", "http://127.0.0.1:9"), "no server answers at http://127.0.0.1:9"),
        ],
    )
    def test_mistakes(self, command, arguments: tuple[str, ...], words: str) -> None:
        status, out, err = command(*arguments)
        assert (status, out) == (2, "") and words in err and err.startswith("dejavu: ") and err.count("\n") == 1


def test_without_httpx(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, out, err = command("--url", "http://x")
    assert (status, out) == (2, "") and "pip install 'dejavu-llm[serve]'" in err


@pytest.mark.slow
def test_dejavu_serve_under_load(tiny: Tiny, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The real server as a process: every request is answered and no page is lost."""
    export(tiny("opt"), tokenizer, tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat on the mat and then the other cat ran to the hat " * 20)
    arguments = (
        "--text",
        "text.txt",
        "--prompt-tokens",
        "8,16",
        "--output-tokens",
        "4,8",
        "--requests",
        "8",
        "--concurrency",
        "3",
        "--check-leaks",
        "--json",
    )
    run = subprocess.run(
        [sys.executable, "-m", "dejavu", "bench-serve", "model", "--backend", "torch", "--threads", "1", *arguments],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert [(row["completed"], row["failed"]) for row in found["rows"]] == [(8, 0)] and found["leaks"]["pages_lost"] == 0
    assert found["rows"][0]["mode"] == "dense" and found["rows"][0]["backend"] == "torch"
