"""`dejavu bench` as a command: synthetic models, densities, peers, what it prints, and what it refuses."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tokenizers

from conftest import Tiny
from dejavu.bench import comparison, ops
from dejavu.bench.models import made_up, planted, random
from dejavu.bench.peers import cuda as cuda_peers
from dejavu.bench.variants import Peer
from dejavu.cli.main import run
from dejavu.config import ModelConfig
from dejavu.loading import load
from dejavu.quality.perplexity import half_windows
from helpers.command_line import obj
from helpers.native import needs_library
from helpers.peers import FakePeer
from helpers.standins import GPU_NAME, CudaStandIn

assert cuda_peers  # before `peers.cpu` replaces a module that it imports
SHORT = ("--steps", "6", "--context", "16")


@pytest.fixture(autouse=True)
def small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 96, "max_positions": 128}
    monkeypatch.setitem(random.SHAPES, "llama-small", small_llama)
    monkeypatch.setitem(random.SHAPES, "opt-small", lambda: ModelConfig.from_dict(random._opt(128, 3, 4).to_dict() | sizes))


def small_llama() -> ModelConfig:
    sizes = {
        "vocab_size": 96,
        "num_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 32,
    }
    return ModelConfig.from_dict(random._smollm2().to_dict() | sizes | {"max_positions": 128})


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch, work: Path) -> list[tuple[Any, ...]]:
    """`dejavu.bench.peers.cpu` replaced: transformers runs what was exported, llama.cpp something else. What it was asked is kept."""
    requested: list[tuple[Any, ...]] = []

    def open_peers(names: Sequence[str], *, export_folder: Path | None, gguf: Path | None, threads: int) -> tuple[list[Peer], list[str]]:
        exported = None if export_folder is None else load(export_folder, backend="torch")
        requested.append((list(names), None if exported is None else exported.name, gguf, threads))
        opened: list[Peer] = []
        if "transformers" in names and exported is not None and export_folder is not None:
            opened.append(FakePeer(exported.model, name=export_folder.name))
        if "llama.cpp" in names:
            opened.append(FakePeer(load(work / "model", backend="torch").model, name="other.gguf", mode="llama.cpp", dtype="q4_1"))
        requested.append(tuple(opened))
        return opened, ["ctranslate2 is not installed"] if "ctranslate2" in names else []

    module = ModuleType("dejavu.bench.peers.cpu")
    module.open_peers = open_peers  # pyrefly: ignore[missing-attribute]
    monkeypatch.setitem(sys.modules, "dejavu.bench.peers.cpu", module)
    return requested


@needs_library
def test_a_synthetic_model(call) -> None:
    arguments = ("bench", "--synthetic", "opt-small", "--density", "0.2", "--density", "0.5", "--head-density", "0.5", *SHORT)
    result = obj(call(*arguments, "--selection", "clustered", "--selection", "hot-set", "--rank", "16", "--threads", "2", "--json"))
    rows = [row for row in result["rows"] if row["op"] == "decode"]
    assert [(row["mode"], row["selection"]) for row in rows] == [
        ("dense", None), *((mode, kind) for kind in ("clustered", "hot-set") for mode in ("sparse", "sparse+heads") * 2),
    ]  # fmt: skip
    assert all(row["synthetic"] and row["dtype"] == "int8" and row["model"] == "opt-small" for row in result["rows"])
    assert all(row["gbs"] > 0 and row["pct_ceiling"] > 0 for row in rows) and len(result["ratios"]) == 8
    assert {"predictor", "attention", "mlp", "head", "other", "read", "prefill"} <= {row["op"] for row in result["rows"]}
    shown = call(*arguments)
    assert "opt-small (synthetic)" in shown and "sparse, uniform" in shown and "speed ratio sparse+heads / dense" in shown


@needs_library
def test_a_synthetic_silu_model_selects_by_gates_and_by_inputs(call) -> None:
    arguments = ("bench", "--synthetic", "llama-small", "--dtype", "int8", "--threads", "1", *SHORT, "--json")

    def sparse(*given: str) -> list[dict[str, Any]]:
        rows = obj(call(*arguments, *given))["rows"]
        return [row for row in rows if row["op"] == "decode" and row["sparse"]]

    [gate] = sparse()
    assert (gate["method"], gate["selection"], gate["head_density"]) == ("gate", None, 1.0) and 0.3 < gate["mlp_density"] < 0.7
    rows = sparse("--method", "input", "--density", "0.75", "--density", "0.5")
    assert [(row["method"], row["mode"]) for row in rows] == [("input", "sparse")] * 2
    assert [row["mlp_density"] for row in rows] == pytest.approx([0.75, 0.5], abs=0.1)
    assert [row["head_density"] for row in rows] == pytest.approx([0.75, 0.5], abs=0.1)
    [apart] = sparse("--method", "input", "--head-density", "0.9")
    assert (apart["mlp_density"], apart["head_density"]) == pytest.approx((0.5, 0.9), abs=0.1)
    [predicted] = sparse("--method", "predicted")
    assert (predicted["method"], predicted["selection"]) == ("predicted", "uniform")


def test_a_synthetic_model_on_torch_and_dense(call) -> None:
    rows = obj(call("bench", "--synthetic", "opt-small", "--backend", "torch", "--dense", *SHORT, "--json"))["rows"]
    assert [(row["op"], row["mode"], row["dtype"]) for row in rows] == [(op, "dense", "fp32") for op in ("prefill", "read", "decode")]
    rows = obj(call("bench", "--synthetic", "opt-small", "--backend", "torch", "--dtype", "bf16", "--batch", "3", *SHORT, "--json"))["rows"]
    assert rows[-1]["mode"] == "sparse" and rows[-1]["mlp_density"] == pytest.approx(0.1, rel=0.15)
    assert rows[-1]["mlp_density"] < rows[-1]["union_density"] < 0.3


@needs_library
@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_a_synthetic_model_in_few_bits(call, dtype: str) -> None:
    arguments = ("bench", "--synthetic", "opt-small", "--dtype", dtype, "--cache-dtype", "int8", "--threads", "1")
    result = obj(call(*arguments, *SHORT, "--json"))
    assert {row["dtype"] for row in result["rows"]} == {dtype} and all(row["tok_s"] > 0 for row in result["rows"] if row["op"] == "decode")
    assert (result["cache_dtype"], result["screened_head"]) == ("int8", 0)


def test_an_adapter_at_other_densities(call) -> None:
    arguments = ("bench", "model", "--text", "text.txt", "--adapter", "adapter", "--backend", "torch", *SHORT)
    result = obj(call(*arguments, "--density", "0.05", "--density", "0.6", "--head-density", "0.5", "--json"))
    rows = [row for row in result["rows"] if row["op"] == "decode"]
    assert [row["mode"] for row in rows] == ["dense", "sparse", "sparse+heads", "sparse", "sparse+heads"]
    assert rows[1]["mlp_density"] < 0.2 < 0.4 < rows[3]["mlp_density"] and rows[2]["head_density"] < 0.75
    assert not any(row["synthetic"] or row["selection"] for row in rows)
    assert "perplexity as the adapter states it" not in call(*arguments, "--density", "0.05")


def test_against_peers(call, peers: list[tuple[Any, ...]]) -> None:
    arguments = ("bench", "model", "--text", "text.txt", "--adapter", "adapter", "--backend", "torch", *SHORT, "--threads", "1")
    against = ("--against", "transformers,ctranslate2", "--against", "llama.cpp", "--gguf", "a.gguf")
    result = obj(call(*arguments, *against, "--json"))
    assert peers[0] == (["transformers", "ctranslate2", "llama.cpp"], "model", Path("a.gguf"), 1)
    assert all(isinstance(peer, FakePeer) and peer.closed for peer in peers[1])
    decodes = [row for row in result["rows"] if row["op"] == "decode"]
    assert [row["mode"] for row in decodes] == ["dense", "sparse", "sparse+heads", "transformers", "llama.cpp"]
    assert [row["model"] for row in decodes[3:]] == ["model", "other.gguf"]
    pairs = {(each["mode"], each["against"]): each["ratio"] for each in result["ratios"]}
    assert set(pairs) == {("sparse", "dense"), ("sparse+heads", "dense")} | {
        (mode, peer) for mode in ("dense", "sparse", "sparse+heads") for peer in ("transformers", "llama.cpp")
    }
    assert pairs["sparse", "llama.cpp"] == pytest.approx(decodes[1]["tok_s"] / decodes[4]["tok_s"])
    assert "ctranslate2 is not installed" in result["notes"] and any("another model than model" in note for note in result["notes"])
    shown = call(*arguments, *against)
    assert "speed ratio sparse / llama.cpp q4_1" in shown and "note: ctranslate2 is not installed" in shown


def test_requests_and_perplexity_beside_peers(call, peers: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "HALF_CONTEXT", 16)
    monkeypatch.setattr(comparison, "half_windows", lambda ids, *, bos: half_windows(ids, bos=bos, context=16))
    arguments = ("bench", "model", "--text", "text.txt", "--adapter", "adapter", "--backend", "torch", *SHORT, "--threads", "1")
    whole = ("--against", "transformers", "--prompt", "12", "--request", "8+3", "--perplexity", "32")
    result = obj(call(*arguments, *whole, "--json"))
    modes = ["dense", "sparse", "sparse+heads", "transformers"]
    timed = [(row["op"], row["context"], row["new_tokens"], row["mode"]) for row in result["rows"] if row["context"] != 16]
    assert timed == [(*what, mode) for what in (("prefill", 12, None), ("request", 8, 3)) for mode in modes]
    assert {each["op"] for each in result["ratios"]} == {"decode", "prefill", "request"}
    rows = result["perplexity"]
    assert [(row["mode"], row["peer"]) for row in rows] == [("dense", False), ("sparse", False), ("sparse", False), ("transformers", True)]
    assert rows[3]["ppl"] == pytest.approx(rows[0]["ppl"], rel=1e-5) and rows[1]["ppl"] != rows[0]["ppl"]
    assert len({(row["tokens"], row["texts_hash"]) for row in rows}) == 1 and rows[0]["texts"] == ["text.txt"]
    shown = call(*arguments, *whole)
    assert "request 8+3" in shown and "speed ratio sparse request 8+3 / transformers" in shown and "Perplexity of 14 tokens" in shown


def test_a_gguf_file_is_what_llama_cpp_runs_too(
    call, peers: list[tuple[Any, ...]], work: Path, tiny: Tiny, tok96: tokenizers.Tokenizer
) -> None:
    """And what has no room in the model is said, where nobody asked for it."""
    from helpers.gguf_files import write_gguf  # gguf is not on every machine that the other tests run on

    write_gguf(tiny("llama"), tok96, work / "small.gguf")
    result = obj(call("bench", "small.gguf", "--text", "text.txt", "--backend", "torch", *SHORT, "--against", "llama.cpp", "--json"))
    assert peers[0][2] == Path("small.gguf")
    assert any(note.endswith("needs 1152 positions, the model has 64: not timed") for note in result["notes"])
    assert any(note.startswith("no perplexity was measured: windows have 512 tokens") for note in result["notes"])


def test_a_peer_that_is_wrong_means_no_number(work: Path, peers: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(work)
    monkeypatch.setattr("test_bench.FakePeer.prefill", lambda self, ids: setattr(self, "ids", [5]))
    status = run(
        ["bench", "model", "--text", "text.txt", "--backend", "torch", *SHORT, "--against", "transformers", "--results", "no.jsonl"]
    )
    captured = capsys.readouterr()
    assert status == 2 and "not timed" in captured.err and "decode" not in captured.out and not (work / "no.jsonl").exists()
    assert all(isinstance(peer, FakePeer) and peer.closed for peer in peers[1])


def test_a_synthetic_model_against_peers(call, peers: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dejavu.kernels.processors.default_threads", lambda: 77)  # of the native engine, which does not run here
    arguments = ("bench", "--synthetic", "opt-small", "--backend", "torch", "--dense", *SHORT)
    result = obj(call(*arguments, "--against", "transformers,ctranslate2,llama.cpp", "--gguf", "a.gguf", "--json"))
    assert peers[0] == (["llama.cpp"], None, Path("a.gguf"), result["rows"][0]["threads"]) and peers[0][3] < 77
    decodes = [row for row in result["rows"] if row["op"] == "decode"]
    assert [row["mode"] for row in decodes] == ["dense", "transformers", "llama.cpp"]
    found = [(row["synthetic"], row["model"], row["shape"], row["peer"]) for row in decodes]
    ours = (True, "opt-small", "opt-small")
    assert found == [(*ours, False), (*ours, True), (False, "other.gguf", None, True)]
    assert any("ctranslate2 loads an exported model" in note for note in result["notes"])
    assert any(note.startswith("transformers fp32 picks the same next token as opt-small dense after") for note in result["notes"])


@pytest.fixture
def planted_here(cuda: type[CudaStandIn], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The GPU's backend without one: what is planted lies on the CPU. What was asked for is kept."""
    requested: list[dict[str, Any]] = []

    def planted_on_cpu(name: str, **options: Any) -> planted.PlantedModel:
        requested.append({"name": name, **options})
        return make(name, **options | {"device": "cpu"})

    make = planted.planted_model
    monkeypatch.setattr(planted, "planted_model", planted_on_cpu)
    return requested


def test_a_planted_model_on_the_gpu(call, planted_here: list[dict[str, Any]], cuda: type[CudaStandIn]) -> None:
    arguments = ("bench", "--synthetic", "opt-small", "--backend", "cuda", "--layers", "2", "--density", "0.3", "--density", "0.2")
    arguments = (*arguments, "--head-density", "0.5", "--ahead", "in-line", "--dtype", "fp32", *SHORT)
    result = obj(call(*arguments, "--against", "transformers,llama.cpp", "--json"))
    assert planted_here == [
        {
            "name": "opt-small",
            "device": "cuda",
            "dtype": "fp32",
            "density": 0.1,
            "rank": 128,
            "num_layers": 2,
            "selection": "uniform",
            "seed": 0,
        }
    ]
    decodes = [row for row in result["rows"] if row["op"] == "decode"]
    assert [row["mode"] for row in decodes] == ["dense", *("sparse in-line", "sparse+heads in-line") * 2, "transformers"]
    assert [row["nodes"] for row in decodes] == [101] * 5 + [None] and result["model"] == "opt-small[2 of 3 layers]"
    ran = {(row["model"], row["layers"], row["synthetic"], row["shape"], row["shape_layers"]) for row in result["rows"]}
    assert ran == {("opt-small[2 of 3 layers]", 2, True, "opt-small", 3)}
    assert [row["mlp_density"] for row in decodes[1:5]] == pytest.approx([0.3, 0.3, 0.2, 0.2], rel=0.2)
    assert all(options.ahead == "in-line" for options in cuda.made if options.dtype != "auto")
    assert "llama.cpp would run on the CPU and our engine on the GPU: not timed" in result["notes"]
    qualities = result["planted"]["modes"]
    assert [each["mode"] for each in qualities] == ["sparse", "sparse+heads"] * 2 and result["planted"]["rank"] == 128
    assert all(each["recall"] > 2 * each["mlp_density"] for each in qualities)
    assert qualities[0]["mlp_and_heads"] is None and qualities[1]["mlp_and_heads"]["kl"] > 0


def test_a_planted_model_shows_what_it_misses_before_its_speed(call, planted_here: list[dict[str, Any]]) -> None:
    shown = call("bench", "--synthetic", "opt-small", "--backend", "cuda", "--rank", "32", *SHORT)
    assert planted_here[0]["dtype"] == "fp16" and planted_here[0]["rank"] == 32 and planted_here[0]["density"] == pytest.approx(0.05)
    assert "opt-small (synthetic)" in shown and "backend cuda · fp16 · cache fp16" in shown and "nodes" in shown
    assert 0 < shown.index("planted, sparse: ") < shown.index("Speed of opt-small (synthetic)") and "recall" in shown
    dense = obj(call("bench", "--synthetic", "opt-small", "--backend", "cuda", "--dense", *SHORT, "--json"))
    assert dense["planted"]["modes"] == [] and [row["mode"] for row in dense["rows"] if row["op"] == "decode"] == ["dense"]


@pytest.mark.parametrize(("name", "method"), [("llama-small", "input"), ("llama-small", None), ("opt-small", "gate")])
def test_gates_and_inputs_of_a_model_made_on_the_gpu(
    call, cuda: type[CudaStandIn], monkeypatch: pytest.MonkeyPatch, name: str, method: str | None
) -> None:
    requested: list[tuple[float | None, Any]] = []

    def made_on_cpu(asked: made_up.MadeUp, *, device: str, seed: int) -> Any:
        requested.append((asked.density, device))
        return make(asked, device="cpu", seed=seed)

    make = made_up.made_up_model
    monkeypatch.setattr(made_up, "made_up_model", made_on_cpu)
    given = ("--method", method) if method else ()
    result = obj(call("bench", "--synthetic", name, "--backend", "cuda", "--layers", "2", *given, "--density", "0.4", *SHORT, "--json"))
    assert requested == [(0.4 if name == "opt-small" else None, "cuda")]
    decodes = [row for row in result["rows"] if row["op"] == "decode"]
    assert [(row["mode"], row["method"]) for row in decodes] == [("dense", None), ("sparse", method or "gate")]
    assert decodes[1]["mlp_density"] == pytest.approx(0.4, rel=0.2) and decodes[1]["layers"] == 2
    assert result["model"] == ("opt-small[2 of 3 layers]" if name == "opt-small" else name)


def test_single_ops(call, planted_here: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[Any] = []

    def op(**changes: Any) -> ops.OpRun:
        return ops.OpRun(run=lambda copy: None, bytes=100.0, check=lambda: 0.5, copies=2, **changes)

    def cuda_ops(model: Any, **options: Any) -> Any:
        requested.append(options)
        return lambda density, selection: {"head": op(sparse=False)} if density is None else {"mlp": op()}, op()

    module = ModuleType("dejavu.bench.ops_cuda")
    module.cuda_ops = cuda_ops  # pyrefly: ignore[missing-attribute]
    monkeypatch.setitem(sys.modules, "dejavu.bench.ops_cuda", module)
    monkeypatch.setattr(ops, "graph_sampler", ops.loop_sampler(time.perf_counter))
    arguments = (
        "bench",
        "--synthetic",
        "opt-small",
        "--backend",
        "cuda",
        "--ops",
        "--selection",
        "hot-set",
        "--selection",
        "uniform",
        *SHORT,
    )
    result = obj(call(*arguments, "--batch", "1", "--batch", "3", "--json"))
    rows = [row for row in result["rows"] if row["op"] not in ("decode", "prefill", "read")]
    assert requested == [{"batch": batch, "seed": 0} for batch in (1, 3)]
    at = [(density, selection) for density in (0.05, 0.1, 0.2, 0.5) for selection in ("hot-set", "uniform")]
    assert [(row["mlp_density"], row["selection"]) for row in rows] == [(None, None), *at, (1.0, None)] * 2
    assert {(row["op"], row["mode"], row["nodes"], row["head_density"]) for row in rows} == {
        ("head", "dense", None, None), ("mlp", "sparse", None, None),
    }  # fmt: skip
    assert [row["batch"] for row in rows] == [1] * 10 + [3] * 10 and {row["device"] for row in rows} == {GPU_NAME}
    shown = call(*arguments)
    assert "Single ops of opt-small" in shown and "Speed of opt-small (synthetic): batch 1, context 16" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "9"), "layers must lie between 1 and 3"),
        (("--dtype", "int8"), "dtype 'int8' is not available for a synthetic model on backend 'cuda'; choose one of fp32, fp16, bf16"),
        (("--selection", "uniform", "--selection", "published"), "a planted model has one selection on the cuda backend: name one"),
        (("--selection", "clustered"), "selection 'clustered' cannot be planted; choose one of uniform, hot-set, published"),
        (("--method", "gate", "--rank", "9"), "--method gate has no predictors: leave --rank and --selection out"),
    ],
)
def test_mistakes_on_the_gpu(
    work: Path, planted_here: list[dict[str, Any]], arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(work)
    assert run(["bench", "--synthetic", "opt-small", "--backend", "cuda", *SHORT, *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and not (work / "r.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either MODEL or --synthetic NAME"),
        (("model", "--synthetic", "opt-small"), "give either MODEL or --synthetic NAME"),
        (("--synthetic", "opt-small", "--text", "text.txt"), "--text belongs to a MODEL"),
        (("--synthetic", "opt-1t"), "no shape is called 'opt-1t'; choose one of smollm2-135m"),
        (("--synthetic", "opt-small", "--selection", "odd"), "unknown selection 'odd'; choose one of uniform, clustered, hot-set"),
        (("--synthetic", "opt-small", "--density", "1.5"), r"density must lie in \(0, 1\], not 1.5"),
        (("--synthetic", "opt-small", "--density", "nan"), r"density must lie in \(0, 1\], not nan"),
        (("--synthetic", "opt-small", "--dtype", "fp12"), "dtype 'fp12' is not available for a synthetic model on backend 'torch'"),
        (("--synthetic", "llama-small", "--method", "exact"), "--method exact cannot be made up; choose one of predicted, gate, input"),
        (("--synthetic", "llama-small", "--method", "gate", "--head-density", "0.5"), "--method gate selects no heads"),
        (
            ("--synthetic", "llama-small", "--rank", "8"),
            "llama-small selects by gate, and has no predictors: leave --rank and --selection out",
        ),
        (("--synthetic", "llama-small", "--method", "gate", "--dense"), "--dense leaves nothing to select; drop it or --method gate"),
        (("model", "--text", "text.txt", "--request", "9-9"), r"--request 9-9 is no PROMPT\+NEW"),
        (("model", "--text", "text.txt", "--prompt", "900"), "a request of 900 tokens needs 900 positions"),
        (("model", "--text", "text.txt", "--perplexity", "99"), "windows have 512 tokens"),
        (("model", "--text", "text.txt", "--perplexity", "-3"), "--perplexity takes 0 tokens or more of each text, not -3"),
        (("--synthetic", "opt-small", "--perplexity", "99"), "--perplexity belongs to a MODEL"),
        (("model", "--method", "gate"), "--method says what is made up; it needs --synthetic NAME"),
        (("--synthetic", "opt-small", "--rank", "999"), "rank must lie between 1 and 128 .*not 999"),
        (("--synthetic", "opt-small", "--rank", "0"), "rank must lie between 1 and 128 .*not 0"),
        (("--synthetic", "opt-small", "--head-density", "0.1"), "head density 0.1 is less than one of 4 head groups"),
        (("--synthetic", "opt-small", "--dense", "--density", "0.1"), "--dense leaves nothing to select"),
        (("no-such-model", "--dense", "--density", "0.1"), "--dense leaves nothing to select"),
        (("model", "--text", "text.txt", "--density", "0.1"), "a density needs predictors"),
        (("model", "--selection", "uniform"), "--selection says what is made up; it needs --synthetic NAME"),
        (("model", "--layers", "2"), "--layers says what is made up; it needs --synthetic NAME"),
        (("--synthetic", "opt-small", "--layers", "2"), "--layers takes a slice of a model planted on the GPU; backend 'torch' has none"),
        (("--synthetic", "opt-small", "--ahead", "beside"), "--ahead beside is of the cuda backend, not of 'torch'"),
        (("model", "--text", "text.txt", "--ahead", "beside"), "--ahead beside is of the cuda backend, not of 'torch'"),
        (("--synthetic", "opt-small", "--ops"), "--ops times kernels of the cuda backend, not of 'torch'"),
        (("model", "--against", "vllm"), "--against vllm is no peer; choose from transformers"),
        (("model", "--gguf", "a.gguf"), "--gguf is the model of --against llama.cpp"),
        (("--synthetic", "opt-small", "--cache-dtype", "int8"), "cache dtype 'int8' is not available on backend 'torch' in fp32"),
        (("--synthetic", "opt-small", "--screened-head", "0.1"), "a screened head is trained on a text, which a made-up model has not"),
        (("model", "--text", "text.txt", "--steps", "4"), "steps must be at least 5, not 4"),
    ],
)
def test_mistakes(work: Path, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(work)
    assert run(["bench", *arguments, "--backend", "torch"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
