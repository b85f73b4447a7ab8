"""Planted models: as sparse as asked for, by sets that each token has of its own, which predictors find most of."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from dejavu.bench.models import planted
from dejavu.bench.models.density import rethresholded
from dejavu.bench.models.planted import (
    ATTENTION_SHARE,
    LOGIT_SPREAD,
    MLP_SHARE,
    PlantedModel,
    check_planted_memory,
    firing_rates,
    plant,
    planted_model,
    planted_quality,
    relu_moments,
)
from dejavu.bench.models.random import SHAPES, planted_layers, random_ids, shape_of
from dejavu.config import ModelConfig
from dejavu.kernels.quantized import wide as dense
from dejavu.model.adapter import quantized
from dejavu.model.families import parameter_shapes
from dejavu.model.predictor import Predictor
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import LayerInputs, Selection
from dejavu.offline.collect import sweep_layers
from dejavu.offline.predictors import start_mlp, train_mlp
from dejavu.offline.thresholds import score_mlp
from helpers.adapters import heads_of, mlp_of, predicted, predictors_of

KINDS = {"gated": "llama-2-7b-relu", "ungated": "opt-125m", "squared": "minitron-4b"}
SIZES = {"vocab_size": 500, "hidden_size": 96, "intermediate_size": 400, "num_heads": 6, "num_kv_heads": 6, "head_dim": 16}
RANK = 16

kinds = pytest.mark.parametrize("kind", KINDS)


def tiny_config(kind: str, **changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(shape_of(KINDS[kind]).to_dict() | SIZES | {"num_layers": 3, "max_positions": 300} | changes)


def make(kind: str, *, config: ModelConfig | None = None, **options: Any) -> PlantedModel:
    values: dict[str, Any] = {"name": kind, "device": "cpu", "dtype": "fp32", "density": 0.1, "rank": RANK} | options
    return plant(config or tiny_config(kind), **values)


@cache
def made_of(kind: str) -> PlantedModel:
    return make(kind)


@cache
def thresholded(kind: str, share: float, head_density: float | None = None) -> tuple[LayerAdapter, ...]:
    """Predictors that select `share` times what fires."""
    made = made_of(kind)
    layers = made.layers if head_density is not None else [LayerAdapter(neurons=layer.neurons) for layer in made.layers]
    return rethresholded(made.model, layers, random_ids(made.config, 256), mlp_density=share * made.density, head_density=head_density)


def other_ids(made: PlantedModel) -> list[int]:
    """Not those that thresholds come from."""
    return random_ids(made.config, 256, seed=1)


def tensors_of(made: PlantedModel) -> list[Tensor]:
    parts = [part for layer in made.layers for part in predictors_of(layer)]
    return [*made.model.parameters(), *(tensor for part in parts for tensor in (dense(part.A_RD), dense(part.B_OR), part.bias_O))]


class Seen(Selection):
    """Activations and the normed input of every MLP."""

    def __init__(self) -> None:
        self.act: list[Tensor] = []
        self.attention_in: list[Tensor] = []
        self.mlp_in: list[Tensor] = []

    def neurons(self, layer: int, inputs: LayerInputs, act_BTF: Tensor) -> Tensor:
        assert inputs.mlp is not None
        self.act.append(act_BTF[0])
        self.attention_in.append(inputs.attention[0])
        self.mlp_in.append(inputs.mlp[0])
        return act_BTF


@torch.inference_mode()
def seen(made: PlantedModel) -> Seen:
    selection = Seen()
    made.model.hidden(torch.tensor([other_ids(made)]), selection)
    return selection


@kinds
def test_a_seed_gives_one_model_and_dtypes_round_it(kind: str) -> None:
    made, same, half = made_of(kind), make(kind), make(kind, dtype="fp16")
    assert all(map(torch.equal, tensors_of(made), tensors_of(same)))
    assert not torch.equal(make(kind, seed=1).model.blocks[0].up.weight, made.model.blocks[0].up.weight)
    assert not torch.equal(made.model.blocks[1].up.weight, made.model.blocks[0].up.weight)
    weights = dict(made.model.named_weights())
    for key, value in half.model.named_weights():
        # down's bias adds up rows of down that were rounded before.
        assert value.dtype == torch.float16 and not value.requires_grad
        assert torch.allclose(value.float(), weights[key], atol=1e-3, rtol=1e-3), key
    assert made.num_parameters == sum(math.prod(shape) for shape in parameter_shapes(made.config).values())
    assert not made.model.training and (made.dtype, half.dtype) == ("fp32", "fp16")


@kinds
@pytest.mark.parametrize("density", [0.03, 0.1, 0.4])
def test_the_target_share_of_neurons_fires_and_each_token_has_its_own(kind: str, density: float) -> None:
    # A neuron's inputs are normal but for 1/D, and what fires differs from token to token by about a third: 2 % over 256 tokens.
    for act_TF in seen(make(kind, density=density)).act:
        fired_TF = (act_TF != 0).float()
        assert float(fired_TF.mean()) == pytest.approx(density, rel=0.15)
        assert float(fired_TF.mean(0).max()) < 3 * density + 0.05, "no neuron is always on"
        assert float((fired_TF.sum(0) == 0).float().mean()) < 0.02, "and hardly one dead: 3 % of 256 tokens are 8"
        shared = float((fired_TF[1:] * fired_TF[:-1]).sum() / fired_TF[1:].sum())
        assert shared < 1.3 * density + 0.03, "tokens choose independently"


@kinds
@pytest.mark.parametrize("density", [0.1, 0.5])
@torch.inference_mode()
def test_the_residual_stream_is_well_scaled(kind: str, density: float) -> None:
    made = make(kind, config=tiny_config(kind, hidden_size=192, head_dim=32, intermediate_size=1600), density=density)
    found = seen(made)
    for block, act_TF, attention_in, mlp_in in zip(made.model.blocks, found.act, found.attention_in, found.mlp_in, strict=True):
        added_TD = block.down(act_TF)
        assert float(added_TD.square().mean()) == pytest.approx(MLP_SHARE / 3, rel=0.2)
        assert float(added_TD.mean(0).square().mean()) < 0.05 * MLP_SHARE / 3, "what every token gets"
        close = torch.cosine_similarity(attention_in, mlp_in, dim=-1)
        assert float(close.mean()) > (1 + ATTENTION_SHARE / 3) ** -0.5 - 0.02, "attention adds little"
    logits = made.model(torch.tensor([other_ids(made)]))[0]
    assert float(logits.std()) == pytest.approx(LOGIT_SPREAD, rel=0.15)
    likeliest = logits.argmax(-1)
    assert float((likeliest == torch.tensor(other_ids(made))).float().mean()) < 0.1, "a tied head does not repeat its token"


@kinds
@pytest.mark.parametrize(("share", "least"), [(1.0, 0.6), (1.5, 0.75)])
def test_predictors_find_most_of_what_fires_and_not_all(kind: str, share: float, least: float) -> None:
    made = made_of(kind)
    quality = planted_quality(made, thresholded(kind, share), other_ids(made))
    assert quality.mlp_density == pytest.approx(share * 0.1, rel=0.15) and quality.head_density == 1.0
    assert quality.natural_density == pytest.approx(0.1, rel=0.15)
    assert all(least < recall < 0.98 for recall in quality.recall_L)
    assert quality.recall > 4 * quality.mlp_density, "chance finds as many as are selected"
    assert quality.recall == pytest.approx(sum(quality.recall_L) / 3) and quality.mlp_density == pytest.approx(
        sum(quality.mlp_density_L) / 3
    )
    assert quality.mlp_and_heads is None and quality.tokens == 256


@kinds
def test_a_predictor_of_higher_rank_finds_more(kind: str) -> None:
    """What a rank-r predictor misses is in the planted rest: the first columns of A and B are the best of their rank."""
    made, wide = made_of(kind), make(kind, rank=32)
    cut = []
    for layer in wide.layers:
        part = dataclasses.replace(mlp_of(layer), A_RD=dense(mlp_of(layer).A_RD)[:8], B_OR=dense(mlp_of(layer).B_OR)[:, :8])
        cut.append(predicted(mlp=quantized(part)))
    recalls = []
    for layers in (wide.layers, cut):
        layers = rethresholded(wide.model, layers, random_ids(made.config, 256), mlp_density=0.1)
        recalls.append(planted_quality(wide, layers, other_ids(wide)).recall)
    assert recalls[0] > recalls[1] + 0.1


@kinds
def test_trained_predictors_find_at_least_what_planted_ones_find(kind: str) -> None:
    """At the same density, of the same rank and from the input before attention; one batch of steps from the closed form."""
    made, tokens = made_of(kind), 3000
    ids_WT = torch.tensor(random_ids(made.config, tokens + 600, seed=2)).view(-1, 300)
    data = next(islice(sweep_layers(made.model, ids_WT), 1, None))
    block, given = made.model.blocks[1], mlp_of(made.layers[1])
    start = start_mlp(data, block, RANK, given.lookahead, tokens)
    generator = torch.Generator().manual_seed(0)
    trained = train_mlp(data, block, start, tokens=tokens, epochs=1, loss="contribution", learning_rate=5e-3, generator=generator)

    def recall(predictor: Predictor) -> float:
        scored = score_mlp(predictor, data, block, slice(tokens, tokens + 600))
        return scored.quality(scored.threshold_for_density(2 * made.density)).recall

    assert recall(trained) > recall(given) - 0.02 > 0.8


@kinds
def test_sparse_logits_are_nearer_than_with_a_random_selection(kind: str) -> None:
    made = made_of(kind)
    random = rethresholded(
        made.model, planted_layers(made.config, density=0.15, heads=False, rank=RANK), random_ids(made.config, 256), mlp_density=0.15
    )
    real, chance = (planted_quality(made, layers, other_ids(made)) for layers in (thresholded(kind, 1.5), random))
    assert chance.recall == pytest.approx(chance.mlp_density, abs=0.05) and chance.mlp_density == pytest.approx(0.15, rel=0.15)
    assert 0.01 < real.mlp.kl < chance.mlp.kl / 5
    assert chance.mlp.same_argmax + 0.3 < real.mlp.same_argmax < 1


@kinds
def test_everything_selected_is_the_dense_model(kind: str) -> None:
    made = made_of(kind)
    layers = tuple(
        predicted(mlp=dataclasses.replace(mlp_of(layer), threshold=-1e9), heads=dataclasses.replace(heads_of(layer), threshold=-1e9))
        for layer in made.layers
    )
    quality = planted_quality(made, layers, other_ids(made))
    assert (quality.recall, quality.mlp_density, quality.head_density) == (1.0, 1.0, 1.0)
    assert quality.mlp == quality.mlp_and_heads and quality.mlp.same_argmax == 1.0 and quality.mlp.kl < 1e-6


@kinds
def test_heads_are_selected_token_by_token_and_cost_more(kind: str) -> None:
    made = made_of(kind)
    assert [heads_of(layer).lookahead for layer in made.layers] == [0, 1, 1]
    assert [mlp_of(layer).lookahead for layer in made.layers] == [1, 1, 1]
    quality = planted_quality(made, thresholded(kind, 1.5, 0.5), other_ids(made))
    alone = planted_quality(made, thresholded(kind, 1.5), other_ids(made))
    assert quality.head_density == pytest.approx(0.5, abs=0.06) and quality.recall == pytest.approx(alone.recall, abs=0.03)
    assert quality.mlp_and_heads is not None
    assert quality.mlp_and_heads.kl > quality.mlp.kl and quality.mlp.kl == pytest.approx(alone.mlp.kl, rel=0.2)


@kinds
def test_a_slice_is_the_first_layers_of_the_whole(kind: str) -> None:
    made, part = made_of(kind), make(kind, num_layers=2)
    assert part.is_slice and not made.is_slice and part.layers_of_full == made.layers_of_full == 3
    assert part.config.num_layers == len(part.layers) == len(part.model.blocks) == 2
    assert part.label == f"{kind}[2 of 3 layers]" and made.label == kind
    whole = dict(made.model.named_parameters())
    assert all(torch.equal(value, whole[key]) for key, value in part.model.named_parameters())
    mlps = [(mlp_of(a), mlp_of(b)) for a, b in zip(part.layers, made.layers[:2], strict=True)]
    assert all(a and b and torch.equal(dense(a.B_OR), dense(b.B_OR)) for a, b in mlps)


@kinds
@torch.inference_mode()
def test_a_deep_model_is_finite_in_half_precision(kind: str) -> None:
    exact = make(kind, config=tiny_config(kind, num_layers=32), density=0.05)
    ids_BT = torch.tensor([random_ids(exact.config, 40)])
    expected = exact.model(ids_BT)
    for dtype, limit in (("fp16", 0.02), ("bf16", 0.15)):
        logits = make(kind, config=exact.config, dtype=dtype, density=0.05).model(ids_BT)
        assert bool(logits.isfinite().all())
        assert float((logits - expected).abs().mean()) < limit * LOGIT_SPREAD, "rounding does not grow with depth"


def test_matrices_made_in_chunks_keep_their_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted, "CHUNK", 1000)  # ten rows
    made = make("ungated")
    for act_TF in seen(made).act:
        assert float((act_TF != 0).float().mean()) == pytest.approx(0.1, rel=0.15)
    for block in made.model.blocks:
        assert float(block.q.weight.std()) == pytest.approx((2 / 96) ** 0.5, rel=0.05)
        assert int(block.up.weight.isfinite().sum()) == 400 * 96 and float(block.down.weight.abs().amin(1).min()) > 0


@pytest.mark.parametrize("neurons", [16384, 9215])
@pytest.mark.parametrize("selection", ["uniform", "hot-set", "published"])
def test_rates_of_firing(selection: str, neurons: int) -> None:
    """Of the density on average; what comes in pairs fires alike; the same for one seed."""
    rates = firing_rates(selection, 0.05, neurons, seed=3)
    assert len(rates) == neurons and rates.mean() == pytest.approx(0.05, rel=0.05) and 0 < rates.min() <= rates.max() < 1
    half = -(-neurons // 2)
    assert (rates[: neurons - half] == rates[half:]).all() and (rates == firing_rates(selection, 0.05, neurons, seed=3)).all()
    hot = (rates == 0.5).sum() * 0.5 / rates.sum()
    assert hot == pytest.approx(0.8 if selection == "hot-set" else 0.0, abs=0.01)


UNIONS = {"uniform": (0.19, 0.344, 0.57), "hot-set": (0.146, 0.214, 0.325), "published": (0.15, 0.21, 0.29)}


@pytest.mark.parametrize("selection", UNIONS)
@pytest.mark.parametrize("kind", ["ungated", "squared"])
def test_what_several_tokens_select_together(kind: str, selection: str) -> None:
    """Of what predictors set to a tenth select: by 2, 4 and 8 tokens; the published ones are Polar Sparsity's for OPT-6.7B."""
    made = make(kind, density=0.05, selection=selection, config=tiny_config(kind, intermediate_size=4000))
    layers = rethresholded(
        made.model, [LayerAdapter(neurons=layer.neurons) for layer in made.layers], random_ids(made.config, 256), mlp_density=0.1,
        head_density=None,
    )  # fmt: skip
    act = seen(made).act
    for act_TF in act:
        assert float((act_TF != 0).float().mean()) == pytest.approx(0.05, rel=0.25)
    engine_in, unions = seen(made), {2: [], 4: [], 8: []}
    for index, layer in enumerate(layers[1:], start=1):
        (predictor,) = predictors_of(layer)
        h_TR = engine_in.attention_in[index] @ dense(predictor.A_RD).T
        chosen_TF = h_TR @ dense(predictor.B_OR).T + predictor.bias_O > predictor.threshold
        for rows, found in unions.items():
            found.append(float(chosen_TF[: 256 // rows * rows].view(-1, rows, chosen_TF.shape[1]).any(1).float().mean()))
    means = [sum(found) / len(found) for found in unions.values()]
    assert means == pytest.approx(UNIONS[selection], rel=0.12)


@pytest.mark.parametrize("density", [0.02, 0.3, 0.7])
def test_moments_of_relu(density: float) -> None:
    z, mean, square = relu_moments(density)
    act = (torch.randn(4_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - z).relu()
    assert float((act > 0).double().mean()) == pytest.approx(density, rel=0.02)
    assert (float(act.mean()), float(act.square().mean())) == pytest.approx((mean, square), rel=0.02)


def test_memory_is_checked_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    config = shape_of("opt-66b")
    options: dict[str, Any] = {"device": "cuda", "dtype": "fp16", "rank": 512}
    with pytest.raises(
        ValueError, match=r"opt-66b in fp16 with 64 layers .* about 14\d\.\d GB on cuda and 80\.0 GB are free; .* --layers 3\d at most"
    ) as error:
        check_planted_memory("opt-66b", config, available=80 * 10**9, **options)
    fits = int(str(error.value).split("--layers ")[1].split()[0])
    check_planted_memory("opt-66b", dataclasses.replace(config, num_layers=fits), available=80 * 10**9, **options)
    with pytest.raises(ValueError, match=f"--layers {fits} at most"):
        check_planted_memory("opt-66b", dataclasses.replace(config, num_layers=fits + 1), available=80 * 10**9, **options)
    with pytest.raises(ValueError, match="take a smaller shape$"):
        check_planted_memory("opt-66b", config, available=10**9, **options)
    check_planted_memory("opt-30b", shape_of("opt-30b"), available=79 * 10**9, **options)
    check_planted_memory("opt-66b", config, available=None, **options)
    monkeypatch.setattr(planted, "free_bytes", lambda device: 10**5)
    monkeypatch.setattr(planted, "empty_model", lambda config: pytest.fail("made all the same"))
    with pytest.raises(ValueError, match="GB are free"):
        make("gated")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is not available for a planted model; choose one of fp32, fp16, bf16"),
        ({"density": 0.0}, "density must lie between 0 and 1, not 0"),
        ({"density": 1.0}, "density must lie between 0 and 1, not 1"),
        ({"rank": 97}, r"rank must lie between 1 and 96 \(the hidden size\), not 97"),
        ({"num_layers": 4}, r"layers must lie between 1 and 3 \(those of gated\), not 4"),
        ({"num_layers": 0}, "layers must lie between 1 and 3 .*, not 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("gated", **options)


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device cuda:0 is not available: torch finds no GPU; take cpu"):
        make("gated", device="cuda:0")


def test_shapes_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "opt-tiny", lambda: tiny_config("ungated"))
    made = planted_model("opt-tiny", device="cpu", dtype="bf16", density=0.1, rank=RANK, num_layers=1)
    assert (made.name, made.config.num_layers, made.layers_of_full) == ("opt-tiny", 1, 3)
    with pytest.raises(ValueError, match="no shape is called 'opt-1t'"):
        planted_model("opt-1t", device="cpu", dtype="fp32", density=0.1)
    with pytest.raises(
        ValueError, match="smollm2-135m has activation silu, no biases of its MLPs or of the norms before them: no sparsity can be planted"
    ):
        planted_model("smollm2-135m", device="cpu", dtype="fp32", density=0.1)
