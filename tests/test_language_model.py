"""The Python interface: loading by every kind of name, dense and sparse from one object, what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dejavu
from conftest import Tiny
from dejavu.engine.backends import make_engine, pick_backend
from dejavu.engine.interface import Engine
from dejavu.engine.options import EngineOptions
from dejavu.generation.engine_cache import KEPT
from dejavu.kernels.native import missing_reason
from dejavu.language_model import LanguageModel
from dejavu.loading import load
from dejavu.model.adapter import Adapter
from dejavu.model.bundle import export, write_bundle
from dejavu.model.texts import SEPARATOR, document_ids, documents, named_texts, spread_windows
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.versions import weights_version
from dejavu.quality.evaluate import evaluate
from dejavu.quality.resume import PartStore
from helpers.adapters import changing_weights, make_adapter, mlp_of, without_predictors
from helpers.screens import screen_of, with_screen
from helpers.texts import PROMPT, TEXT


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a Hugging Face folder with an adapter in it."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny("opt")
    export(model, tokenizer, path)
    lm = load(path)
    export(model, tokenizer, path, adapter=make_adapter(lm.config, lm.base_hash))
    return path


@pytest.fixture(scope="module")
def lm(folder: Path) -> LanguageModel:
    return load(folder)


def test_importing_the_package_is_light_and_runs_nothing() -> None:
    code = "import sys, dejavu; assert 'torch' not in sys.modules and 'typer' not in sys.modules; print(dejavu.__version__)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(Path(dejavu.__file__).parents[1])}
    )
    assert (run.returncode, run.stdout.strip()) == (0, dejavu.__version__), run.stderr
    assert dejavu.load is load and dejavu.LanguageModel is LanguageModel and dejavu.Adapter is Adapter
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = dejavu.nothing_such


def test_what_a_loaded_model_says_of_itself(lm: LanguageModel) -> None:
    assert (lm.name, lm.backend, lm.dtype, lm.notes) == ("tiny", pick_backend(), "fp32", ())
    assert lm.config.num_layers == 2 and lm.tokenizer.bos_token_id == 2
    assert lm.num_parameters == sum(p.numel() for p in lm.model.parameters())
    assert "sparse" in repr(lm) and "'tiny'" in repr(lm)


def test_the_adapter_next_to_a_model_is_used_unless_told_otherwise(folder: Path, lm: LanguageModel) -> None:
    assert lm.adapter is not None
    assert load(folder, adapter=None).adapter is None
    sparse, dense = (
        lm.generate(PROMPT, max_new_tokens=8, ignore_eos=True),
        lm.generate(PROMPT, max_new_tokens=8, ignore_eos=True, dense=True),
    )
    assert sparse.mlp_density is not None and 0 < sparse.mlp_density < 1 and dense.mlp_density == 1.0
    assert load(folder, adapter=None).generate(PROMPT, max_new_tokens=8, ignore_eos=True) == dense
    assert load(folder, adapter=folder / "adapter").generate(PROMPT, max_new_tokens=8, ignore_eos=True) == sparse


def test_an_adapter_can_be_given_to_one_call(folder: Path, lm: LanguageModel) -> None:
    plain = load(folder, adapter=None)
    everything = make_adapter(plain.config, plain.base_hash, threshold=-1e9)
    text = plain.generate(PROMPT, max_new_tokens=6, adapter=everything, ignore_eos=True)
    assert text.mlp_density == 1.0 and text.token_ids == plain.generate(PROMPT, max_new_tokens=6, ignore_eos=True).token_ids
    plain.adapter = lm.adapter
    assert plain.generate(PROMPT, max_new_tokens=6, ignore_eos=True) == lm.generate(PROMPT, max_new_tokens=6, ignore_eos=True)


def test_streaming_gives_the_same_text(lm: LanguageModel) -> None:
    pieces = lm.generate(PROMPT, max_new_tokens=12, stream=True, ignore_eos=True)
    assert "".join(pieces) == lm.generate(PROMPT, max_new_tokens=12, ignore_eos=True)


def test_two_streams_do_not_disturb_each_other(lm: LanguageModel) -> None:
    alone = lm.generate(PROMPT, max_new_tokens=10, ignore_eos=True)
    streams = [lm.generate(PROMPT, max_new_tokens=10, stream=True, ignore_eos=True) for _ in range(2)]
    texts = ["", ""]
    for pieces in zip(*streams, strict=True):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == [alone, alone]


def test_a_seed_repeats_a_drawn_text(lm: LanguageModel) -> None:
    options = {"max_new_tokens": 20, "temperature": 1.5, "ignore_eos": True}
    first, second, other = (lm.generate(PROMPT, seed=seed, **options).token_ids for seed in (1, 1, 2))  # pyrefly: ignore
    assert first == second != other


def test_logits_dense_and_masked(lm: LanguageModel) -> None:
    ids = lm.tokenizer.encode(PROMPT)
    dense, masked = lm.logits(ids, dense=True), lm.logits(ids)
    assert dense.shape == masked.shape == (len(ids), 96) and dense.dtype == masked.dtype == torch.float32
    assert torch.allclose(dense, lm.model(torch.tensor([ids]))[0]) and not torch.allclose(dense, masked, atol=1e-2)


def test_logits_of_the_last_prompt_token_choose_the_first_new_one(lm: LanguageModel) -> None:
    ids = lm.tokenizer.encode(PROMPT)
    assert lm.generate(PROMPT, max_new_tokens=1, ignore_eos=True).token_ids == (int(lm.logits(ids, dense=True)[-1].argmax()),)


@pytest.mark.parametrize(
    ("ids", "message"), [([], "no token ids"), ([96], "token id 96 is outside"), ([-1], "token id -1"), ([5] * 65, "65 tokens exceed")]
)
def test_logits_refuse(lm: LanguageModel, ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lm.logits(ids)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (PROMPT, {"max_new_tokens": -1}, "max_new_tokens must be 0 or more, not -1"),
        (TEXT, {"max_new_tokens": 1}, "the context holds 64"),
        (PROMPT, {"max_new_tokens": 1, "temperature": -1.0}, "temperature"),
        (PROMPT, {"max_new_tokens": 1, "top_p": 0.0}, "top_p"),
        (PROMPT, {"max_new_tokens": 1, "stop": [""]}, "stop string"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_generate_refuses_at_once(lm: LanguageModel, prompt: str, options: dict, message: str, stream: bool) -> None:
    with pytest.raises(ValueError, match=message):
        lm.generate(prompt, stream=stream, **options)  # pyrefly: ignore


def test_an_adapter_of_another_model_is_refused(folder: Path, lm: LanguageModel, tmp_path: Path) -> None:
    foreign = make_adapter(lm.config, "f" * 64)
    with pytest.raises(ValueError, match=f"{'f' * 64}.*{lm.base_hash}"):
        lm.generate(PROMPT, max_new_tokens=1, adapter=foreign)
    foreign.save(tmp_path / "a")
    for given in (foreign, tmp_path / "a"):
        with pytest.raises(ValueError, match=f"{'f' * 64}.*{lm.base_hash}"):
            load(folder, adapter=given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cuda"}, "backend 'cuda' is not available"),
        ({"backend": "x"}, "unknown backend 'x'"),
        ({"dtype": "foo"}, "unknown dtype 'foo'; choose one of auto, stored, fp32, fp16, bf16, int8, int4"),
        ({"dtype": "int8", "backend": "torch"}, "dtype 'int8' is not available on backend 'torch'"),
        ({"threads": 0}, "threads must lie between 1 and"),
        ({"threads": 100_000}, "not 100000"),
        ({"adapter": "nowhere"}, "adapter not found: .*nowhere"),
    ],
)
def test_load_refuses(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(folder, **options)


def test_low_precision(folder: Path) -> None:
    bf16, fp16 = load(folder, dtype="bf16"), load(folder, dtype="fp16")
    assert bf16.dtype == "bf16" and bf16.logits([2, 5, 7]).dtype == torch.float32
    if missing_reason() is None:
        assert (fp16.dtype, bf16.backend, fp16.backend) == ("fp16", "native", "native") and not fp16.notes
    else:
        assert (fp16.dtype, bf16.backend, fp16.backend) == ("fp32", "torch", "torch") and "fp16" in fp16.notes[0]


@pytest.mark.parametrize(("dtype", "limit"), [("bf16", 0.05), ("int8", 0.2), ("int4", 1.0)])
def test_rounded_weights(folder: Path, dtype: str, limit: float) -> None:
    if pick_backend() != "native":
        with pytest.raises(ValueError, match=f"dtype '{dtype}' is not available on backend 'torch'"):
            load(folder, dtype=dtype, backend="native" if dtype == "bf16" else "auto")
        return
    fp32, low = load(folder), load(folder, dtype=dtype, threads=1)
    assert (low.backend, low.dtype) == ("native", dtype) and low.base_hash == fp32.base_hash
    assert low.generate("the cat", max_new_tokens=4, ignore_eos=True).new_tokens == 4
    difference = (low.logits([2, 5, 7]) - fp32.logits([2, 5, 7])).abs().mean()
    assert 0 < difference < limit, "logits are those of the rounded weights"
    if fp32.model.position is not None and low.model.position is not None:
        assert torch.equal(fp32.model.position.weight, low.model.position.weight)


def test_names_of_bundled_models_and_adapters(folder: Path, tmp_path: Path, tiny: Tiny, tokenizer: Tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("dejavu.model.bundle.MODELS_FOLDER", tmp_path)
    monkeypatch.setattr("dejavu.loading.MODELS_FOLDER", tmp_path)
    write_bundle(tiny("opt"), tokenizer, tmp_path / "mine")
    mine = load("mine")
    assert mine.name == "mine" and mine.adapter is None
    adapter = make_adapter(mine.config, mine.base_hash)
    adapter = Adapter(layers=adapter.layers, config=dataclasses.replace(adapter.config, base_id="mine"))
    adapter.save(tmp_path / "mine-sparse" / "adapter")
    sparse = load("mine-sparse")
    assert sparse.name == "mine" and sparse.adapter is not None and load("mine-sparse", adapter=None).adapter is None


def test_documents_and_windows(lm: LanguageModel, tmp_path: Path) -> None:
    text = f"one\ntwo\n{SEPARATOR}\n \n{SEPARATOR}\nthree {SEPARATOR} four\n"
    assert documents(text) == ["one\ntwo\n", f"three {SEPARATOR} four\n"]
    many = "".join(f"the {i} cat sat\n{SEPARATOR}\n" for i in range(50))
    windows = spread_windows(lm.tokenizer, [many], max_tokens=60, length=63)
    assert sum(map(len, windows)) == 60
    numbers = [int(lm.tokenizer.decode(ids).split()[1]) for ids in windows[:-1]]
    assert numbers == sorted(numbers) and numbers[-1] - numbers[0] > 25, "windows are in order and reach over the text"
    assert sum(map(len, spread_windows(lm.tokenizer, [many], max_tokens=10**6, length=63))) == sum(
        len(lm.tokenizer.encode_plain(part)) for part in documents(many)
    )
    assert list(document_ids(lm.tokenizer, {"a": text, "b": "the cat"}, max_tokens=3)) == ["a #1", "b"]
    for name in ("x/a.txt", "y/a.txt", "y/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert [Path(name).name for name in named_texts([str(tmp_path / "*/*.txt")])] == ["a.txt", "a.txt", "b.txt"]


@pytest.mark.parametrize("dense", [False, True])
def test_evaluation_in_parts_is_the_evaluation(lm: LanguageModel, tmp_path: Path, dense: bool) -> None:
    inputs = {
        "texts": {"one": TEXT[:500], "two": TEXT[300:]},
        "tasks": {"quiz": [{"context": "the cat", "choices": [" sat on", " ran to it"], "label": i % 2} for i in range(5)]},
        "max_tokens": 150,
        "stride": 40,
    }
    layers = lm.layers(dense=dense)
    whole = evaluate(lm.model, lm.tokenizer, layers, **inputs)
    assert whole == evaluate(lm.model, lm.tokenizer, layers, **inputs, store=PartStore({}))
    store = PartStore({"a": 1}, tmp_path / "parts.json")
    with pytest.raises(KeyboardInterrupt):
        evaluate(lm.model, lm.tokenizer, layers, **inputs, store=store, progress=_interrupt_at("two"))
    again = PartStore({"a": 1}, tmp_path / "parts.json")
    assert evaluate(lm.model, lm.tokenizer, layers, **inputs, store=again) == whole and again.reused == 1
    assert PartStore({"a": 2}, tmp_path / "parts.json").parts == {}
    assert lm.evaluate(dense=dense, **inputs) == whole


def _interrupt_at(name: str):
    def progress(what: str, done: int, total: int) -> None:
        if what.startswith(name):
            raise KeyboardInterrupt

    return progress


def test_profile_and_train(folder: Path) -> None:
    lm = load(folder, adapter=None)
    profiled = lm.profile(TEXT, max_tokens=200)
    assert len(profiled["layers"]) == 2 and 200 <= profiled["tokens"] <= 210 and 0 < profiled["layers"][0]["mlp_density"] < 1
    adapter, measured = lm.train_measured(TEXT, budget=0.05, rank=4, epochs=0.5, max_tokens=600)
    assert adapter is not None
    assert adapter.config.base_hashes == (lm.base_hash,) and adapter.config.calibration_max_tokens == 600
    assert lm.calibration_perplexity([TEXT], adapter) == pytest.approx(measured["ppl_dense"])
    assert lm.generate(PROMPT, max_new_tokens=4, adapter=adapter, ignore_eos=True).new_tokens == 4
    with pytest.raises(TypeError, match="ranks"):
        lm.train(TEXT, ranks=4)  # pyrefly: ignore[unexpected-keyword]
    with pytest.raises(ValueError, match="budget"):
        lm.train(TEXT, budget=-1.0)


# One engine for one generation after the other


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> weakref.WeakSet[Engine]:
    """The engines made since the test began that are still alive; `made.total` counts all of them."""

    class Made(weakref.WeakSet[Engine]):
        total = 0

    engines = Made()

    def make(*arguments: Any, **options: Any) -> Engine:
        engine = make_engine(*arguments, **options)
        engines.add(engine)
        engines.total += 1
        return engine

    monkeypatch.setattr("dejavu.generation.engine_cache.make_engine", make)
    return engines


def ids(lm: LanguageModel, prompt: str = PROMPT, **options: Any) -> tuple[int, ...]:
    return lm.generate(prompt, **{"max_new_tokens": 6, "ignore_eos": True, **options}).token_ids  # pyrefly: ignore[no-matching-overload]


def test_generations_one_after_the_other_share_an_engine(folder: Path, made: Any) -> None:
    """Dense and sparse have one each; a text gives what it gives on an engine of its own."""
    fresh = {(prompt, dense): ids(load(folder), prompt, dense=dense) for prompt in (PROMPT, "a dog") for dense in (False, True)}
    made.total, lm = 0, load(folder)
    for _ in range(2):
        for (prompt, dense), expected in fresh.items():
            assert ids(lm, prompt, dense=dense) == expected
            assert "".join(lm.generate(prompt, max_new_tokens=6, ignore_eos=True, dense=dense, stream=True))
    assert made.total == 2
    lm.options = dataclasses.replace(lm.options, threads=1)
    assert ids(lm) == fresh[PROMPT, False] and made.total == 3, "another option, another engine"


def test_engines_do_not_grow_in_number_and_rarely_in_size(folder: Path, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dejavu.generation.engine_cache.SMALLEST", 16)
    lm = load(folder)
    gc.collect()
    for count in range(1, 50, 3):
        ids(lm, "a", max_new_tokens=count)
    assert made.total == 3 and sorted(engine.info.cache_tokens for engine in made) == [64]  # 16, 32, 64
    for seed in range(5):
        ids(lm, adapter=make_adapter(lm.config, lm.base_hash, threshold=seed / 10))
    gc.collect()
    assert made.total == 8 and len(made) == 2


def test_two_texts_at_once_have_an_engine_each(lm: LanguageModel, made: Any) -> None:
    lm._engines.clear()
    alone = ids(lm)
    streams = [lm.start(PROMPT, max_new_tokens=6, ignore_eos=True) for _ in range(3)]
    for pieces in zip(*streams, strict=True):
        assert len({piece.token_ids for piece in pieces}) == 1
    assert [stream.result().token_ids for stream in streams] == [alone] * 3 and made.total == 3
    assert ids(lm) == alone and made.total == 3


def test_an_engine_comes_back_from_a_text_that_was_left_or_refused(lm: LanguageModel, made: Any) -> None:
    lm._engines.clear()
    running = lm.start(PROMPT, max_new_tokens=6, ignore_eos=True)
    next(running)
    running.close()
    with pytest.raises(ValueError, match="must not be empty"):
        ids(lm, stop=[""])
    pieces = lm.generate(PROMPT, max_new_tokens=6, ignore_eos=True, stream=True)
    next(pieces)
    pieces.close()
    unread = lm.start(PROMPT, max_new_tokens=6, ignore_eos=True)
    unread.close()  # before its first piece
    assert list(unread) == [] and len(lm._engines._entries) == 1
    running.close()  # again: the slot may be another's by now
    assert len(ids(lm)) == 6 and made.total == 1


def test_an_engine_comes_back_from_a_stream_that_was_closed_or_dropped_before_its_first_piece(lm: LanguageModel, made: Any) -> None:
    lm._engines.clear()
    pieces = lm.generate(PROMPT, max_new_tokens=6, ignore_eos=True, stream=True)
    pieces.close()
    assert list(pieces) == [] and len(lm._engines._entries) == 1
    pieces = lm.generate(PROMPT, max_new_tokens=6, ignore_eos=True, stream=True)
    del pieces
    assert len(lm._engines._entries) == 1 and made.total == 1


def test_a_text_that_nobody_holds_ends(lm: LanguageModel, made: Any) -> None:
    lm._engines.clear()
    next(lm.start(PROMPT, max_new_tokens=6, ignore_eos=True))
    assert len(lm._engines._entries) == 1 and len(ids(lm)) == 6 and made.total == 1


@pytest.mark.parametrize("held", [True, False], ids=["its engine is held", "with its engine"])
def test_a_text_in_a_cycle_may_be_collected_at_any_time(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, held: bool) -> None:
    """Its engine comes back in the middle of whatever this thread does, such as taking another; one whose memory is freed does not."""

    class Collecting(dict):
        def pop(self, *arguments: Any) -> Any:
            gc.collect()
            return super().pop(*arguments)

    def collecting(*arguments: Any) -> Any:
        gc.collect()
        return weights_version(*arguments)

    def leave(**options: Any) -> None:
        running = lm.start(PROMPT, max_new_tokens=6, ignore_eos=True, **options)
        next(running)
        engines.append(running._engine if held else None)
        cycle: list[Any] = [running]
        cycle.append(cycle)

    def run() -> None:
        monkeypatch.setattr("dejavu.generation.engine_cache.weights_version", collecting)
        found.extend(ids(lm) for _ in range(2))

    expected, engines, found = ids(lm), [], []
    ids(lm, dense=True)
    monkeypatch.setattr(lm._engines, "_entries", Collecting(lm._engines._entries))
    thread = threading.Thread(target=run, daemon=True)  # one that waits for itself would hang
    gc.disable()
    gc.freeze()  # what other tests left is not looked through at each collection
    try:
        leave()
        leave(record=True)
        thread.start()
        thread.join(20)
    finally:
        gc.unfreeze()
        gc.enable()
    assert not thread.is_alive() and found == [expected] * 2 and 1 <= len(lm._engines._entries) <= KEPT
    assert not any(entry.engine in engines for entry in lm._engines._entries.values()) or held


def test_an_adapter_is_attached_once_for_loading_and_all_generations(folder: Path, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What attaching an adapter that changes weights makes is as large as the model."""
    attached, calls = Adapter.attached, []

    def counted(adapter: Adapter, model: Any, *, dtype: str | None = None) -> Any:
        calls.append(dtype)
        return attached(adapter, model, dtype=dtype)

    monkeypatch.setattr(Adapter, "attached", counted)
    lm = load(folder)
    first, second = (lm.start(PROMPT, max_new_tokens=3) for _ in range(2))  # an engine each
    assert next(first) == next(second)
    lm.logits([5, 6])
    lm.generate(PROMPT, max_new_tokens=3, dense=True)
    assert calls == ["stored"] and made.total == 3
    lm.adapter = make_adapter(lm.config, lm.base_hash, threshold=0.7)
    lm.generate(PROMPT, max_new_tokens=3)
    assert len(calls) == 2


@pytest.mark.parametrize("change", ["in place", "replaced", "adapter", "adapter in place"])
def test_no_engine_of_old_weights_is_used_again(folder: Path, change: str) -> None:
    lm = load(folder)

    def logprobs(lm: LanguageModel) -> tuple[float, ...]:
        return lm.generate(PROMPT, max_new_tokens=6, ignore_eos=True).logprobs

    before = logprobs(lm)
    assert lm.adapter is not None
    running = lm.start(PROMPT, max_new_tokens=6, ignore_eos=True)
    next(running)
    embed = lm.model.embed
    with torch.no_grad():
        if change == "in place":
            embed.weight.copy_(embed.weight.flip(0))
        elif change == "replaced":
            embed.weight = torch.nn.Parameter(embed.weight.flip(0), requires_grad=False)
        elif change == "adapter":
            lm.adapter = make_adapter(lm.config, lm.base_hash, threshold=0.7)
        else:
            for layer in lm.adapter.layers:
                mlp_of(layer).bias_O.add_(0.7)
    if change != "adapter":
        running.close()  # its engine is of the old weights, and comes back after they have changed
    fresh = LanguageModel(lm.checkpoint, EngineOptions(backend=lm.backend), adapter=lm.adapter)
    assert logprobs(lm) == pytest.approx(logprobs(fresh), abs=1e-5) != before


@pytest.mark.parametrize("change", ["nothing", "in place", "replaced", "adapter", "a factor in place", "a norm in place"])
def test_changed_weights_are_merged_anew(folder: Path, change: str) -> None:
    """An adapter that changes weights runs with what they and its own are now; without a change nothing is merged twice."""
    lm = load(folder)
    adapter = lm.adapter = changing_weights(make_adapter(lm.config, lm.base_hash), lm.config)
    before, layers, up = lm.logits([5, 6, 7]), lm.layers(), lm.model.blocks[0].up
    assert adapter.lora is not None
    with torch.no_grad():
        if change == "in place":
            up.weight.copy_(up.weight.flip(0))
        elif change == "replaced":
            up.weight = torch.nn.Parameter(up.weight.flip(0), requires_grad=False)
        elif change == "adapter":
            lm.adapter = dataclasses.replace(adapter, lora=adapter.lora[::-1])
        elif change == "a factor in place":
            factor = adapter.lora[0].factors["up"][1]
            (factor if isinstance(factor, torch.Tensor) else factor.values).neg_()
        elif change == "a norm in place":
            adapter.lora[1].norms["norm1"].mul_(0.5)
    fresh = LanguageModel(lm.checkpoint, EngineOptions(backend=lm.backend), adapter=lm.adapter)
    assert torch.equal(lm.logits([5, 6, 7]), fresh.logits([5, 6, 7]))
    assert torch.equal(lm.logits([5, 6, 7]), before) == (lm.layers() is layers) == (change == "nothing")


@pytest.mark.skipif(missing_reason() is not None, reason="the native library is absent")
@pytest.mark.parametrize("method", ["gate", "input", "changed weights"])
@pytest.mark.parametrize("dense", [True, False])
def test_every_adapter_runs_on_a_model_that_was_handed_over(folder: Path, method: str, dense: bool) -> None:
    plain, lm = load(folder), load(folder)
    if method == "changed weights":
        adapter = changing_weights(make_adapter(lm.config, lm.base_hash), lm.config)
    else:
        adapter = without_predictors(method, lm.config, lm.base_hash)
    plain.adapter = lm.adapter = adapter
    lm.hand_over(dense=dense)
    assert ids(lm) == ids(plain)
    if dense:
        assert ids(lm, dense=True) == ids(plain, dense=True)


@pytest.mark.skipif(missing_reason() is not None, reason="the native library is absent")
@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4"])
def test_a_model_that_was_handed_over_writes_the_same_and_nothing_else(folder: Path, dtype: str) -> None:
    plain, lm = load(folder, dtype=dtype), load(folder, dtype=dtype)
    adapter = make_adapter(lm.config, lm.base_hash, threshold=0.7)
    plain.adapter = lm.adapter = with_screen(adapter, screen_of(plain.model, threshold=0.01))
    lm.hand_over()
    assert all(parameter.is_meta for parameter in lm.model.parameters() if parameter.dim() == 2 and parameter.shape[0] > 1)
    assert list(lm.model.tensors()) == list(lm.model.parameters()) and lm.num_parameters == plain.num_parameters
    assert ids(lm) == ids(plain) and ids(lm, dense=True) == ids(plain, dense=True)
    assert list(lm.start(PROMPT, max_new_tokens=3, record=True))
    engine, own = (each.engine(num_slots=2, cache_tokens=64) for each in (lm, plain))
    assert torch.equal(engine.prefill(0, [5, 6, 7]), own.prefill(0, [5, 6, 7]))
    lm.adapter = make_adapter(lm.config, lm.base_hash, threshold=0.7)
    assert lm.generate(PROMPT, max_new_tokens=2)
    requested: list[Callable[[], object]] = [
        lambda: lm.logits([5, 6]),
        lambda: list(lm.model.named_weights()),
        lm.model.widened,
        lambda: lm.profile(PROMPT),
        lambda: lm.train(PROMPT),
    ]
    for ask in requested:
        with pytest.raises(ValueError, match="handed over to an engine.* load the model again"):
            ask()
    with pytest.raises(ValueError, match="handed over"):
        make_engine(lm.model, None, EngineOptions(backend="native", dtype="bf16"))
    lm.hand_over()


@pytest.mark.skipif(missing_reason() is not None, reason="the native library is absent")
def test_handing_a_model_over_for_sparse_text_leaves_no_dense_one(folder: Path) -> None:
    lm = load(folder)
    lm.adapter = None
    lm.hand_over(dense=False)
    assert ids(lm) == ids(load(folder), dense=True), "without an adapter there is dense text alone"


def test_a_model_whose_engine_reads_it_in_place_is_not_handed_over(folder: Path) -> None:
    lm = load(folder, backend="torch")
    lm.hand_over()
    assert len(lm.logits([5, 6])) == 2


def test_an_engine_may_be_used_in_and_out_of_inference_mode(folder: Path, made: Any) -> None:
    lm = load(folder)
    with torch.inference_mode():
        first = ids(lm)
    assert ids(lm) == first and made.total == 1


def test_cached_engines_are_gone_while_a_model_trains(folder: Path, made: Any) -> None:
    lm = load(folder, adapter=None)
    ids(lm)
    lm.profile(TEXT, max_tokens=100)
    gc.collect()
    assert len(made) == 0 and len(ids(copy.deepcopy(lm))) == 6
