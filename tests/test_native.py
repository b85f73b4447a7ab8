"""The native engine against the torch engine, which defines decoding; and what must hold bit for bit.

Skipped only where the library is absent and could not have been built: with a C++ compiler its absence is a failure.
"""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

import pytest
import torch

from conftest import Tiny
from dejavu.engine.backends import make_engine
from dejavu.engine.native.weights import packed_model
from dejavu.engine.options import EngineOptions
from dejavu.engine.torch_engine import TorchEngine
from dejavu.model.adapter import quantized
from dejavu.model.predictor import Predictor
from dejavu.model.selectors import LayerAdapter, PredictedNeurons
from dejavu.model.transformer import Transformer
from helpers.adapters import mlp_of, predicted
from helpers.engines import decode, ids_of, random_layers
from helpers.native import DTYPES, GEMMA, ISAS, MISSING, NATIVE_MODELS, NEARNESS, engine_of, needs_library, rounded
from helpers.pairs import all_pairs

COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
SELECTIONS = [(None, None), (0, 0), (1, 1), (2, None), (None, 0), (2, 1)]


def test_the_library_is_there() -> None:
    if MISSING is not None and COMPILER:
        pytest.fail(f"a C++ compiler is here but the library is not: {MISSING}")


@pytest.fixture(params=NATIVE_MODELS)
def model(request: pytest.FixtureRequest, tiny: Tiny) -> Transformer:
    family, overrides = NATIVE_MODELS[request.param]
    return tiny(family, **overrides)


def constant_layers(model: Transformer, *, every: int) -> tuple[LayerAdapter, ...]:
    """The same neurons and groups for every token: each `every`-th."""
    config = model.config

    def constant(outputs: int) -> Predictor:
        bias_O = (torch.arange(outputs) % every == 0).float()
        A_RD, B_OR = torch.zeros(1, config.hidden_size), torch.zeros(outputs, 1)
        return Predictor(A_RD=A_RD, B_OR=B_OR, bias_O=bias_O, threshold=0.5, lookahead=0)

    return tuple(predicted(mlp=constant(config.intermediate_size), heads=constant(config.num_kv_heads)) for _ in range(config.num_layers))


# Against the torch engine


@needs_library
@pytest.mark.parametrize(("name", "selection", "isa"), all_pairs(NATIVE_MODELS, SELECTIONS, ISAS))
def test_native_equals_torch(tiny: Tiny, name: str, selection: tuple[int | None, int | None], isa: str) -> None:
    """Dense prefill, then sparse steps: logits to 1e-4 and the same selections, on every instruction set."""
    family, overrides = NATIVE_MODELS[name]
    model, (mlp, heads), ids = tiny(family, **overrides), selection, ids_of(1, 10)
    layers = random_layers(model, mlp=mlp, heads=heads)
    torch_engine = TorchEngine(model, layers, EngineOptions(record=True))
    engine = engine_of(model, layers, record=True, instruction_set=isa)
    prompt = ids_of(9, 13)
    torch.testing.assert_close(engine.prefill(0, prompt), torch_engine.prefill(0, prompt), rtol=0, atol=1e-4)
    expected, torch_steps = decode(torch_engine, ids)
    logits, steps = decode(engine, ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    for step, other in zip(steps, torch_steps, strict=True):
        assert step.counts == other.counts
        assert step.selections is not None and other.selections is not None
        for mine, theirs in zip(step.selections[0], other.selections[0], strict=True):
            for mine_A, theirs_A in ((mine.neurons_A, theirs.neurons_A), (mine.heads_A, theirs.heads_A)):
                assert (mine_A is None) == (theirs_A is None)
                assert mine_A is None or theirs_A is None or mine_A.tolist() == theirs_A.tolist()


@needs_library
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_200_greedy_tokens_are_equal(tiny: Tiny, family: str) -> None:
    model = tiny(family, max_positions=210)
    layers = random_layers(model, mlp=1, heads=0)
    layers = tuple(dataclasses.replace(layer, neurons=PredictedNeurons(quantized(mlp_of(layer)))) for layer in layers)
    generated = []
    for engine in (TorchEngine(model, layers), engine_of(model, layers)):
        token, tokens = int(engine.prefill(0, ids_of(3, 8)).argmax()), []
        for _ in range(200):
            tokens.append(token)
            token = int(engine.step([token], [0]).logits_BV.argmax())
        generated.append(tokens)
    assert generated[0] == generated[1] and len(set(generated[0])) > 3


@needs_library
@pytest.mark.parametrize("length", [1, 31, 32, 33, 64])
def test_prefill_in_blocks_equals_torch(tiny: Tiny, length: int) -> None:
    model, ids = tiny("llama", max_positions=64), ids_of(4, 64)
    expected = TorchEngine(model).prefill(0, ids[:length])
    torch.testing.assert_close(engine_of(model).prefill(0, ids[:length]), expected, rtol=0, atol=1e-4)
    engine = engine_of(model)
    for token_id in ids[: length - 1]:
        engine.step([token_id], [0])
    assert torch.equal(engine.prefill(0, ids[length - 1 : length]), engine_of(model).prefill(0, ids[:length])), "however it got there"


# Weights of fewer bits


@needs_library
@pytest.mark.parametrize(("name", "every", "dtype"), all_pairs([name for name in NATIVE_MODELS if name != "opt-one"], [0, 3], NEARNESS))
def test_within_twice_the_plain_error(tiny: Tiny, name: str, every: int, dtype: str) -> None:
    """The rule: error against fp64 at most twice that of plain weights of the dtype. And close to the same weights in fp32."""
    family, overrides = NATIVE_MODELS[name]
    model, ids = tiny(family, **overrides), ids_of(5)
    layers = constant_layers(model, every=every) if every else None
    truth, _ = decode(TorchEngine(tiny(family, **overrides).double(), layers), ids)
    plain, _ = decode(TorchEngine(rounded(tiny(family, **overrides), dtype), layers), ids)
    limit = 2 * (plain - truth).abs().max() + torch.finfo(torch.float32).eps * truth.abs().max()
    for isa in ISAS:
        logits, _ = decode(engine_of(model, layers, dtype=dtype, instruction_set=isa), ids)
        assert (logits - truth).abs().max() <= limit, isa
        assert (logits - plain).abs().mean() < NEARNESS[dtype] * plain.std(), isa


@needs_library
@pytest.mark.parametrize("dtype", NEARNESS)
def test_rounded_weights_are_the_same_engine(tiny: Tiny, dtype: str) -> None:
    """An int8 bundle's rows are recovered exactly: quantising what was quantised changes no bit."""
    first, _ = decode(engine_of(tiny("opt"), dtype=dtype), ids_of(6))
    second, _ = decode(engine_of(rounded(tiny("opt"), dtype), dtype=dtype), ids_of(6))
    assert torch.equal(first, second)


@needs_library
def test_int8_predictors_select_as_fp32_ones_do_nearly_always(tiny: Tiny) -> None:
    model = tiny("opt", hidden_size=64, head_dim=16, intermediate_size=512)
    layers = tuple(predicted(mlp=quantized(mlp_of(layer))) for layer in random_layers(model, mlp=1, heads=None))
    fp32, int8 = (engine_of(rounded(model), layers, record=True, dtype=dtype) for dtype in ("fp32", "int8"))
    same = total = 0
    for token_id in ids_of(7):
        masks = []
        for engine in (fp32, int8):
            step = engine.step([token_id], [0])
            assert step.selections is not None
            masks.append(
                [torch.zeros(512).index_fill(0, layer.neurons_A, 1) for layer in step.selections[0] if layer.neurons_A is not None]
            )
        same += sum(int((a == b).sum()) for a, b in zip(*masks, strict=True))
        total += 512 * len(masks[0])
    assert same / total > 0.998


@needs_library
@pytest.mark.parametrize(
    ("name", "cache_dtype", "isa"), all_pairs(["opt-odd", "llama-odd", "llama-gelu", "opt-one"], ["fp16", "int8"], ISAS)
)
def test_a_cache_of_fewer_bits_is_within_twice_the_plain_error(tiny: Tiny, name: str, cache_dtype: str, isa: str) -> None:
    """Against the torch engine over keys and values rounded as the cache holds them, which differs from that over exact ones."""
    family, overrides = NATIVE_MODELS[name]
    model, plain_model, ids = tiny(family, **overrides), tiny(family, **overrides), ids_of(5, 12)
    layers = random_layers(model, mlp=None, heads=0)
    truth, _ = decode(TorchEngine(tiny(family, **overrides).double(), layers), ids)
    plain_model = plain_model.rounded("fp32", cache_dtype=cache_dtype)
    plain, _ = decode(TorchEngine(plain_model, layers), ids)
    logits, _ = decode(engine_of(model, layers, cache_dtype=cache_dtype, instruction_set=isa), ids)
    eps = torch.finfo(torch.float32).eps
    assert (logits - truth).abs().max() <= 2 * (plain - truth).abs().max() + 8 * eps * truth.abs().max()
    exact, _ = decode(engine_of(model, layers, instruction_set=isa), ids)
    if name != "opt-one":  # the only key that it has is also the query's
        assert (logits - plain).abs().mean() < 0.3 * (logits - exact).abs().mean(), "what differs is the rounding of the cache"


@needs_library
def test_a_cache_takes_its_dtype(tiny: Tiny) -> None:
    model = tiny("opt")
    engines = {dtype: engine_of(model, cache_dtype=dtype) for dtype in ("fp32", "fp16", "int8")}
    for dtype, engine in engines.items():
        assert engine.info.cache_dtype == dtype and (engine._cache.k_scale_LPGS is not None) == (dtype == "int8")
    assert [engine._cache.k_LPGSK.element_size() for engine in engines.values()] == [4, 2, 1]
    for dtype, expected in {"fp32": "fp32", "fp16": "fp16", "bf16": "fp16", "int8": "fp16", "int4": "fp16"}.items():
        assert engine_of(model, dtype=dtype).info.cache_dtype == expected
    refused = "cache dtype 'int4' is not available on backend 'native' in fp32; choose one of auto, fp32, fp16, int8"
    with pytest.raises(ValueError, match=refused):
        engine_of(model, cache_dtype="int4")
    with pytest.raises(ValueError, match="cache dtype 'int8' is not available on backend 'torch' in fp32; choose one of auto, fp32"):
        make_engine(model, None, EngineOptions(backend="torch", cache_dtype="int8"))
    model.blocks[0].v.weight.fill_(1e6)
    with pytest.raises(ValueError, match="not finite: .*an fp16 cache: keys or values beyond 65504"):
        engine_of(model, cache_dtype="fp16").prefill(0, [1, 2])
    assert engine_of(model, cache_dtype="int8").prefill(0, [1, 2]).isfinite().all()


# Bit for bit


@needs_library
@pytest.mark.parametrize(
    ("name", "dtype", "cache_dtype", "order"), all_pairs(NATIVE_MODELS, DTYPES, ["fp32", "fp16", "int8"], [(0, 1, 2), (2, 0, 1)])
)
def test_a_batch_of_three_is_three_singles(tiny: Tiny, name: str, dtype: str, cache_dtype: str, order: tuple[int, ...]) -> None:
    family, overrides = NATIVE_MODELS[name]
    model = tiny(family, **overrides)
    layers = random_layers(model, mlp=1, heads=0, threshold=0.2)
    vocab = model.config.vocab_size
    prompts, continuations = [ids_of(seed, 4 + 3 * seed) for seed in range(3)], [ids_of(9 + seed, 6) for seed in range(3)]
    options: dict[str, Any] = {"record": True, "dtype": dtype, "cache_dtype": cache_dtype}
    together = engine_of(model, layers, num_slots=3, **options)
    for row in order:
        together.prefill(row, prompts[row])
    steps = [together.step([continuations[row][t] for row in order], order) for t in range(6)]
    for place, row in enumerate(order):
        alone = engine_of(model, layers, page_size=4, threads=1, **options)
        alone.prefill(0, prompts[row])
        for t in range(6):
            step = alone.step([continuations[row][t]], [0])
            assert step.logits_BV.shape == (1, vocab) and torch.equal(steps[t].logits_BV[place], step.logits_BV[0])
            assert steps[t].counts[place] == step.counts[0]


@needs_library
@pytest.mark.parametrize("batch", [1, 2, 5, 8, 33])
def test_a_batch_of_any_size(tiny: Tiny, batch: int) -> None:
    """More rows than the library takes at once, too; together with a row that selects everything."""
    model = tiny("opt", intermediate_size=127)
    layers = random_layers(model, mlp=0, heads=0, threshold=0.5)
    tokens = ids_of(21, batch)
    step = engine_of(model, layers, num_slots=batch).step(tokens, list(range(batch)))
    for row, token_id in enumerate(tokens):
        alone = engine_of(model, layers, threads=1).step([token_id], [0])
        assert torch.equal(step.logits_BV[row], alone.logits_BV[0]) and torch.equal(step.counts.neurons[row], alone.counts.neurons[0])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_the_number_of_threads_changes_no_bit(tiny: Tiny, family: str, dtype: str) -> None:
    model = tiny(family, intermediate_size=300)
    layers = random_layers(model, mlp=1, heads=1)
    runs = [decode(engine_of(model, layers, threads=threads, dtype=dtype), ids_of(8))[0] for threads in (1, 2, 3, 7)]
    assert all(torch.equal(runs[0], run) for run in runs[1:])


# Ends of the threshold, cache without holes, rows left out


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_none_and_all_selected(model: Transformer, dtype: str) -> None:
    ids = ids_of(13, 9)
    dense, _ = decode(engine_of(model, dtype=dtype), ids)
    everything, steps = decode(engine_of(model, random_layers(model, mlp=1, heads=0, threshold=-torch.inf), dtype=dtype), ids)
    assert torch.equal(everything, dense)
    assert all((step.counts.neurons == model.config.intermediate_size).all() for step in steps)
    layers = random_layers(model, mlp=1, heads=0, threshold=torch.inf)
    nothing, steps = decode(engine_of(model, layers, dtype=dtype), ids)
    assert all((step.counts.neurons == 0).all() and (step.counts.heads == model.config.heads_per_group).all() for step in steps)
    if dtype == "fp32":
        torch.testing.assert_close(nothing, decode(TorchEngine(model, layers), ids)[0], rtol=0, atol=1e-4)


@needs_library
@pytest.mark.parametrize("cache_dtype", ["fp32", "fp16", "int8"])
def test_the_cache_of_a_sparse_run_has_no_holes(model: Transformer, cache_dtype: str) -> None:
    """Pools of NaN, sparse heads, then a dense token: as in the torch engine, whose every key and value is stored."""
    layers, ids = random_layers(model, mlp=1, heads=0), ids_of(7, 11)
    engine = engine_of(model, layers, cache_dtype=cache_dtype)
    model = model.rounded("fp32", cache_dtype=cache_dtype)
    torch_engine = TorchEngine(model, layers)
    cache = engine._cache
    pools = (cache.k_LPGSK, cache.v_LPGSK)
    if cache.k_scale_LPGS is not None and cache.v_scale_LPGS is not None:
        pools = (cache.k_scale_LPGS[..., None], cache.v_scale_LPGS[..., None])
    for pool in pools:
        pool.fill_(torch.nan)
    decode(engine, ids[:-1])
    decode(torch_engine, ids[:-1])
    page_N = cache.pages(0, len(ids) - 1)
    for pool in pools:
        assert pool[:, page_N].transpose(2, 3).flatten(1, 2)[:, : len(ids) - 1].isfinite().all()
        others = torch.ones(cache.num_pages, dtype=torch.bool).index_fill(0, page_N, False)
        assert pool[:, others].isnan().all(), "pages of no sequence are not touched"
    limit = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.1}[cache_dtype]  # a key whose rounding falls on the other side
    torch.testing.assert_close(engine.prefill(0, ids[-1:]), torch_engine.prefill(0, ids[-1:]), rtol=0, atol=limit)


@needs_library
def test_rows_left_out_are_not_read(model: Transformer) -> None:
    """With a constant selection, NaN in every other row changes no bit; a dense pass says that it read them."""
    layers, config, ids = constant_layers(model, every=2), model.config, ids_of(15)
    expected, _ = decode(engine_of(model, layers), ids)
    neurons, groups = (torch.arange(count) % 2 == 0 for count in (config.intermediate_size, config.num_kv_heads))
    queries = groups.repeat_interleave(config.heads_per_group * config.head_dim)
    if neurons.all() and queries.all():
        return
    for block in model.blocks:
        for matrix, keep in ((block.up, neurons), (block.gate, neurons), (block.down, neurons), (block.q, queries), (block.o, queries)):
            if matrix is not None:
                matrix.weight[~keep] = torch.nan
    engine = engine_of(model, layers)
    logits, _ = decode(engine, ids)
    assert torch.equal(logits, expected)
    with pytest.raises(ValueError, match="not finite"):
        engine.prefill(0, ids[:1])
    assert engine.length(0) == len(ids)


@needs_library
@pytest.mark.parametrize("cache_dtype", ["fp32", "fp16", "int8"])
def test_pages_that_a_window_left_behind_are_not_read(tiny: Tiny, cache_dtype: str) -> None:
    """NaN in them changes no bit, of steps or of a prompt, whose tokens share pages and have the bits of steps."""
    model, ids = tiny("llama", **GEMMA | {"windowed": (0, 1, 2)}), ids_of(6, 31)
    for isa in ISAS:
        options: dict[str, Any] = {"cache_dtype": cache_dtype, "instruction_set": isa, "cache_tokens": 63}
        expected, _ = decode(engine_of(model, **options), ids)
        engine = engine_of(model, **options)
        first = engine.prefill_logits(0, ids[:18])
        cache = engine._cache
        for pool in (cache.k_LPGSK, cache.v_LPGSK, cache.k_scale_LPGS, cache.v_scale_LPGS):
            if pool is not None and pool.is_floating_point():
                pool[:, cache.pages(0, 9)] = torch.nan  # position 18 sees 11 and on
        prompt = engine.prefill_logits(0, ids[18:28])
        assert torch.equal(torch.cat([first, prompt, decode(engine, ids[28:])[0]]), expected)


# Limits, bad input, memory


@needs_library
def test_context_limit_and_vocabulary(tiny: Tiny) -> None:
    model = tiny("opt", max_positions=10)
    for engine in (engine_of(model), engine_of(model, random_layers(model, mlp=0, heads=0))):
        with pytest.raises(ValueError, match="11 tokens exceed the model's context of 10"):
            engine.prefill(0, ids_of(1, 11))
        assert engine.length(0) == 0 and engine.free_pages == engine.info.num_pages
        engine.prefill(0, ids_of(1, 9))
        engine.step([5], [0])
        with pytest.raises(ValueError, match="11 tokens exceed"):
            engine.step([5], [0])
        engine.free(0)
        for token_id in (-1, 96):
            with pytest.raises(ValueError, match=f"token id {token_id} is outside the model's vocabulary of 96"):
                engine.step([token_id], [0])
        with pytest.raises(ValueError, match="no tokens"):
            engine.prefill(0, [])
        assert engine.step([5], [0]).logits_BV.isfinite().all()


@needs_library
def test_full_cache_refuses_and_recovers(tiny: Tiny) -> None:
    engine = engine_of(tiny("opt"), num_slots=2, cache_tokens=12, page_size=4)
    engine.prefill(0, ids_of(1, 8))
    with pytest.raises(ValueError, match="cache is full"):
        engine.prefill(1, ids_of(2, 5))
    engine.free(0)
    assert engine.step([1], [1]).logits_BV.shape == (1, 96)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_an_error(tiny: Tiny, dtype: str) -> None:
    model = tiny("opt")
    model.blocks[1].norm1.bias[3] = torch.nan  # pyrefly: ignore[unsupported-operation]
    engine = engine_of(model, dtype=dtype)
    with pytest.raises(ValueError, match="logits are not finite"):
        engine.step([5], [0])
    assert engine.length(0) == 0
    model.blocks[1].up.weight[0, 0] = torch.inf
    if dtype in ("int8", "int4"):
        with pytest.raises(ValueError, match="up of layer 1 has values that are not finite"):
            engine_of(model, dtype=dtype)


@needs_library
def test_memory_that_is_not_there(tiny: Tiny) -> None:
    with pytest.raises(MemoryError, match="cache"):
        engine_of(tiny("opt"), cache_tokens=10**13)


@needs_library
def test_bad_options_are_refused(tiny: Tiny) -> None:
    model = tiny("opt")
    with pytest.raises(ValueError, match="threads must lie between 1 and 1024, not 0"):
        engine_of(model, threads=0)
    with pytest.raises(ValueError, match="cannot run the instruction set abacus; choose one of .*scalar"):
        engine_of(model, instruction_set="abacus")
    with pytest.raises(ValueError, match="dtype 'q4_k' is not available .* choose one of fp32, fp16, bf16, int8, int4, stored"):
        engine_of(model, dtype="q4_k")
    with pytest.raises(ValueError, match="loaded as fp32 on the cpu"):
        engine_of(tiny("opt").to(torch.bfloat16))
    with pytest.raises(ValueError, match="3 layers and the model 2"):
        engine_of(model, (LayerAdapter(),) * 3)


@needs_library
def test_a_changed_weight_is_packed_anew(tiny: Tiny) -> None:
    model = tiny("opt")
    assert packed_model(model, "fp32") is packed_model(model, "fp32")
    before = engine_of(model).prefill(0, [1, 2])
    model.blocks[0].up.weight.mul_(2)
    after = engine_of(model).prefill(0, [1, 2])
    torch.testing.assert_close(after, TorchEngine(model).prefill(0, [1, 2]), rtol=0, atol=1e-4)
    assert not torch.equal(before, after)


@needs_library
def test_make_engine_picks_what_can_run_the_model(tiny: Tiny) -> None:
    assert make_engine(tiny("opt")).info.backend == "native"
    assert make_engine(tiny("opt").to(torch.bfloat16)).info.backend == "torch"
    info = make_engine(tiny("opt"), None, EngineOptions(dtype="int8", threads=1)).info
    assert (info.backend, info.dtype, info.device, info.sparse) == ("native", "int8", "cpu", False)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [384, 640, 5120])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_integer_products_do_not_overflow(tiny: Tiny, size: int, dtype: str, isa: str) -> None:
    """All weights and inputs equal: every product is at its largest and sums come as close to their bound as they can (int4: all but
    one value of a group, so that their nibbles are 15)."""
    model = tiny("llama", hidden_size=size, head_dim=8, intermediate_size=5, num_layers=1, activation="relu", norm_affine=False)
    model.embed.weight.fill_(1.0)
    block = model.blocks[0]
    assert block.gate is not None
    for matrix in (block.q, block.k, block.v, block.up, block.gate):
        matrix.weight.fill_(0.01)
        if dtype == "int4":
            matrix.weight[:, ::32] = -0.01 * 8 / 7
    block.o.weight.zero_()
    model = rounded(model, dtype)
    expected, logits = (
        engine.step([1], [0]).logits_BV for engine in (TorchEngine(model), engine_of(model, dtype=dtype, instruction_set=isa))
    )
    assert (logits - expected).abs().mean() < 0.02 * expected.std()
