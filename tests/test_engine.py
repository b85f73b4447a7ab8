"""Decoding against the definition: one masked forward pass over the whole sequence, without a cache."""

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from conftest import Tiny
from dejavu.engine.backends import backends, make_engine, pick_backend
from dejavu.engine.options import EngineOptions
from dejavu.engine.torch_engine import TorchEngine
from dejavu.model.masked import MaskedSelection
from dejavu.model.predictor import Predictor
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import LayerInputs, Selection, Transformer
from helpers.adapters import predicted
from helpers.engines import MODELS, TOKENS, decode, ids_of, masked_forward, predictor, random_layers


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tiny: Tiny) -> Transformer:
    family, overrides = MODELS[request.param]
    return tiny(family, **overrides)


class MaskRecorder(Selection):
    """Which neurons and query heads a selection leaves on, by layer; read off what it zeroes."""

    def __init__(self, inner: Selection) -> None:
        self.inner = inner
        self.neurons_LTF: list[Tensor] = []
        self.heads_LTH: list[Tensor] = []

    def heads(self, layer: int, inputs: LayerInputs, mixed_BTHK: Tensor) -> Tensor:
        kept = self.inner.heads(layer, inputs, torch.ones_like(mixed_BTHK))
        self.heads_LTH.append(kept[0, :, :, 0] != 0)
        return mixed_BTHK * kept

    def neurons(self, layer: int, inputs: LayerInputs, act_BTF: Tensor) -> Tensor:
        kept = self.inner.neurons(layer, inputs, torch.ones_like(act_BTF))
        self.neurons_LTF.append(kept[0] != 0)
        return act_BTF * kept


@pytest.mark.parametrize(("mlp", "heads"), [(0, 0), (1, 1), (2, None), (None, 0), (2, 1), (None, None)])
def test_decode_equals_masked_forward(model: Transformer, mlp: int | None, heads: int | None) -> None:
    """Logits to 1e-5 and the same selections, token for token; the cache is only ever written by sparse steps."""
    layers, ids, config = random_layers(model, mlp=mlp, heads=heads), ids_of(1), model.config
    recorder = MaskRecorder(selection := MaskedSelection(layers))
    with torch.inference_mode():
        expected = model(torch.tensor([ids]), recorder)[0]
    logits, steps = decode(TorchEngine(model, layers, EngineOptions(record=True, page_size=3)), ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    neurons = heads_total = 0
    for position, step in enumerate(steps):
        assert step.selections is not None
        for layer, selected in enumerate(step.selections[0]):
            neurons_F, heads_H = recorder.neurons_LTF[layer][position], recorder.heads_LTH[layer][position]
            if not layers[layer].neurons.selects:
                assert selected.neurons_A is None and neurons_F.all()
            else:
                assert selected.neurons_A is not None and selected.neurons_A.tolist() == neurons_F.nonzero()[:, 0].tolist()
            if not layers[layer].heads.selects:
                assert selected.heads_A is None and heads_H.all()
            else:
                assert selected.heads_A is not None and selected.heads_A.tolist() == heads_H.nonzero()[:, 0].tolist()
            assert step.counts.neurons[0, layer] == neurons_F.sum() and step.counts.heads[0, layer] == heads_H.sum()
        neurons += int(step.counts.neurons.sum())
        heads_total += int(step.counts.heads.sum())
    cells = TOKENS * config.num_layers
    assert selection.counter.mlp_density() == pytest.approx(neurons / cells / config.intermediate_size)
    assert selection.counter.head_density() == pytest.approx(heads_total / cells / config.num_heads)
    if mlp is not None:
        assert 0.2 < neurons / cells / config.intermediate_size < 0.8, "the test must select some"
    if heads is not None:
        assert 0.2 < heads_total / cells / config.num_heads < 0.95


@pytest.mark.parametrize("chunk", [1, 5, TOKENS])
def test_dense_prefill_and_steps_equal_the_model(model: Transformer, chunk: int) -> None:
    """Prefill in pieces, on top of what the slot holds, then steps: every way to the same logits."""
    ids = ids_of(2)
    expected = model(torch.tensor([ids]))[0]
    engine = TorchEngine(model, None, EngineOptions(page_size=4))
    prefilled = [engine.prefill(0, ids[start : min(start + chunk, 10)]) for start in range(0, 10, chunk)]
    torch.testing.assert_close(prefilled[-1], expected[9], rtol=0, atol=1e-5)
    logits, _ = decode(engine, ids[10:15])
    torch.testing.assert_close(logits, expected[10:15], rtol=0, atol=1e-5)
    torch.testing.assert_close(engine.prefill(0, ids[15:]), expected[-1], rtol=0, atol=1e-5)
    assert engine.length(0) == TOKENS


def test_a_long_prompt_is_prefilled_in_chunks(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama"), ids_of(3, 50)
    whole = TorchEngine(model).prefill(0, ids)
    monkeypatch.setattr("dejavu.engine.prefill.PREFILL_CHUNK", 7)
    torch.testing.assert_close(TorchEngine(model).prefill(0, ids), whole, rtol=0, atol=1e-5)


def test_prefill_is_dense_and_decode_sparse(model: Transformer) -> None:
    """A prompt, then sparse steps, equals one forward pass that masks the later tokens only."""
    layers, ids = random_layers(model, mlp=1, heads=0), ids_of(4)
    sparse_BT = (torch.arange(TOKENS) >= 12)[None]
    selection = MaskedSelection(layers, sparse_BT)
    with torch.inference_mode():
        expected = model(torch.tensor([ids]), selection)[0]
    engine = TorchEngine(model, layers)
    torch.testing.assert_close(engine.prefill(0, ids[:12]), expected[11], rtol=0, atol=1e-5)
    logits, _ = decode(engine, ids[12:])
    torch.testing.assert_close(logits, expected[12:], rtol=0, atol=1e-5)


# Heads left out


class ScriptedHeads(Predictor):
    """Group masks read from a list, whatever the input."""

    masks: Iterator[Tensor]

    def group_mask(self, x: Tensor) -> Tensor:
        return next(self.masks)


def scripted(model: Transformer, mask_TG: Tensor) -> ScriptedHeads:
    config = model.config
    heads = ScriptedHeads(
        A_RD=torch.zeros(1, config.hidden_size),
        B_OR=torch.zeros(config.num_kv_heads, 1),
        bias_O=torch.zeros(config.num_kv_heads),
        threshold=0.0,
        lookahead=0,
    )
    object.__setattr__(heads, "masks", iter(mask_TG))
    return heads


class HeadMasks(Selection):
    """One-shot forward with the same masks."""

    def __init__(self, mask_LTG: Tensor) -> None:
        self.mask_LTG = mask_LTG

    def heads(self, layer: int, inputs: LayerInputs, mixed_BTHK: Tensor) -> Tensor:
        per_group = mixed_BTHK.shape[2] // self.mask_LTG.shape[2]
        return mixed_BTHK * self.mask_LTG[layer].repeat_interleave(per_group, 1)[None, :, :, None]


@pytest.mark.parametrize("density", [0.3, 0.7])
def test_random_head_masks_leave_no_holes(model: Transformer, density: float) -> None:
    """A head off at one token and on at the next sees the whole history; a token may even have none at all."""
    config, ids = model.config, ids_of(5)
    mask_LTG = torch.rand(config.num_layers, TOKENS, config.num_kv_heads, generator=torch.Generator().manual_seed(6)) < density
    mask_LTG[0, 3] = mask_LTG[1, 9] = False
    with torch.inference_mode():
        expected = model(torch.tensor([ids]), HeadMasks(mask_LTG))[0]
    layers = tuple(predicted(heads=scripted(model, mask_TG)) for mask_TG in mask_LTG)
    logits, steps = decode(TorchEngine(model, layers, EngineOptions(page_size=4)), ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    counts = torch.cat([step.counts.heads for step in steps])
    assert torch.equal(counts, mask_LTG.sum(-1).t() * config.heads_per_group)


def test_the_cache_of_a_sparse_run_has_no_holes_and_a_dense_step_after_it_is_right(model: Transformer) -> None:
    layers, ids = random_layers(model, mlp=1, heads=0), ids_of(7)
    sparse_BT = (torch.arange(TOKENS) < TOKENS - 1)[None]
    with torch.inference_mode():
        expected = model(torch.tensor([ids]), MaskedSelection(layers, sparse_BT))[0, -1]
    engine = TorchEngine(model, layers)
    cache = engine._cache
    cache.k_LPGSK.fill_(torch.nan)
    cache.v_LPGSK.fill_(torch.nan)
    _, steps = decode(engine, ids[:-1])
    assert min(int(step.counts.heads.min()) for step in steps) < model.config.num_heads
    page_N = cache.pages(0, TOKENS - 1)
    for pool in (cache.k_LPGSK, cache.v_LPGSK):
        stored = pool[:, page_N].transpose(2, 3).flatten(1, 2)[:, : TOKENS - 1]
        assert stored.isfinite().all()
    torch.testing.assert_close(engine.prefill(0, ids[-1:]), expected, rtol=0, atol=1e-5)


def test_a_dense_run_in_the_slot_of_a_sparse_one_is_a_fresh_one(tiny: Tiny) -> None:
    model, ids = tiny("llama"), ids_of(8)
    engine, fresh = TorchEngine(model, random_layers(model, mlp=0, heads=0)), TorchEngine(model)
    decode(engine, ids)
    engine.free(0)
    assert torch.equal(engine.prefill(0, ids), fresh.prefill(0, ids))


# Batch mates


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_row_is_bit_identical_whatever_its_batch_mates(tiny: Tiny, family: str, order: tuple[int, ...], dtype: torch.dtype) -> None:
    """Three sequences of different lengths together, in two orders, against each alone: logits and selections."""
    model = tiny(family).to(dtype)
    layers = random_layers(model, mlp=1, heads=0, threshold=0.2)
    prompts, continuations = [ids_of(seed, 4 + 3 * seed) for seed in range(3)], [ids_of(9 + seed, 6) for seed in range(3)]
    together = TorchEngine(model, layers, EngineOptions(num_slots=3, page_size=4, record=True))
    for row in order:
        together.prefill(row, prompts[row])
    steps = [together.step([continuations[row][t] for row in order], order) for t in range(6)]
    for place, row in enumerate(order):
        alone = TorchEngine(model, layers, EngineOptions(page_size=4, record=True))
        alone.prefill(0, prompts[row])
        for t in range(6):
            step = alone.step([continuations[row][t]], [0])
            assert torch.equal(steps[t].logits_BV[place], step.logits_BV[0])
            assert torch.equal(steps[t].counts.neurons[place], step.counts.neurons[0])
            both = zip(steps[t].selections[place], step.selections[0], strict=True)  # pyrefly: ignore[unsupported-operation]
            assert all(torch.equal(mine.neurons_A, other.neurons_A) for mine, other in both)  # pyrefly: ignore[bad-argument-type]


def test_a_neighbour_that_selects_everything_changes_nothing(tiny: Tiny) -> None:
    """Hostile neighbour: a token whose embedding makes every score exceed the threshold, where mine selects few."""
    model = tiny("opt")
    hostile, mine = 7, [11, 30, 52, 3]
    layers = tuple(
        predicted(
            mlp=Predictor(
                A_RD=torch.eye(32)[:1],
                B_OR=torch.cat([torch.full((60, 1), 1.0), torch.zeros(4, 1)]),
                bias_O=torch.cat([torch.zeros(60), torch.full((4,), 1000.0)]),
                threshold=300.0,
                lookahead=0,
            )
        )
        for _ in range(2)
    )
    with torch.no_grad():
        for block in model.blocks:  # the first coordinate of the MLP's input grows with that of the residual stream
            block.norm2 = torch.nn.Identity()  # pyrefly: ignore[bad-assignment]
        model.embed.weight[hostile, 0] = 1e4
    engine = TorchEngine(model, layers, EngineOptions(num_slots=2))
    alone = TorchEngine(model, layers)
    for token_id in mine:
        pair, single = engine.step([hostile, token_id], [1, 0]), alone.step([token_id], [0])
        assert pair.counts.neurons.tolist() == [[64, 64], [4, 4]]
        assert torch.equal(pair.logits_BV[1], single.logits_BV[0])


# The ends of the threshold


def test_threshold_plus_infinity_leaves_exactly_the_down_bias(tiny: Tiny) -> None:
    model, ids = tiny("opt"), ids_of(12)
    layers = random_layers(model, mlp=1, heads=None, threshold=torch.inf)
    logits, steps = decode(TorchEngine(model, layers), ids)
    expected, selection = masked_forward(model, layers, ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert sum(int(step.counts.neurons.sum()) for step in steps) == 0 and selection.counter.mlp_density() == 0.0
    dense = model(torch.tensor([ids]))[0]
    assert (logits - dense).abs().max() > 0.01
    with torch.no_grad():
        for block in model.blocks:
            block.down.weight.zero_()
    torch.testing.assert_close(logits, model(torch.tensor([ids]))[0], rtol=0, atol=1e-5)


def test_threshold_minus_infinity_is_dense(model: Transformer) -> None:
    ids = ids_of(13)
    layers = random_layers(model, mlp=1, heads=0, threshold=-torch.inf)
    logits, steps = decode(TorchEngine(model, layers), ids)
    torch.testing.assert_close(logits, model(torch.tensor([ids]))[0], rtol=0, atol=1e-5)
    assert all((step.counts.neurons == 64).all() and (step.counts.heads == model.config.num_heads).all() for step in steps)


def test_at_least_one_head_group_is_always_kept(tiny: Tiny) -> None:
    model = tiny("llama")
    layers = random_layers(model, mlp=None, heads=0, threshold=torch.inf)
    _, steps = decode(TorchEngine(model, layers), ids_of(14))
    assert all((step.counts.heads == model.config.heads_per_group).all() for step in steps)


# What is left out is not read


def test_rows_left_out_are_not_read(model: Transformer) -> None:
    """With a constant selection, NaN in every other row of q, o, up, gate and down changes no bit."""
    config, ids = model.config, ids_of(15)
    neurons, groups = torch.arange(config.intermediate_size) % 3 == 0, torch.arange(config.num_kv_heads) % 2 == 0

    def constant(mask_O: Tensor) -> Predictor:
        outputs = mask_O.shape[0]
        return Predictor(
            A_RD=torch.zeros(1, config.hidden_size), B_OR=torch.zeros(outputs, 1), bias_O=mask_O.float(), threshold=0.5, lookahead=0
        )

    layers = tuple(predicted(mlp=constant(neurons), heads=constant(groups)) for _ in range(config.num_layers))
    expected, _ = decode(TorchEngine(model, layers), ids)
    queries = groups.repeat_interleave(config.heads_per_group * config.head_dim)
    with torch.no_grad():
        for block in model.blocks:
            for matrix, keep in ((block.up, neurons), (block.gate, neurons), (block.down, neurons), (block.q, queries), (block.o, queries)):
                if matrix is not None:
                    matrix.weight[~keep] = torch.nan
    engine = TorchEngine(model, layers)
    logits, _ = decode(engine, ids)
    assert torch.equal(logits, expected)
    assert engine.prefill(0, ids[:1]).isnan().all(), "a dense pass reads them"


# Limits and bad input


def test_context_limit_comes_before_the_embedding(tiny: Tiny) -> None:
    model = tiny("opt", max_positions=10)
    for engine in (TorchEngine(model), TorchEngine(model, random_layers(model, mlp=0, heads=0))):
        with pytest.raises(ValueError, match="11 tokens exceed the model's context of 10"):
            engine.prefill(0, ids_of(1, 11))
        assert engine.length(0) == 0 and engine.free_pages == engine.info.num_pages
        engine.prefill(0, ids_of(1, 9))
        engine.step([5], [0])
        with pytest.raises(ValueError, match="11 tokens exceed the model's context of 10"):
            engine.step([5], [0])
        with pytest.raises(ValueError, match="11 tokens"):
            engine.prefill(0, [5])
        assert engine.length(0) == 10
        engine.free(0)
        assert engine.step([5], [0]).logits_BV.isfinite().all()


@pytest.mark.parametrize("token_id", [-1, 96])
def test_token_outside_the_vocabulary(tiny: Tiny, token_id: int) -> None:
    engine = TorchEngine(tiny("opt"))
    with pytest.raises(ValueError, match=f"token id {token_id} is outside the model's vocabulary of 96"):
        engine.prefill(0, [1, token_id, 2])
    with pytest.raises(ValueError, match=f"token id {token_id} "):
        engine.step([token_id], [0])
    with pytest.raises(ValueError, match="no tokens"):
        engine.prefill(0, [])


def test_full_cache_refuses_and_recovers(tiny: Tiny) -> None:
    engine = TorchEngine(tiny("opt"), None, EngineOptions(num_slots=2, cache_tokens=12, page_size=4))
    assert (engine.info.num_pages, engine.info.max_tokens) == (3, 12)
    engine.prefill(0, ids_of(1, 8))
    with pytest.raises(ValueError, match="cache is full"):
        engine.prefill(1, ids_of(2, 5))
    engine.prefill(1, ids_of(2, 3))
    with pytest.raises(ValueError, match="cache is full"):
        engine.step([1, 1], [1, 0])
    assert (engine.length(0), engine.length(1)) == (8, 3)
    engine.free(0)
    assert engine.step([1], [1]).logits_BV.shape == (1, 96)
    engine.free(1)
    assert engine.free_pages == 3


def test_predictors_of_another_model_are_refused(tiny: Tiny) -> None:
    model, other = tiny("opt"), tiny("opt", intermediate_size=48, num_layers=3)
    with pytest.raises(ValueError, match="3 layers and the model 2"):
        TorchEngine(model, random_layers(other, mlp=0, heads=0))
    with pytest.raises(ValueError, match="layer 0's MLP maps 32 to 48 values, the model 32 to 64"):
        TorchEngine(model, random_layers(other, mlp=0, heads=0)[:2])
    late = (predicted(mlp=predictor(1, model, 64, 2)), LayerAdapter())
    with pytest.raises(ValueError, match="layer 0 has no layer before it"):
        TorchEngine(model, late)
    with pytest.raises(ValueError, match="lookahead of layer 1's heads must be one of"):
        TorchEngine(model, (LayerAdapter(), predicted(heads=predictor(1, model, 4, 3))))


def test_info_says_what_the_engine_is(tiny: Tiny) -> None:
    model = tiny("llama").to(torch.bfloat16)
    info = TorchEngine(model, random_layers(model, mlp=None, heads=0), EngineOptions(num_slots=3)).info
    assert (info.backend, info.dtype, info.device, info.sparse) == ("torch", "bf16", "cpu", True)
    assert (info.num_neurons, info.num_heads, info.max_positions, info.num_slots) == (64, 4, 64, 3)
    assert not TorchEngine(model).info.sparse


def test_stepping_keeps_no_gradients(tiny: Tiny) -> None:
    model = tiny("opt").requires_grad_(True)
    engine = TorchEngine(model)
    assert not engine.prefill(0, [1, 2]).requires_grad and not engine.step([1], [0]).logits_BV.requires_grad


# Backends


def test_auto_picks_one_that_is_available(tiny: Tiny) -> None:
    picked = pick_backend("auto")
    assert {status.name: status for status in backends()}[picked].available
    assert make_engine(tiny("opt")).info.backend == picked
    assert pick_backend("torch") == "torch"


def test_an_unavailable_backend_names_the_reason_and_the_others() -> None:
    missing = [status for status in backends() if not status.available]
    for status in missing:
        with pytest.raises(ValueError, match=rf"'{status.name}' is not available: {re.escape(str(status.reason))}; available: .*torch"):
            pick_backend(status.name)
    with pytest.raises(ValueError, match="unknown backend 'tpu'; choose one of auto, torch, native, cuda"):
        pick_backend("tpu")
