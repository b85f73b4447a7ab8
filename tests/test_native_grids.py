"""The native engine over matrices in the grids of files, against the plain definition: the values dequantised, and torch's products."""

from __future__ import annotations

import copy
import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import Tiny
from dejavu.engine.native.weights import MatrixView, NativeModel
from dejavu.engine.torch_engine import TorchEngine
from dejavu.kernels import native
from dejavu.kernels.quantized import SCALES_AT, QuantizedMatrix, gguf_block, wide
from dejavu.model.predictor import Predictor
from dejavu.model.selectors import InputThresholds, LayerAdapter
from dejavu.model.transformer import Transformer
from helpers.adapters import predicted
from helpers.engines import decode, ids_of, masked_forward, random_layers
from helpers.grids import ALL, GRIDS, blocks_of, floats_of, held_as, in_grid, sizes_of
from helpers.matrices import scale_type
from helpers.native import ISAS, engine_of, needs_library
from helpers.thresholds import input_layers

pytestmark = needs_library
EPS = torch.finfo(torch.float32).eps
OF_BYTES = ("q8_0", "w8_fp16", "w8_bf16")
# What a Q4_K_M file may hold, and a folder whose layers and head are of different dtypes.
_MIXED = {
    "k": ("q4_k", "q6_k", "q4_k", "q5_k", "q6_k", "q4_k", "q4_k", "q5_k", "q6_k"),
    "legacy": ("q4_1", "q8_0", "q5_0", "fp16", "q8_0", "bf16", "q5_1", "q4_0", "q4_1"),
    "folder": ("fp16", "int8", "int4", "bf16", "int4", "fp16", "int4", "int8", "bf16"),
}
MIXTURES = {name: dict(zip(ALL, grids, strict=True)) for name, grids in _MIXED.items()}


def made(grid: str, rows: int, columns: int, seed: int) -> QuantizedMatrix:
    return (blocks_of if grid in GRIDS else floats_of)(grid, rows, columns, seed)


def mixed(tiny: Tiny, name: str, **overrides: Any) -> Transformer:
    sizes = sizes_of("q4_k") if name == "k" else sizes_of("q4_0")
    return held_as(tiny("llama", **{**sizes, **overrides}), MIXTURES[name], made)


def stored(model: Transformer, layers: tuple[LayerAdapter, ...] | None = None, **options: Any) -> Any:
    return engine_of(model, layers, dtype="stored", **{"cache_dtype": "fp32", **options})


def every_third(model: Transformer) -> tuple[LayerAdapter, ...]:
    """The same neurons for every token."""
    size, neurons = model.config.hidden_size, model.config.intermediate_size
    bias_O = (torch.arange(neurons) % 3 == 0).float()
    one = Predictor(A_RD=torch.zeros(1, size), B_OR=torch.zeros(neurons, 1), bias_O=bias_O, threshold=0.5, lookahead=0)
    return (predicted(mlp=one),) * model.config.num_layers


def rounded_in_groups(x: Tensor, size: int = 32, limit: int = 127) -> Tensor:
    """Vectors [.., K] as products of these grids take them: int8 with a scale for each 32 values."""
    groups = x.unflatten(-1, (-1, size))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30) / limit
    return ((groups / scale).round() * scale).flatten(-2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("grid", GRIDS)
def test_products_are_those_of_the_vector_in_groups(tiny: Tiny, grid: str, isa: str) -> None:
    """The rule: error against fp64 at most twice that of plain products with the rounded vector. And it is that rounding's own."""
    model, ids = in_grid(tiny("llama", **sizes_of(grid)), grid, ["head"]), ids_of(3)
    hidden = tiny("llama", **sizes_of(grid)).double().hidden(torch.tensor([ids]))[0]
    head = wide(model.head_matrix).double()
    truth, plain = hidden @ head.T, rounded_in_groups(hidden) @ head.T
    logits, _ = decode(stored(model, instruction_set=isa), ids)
    assert (logits - truth).abs().max() <= 2 * (plain - truth).abs().max() + EPS * truth.abs().max()
    assert (logits - plain).abs().mean() < 0.02 * (plain - truth).abs().mean()


def sums_rounded(model: Transformer, part: str, size: int, limit: int) -> Transformer:
    """What this part adds up is rounded as grids take it: int8, or for bytes int16, with a scale for each `size` values."""
    for layer in model.layers:
        getattr(layer, part).register_forward_pre_hook(lambda _, inputs: (rounded_in_groups(inputs[0], size, limit),))
    return model


@pytest.mark.parametrize("part", ["o", "down"])
@pytest.mark.parametrize("grid", GRIDS)
def test_sums_of_rows_are_those_of_coefficients_in_groups(tiny: Tiny, grid: str, part: str) -> None:
    """As near to fp64 as products with rounded coefficients, and that rounding's own: dense and over lists of neurons, ReLU leaving some of
    these out."""
    limit, share = (32767, 0.6) if grid in OF_BYTES else (127, 0.4)  # near ties may round the other way
    lists_of_neurons = [("relu", every_third), ("silu", every_third)] if part == "down" else []
    for activation, select in [("relu", None), *lists_of_neurons]:
        model, ids = in_grid(tiny("llama", activation=activation, **sizes_of(grid)), grid, [part]), ids_of(4, 8)
        layers = None if select is None else select(model)
        truth, _ = decode(TorchEngine(copy.deepcopy(model.widened()).double(), layers), ids)
        rounded = sums_rounded(copy.deepcopy(model.widened()), part, 16 if grid == "q6_k" else 32, limit)
        plain, _ = masked_forward(rounded, layers or (LayerAdapter(),) * model.config.num_layers, ids)
        for isa in ISAS:
            logits, _ = decode(stored(model, layers, instruction_set=isa), ids)
            assert (logits - truth).abs().max() <= 2 * (plain - truth).abs().max() + 8 * EPS * truth.abs().max(), isa
            assert (logits - plain).abs().mean() < share * (plain - truth).abs().mean(), isa


@pytest.mark.parametrize("grid", GRIDS)
def test_an_embedding_is_that_of_fp32(tiny: Tiny, grid: str) -> None:
    model, ids = in_grid(tiny("llama", **sizes_of(grid)), grid, ["embed"]), ids_of(4, 8)
    truth, plain = (decode(TorchEngine(copy.deepcopy(model.widened()).to(dtype)), ids)[0] for dtype in (torch.float64, torch.float32))
    for isa in ISAS:
        logits, _ = decode(stored(model, instruction_set=isa), ids)
        assert (logits - truth).abs().max() <= 2 * (plain - truth).abs().max() + 8 * EPS * truth.abs().max(), isa


@pytest.mark.parametrize("grid", [*GRIDS, *MIXTURES])
def test_every_matrix_may_be_in_a_grid_of_its_own(tiny: Tiny, grid: str) -> None:
    """Near a masked forward pass of the same values in fp32: what is left is how vectors are rounded. On every instruction set, whose
    integers are the same."""
    model = mixed(tiny, grid) if grid in MIXTURES else in_grid(tiny("llama", **sizes_of(grid)), grid)
    ids, found = ids_of(5), []
    expected, _ = masked_forward(model.widened(), every_third(model), ids)
    for isa in ISAS:
        logits, _ = decode(stored(model, every_third(model), instruction_set=isa), ids)
        assert (logits - expected).abs().mean() < 3e-2 * expected.std()
        found.append(logits)
    for other in found[1:]:
        assert (other - found[0]).abs().mean() < 2e-3 * expected.std()


@pytest.mark.parametrize("grid", [*GRIDS, *MIXTURES])
def test_inputs_are_selected_in_every_grid(tiny: Tiny, grid: str) -> None:
    """Of panels of columns. All kept: near a forward pass of the same values, and a prompt has the
    bits of steps. Half of them: it is the selection that is seen, whatever the number of threads."""
    sizes = sizes_of("q4_k" if grid == "k" else grid if grid in GRIDS else "q4_0")
    model = mixed(tiny, grid, **sizes) if grid in MIXTURES else in_grid(tiny("llama", **sizes), grid)
    all_kept = (LayerAdapter(inputs=InputThresholds(attention=0.0, output=0.0, mlp=0.0, down=0.0)),) * model.config.num_layers
    half, ids = input_layers(model, 0.5), ids_of(5, 22)
    dense, expected = (masked_forward(model.widened(), layers, ids)[0] for layers in (all_kept, half))
    for isa in ISAS:
        engine = stored(model, all_kept, instruction_set=isa, num_slots=2)
        logits, _ = decode(engine, ids)
        assert (logits - dense).abs().mean() < 3e-2 * dense.std(), isa
        assert torch.equal(engine.prefill_logits(1, ids)[1:], logits[1:]), isa
        one, three = (decode(stored(model, half, instruction_set=isa, threads=threads), ids)[0] for threads in (1, 3))
        assert torch.equal(one, three), isa
        assert (one - expected).abs().mean() < 0.4 * (one - dense).abs().mean(), isa


@pytest.mark.parametrize("cache_dtype", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_prompt_has_the_same_bits_however_it_is_cut(tiny: Tiny, mixture: str, cache_dtype: str) -> None:
    """Tokens of a prompt share rows, keys and values of whole pages: 37 of them, of three pages and of blocks with a rest. Whole, in
    pieces of any length, by any number of threads; and near to what steps give: another order of sums moves some value to the next
    integer."""
    model, ids = mixed(tiny, mixture), ids_of(6, 37)
    for isa in ISAS:
        prompt = stored(model, instruction_set=isa, cache_dtype=cache_dtype).prefill_logits(0, ids)
        pieces = stored(model, instruction_set=isa, cache_dtype=cache_dtype, threads=3)
        cuts = [0, 1, 2, 9, 10, 26, len(ids)]
        cut = torch.cat([pieces.prefill_logits(0, ids[first:end]) for first, end in pairwise(cuts)])
        assert torch.equal(prompt, cut), isa
        engine = stored(model, instruction_set=isa, cache_dtype=cache_dtype)
        engine.prefill(0, ids[:1])
        steps = torch.cat([engine.step([token], [0]).logits_BV for token in ids[1:]])
        assert (prompt[1:] - steps).abs().mean() < 1e-2 * steps.std(), isa


@pytest.mark.parametrize("grid", GRIDS)
def test_a_prompt_in_every_grid(tiny: Tiny, grid: str) -> None:
    """Rows in tiles, whose number is no multiple of a tile's, of groups that fill more than one: near to a forward pass of the same values,
    on every instruction set."""
    sizes = sizes_of(grid) | {"num_heads": 32, "num_kv_heads": 4, "head_dim": 24, "hidden_size": 768, "intermediate_size": 768}
    model, ids, found = in_grid(tiny("llama", **sizes), grid), ids_of(5, 21), []
    expected, _ = masked_forward(model.widened(), (LayerAdapter(),) * model.config.num_layers, ids)
    for isa in ISAS:
        logits = stored(model, instruction_set=isa).prefill_logits(0, ids)
        assert (logits - expected).abs().mean() < 3e-2 * expected.std(), isa
        found.append(logits)
    for other in found[1:]:
        assert (other - found[0]).abs().mean() < 1e-2 * expected.std()


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("grid", [*GRIDS, *MIXTURES])
def test_a_row_of_a_batch_is_what_it_is_alone(tiny: Tiny, grid: str, activation: str) -> None:
    """Bit for bit, whatever its batch mates, the number of threads, and how its neurons were listed."""
    changes: dict[str, Any] = {"activation": activation, "intermediate_size": 1024 if grid.endswith("k") else 480}
    model = mixed(tiny, grid, **changes) if grid in MIXTURES else in_grid(tiny("llama", **{**sizes_of(grid), **changes}), grid)
    layers = random_layers(model, mlp=1, heads=0, threshold=0.2)
    prompts, continuations = [ids_of(seed, 4 + 3 * seed) for seed in range(3)], [ids_of(9 + seed, 4) for seed in range(3)]
    together = stored(model, layers, num_slots=3)
    for row in range(3):
        together.prefill(row, prompts[row])
    steps = [together.step([continuation[t] for continuation in continuations], [0, 1, 2]) for t in range(4)]
    for row, threads in enumerate((1, 3, 7)):
        alone = stored(model, layers, threads=threads)
        alone.prefill(0, prompts[row])
        for t in range(4):
            assert torch.equal(steps[t].logits_BV[row], alone.step([continuations[row][t]], [0]).logits_BV[0])


@pytest.mark.parametrize("grid", GRIDS)
def test_all_selected_is_dense(tiny: Tiny, grid: str) -> None:
    model, ids = in_grid(tiny("llama", **sizes_of(grid)), grid), ids_of(6, 8)
    dense, _ = decode(stored(model), ids)
    everything, _ = decode(stored(model, random_layers(model, mlp=1, heads=0, threshold=-torch.inf)), ids)
    assert torch.equal(everything, dense)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("name", MIXTURES)
def test_an_engine_of_one_dtype_rounds_what_is_stored(tiny: Tiny, name: str, dtype: str) -> None:
    """However the model holds it: the bits are those of its values in fp32, rounded."""
    model, ids = mixed(tiny, name), ids_of(7, 8)
    engines = [engine_of(each, dtype=dtype) for each in (model, model.widened())]
    logits, expected = (decode(engine, ids)[0] for engine in engines)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("grid", ["fp16", "bf16"])
def test_a_stored_float_is_taken_as_it_is(tiny: Tiny, grid: str) -> None:
    """By output or by input: the same bits as those of a model in fp32 that is rounded to it."""
    model, ids = tiny("llama"), ids_of(8, 8)
    held = held_as(tiny("llama"), dict.fromkeys(ALL, grid), made)
    assert torch.equal(decode(stored(held), ids)[0], decode(engine_of(held.widened(), dtype=grid, cache_dtype="fp32"), ids)[0])
    expected, _ = decode(TorchEngine(model.rounded(grid).widened()), ids)
    torch.testing.assert_close(decode(engine_of(model, dtype=grid, cache_dtype="fp32"), ids)[0], expected, rtol=0, atol=1e-4)


def test_a_grid_that_the_library_does_not_know_becomes_fp16(tiny: Tiny) -> None:
    model = tiny("llama", **sizes_of("q4_k"))
    model = held_as(model, dict.fromkeys(ALL, "q3_k"), blocks_of)
    ids = ids_of(9, 8)
    logits, _ = decode(stored(model), ids)
    assert torch.equal(logits, decode(engine_of(model, dtype="fp16", cache_dtype="fp32"), ids)[0])
    expected, _ = decode(TorchEngine(model.widened()), ids)
    assert (logits - expected).abs().mean() < 2e-3 * expected.std()


@pytest.mark.parametrize("grid", GRIDS)
def test_what_a_grid_cannot_be_is_refused(tiny: Tiny, grid: str) -> None:
    model = in_grid(tiny("llama", **sizes_of(grid)), grid)
    q = model.blocks[1].q.matrix
    assert isinstance(q, QuantizedMatrix)
    block, size = gguf_block(grid)
    raw = q.values.unflatten(1, (-1, size)).clone()
    end = SCALES_AT.get(grid, (0, 2))[1]
    raw[-1, -1, end - 2 : end] = torch.tensor([torch.inf], dtype=scale_type(grid)).view(torch.uint8)
    packed = NativeModel(model, "stored")

    def put(matrix: QuantizedMatrix) -> None:
        native.check(native.library().dejavu_model_set(packed.handle, native.QUERY, 1, MatrixView(matrix).matrix))

    with pytest.raises(ValueError, match="q of layer 1 has values that are not finite"):
        put(dataclasses.replace(q, values=raw.flatten(1)))
    with pytest.raises(ValueError, match="q of layer 1 cannot be transposed"):
        put(q.swapped())
    with pytest.raises(ValueError, match=f"q of layer 1 is {q.shape[0]} x {q.columns - block}, expected {q.shape[0]} x {q.columns}"):
        put(dataclasses.replace(q, columns=q.columns - block))
    put(q)


def test_rows_of_k_types_are_whole_blocks(tiny: Tiny) -> None:
    model = NativeModel(tiny("llama"), "fp32")
    view = MatrixView(QuantizedMatrix("q4_k", torch.zeros(96, 144, dtype=torch.uint8), None, 32))
    with pytest.raises(ValueError, match="the embedding has rows of 32 values, which q4_k does not have: they are a multiple of 256"):
        native.check(native.library().dejavu_model_set(model.handle, native.EMBED, -1, view.matrix))
