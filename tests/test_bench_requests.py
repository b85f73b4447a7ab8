"""Prompts and whole requests: what a program is asked to do, what a row says of it, and what has no room."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import Tiny
from dejavu.bench.requests import ROUNDS, USUAL, Request, bench_requests, fits, request_of
from dejavu.bench.variants import DENSE_VARIANT, Variant
from dejavu.engine.options import EngineOptions
from helpers.engines import ids_of, random_layers
from helpers.peers import FakeClock, FakePeer

IDS = ids_of(7, 60)
TORCH: dict[str, Any] = {"name": "tiny", "options": EngineOptions(backend="torch")}


def test_a_request_is_a_prompt_and_its_steps_in_turns(tiny: Tiny) -> None:
    """N new tokens are the prefill's and N - 1 steps; five turns count, of every mode and peer."""
    model = tiny("opt")
    peer = FakePeer(model)
    peer.clock = FakeClock()
    modes = [DENSE_VARIANT, Variant(mode="sparse", layers=random_layers(model, mlp=1, heads=None))]
    wanted = [Request(prompt=9), Request(prompt=6, new=4)]
    found = bench_requests(model, modes, IDS, **TORCH, requests=wanted, adapter="0123", peers=[peer], clock=peer.clock)
    rows = {(row.op, row.mode): row for row in found.rows}
    assert list(rows) == [(op, mode) for op in ("prefill", "request") for mode in ("dense", "sparse", "transformers")]
    prompt, request = rows["prefill", "transformers"], rows["request", "transformers"]
    assert (prompt.context, prompt.new_tokens, request.context, request.new_tokens) == (9, None, 6, 4)
    assert (prompt.p50_us, prompt.tok_s) == pytest.approx((500_001, 9 / 0.500001))
    assert (request.p50_us, request.tok_s) == pytest.approx((1_250_001, 4 / 1.250001)), "half a second, and a quarter for each of 3 steps"
    assert peer.requested == [IDS[: 6 + step + 1] for _ in range(ROUNDS) for step in range(3)]
    sparse = rows["request", "sparse"]
    assert sparse.sparse and sparse.adapter == "0123" and 0 < (sparse.mlp_density or 0) < 1 and rows["request", "dense"].mlp_density == 1
    assert rows["prefill", "sparse"].mlp_density == 1, "a prompt is read densely"
    ratios = {(each["op"], each["mode"], each["against"]): each["ratio"] for each in found.ratios}
    own = rows["request", "sparse"].speed
    assert ratios["request", "sparse", "transformers"] == pytest.approx(own / request.speed)
    assert len(ratios) == 6 and ("prefill", "sparse", "dense") in ratios


def test_an_engine_that_reads_a_prompt_is_the_one_that_decodes(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mode's engine is made once, with room for the longest."""
    made: list[EngineOptions] = []

    def counted(*arguments: Any) -> Any:
        made.append(arguments[-1])
        return make(*arguments)

    make = bench_requests.__globals__["make_engine"]
    monkeypatch.setattr("dejavu.bench.requests.make_engine", counted)
    bench_requests(tiny("opt"), [DENSE_VARIANT], IDS, **TORCH, requests=[Request(prompt=3, new=2), Request(prompt=7)])
    assert [(options.num_slots, options.cache_tokens) for options in made] == [(1, 7 + 64)]


def test_what_has_no_room_is_refused(tiny: Tiny) -> None:
    model = tiny("opt")
    assert [str(request) for request in USUAL] == ["512", "128+128", "1024+128"]
    with pytest.raises(ValueError, match="a request of 1024\\+128 tokens needs 1152 positions, the model has 64"):
        bench_requests(model, [DENSE_VARIANT], IDS, **TORCH, requests=USUAL[-1:])
    assert "needs a text of 61" in str(fits(Request(prompt=61), model.config, IDS))
    assert "at least 1 of each" in str(fits(Request(prompt=4, new=0), model.config, IDS))
    assert request_of("16+8") == Request(prompt=16, new=8)
    with pytest.raises(ValueError, match=r"--request 16x8 is no PROMPT\+NEW, such as 128\+128"):
        request_of("16x8")
