"""The server's page in a headless Chromium: it shows both answers, the maps, and what went wrong, with a pointer, a keyboard and on a
phone. Without playwright or a Chromium all of it is skipped; test_page_files.py needs neither.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from helpers.page_server import BINS, CUT, PAGE, Reply, answer, models, text_chunk
from helpers.page_server import PageServer as Server

STYLE = (PAGE / "style.css").read_text(encoding="utf-8")
DENSE = [" the", " keeper", " lit", " a", " lamp", "."]
SPARSE = [" the", " keeper", " lit", " the", " lantern", ".\n"]
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("the page's browser tests need playwright (pip install playwright)")
    api = importlib.import_module("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with api.sync_playwright() as tools:
        path = found or tools.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("the page's browser tests need a Chromium on the PATH, or playwright's own (playwright install chromium)")
        browser = tools.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-background-networking"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Open]:
    """Opens the page of a server; at the end, the page must have raised no error and broken no rule of its policy."""
    problems: list[str] = []
    contexts = []

    def open_it(server: Server, *, width: int = 1280, height: int = 900, **options: Any) -> Any:
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(server.url)
        page.wait_for_selector("#run:enabled")
        return page

    yield open_it
    for context in contexts:
        context.close()
    # What the server refuses, the browser reports too: that is no fault of the page's.
    assert [problem for problem in problems if not problem.startswith("Failed to load resource")] == []


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    running = []

    def start(*, dense: Any = None, sparse: Any = None, listed: Any = None, key: str | None = None) -> Server:
        answers = {"dense": dense or answer(DENSE, traced=False, tok_s=50.0), "sparse": sparse or answer(SPARSE, traced=True, tok_s=90.0)}
        running.append(Server(listed or models(), answers, key=key).running())
        return running[-1].__enter__()

    yield start
    for server in running:
        server.__exit__(None, None, None)


def text_of(page: Any, name: str) -> str:
    return page.text_content(f"#{name}")


def wait_status(page: Any, begins: str) -> str:
    page.wait_for_function("begins => document.querySelector('#status').textContent.startsWith(begins)", arg=begins)
    return text_of(page, "status")


def wait_text(page: Any, name: str, text: str) -> None:
    page.wait_for_function("([id, text]) => document.getElementById(id).textContent === text", arg=[name, text])


def finished(page: Any) -> str:
    """Press Run and wait for the outcome of both answers."""
    page.click("#run")
    return wait_status(page, "Sparse ran")


def pixel(page: Any, name: str, x: float, y: float) -> list[int]:
    """Colour of a canvas, x and y being shares of the part of it between its margins (24 and 44 px)."""
    script = """([id, x, y]) => {
        const canvas = document.getElementById(id), ratio = canvas.width / canvas.clientWidth;
        const left = (24 + x * (canvas.clientWidth - 68)) * ratio;
        return [...canvas.getContext("2d").getImageData(Math.floor(left), Math.floor(y * canvas.height), 1, 1).data];
    }"""
    return page.evaluate(script, [name, x, y])


def rgb(name: str) -> list[int]:
    """A colour of the light theme."""
    found = re.search(rf"--{name}: #([0-9a-f]{{6}})", STYLE)
    assert found is not None
    return [*bytes.fromhex(found[1]), 255]


def test_page_shows_both_answers(serve: Callable[..., Server], open_page: Open) -> None:
    server = serve()
    page = open_page(server)
    assert text_of(page, "facts") == "tiny · 3 layers of 640 neurons and 4 heads · native, fp32"
    page.fill("#prompt", "Once")
    page.fill("#max-tokens", "6")
    page.fill("#seed", "7")
    assert finished(page) == (
        "Sparse ran at 1.80\u00d7 the speed of dense while recording its maps, "
        "reading 34.9% of the MLP neurons and 25.0% of the heads. "
        "The answers part at token 4."
    )
    assert text_of(page, "dense-text") == "Once" + "".join(DENSE)
    assert text_of(page, "sparse-text") == "Once" + "".join(SPARSE)
    assert [text_of(page, f"sparse-{name}") for name in ("speed", "tokens", "mlp", "heads")] == ["90.0", "6", "34.9%", "25.0%"]
    assert [text_of(page, f"dense-{name}") for name in ("speed", "tokens", "mlp", "heads")] == ["50.0", "6", "100%", "100%"]
    assert [page.text_content(f"#{side}-text .fork") for side in ("dense", "sparse")] == [" a", " the"]
    path, _, body = server.requests[0]
    expected = {"model": "tiny:dense", "prompt": "Once", "max_tokens": 6, "temperature": 0.6, "seed": 7, "stream": True}
    assert path == "/v1/completions" and body == expected | {"stream_options": {"include_usage": True}}
    assert server.requests[1][2] == body | {"model": "tiny", "dejavu": {"trace": True}}


def test_page_says_where_both_are_the_same_or_one_ends_first(serve: Callable[..., Server], open_page: Open) -> None:
    assert finished(open_page(serve(dense=answer(SPARSE, traced=False, tok_s=50)))).endswith("Both answers are the same.")
    page = open_page(serve(dense=answer([*SPARSE, " So"], traced=False, tok_s=50)))
    assert finished(page).endswith("The sparse answer ends first.")
    assert page.text_content("#dense-text .fork") == " So" and page.query_selector("#sparse-text .fork") is None


def test_page_says_nothing_of_the_speed_of_one_token(serve: Callable[..., Server], open_page: Open) -> None:
    server = serve(dense=answer(SPARSE[:1], traced=False, tok_s=50), sparse=answer(SPARSE[:1], traced=True, tok_s=90))
    page = open_page(server)
    page.click("#run")
    one = "A single token comes from the prompt and tells nothing of the speed. "
    assert wait_status(page, "A single token") == one + "Both answers are the same."
    for side in ("dense", "sparse"):
        assert [text_of(page, f"{side}-{name}") for name in ("speed", "tokens", "mlp", "heads")] == ["\u2013", "1", "\u2013", "\u2013"]
    assert page.is_visible("#maps") and page.is_hidden("#mean-note")
    server.answers["sparse"] = answer(SPARSE, traced=True, tok_s=90)
    page.click("#run")
    page.wait_for_function("() => document.querySelector('#status').textContent.includes('Sparse answered')")
    read = "Sparse answered, reading 34.9% of the MLP neurons and 25.0% of the heads. "
    assert text_of(page, "status") == one + read + "The answers part at token 2." and page.is_visible("#mean-note")


def test_page_maps_follow_the_token_under_the_pointer(serve: Callable[..., Server], open_page: Open) -> None:
    page = open_page(serve())
    assert page.is_hidden("#maps")
    finished(page)
    wait_text(page, "token-number", "6 of 6")
    page.hover("#sparse-text .piece:nth-of-type(4)")  # the first span is the prompt
    wait_text(page, "token-number", "3 of 6")
    assert text_of(page, "token-text") == " lit" and page.text_content(".shown") == " lit"
    full, none = rgb("neurons-3"), rgb("neurons-0")
    bins = [pixel(page, "neurons-token", (place + 0.4) / BINS, 0.15) for place in range(BINS)]
    assert bins == [full if place == 2 else none for place in range(BINS)]
    assert [pixel(page, "neurons-token", 32.4 / BINS, y) for y in (0.5, 0.8)] == [none, full]
    assert [pixel(page, "heads-token", (head + 0.4) / 4, 0.5) for head in range(4)] == [
        rgb("heads-3") if head == 2 else rgb("heads-0") for head in range(4)
    ]
    assert page.get_attribute("#neurons-token", "aria-label") == "Neurons read for token 3: layer 0 1.6%, layer 1 0%, layer 2 100%"


def test_page_maps_follow_the_newest_token_unless_the_reader_looks_at_one(serve: Callable[..., Server], open_page: Open) -> None:
    gates = [threading.Event() for _ in range(3)]
    steps = answer(SPARSE, traced=True, tok_s=90.0)
    page = open_page(serve(sparse=[*steps[:2], gates[0], steps[2], gates[1], steps[3], gates[2], *steps[4:]]))
    page.fill("#max-tokens", "12")
    page.click("#run")
    wait_text(page, "token-number", "2 of 2")
    places = [pixel(page, "neurons-time", (token + 0.5) / 12, 0.85) for token in (0, 2, 11)]
    assert places == [rgb("neurons-3"), [0, 0, 0, 0], [0, 0, 0, 0]]  # room for the tokens to come
    page.hover("#sparse-text .piece:nth-of-type(2)")
    wait_text(page, "token-number", "1 of 2")
    gates[0].set()
    wait_text(page, "token-number", "1 of 3")
    page.mouse.move(0, 0)
    wait_text(page, "token-number", "3 of 3")
    gates[1].set()
    wait_text(page, "token-number", "4 of 4")
    gates[2].set()
    wait_text(page, "token-number", "6 of 6")


def test_page_maps_over_time(serve: Callable[..., Server], open_page: Open) -> None:
    page = open_page(serve())
    finished(page)
    # The first token comes from the prompt's pass, which is dense; later ones leave layer 1 out and take all of layer 2.
    over_time = [[pixel(page, "neurons-time", (token + 0.5) / 6, y) for token in range(5)] for y in (0.5, 0.85)]
    assert over_time == [[rgb("neurons-3"), *[rgb("neurons-0")] * 4], [rgb("neurons-3")] * 5]
    box = page.locator("#neurons-time").bounding_box()
    page.mouse.move(box["x"] + 24 + (box["width"] - 68) * 0.5 / 6, box["y"] + 10)
    wait_text(page, "token-number", "1 of 6")
    assert text_of(page, "token-note") == "out of the prompt's pass, which is dense"
    assert pixel(page, "neurons-token", 32.4 / BINS, 0.5) == rgb("neurons-3")


def test_page_runs_without_maps_at_full_speed(serve: Callable[..., Server], open_page: Open) -> None:
    server = serve()
    page = open_page(server)
    finished(page)
    assert page.is_visible("#maps")
    server.answers["sparse"] = answer(SPARSE, traced=False, tok_s=100.0)
    page.check("input[value=off]", force=True)
    page.click("#run")
    outcome = wait_status(page, "Sparse ran at 2.00")
    assert "recording" not in outcome and outcome.endswith("The answers part at token 4.")
    assert "dejavu" not in server.requested("sparse") and page.is_hidden("#maps") and page.locator(".piece[tabindex]").count() == 0
    page.hover("#sparse-text .piece:nth-of-type(4)")
    page.focus("#sparse-text")  # by which it scrolls
    assert page.evaluate("document.activeElement.id") == "sparse-text"


def test_page_says_so_where_no_head_is_skipped(serve: Callable[..., Server], open_page: Open) -> None:
    page = open_page(serve())
    finished(page)
    assert page.is_visible("#heads-time") and page.is_hidden("#heads-note")
    steps = answer(SPARSE, traced=True, tok_s=90.0)
    for step in steps[:-3]:
        (one,) = step["dejavu"]["trace"]
        one["head_density"] = None if one["head_density"] is None else 1.0
    steps[-3]["dejavu"]["head_density"] = 1.0
    page = open_page(serve(sparse=steps))
    assert "and all heads." in finished(page)
    assert page.is_hidden("#heads-time") and page.is_visible("#heads-note")


def test_page_works_with_the_keyboard_alone(serve: Callable[..., Server], open_page: Open) -> None:
    page = open_page(serve())
    focused = []
    for _ in range(8):
        page.keyboard.press("Tab")
        focused.append(page.evaluate("document.activeElement.id || document.activeElement.value"))
    assert focused == ["prompt", "apart", "on", "max-tokens", "temperature", "seed", "run", "dense-text"]
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    wait_status(page, "Sparse ran")
    page.focus("#dense-text")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == ".\n"  # one stop for the whole text: the token that is shown
    for key, token in (("ArrowLeft", 5), ("ArrowLeft", 4), ("Home", 1), ("ArrowRight", 2), ("End", 6), ("ArrowRight", 6)):
        page.keyboard.press(key)
        wait_text(page, "token-number", f"{token} of 6")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "token"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("ArrowLeft")
    wait_text(page, "token-number", "5 of 6")
    assert page.locator("#sparse-text [tabindex='0']").count() == 1


def test_page_runs_in_turn_or_together(serve: Callable[..., Server], open_page: Open) -> None:
    gate = threading.Event()
    dense = answer(DENSE, traced=False, tok_s=50.0)
    server = serve(dense=[*dense[:2], gate, *dense[2:]])
    page = open_page(server)
    page.click("#run")
    wait_text(page, "dense-tokens", "2")
    assert text_of(page, "sparse-state") == "waits for its turn" and len(server.requests) == 1
    assert page.is_hidden("#run") and page.is_visible("#stop")
    gate.set()
    wait_status(page, "Sparse ran")
    gate.clear()
    page.check("input[value=together]", force=True)
    page.click("#run")
    wait_text(page, "sparse-tokens", "6")
    assert text_of(page, "dense-tokens") == "2"
    gate.set()
    assert "while sharing the machine and recording its maps" in wait_status(page, "Sparse ran")


def test_page_stays_quiet_while_text_streams(serve: Callable[..., Server], open_page: Open) -> None:
    words = [f" word{place}" for place in range(120)]
    page = open_page(serve(dense=answer(words, traced=False, tok_s=50), sparse=answer(words, traced=True, tok_s=90)))
    page.evaluate("""() => {
        window.said = [];
        const watch = new MutationObserver(() => window.said.push(document.querySelector("#status").textContent));
        watch.observe(document.querySelector("#status"), { childList: true, characterData: true, subtree: true });
    }""")
    finished(page)
    said = page.evaluate("window.said")
    assert said[:2] == ["The dense answer is being written.", "The sparse answer is being written."] and len(said) == 3
    assert page.locator("[aria-live], [role=status], [role=alert], [role=log]").count() == 3  # the status, and an error for each side


@pytest.mark.parametrize("key", [False, True])
def test_page_stops(serve: Callable[..., Server], open_page: Open, key: bool) -> None:
    gate = threading.Event()
    flood = [text_chunk(" x") for _ in range(20_000)]  # enough that a server notices its client's going
    server = serve(dense=[text_chunk(" one"), gate, *flood])
    page = open_page(server)
    page.focus("#run")
    page.keyboard.press("Enter")
    wait_text(page, "dense-tokens", "1")
    assert page.evaluate("document.activeElement.id") == "stop"
    if key:
        page.keyboard.press("Escape")
    else:
        page.click("#stop")
    wait_status(page, "Stopped.")
    gate.set()
    assert server.gone.wait(15), "the request goes on"
    assert [text_of(page, f"{side}-state") for side in ("dense", "sparse")] == ["stopped", "not run"]
    assert len(server.requests) == 1 and page.evaluate("document.activeElement.id") == "run"
    server.answers["dense"] = answer(DENSE, traced=False, tok_s=50.0)
    finished(page)
    assert text_of(page, "dense-text").endswith("".join(DENSE)) and " one" not in text_of(page, "dense-text")


LOST = "The connection to the server was lost."


@pytest.mark.parametrize(
    ("dense", "said"),
    [
        (Reply(429, "queue", {"Retry-After": "7"}), "The server is busy and its queue is full. Try again in 7 seconds."),
        (Reply(429, "queue"), "The server is busy and its queue is full. Try again soon."),
        (Reply(400, "the prompt has 9 tokens <b>"), "The server refused (400): the prompt has 9 tokens <b>."),
        (Reply(500, "a step failed"), "The server failed (500): a step failed."),
        ([text_chunk(" a"), CUT], f"{LOST} What came until then is above."),
        ([CUT], LOST),
        (
            [text_chunk(" a"), {"error": {"message": "a step failed"}}, CUT],
            "The server failed: a step failed. What came until then is above.",
        ),
    ],
)
def test_page_says_what_went_wrong(serve: Callable[..., Server], open_page: Open, dense: Any, said: str) -> None:
    page = open_page(serve(dense=dense))
    page.click("#run")
    wait_status(page, "This run did not finish")
    assert text_of(page, "dense-error") == said and page.is_visible("#dense-error")
    assert text_of(page, "sparse-text").endswith("".join(SPARSE)) and page.is_hidden("#sparse-error")  # the other side ran
    assert page.is_visible("#run")


@pytest.mark.parametrize("order", ["apart", "together"])
def test_page_says_once_that_the_server_is_gone(serve: Callable[..., Server], open_page: Open, order: str) -> None:
    page = open_page(serve())
    page.route("**/v1/**", lambda route: route.abort())
    page.check(f"input[value={order}]", force=True)
    page.click("#run")
    assert wait_status(page, "The server does") == "The server does not answer. Is it still running?"
    assert page.is_hidden("#dense-error") and page.is_hidden("#sparse-error")
    assert [text_of(page, f"{side}-state") for side in ("dense", "sparse")] == ["failed", "failed"]


def test_page_asks_for_a_key_only_where_one_is_required(serve: Callable[..., Server], open_page: Open) -> None:
    page = open_page(serve())
    assert page.is_hidden("#key-field")
    server = serve(key="s3cret")
    page = open_page(server)
    assert wait_status(page, "The server wants an API key") and page.is_visible("#key-field")
    assert page.evaluate("document.activeElement.id") == "key"
    page.fill("#key", "wrong")
    page.click("#run")
    wait_status(page, "The server does not take this API key.")
    page.fill("#key", "s3cret")
    page.keyboard.press("Enter")
    wait_status(page, "Sparse ran")
    assert [headers["Authorization"] for _, headers, _ in server.requests] == ["Bearer s3cret"] * 2
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("key", ["ключ", "clé", "a\tb"])
def test_page_sends_no_key_that_no_header_can_have(serve: Callable[..., Server], open_page: Open, key: str, known: bool) -> None:
    page = open_page(serve(key="s3cret"))
    if known:
        page.fill("#key", "s3cret")
        finished(page)
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    page.fill("#key", key)
    page.click("#run")
    assert wait_status(page, "This API key") == "This API key cannot be sent: it may have only ASCII letters, digits and signs."
    assert sent == [] and page.is_hidden("#dense-error") and page.evaluate("document.activeElement.id") == "key"
    page.fill("#key", "s3cret")
    finished(page)


def test_page_needs_no_more_of_a_model_than_its_mode(serve: Callable[..., Server], open_page: Open) -> None:
    listed = [{"id": model["id"], "dejavu": {"mode": model["dejavu"]["mode"]}} for model in models()]
    page = open_page(serve(listed=listed))
    assert text_of(page, "facts") == "tiny"
    finished(page)


def test_page_without_an_adapter(serve: Callable[..., Server], open_page: Open) -> None:
    page = open_page(serve(listed=models(adapter=False)))
    page.click("#run")
    assert wait_status(page, "Dense alone") == "Dense alone: the server runs this model without an adapter."
    assert (
        page.is_hidden("#sparse")
        and page.is_hidden("#order")
        and page.is_hidden("#record")
        and text_of(page, "dense-text").endswith("".join(DENSE))
    )


def test_page_chats_where_the_model_has_a_template(serve: Callable[..., Server], open_page: Open) -> None:
    page = open_page(serve())
    assert page.is_hidden("#kind")
    dense, sparse = answer(DENSE, traced=False, tok_s=50, chat=True), answer(SPARSE, traced=True, tok_s=90, chat=True)
    server = serve(listed=models(chat=True), dense=dense, sparse=sparse)
    page = open_page(server)
    page.check("input[value=chat]", force=True)
    assert text_of(page, "prompt-label") == "Message"
    page.fill("#prompt", "Hello")
    finished(page)
    assert {path for path, _, _ in server.requests} == {"/v1/chat/completions"}
    assert server.requested("sparse")["messages"] == [{"role": "user", "content": "Hello"}] and "prompt" not in server.requested("dense")
    assert text_of(page, "sparse-text") == "".join(SPARSE) and text_of(page, "sparse-tokens") == "6"


def test_page_reads_streams_cut_anywhere(serve: Callable[..., Server], open_page: Open) -> None:
    pieces = [" na\u00efve", " \u2014", " \U0001f600", "\u4f60"]
    body = b": a comment\r\n\r\n"
    for step in answer(pieces, traced=False, tok_s=50.0):
        body += step if isinstance(step, bytes) else b"data: " + json.dumps(step, ensure_ascii=False).encode() + b"\r\n\r\n"
    page = open_page(serve(dense=[body[at : at + 5] for at in range(0, len(body), 5)]))
    finished(page)
    assert text_of(page, "dense-text").endswith("".join(pieces)) and text_of(page, "dense-tokens") == "4"


def test_page_tokens_that_share_a_piece(serve: Callable[..., Server], open_page: Open) -> None:
    # The bytes of one character from two tokens: the first brings no text.
    sparse = answer([" a", "", "\u4f60", " b", ""], traced=True, tok_s=90.0)
    page = open_page(serve(sparse=sparse))
    finished(page)
    assert page.locator("#sparse-text .piece").all_text_contents() == [" a", "\u4f60", " b"]
    for token, shown in ((1, " a"), (2, "\u4f60"), (3, "\u4f60"), (4, " b"), (5, None)):
        page.fill("#token", str(token))
        wait_text(page, "token-number", f"{token} of 5")
        assert page.locator(".piece.shown").all_text_contents() == ([shown] if shown else [])


def test_page_takes_everything_as_text(serve: Callable[..., Server], open_page: Open) -> None:
    nasty = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    listed = models()
    listed[0]["id"] = nasty
    dense, sparse = answer([nasty, "."], traced=False, tok_s=50), answer([nasty, "."], traced=True, tok_s=90)
    page = open_page(serve(listed=listed, dense=dense, sparse=sparse))
    page.fill("#prompt", nasty)
    finished(page)
    assert text_of(page, "dense-text") == text_of(page, "sparse-text") == f"{nasty}{nasty}." and nasty in text_of(page, "facts")
    assert page.locator("main img, main script").count() == 0


def call_of(page: Any) -> tuple[list[str], dict[str, Any]]:
    """The words of the command that the page shows, and the body among them."""
    *words, body = shlex.split(text_of(page, "call").replace("\\\n", ""))
    return words, json.loads(body)


def test_page_shows_the_call_that_it_makes(serve: Callable[..., Server], open_page: Open) -> None:
    server = serve(listed=models(chat=True))
    page = open_page(server)
    page.click("summary")
    words = ["curl", f"{server.url}v1/completions", "-H", "Content-Type: application/json", "-d"]
    body = {"model": "tiny", "prompt": "The garden behind the house was", "max_tokens": 80, "temperature": 0.6, "seed": 3}
    assert call_of(page) == (words, body) and page.is_hidden("#no-call")
    assert text_of(page, "address") == f"{server.url}v1" and page.is_visible("#any-key") and page.is_hidden("#own-key")
    # It follows the form.
    for name, value in (("prompt", 'It\'s "so"'), ("max-tokens", "7"), ("temperature", "0"), ("seed", "11")):
        page.fill(f"#{name}", value)
    body = {"model": "tiny", "prompt": 'It\'s "so"', "max_tokens": 7, "temperature": 0, "seed": 11}
    assert call_of(page) == (words, body)
    for name in ("max-tokens", "temperature", "seed"):
        page.fill(f"#{name}", "")
    assert call_of(page) == (words, {"model": "tiny", "prompt": 'It\'s "so"'})  # not null
    page.check("input[value=chat]", force=True)
    words[1] = f"{server.url}v1/chat/completions"
    assert call_of(page) == (words, {"model": "tiny", "messages": [{"role": "user", "content": 'It\'s "so"'}]})
    page.check("input[value=completion]", force=True)
    assert call_of(page)[1] == {"model": "tiny", "prompt": 'It\'s "so"'}


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_page_shows_a_call_that_a_shell_runs(serve: Callable[..., Server], open_page: Open, kind: str, shell: str) -> None:
    if shutil.which("curl") is None or shutil.which(shell) is None:
        pytest.skip(f"needs curl and {shell}")
    chat = kind == "chat"
    dense, sparse = answer(DENSE, traced=False, tok_s=50, chat=chat), answer(SPARSE, traced=True, tok_s=90, chat=chat)
    server = serve(listed=models(chat=True), dense=dense, sparse=sparse, key="s3cret")
    page = open_page(server)
    page.click("summary")
    assert page.is_hidden("#call") and page.is_visible("#no-call") and text_of(page, "call") == ""  # no model is known yet
    assert page.is_visible("#own-key") and page.is_hidden("#any-key")
    page.fill("#key", "s3cret")
    page.fill("#prompt", "It's \"so\" isn''t, `id` $HOME $(id) !! \\n \\' %41\nnaïve\t— 你好 \U0001f600'")
    finished(page)
    page.check(f"input[value={kind}]", force=True)
    finished(page)
    assert page.is_visible("#call") and page.is_hidden("#no-call") and "s3cret" not in page.inner_text("footer")
    environment = {"PATH": os.environ["PATH"], "DEJAVU_KEY": "s3cret", "no_proxy": "*"}
    subprocess.run([shell, "-c", text_of(page, "call")], env=environment, check=True, capture_output=True, timeout=20)
    (path, _, body), (shown_path, headers, shown) = server.requests[-2:]
    assert headers["Authorization"] == "Bearer s3cret" and shown_path == path
    assert shown == {key: value for key, value in body.items() if key not in {"stream", "stream_options", "dejavu"}}


def test_page_refuses_what_the_form_does_not_allow(serve: Callable[..., Server], open_page: Open) -> None:
    server = serve()
    page = open_page(server)
    for name, value in (("max-tokens", "0"), ("temperature", "-1"), ("seed", ""), ("prompt", "")):
        before = page.input_value(f"#{name}")
        page.fill(f"#{name}", value)
        page.click("#run")
        assert page.evaluate("document.querySelector(':invalid:not(form)').id") == name
        page.fill(f"#{name}", before)
    assert server.requests == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone(serve: Callable[..., Server], open_page: Open, scheme: str) -> None:
    page = open_page(serve(), width=390, height=844, color_scheme=scheme, has_touch=True)
    page.fill("#prompt", "A word " + 200 * "o")
    finished(page)
    page.tap("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("(({ scrollWidth, clientWidth }) => scrollWidth - clientWidth)(window.call)") == 0  # its lines wrap
    boxes = [page.locator(f"#{name}").bounding_box() for name in ("dense", "sparse", "neurons-token", "heads-token")]
    assert [box["x"] for box in boxes[:2]] == [boxes[0]["x"]] * 2
    assert all(above["y"] + above["height"] <= below["y"] for above, below in pairwise(boxes))
    assert page.locator("#run").bounding_box()["height"] >= 40
    page.tap("#sparse-text .piece:nth-of-type(3)")
    wait_text(page, "token-number", "2 of 6")
    colours = page.evaluate("[document.body, document.querySelector('#run')].map((node) => getComputedStyle(node).backgroundColor)")
    assert colours == {"light": ["rgb(254, 254, 254)", "rgb(0, 114, 178)"], "dark": ["rgb(20, 23, 27)", "rgb(86, 180, 233)"]}[scheme]


def test_page_long_answers_scroll_next_to_their_maps(serve: Callable[..., Server], open_page: Open) -> None:
    words = [f" word{place}" for place in range(400)]
    page = open_page(serve(dense=answer(words, traced=False, tok_s=50), sparse=answer(words, traced=True, tok_s=90)))
    finished(page)
    top, most = page.evaluate(
        "(({ scrollTop, scrollHeight, clientHeight }) => [scrollTop, scrollHeight - clientHeight])(window['sparse-text'])"
    )
    assert most > 0 and top >= most - 2  # it kept to the end as the text came
    page.fill("#token", "1")
    page.wait_for_function("() => document.querySelector('#sparse-text').scrollTop === 0")
    assert page.locator("#maps").bounding_box()["y"] < 900
