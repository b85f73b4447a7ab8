"""transformers on views of our tensors: the same memory, the same logits, eager and with a cache of fixed size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from conftest import Tiny
from dejavu.bench.peers.cuda import TransformersViews, network_of_views, open_views
from dejavu.bench.variants import check_peer
from dejavu.config import RopeConfig
from dejavu.model.families import FAMILIES, is_transposed
from helpers.engines import ids_of
from helpers.peers import closing, forward

IDS = ids_of(7, 90)
LLAMA3 = RopeConfig(type="llama3", factor=4.0, original_max_positions=32)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {}),
    "opt, post-norm and a narrow embedding": ("opt", {"pre_norm": False, "final_norm": False, "embed_size": 16}),
    "opt, own head": ("opt", {"tied_head": False}),
    "llama": ("llama", {}),
    "llama, relu, biases, tied head": (
        "llama",
        {"activation": "relu", "qkv_bias": True, "out_bias": True, "mlp_bias": True, "tied_head": True},
    ),
    "llama 3": ("llama", {"rope": LLAMA3}),
}


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Compiling takes a while: functions run as they are, and what torch.compile was asked for is kept."""
    requested: list[dict[str, Any]] = []

    def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        requested.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    return requested


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_is_a_view_of_ours(tiny: Tiny, kind: str) -> None:
    family, changes = MODELS[kind]
    model = tiny(family, **changes)
    net = network_of_views(model, model.config)
    theirs = dict(net.named_parameters(remove_duplicate=False))
    for ours, parameter in model.named_weights():
        view = theirs.pop(FAMILIES[family].full_name(FAMILIES[family].foreign_name(ours, model.config)))
        assert view.data_ptr() == parameter.data_ptr() and view.dtype == parameter.dtype
        assert torch.equal(view, parameter.t() if is_transposed(ours) else parameter)
    if model.config.tied_head:
        assert theirs.pop("lm_head.weight").data_ptr() == model.embed.weight.data_ptr()
    assert theirs == {} and not any(buffer.is_meta for buffer in net.buffers()) and not net.training


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("compiled", [False, True])
def test_it_decodes_our_logits(tiny: Tiny, no_compiler: list[dict[str, Any]], kind: str, compiled: bool) -> None:
    family, changes = MODELS[kind]
    model = tiny(family, max_positions=128, **changes)
    with closing(TransformersViews(model, model.config, compiled, name="tiny")) as peer:
        # More steps than the cache had room for; shorter and longer prompts; the same size again, which keeps the cache.
        for prompt, steps in ((7, 80), (20, 3), (18, 3), (5, 3)):
            peer.prefill(IDS[:prompt])
            found = torch.stack([peer.step(token) for token in IDS[prompt : prompt + steps]])
            torch.testing.assert_close(found, forward(model, IDS[: prompt + steps])[prompt:], rtol=0, atol=1e-4)
        torch.testing.assert_close(peer.logits(IDS), forward(model, IDS), rtol=0, atol=1e-4)
        assert "after 90 of 90 tokens" in check_peer(peer, model, IDS, "tiny")
        assert (peer.mode, peer.dtype, peer.device, peer.model) == (
            "transformers-compile" if compiled else "transformers", "fp32", "cpu", "tiny",
        )  # fmt: skip
    assert no_compiler == ([{"dynamic": False, "mode": "reduce-overhead", "fullgraph": True}] if compiled else [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_it_has_the_dtype_of_the_tensors(tiny: Tiny, no_compiler: list[dict[str, Any]], dtype: torch.dtype, compiled: bool) -> None:
    model = tiny("llama").to(dtype)
    with closing(TransformersViews(model, model.config, compiled, name="tiny")) as peer:
        assert peer.dtype == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype] and peer.logits(IDS[:9]).dtype == torch.float32
        assert "picks the same next token" in check_peer(peer, model, IDS, "tiny")


def test_a_cache_of_fixed_size_stays_where_it_is(tiny: Tiny, no_compiler: list[dict[str, Any]]) -> None:
    """A compiled step has its address built in."""
    model = tiny("opt", max_positions=128)
    with closing(TransformersViews(model, model.config, True, name="tiny")) as peer:
        peer.prefill(IDS[:20])
        peer.step(IDS[20])
        first = peer._cache.layers[0].keys.data_ptr()
        peer.prefill(IDS[:12])
        assert peer._cache.layers[0].keys.data_ptr() == first
        torch.testing.assert_close(peer.step(IDS[12]), forward(model, IDS[:13])[-1], rtol=0, atol=1e-4)


def test_a_step_that_is_no_one_graph_is_compiled_in_parts(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("opt")

    def compile_function(function: Callable[..., Any], *, fullgraph: bool, **_: Any) -> Callable[..., Any]:
        def broken(**_: Any) -> None:
            raise RuntimeError("a graph break")

        return broken if fullgraph else function

    monkeypatch.setattr(torch, "compile", compile_function)
    opened, notes = open_views(["transformers", "transformers-compile"], model, name="tiny")
    assert [peer.mode for peer in opened] == ["transformers", "transformers-compile"]
    assert notes == ["transformers-compile (as one graph) cannot run: RuntimeError: a graph break"]


def test_what_does_not_compile_is_left_out_and_said(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    opened, notes = open_views(["transformers-compile"], tiny("opt"), name="tiny")
    assert opened == [] and notes == [
        f"transformers-compile ({how}) cannot run: RuntimeError: no compiler" for how in ("as one graph", "with graph breaks")
    ]


def test_what_transformers_does_not_know_is_said(tiny: Tiny) -> None:
    opened, notes = open_views(["transformers"], tiny("llama", activation="fatrelu", activation_threshold=0.1), name="tiny")
    assert opened == [] and notes[0].startswith("transformers cannot run: ") and "fatrelu" in notes[0]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_on_a_gpu_it_runs_as_one_captured_graph(tiny: Tiny, family: str) -> None:
    model = tiny(family, max_positions=128).to("cuda", torch.float16)
    opened, notes = open_views(["transformers", "transformers-compile"], model, name="tiny")
    assert notes == [] and [(peer.mode, peer.dtype, peer.device) for peer in opened] == [
        (mode, "fp16", "cuda:0") for mode in ("transformers", "transformers-compile")
    ]
    for peer in opened:
        for _ in range(2):  # the second sequence finds the step compiled and captured
            assert "picks the same next token" in check_peer(peer, model, IDS, "tiny")
        peer.close()
