"""Other programs as peers: they run our model and agree with it, a prefill starts anew, and one that cannot run says why."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import Tiny
from dejavu.bench.peers import cpu as module
from dejavu.bench.peers.cpu import CTranslate2Peer, TransformersPeer, open_peers
from dejavu.bench.peers.llama_cpp import LlamaCppPeer
from dejavu.bench.variants import Peer, check_peer
from dejavu.engine.options import EngineOptions
from dejavu.engine.torch_engine import TorchEngine
from dejavu.loading import load
from dejavu.model.bundle import export
from dejavu.model.tokenizer import Tokenizer
from helpers.command_line import obj
from helpers.engines import ids_of
from helpers.peers import FakePeer, closing, forward

IDS = ids_of(7, 90)


@pytest.fixture(scope="module")
def exported(tiny: Tiny, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exported folders of a tiny model of each family, with room for 128 positions."""
    path = tmp_path_factory.mktemp("peers")
    for family in ("opt", "llama"):
        export(tiny(family, max_positions=128), tokenizer, path / family)
    return {family: path / family for family in ("opt", "llama")}


def greedy(peer: Peer, ids: Sequence[int], first: int, count: int) -> list[int]:
    """Tokens that a peer's own logits lead to, beginning with a given one."""
    peer.prefill(ids)
    tokens = [first]
    for _ in range(count - 1):
        logits_V = peer.step(tokens[-1])
        assert logits_V is not None
        tokens.append(int(logits_V.argmax()))
    return tokens


@pytest.mark.parametrize(
    ("family", "compiled"),
    [("opt", True), ("llama", False), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("opt", False), ("llama", True)))],
)
def test_transformers_decodes_our_logits_and_tokens(
    tiny: Tiny, exported: dict[str, Path], family: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compiling takes a while; what is under test is the cache of fixed size and its mask.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = tiny(family, max_positions=128)
    before = torch.get_num_threads()
    with closing(TransformersPeer(exported[family], threads=2, compiled=compiled)) as peer:
        # More steps than the cache had room for at first; a longer and a shorter prompt, each a new sequence.
        for prompt, steps in ((7, 80), (20, 3), (5, 3)):
            peer.prefill(IDS[:prompt])
            found = torch.stack([peer.step(token) for token in IDS[prompt : prompt + steps]])
            torch.testing.assert_close(found, forward(model, IDS[: prompt + steps])[prompt:], rtol=0, atol=1e-4)
        torch.testing.assert_close(peer.logits(IDS), forward(model, IDS), rtol=0, atol=1e-4)
        engine = TorchEngine(model, None, EngineOptions(num_slots=1, cache_tokens=128))
        tokens = [int(engine.prefill(0, IDS[:9]).argmax())]
        while len(tokens) < 20:
            tokens.append(int(engine.step([tokens[-1]], [0]).logits_BV[0].argmax()))
        assert greedy(peer, IDS[:9], tokens[0], 20) == tokens and len(set(tokens)) > 1
        assert (peer.mode, peer.dtype) == ("transformers-compile" if compiled else "transformers", "fp32")
        assert not peer._net.training and torch.get_num_threads() == before


FLAGS = Path("/proc/cpuinfo")
SATURATES = FLAGS.exists() and "vnni" not in FLAGS.read_text()  # CTranslate2's int8 sums, on such a processor


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_ctranslate2_goes_on_by_one_token_a_step(
    tiny: Tiny, exported: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ctranslate2")
    if (
        family == "llama" and SATURATES
    ):  # 0.34 of a standard deviation on these random weights, where its fp32 has 0.02; others' logits have over 1
        monkeypatch.setattr("dejavu.bench.variants.PEER_LIMIT", 0.5)
    threads_before = threading.active_count()
    with closing(CTranslate2Peer(exported[family], threads=1)) as peer:
        for prompt, steps in ((9, 30), (3, 5), (9, 5)):
            ids = IDS[:prompt]
            peer.prefill(ids)
            for step in range(steps):
                assert len(peer.generated) == step + 1, "nothing is computed before it is asked for"
                assert peer.step(95) is None
            generated = peer.generated
            # Each token is the one that a pass over all before it finds likeliest: the steps keep their cache.
            logits_TV = peer.logits(ids + generated)[prompt - 1 : -1]
            chosen_T = logits_TV.gather(1, torch.tensor(generated)[:, None])[:, 0]
            assert len(generated) == steps + 1 and bool((logits_TV.amax(-1) - chosen_T < 0.02 * logits_TV.std()).all())
        assert (peer.mode, peer.dtype, peer.model) == ("ctranslate2", "int8", family)
        assert "of 90 tokens" in check_peer(peer, tiny(family, max_positions=128), IDS, family)
    assert threading.active_count() == threads_before


def test_ctranslate2_at_the_last_position(exported: dict[str, Path]) -> None:
    pytest.importorskip("ctranslate2")
    with closing(CTranslate2Peer(exported["opt"], threads=1)) as peer:
        peer.prefill((IDS + IDS)[:126])
        peer.step(0)
        with pytest.raises(ValueError, match="ctranslate2 has decoded all of the model's 128 positions"):
            peer.step(0)
        with pytest.raises(ValueError, match="128 tokens leave none of the model's 128 positions"):
            peer.prefill((IDS + IDS)[:128])
        peer.prefill(IDS[:5])
        peer.use_threads(2)  # in the middle of a sequence
        peer.prefill(IDS[:5])
        assert peer.step(0) is None and peer.threads == 2


@pytest.mark.parametrize(("file_type", "dtype"), [(None, "all"), ("q8_0", "q8_0"), ("q4_0", "q4_0")])
def test_llama_cpp(tiny: Tiny, tok96: Any, tmp_path: Path, file_type: str | None, dtype: str) -> None:
    pytest.importorskip("llama_cpp")
    # Heads of 32 and rows of whole blocks, which its kernels and formats ask for.
    model = tiny("llama", hidden_size=64, intermediate_size=96, num_heads=2, num_kv_heads=1, head_dim=32)
    from helpers.gguf_files import write_gguf  # gguf is not on every machine that the other tests run on

    write_gguf(model, tok96, tmp_path / "small.gguf")
    with closing(LlamaCppPeer(tmp_path / "small.gguf", threads=1, file_type=file_type)) as peer:
        assert peer.model == ("small" if file_type is None else f"small as {file_type}") and dtype in (peer.dtype, "all")
        limit = {None: 0.02, "q8_0": 0.05, "q4_0": 0.5}[file_type]
        for prompt, steps in ((9, 12), (3, 4)):
            peer.prefill(IDS[:prompt])
            found = torch.stack([peer.step(token) for token in IDS[prompt : prompt + steps]])
            expected = forward(model, IDS[: prompt + steps])[prompt:]
            assert float((found - expected).abs().mean() / expected.std()) < limit
        peer.prefill([500, 96 + 7])  # of a larger vocabulary
        peer.use_threads(2)
        assert peer.step(10_000).shape == (96,) and peer.threads == 2
        peer.prefill(IDS[:60])
        with pytest.raises(ValueError, match="context of at most"):
            for token in range(300):
                peer.step(token)


def test_what_is_not_installed_is_said(exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ctranslate2", "llama_cpp"):
        monkeypatch.setitem(sys.modules, name, None)  # pyrefly: ignore[bad-argument-type]  # what an import takes for missing
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    names = ["ctranslate2", "transformers", "llama.cpp"]
    opened, notes = open_peers(names, export_folder=exported["opt"], gguf=tmp_path / "a.gguf", threads=1)
    assert [peer.mode for peer in opened] == ["transformers"] and len(notes) == 2
    assert "ctranslate2 cannot run: the package ctranslate2 is not installed" in notes[0]
    assert "llama.cpp cannot run: the package llama_cpp is not installed" in notes[1]
    opened[0].close()


def test_what_cannot_run_is_said(exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ctranslate2")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "opt", "max_position_embeddings": 64}')
    opened, notes = open_peers(["transformers", "ctranslate2"], export_folder=tmp_path / "odd", gguf=None, threads=1)
    assert opened == [] and [note.split(" cannot run: ")[0] for note in notes] == ["transformers", "ctranslate2"]
    # One that loads and then fails is closed.
    closed: list[str] = []
    close = CTranslate2Peer.close
    monkeypatch.setattr(CTranslate2Peer, "close", lambda self: (closed.append("ctranslate2"), close(self)))
    monkeypatch.setattr(CTranslate2Peer, "step", lambda self, token_id: 1 / 0)
    opened, notes = open_peers(["ctranslate2"], export_folder=exported["opt"], gguf=None, threads=1)
    assert (opened, closed, notes) == ([], ["ctranslate2"], ["ctranslate2 cannot run: ZeroDivisionError: division by zero"])


def test_a_file_that_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"GGUF file not found: .*none\.gguf"):
        open_peers(["llama.cpp"], export_folder=None, gguf=tmp_path / "none.gguf", threads=1)
    pytest.importorskip("llama_cpp")
    (tmp_path / "bad.gguf").write_bytes(b"no model")
    opened, notes = open_peers(["llama.cpp"], export_folder=None, gguf=tmp_path / "bad.gguf", threads=1)
    assert opened == [] and "llama.cpp cannot run: ValueError: llama.cpp cannot load bad.gguf" in notes[0]
    monkeypatch.setattr(module, "smollm2", lambda: None)
    assert "it has no model; give --gguf FILE" in open_peers(["llama.cpp"], export_folder=None, gguf=None, threads=1)[1][0]


@pytest.mark.parametrize(("one", "two", "kept"), [(1.0, 2.0, 1), (2.0, 1.0, 2), (0.97, 1.0, 2)])
def test_a_peer_has_the_threads_it_is_faster_with(one: float, two: float, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        threads, now = 2, 0.0

        def use_threads(self, threads: int) -> None:
            self.threads = threads

        def prefill(self, ids: Sequence[int]) -> None:
            self.now += 5.0

        def step(self, token_id: int) -> None:
            self.now += 99.0 if token_id < 3 else {1: one, 2: two}[self.threads]

    peer: Any = Slow()
    monkeypatch.setattr(module.time, "perf_counter", lambda: peer.now)
    said = module._try_out(peer, 2, "it")
    assert peer.threads == kept and (said == "it decodes faster with 1 thread than with 2: timed with 1") == (kept == 1)


def test_tokens_that_differ_are_told_or_refused(tiny: Tiny) -> None:
    """Logits that are near enough on average but pick another token: refused in fp32, counted in int8."""
    model = tiny("opt")

    class Swapped(FakePeer):
        def logits(self, ids: Sequence[int]) -> Tensor:
            found_TV = forward(model, ids).clone()
            found_TV[4, int(found_TV[4].argmin())] = found_TV[4].max() + 1
            return found_TV

    with pytest.raises(ValueError, match="transformers fp32 picks other tokens than tiny dense: not timed"):
        check_peer(Swapped(model), model, IDS, "tiny")
    said = check_peer(Swapped(model, mode="ctranslate2", dtype="int8"), model, IDS, "tiny")
    assert said == "ctranslate2 int8 picks the same next token as tiny dense after 63 of 64 tokens"


def test_the_command_against_the_real_ones(call, work: Path) -> None:
    pytest.importorskip("ctranslate2")
    arguments = ("bench", "model", "--text", "text.txt", "--backend", "torch", "--threads", "1", "--steps", "6", "--context", "16")
    result = obj(call(*arguments, "--against", "transformers,ctranslate2", "--json"))
    decodes = {row["mode"]: row for row in result["rows"] if row["op"] == "decode"}
    assert set(decodes) == {"dense", "transformers", "ctranslate2"} and all(row["tok_s"] > 0 for row in decodes.values())
    assert [(row["dtype"], row["threads"], row["model"]) for row in decodes.values()] == [
        ("fp32", 1, "model"), ("fp32", 1, "model"), ("int8", 1, "model"),
    ]  # fmt: skip
    assert [(peer["mode"], peer["dtype"]) for peer in result["peers"]] == [("transformers", "fp32"), ("ctranslate2", "int8")]
    assert {"transformers", "ctranslate2"} <= set(decodes["dense"]["versions"])
    assert any(note.startswith("transformers fp32 picks the same next token as model dense after 64 of 64") for note in result["notes"])
    shown = call(*arguments, "--against", "ctranslate2")
    assert f"peer ctranslate2 {result['peers'][1]['version']} · int8 · threads: 1 · model" in shown


def test_an_export_names_its_special_tokens(work: Path) -> None:
    """CTranslate2 loads no model without an unknown token; ours reads the folder as before."""
    assert load(work / "model", backend="torch").tokenizer.special_tokens["unk_token"] == "</s>"
