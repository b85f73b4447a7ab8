"""From activations to an adapter: collection, oracle, predictors, thresholds, budget, profile and curves, on tiny models."""

from __future__ import annotations

import dataclasses
import itertools
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import Tiny
from dejavu.kernels.quantized import wide
from dejavu.model.adapter import Adapter, quantized
from dejavu.model.checkpoint import Checkpoint
from dejavu.model.fingerprint import model_hash
from dejavu.model.masked import MaskedSelection
from dejavu.model.predictor import Predictor
from dejavu.model.selectors import GateThreshold, LayerAdapter
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import DENSE, Selection, Transformer
from dejavu.offline.budget import DenseRuns, divergence_for, fit
from dejavu.offline.calibrate import Part, ThresholdCandidate, Tried, choose, interpolate_divergence, meet_goal
from dejavu.offline.collect import ActiveNeurons, LayerData, group_norms, mean_input, pack_windows, sweep_layers
from dejavu.offline.curves import perplexity_curves, recall_curves
from dejavu.offline.fidelity import divergences, hidden_states, token_divergence, token_nll
from dejavu.offline.oracle import OracleHeads, OracleNeurons, mass_mask
from dejavu.offline.predictors import best_of_rank, contribution_loss, start_mlp, train_mlp
from dejavu.offline.profile import profile
from dejavu.offline.split import Split, fitting_windows, split_windows
from dejavu.offline.thresholds import Scored, SelectionQuality, score_heads, score_mlp
from dejavu.offline.train import train_adapter
from dejavu.offline.train_config import TrainConfig
from dejavu.offline.train_predicted import choose_head_lookahead, held_out_tokens
from helpers.adapters import mlp_of, predicted
from helpers.offline import random_ids, skewed


@pytest.fixture
def checkpoint(tiny: Tiny, tokenizer: Tokenizer) -> Checkpoint:
    model = skewed(tiny)
    return Checkpoint(
        model=model,
        tokenizer=tokenizer,
        config=model.config,
        name="tiny",
        base_hash=model_hash(model),
        stored_dtype="fp32",
        notes=(),
        path=Path("tiny"),
    )


def data_of(model: Transformer, ids_WT: Tensor) -> list[LayerData]:
    return list(sweep_layers(model, ids_WT))


def test_a_layer_that_is_done_with_is_gone_while_the_next_is_read(tiny: Tiny) -> None:
    model, gone = tiny("opt"), list[bool]()
    seen: list[weakref.ref[Tensor]] = []
    sweep = sweep_layers(model, torch.tensor([random_ids(16)] * 6), progress=lambda *_: gone.extend(each() is None for each in seen))
    for data in sweep:
        seen = [weakref.ref(data.attention_ND), weakref.ref(data.active.runs[0][1])]
        assert torch.is_grad_enabled(), "what a consumer trains has gradients"
        del data
    assert len(gone) == 4 * (model.config.num_layers - 1) and all(gone)


def test_windows_hold_every_document_behind_one_bos() -> None:
    windows = pack_windows([[5, 6, 7], [8, 9]], context=3, bos=2)
    assert windows.tolist() == [[2, 5, 6], [7, 2, 8]]
    assert pack_windows([[5, 6]], context=64, bos=None).tolist() == [[5, 6]]
    with pytest.raises(ValueError, match="1 tokens"):
        pack_windows([[5]], context=8, bos=None)


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 10_000))
def test_active_neurons_round_trip(tokens: int, neurons: int, seed: int) -> None:
    act = torch.relu(torch.randn(tokens, neurons, generator=torch.Generator().manual_seed(seed))).bfloat16().float()
    active = ActiveNeurons.joined([ActiveNeurons.of(act), ActiveNeurons.of(act.flip(0))])
    assert torch.equal(active.dense(0, tokens), act)
    assert torch.equal(active.dense(tokens, 2 * tokens), act.flip(0))
    assert torch.equal(active.dense(1, tokens), act[1:])


def test_sweep_sees_what_the_forward_pass_sees(tiny: Tiny) -> None:
    """Layer by layer equals the whole forward: the MLP of every layer, from the recorded input, gives the recorded activations."""
    model = skewed(tiny)
    ids = torch.tensor([random_ids(20), random_ids(20, 1)])
    previous = None
    for data in data_of(model, ids):
        act = model.blocks[data.layer].activations(data.mlp_ND.float())
        assert data.previous_mlp_ND is previous
        torch.testing.assert_close(data.active.dense(0, 40), act, rtol=0.02, atol=0.05)  # inputs and values are kept in bf16
        previous = data.mlp_ND
    assert previous is not None


def test_group_norms_are_the_norms_of_what_heads_add(tiny: Tiny) -> None:
    block = tiny("opt").blocks[0]
    mixed = torch.randn(2, 5, 4, 8)
    norms = group_norms(block, mixed, 4)
    for head in range(4):
        only = torch.zeros_like(mixed)
        only[:, :, head] = mixed[:, :, head]
        added = only.flatten(-2) @ block.o.weight
        torch.testing.assert_close(norms[..., head], added.norm(dim=-1), rtol=1e-4, atol=1e-5)
    pairs = group_norms(block, mixed, 2)
    torch.testing.assert_close(pairs[..., 0], (mixed[:, :, :2].flatten(-2) @ block.o.weight[:16]).norm(dim=-1), rtol=1e-4, atol=1e-5)


def test_oracle_keeps_the_fewest_and_all_is_dense(tiny: Tiny) -> None:
    contribution = torch.tensor([[5.0, 1.0, 3.0, 1.0], [0.0, 0.0, 0.0, 2.0]])
    assert mass_mask(contribution, 0.5).tolist() == [[True, False, False, False], [False, False, False, True]]
    assert mass_mask(contribution, 0.8).tolist() == [[True, False, True, False], [False, False, False, True]]
    model = skewed(tiny)
    ids = torch.tensor([random_ids(30)])
    dense = model(ids)
    neurons = OracleNeurons(model, 1.0)
    torch.testing.assert_close(model(ids, neurons), dense)
    torch.testing.assert_close(model(ids, OracleHeads(model, 4)), dense)
    assert not torch.allclose(model(ids, OracleHeads(model, 1)), dense, atol=1e-3)
    half = OracleNeurons(model, 0.5)
    assert not torch.allclose(model(ids, half), dense, atol=1e-3)
    density, natural = half.counter.mlp_density(), neurons.counter.mlp_density()
    assert density is not None and natural is not None and 0 < density < natural < 1


def test_a_rank_that_nobody_gives_follows_the_width() -> None:
    assert [TrainConfig().rank_of(size) for size in (384, 2048, 5120)] == [64, 256, 640]
    assert TrainConfig(rank=5).rank_of(5120) == 5
    with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
        TrainConfig(rank=0)


def test_closed_form_start_at_full_rank_is_the_layer_itself(tiny: Tiny) -> None:
    """With rank D and its own input, the regression is exact up to the scale of each score: it ranks neurons perfectly."""
    model = skewed(tiny)
    data = data_of(model, torch.tensor([random_ids(60, s) for s in range(8)]))[1]
    block = model.blocks[1]
    start = start_mlp(data, block, 32, 0, 480)
    expected = block.up(data.mlp_ND.float())
    score = start.scores(data.mlp_ND)
    agree = ((score > 0) == (expected > 0)).float().mean()
    assert agree > 0.999, float(agree)


@pytest.mark.parametrize("shape", [(9, 5), (4, 7)])
def test_the_best_of_a_rank_is_what_a_whole_svd_gives(shape: tuple[int, int]) -> None:
    """Also where the rank asked for is more than the matrix has, whose rounding stays small in both factors."""
    generator = torch.Generator().manual_seed(0)
    matrix_OD = torch.randn(shape[0], 2, generator=generator) @ torch.randn(2, shape[1], generator=generator)
    matrix_OD += 0.1 * torch.randn(*shape, generator=generator)
    left, singular, right = torch.linalg.svd(matrix_OD, full_matrices=False)
    for rank in (1, 3):
        B_OR, A_RD = best_of_rank(matrix_OD, rank)
        torch.testing.assert_close(B_OR @ A_RD, left[:, :rank] * singular[:rank] @ right[:rank], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(B_OR.norm(dim=0), A_RD.norm(dim=1), rtol=1e-4, atol=1e-5)
    deficient_OD = matrix_OD[:, :1] @ matrix_OD[:1]
    B_OR, A_RD = best_of_rank(deficient_OD, 3)
    torch.testing.assert_close(B_OR @ A_RD, deficient_OD, rtol=1e-4, atol=1e-5)
    assert float(B_OR[:, 1:].abs().max()) < 1e-2 * float(B_OR.abs().max())
    assert all(float(factor.abs().max()) < 1e-6 for factor in best_of_rank(0 * matrix_OD, 2))


def test_training_beats_the_start_and_bce_works(tiny: Tiny) -> None:
    model = skewed(tiny)
    data = data_of(model, torch.tensor([random_ids(60, s) for s in range(40)]))[1]
    block, train, held_out = model.blocks[1], 2000, slice(2000, 2400)
    start = start_mlp(data, block, 2, 1, train)

    def mass(predictor: object) -> float:
        scored = score_mlp(predictor, data, block, held_out)  # pyrefly: ignore
        return scored.quality(scored.threshold_for_density(0.1)).mass

    def trained(loss: str) -> float:
        generator = torch.Generator().manual_seed(0)
        return mass(train_mlp(data, block, start, tokens=train, epochs=40, loss=loss, learning_rate=5e-3, generator=generator))

    assert trained("contribution") > mass(start)
    assert trained("bce") > 0.5 * mass(start)


def test_a_large_mean_of_the_inputs_drowns_neither_training_nor_rounding(tiny: Tiny) -> None:
    """Of a norm with a large bias: the same variation of inputs, on top of a constant 40 times as large."""
    model = skewed(tiny)
    block = model.blocks[1]
    offset_D = 40 * torch.randn(32, generator=torch.Generator().manual_seed(2)).sign()
    assert block.norm2 is not None and block.norm2.bias is not None and block.up.bias is not None
    with torch.no_grad():
        block.norm2.bias.add_(offset_D)
        block.up.bias.sub_(block.up.weight @ offset_D)
    ids = pack_windows([random_ids(6000)], context=model.config.max_positions, bos=1)
    data = next(itertools.islice(sweep_layers(model, ids), 1, None))
    assert float(data.mlp_ND.float().mean(0).abs().min()) > 30
    tokens, held_out = 4096, slice(4096, 5600)
    start = start_mlp(data, block, 8, 0, tokens)
    generator = torch.Generator().manual_seed(3)
    trained = train_mlp(data, block, start, tokens=tokens, epochs=2, loss="contribution", learning_rate=5e-3, generator=generator)

    def density(predictor: Predictor) -> float:
        scored = score_mlp(predictor, data, block, held_out)
        return scored.quality(scored.threshold_for_mass(0.99)).density

    rounded, blind = quantized(trained, mean_input(data.mlp_ND, data.device)), quantized(trained)
    assert density(trained) <= 1.02 * density(start)
    assert density(rounded) <= 1.05 * density(trained)
    assert density(blind) > 1.2 * density(rounded)


def test_contribution_loss_is_least_at_the_log_of_the_expected_contribution() -> None:
    contribution = torch.tensor([[4.0, 1.0], [0.0, 1.0]])
    scores = torch.zeros(1, 2, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = contribution_loss(scores.expand(2, 2), contribution)
        loss.backward()
        return loss

    optimizer.step(closure)
    share = contribution / (contribution.sum() / 3)
    torch.testing.assert_close(scores.detach()[0], (share.mean(0) / 0.3).log(), rtol=1e-3, atol=1e-3)


@given(st.integers(0, 10_000), st.floats(0.05, 0.95))
def test_thresholds_select_what_they_say(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    contribution = torch.relu(torch.randn(50, 11, generator=generator))
    scored = Scored(0, torch.randn(50, 11, generator=generator), contribution, contribution > 0, at_least_one=False)
    by_density = scored.quality(scored.threshold_for_density(share))
    assert abs(by_density.density - share) <= 1 / 550 + 1e-6
    threshold = scored.threshold_for_mass(share)
    assert scored.quality(threshold).mass >= share - 1e-5
    above = scored.scores[scored.scores > threshold].min()
    assert scored.quality(float(above)).mass < share + 1e-5  # one neuron fewer does not keep the mass
    assert scored.quality(-math.inf) == SelectionQuality(1.0, 1.0, 1.0)
    assert scored.quality(math.inf).density == 0


@pytest.mark.parametrize("score", [1.0, 1.0 + 2**-23, -3.0, 2.0**26])
def test_a_threshold_lies_below_its_score_also_between_neighbouring_floats(score: float) -> None:
    top = torch.tensor(score)
    following = torch.nextafter(top, torch.tensor(-torch.inf))
    scores = torch.stack([top, following, following])[:, None]
    scored = Scored(0, scores, torch.ones(3, 1), torch.ones(3, 1, dtype=torch.bool), at_least_one=False)
    assert (scores > scored.threshold_for_density(1 / 3)).flatten().tolist() == [True, False, False]
    assert (scores > scored.threshold_for_density(1.0)).all()


def test_head_quality_counts_the_head_that_always_stays(tiny: Tiny) -> None:
    model = skewed(tiny)
    data = data_of(model, torch.tensor([random_ids(60)]))[1]
    predictor = dataclasses.replace(
        start_mlp(data, model.blocks[1], 4, 0, 60), A_RD=torch.randn(4, 32), B_OR=torch.randn(4, 4), bias_O=torch.randn(4)
    )
    assert score_heads(predictor, data, slice(0, 60)).quality(math.inf).density == 0.25


def part(reads: list[float], costs: list[float], dense: float = 100.0) -> Part:
    candidates = [
        ThresholdCandidate(threshold=-float(i), quality=SelectionQuality(r / dense, 1.0, 1.0), reads=r, divergence=c)
        for i, (r, c) in enumerate(zip(reads, costs, strict=True))
    ]
    return Part(layer=0, kind="mlp", dense_reads=dense, candidates=tuple(candidates))


def test_budget_is_spent_where_it_buys_most() -> None:
    cheap, dear = part([10, 20, 40], [0.004, 0.001, 0.0002]), part([80, 90], [0.5, 0.2])
    chosen = choose([cheap, dear], allowance=0.0015)
    assert chosen[0] is not None and chosen[0].reads == 20
    assert chosen[1] is None
    assert choose([cheap, dear], allowance=0.0) == [None, None]
    generous = choose([cheap, dear], allowance=10.0)
    assert [c.reads for c in generous if c is not None] == [10, 80]


@settings(max_examples=40)
@example(2.484375, 0.05)  # the next lower choice is far lower: allowances in between buy what was too much
@given(st.floats(0.2, 5.0), st.floats(0.001, 0.05))
def test_measured_divergence_never_exceeds_the_goal(ratio: float, goal: float) -> None:
    """Whatever factor lies between the prices and what is measured, the choice keeps the goal."""
    parts = [part([10 + i for i in range(60)], [0.05 * 0.8**i for i in range(60)]) for _ in range(3)]

    def measure(choice: list[ThresholdCandidate | None]) -> float:
        return ratio * sum(c.divergence for c in choice if c is not None)

    tried: list[Tried] = []
    choice = meet_goal(parts, goal, measure, tried)
    assert measure(choice) <= goal
    assert measure(choice) > 0.3 * goal  # and spends it
    assert meet_goal(parts, 0.0, measure, tried) == [None, None, None]
    # A lower goal starts from what was tried, of which one is enough where it lies just below.
    trials = len(tried)
    assert meet_goal(parts, 1.05 * measure(choice), measure, tried) == choice and len(tried) == trials


def test_few_trials_meet_a_goal_that_prices_misjudge() -> None:
    """Prices are a third of what the whole costs, which grows faster than they do: two or three trials."""
    parts = [part([10 + i / 4 for i in range(240)], [0.05 * 0.95**i for i in range(240)]) for _ in range(3)]
    for goal in (0.002, 0.01, 0.03):
        tried: list[Tried] = []
        meet_goal(parts, goal, lambda choice: 8 * sum(c.divergence for c in choice if c is not None) ** 1.2, tried)
        assert len(tried) <= 3 and 0.88 * goal < tried[-1].measured <= goal


class OneLayer:
    """A search space of one part with two candidates: what a token reads falls to 20 % or to 60 %. chosen: what is to run."""

    parts = (part([20, 60], [0.006, 0.001]),)
    chosen: ThresholdCandidate | None = None

    def layers(self, choice: Sequence[ThresholdCandidate | None]) -> tuple[LayerAdapter, ...]:
        self.chosen = choice[0]
        return (LayerAdapter(),)


@pytest.mark.parametrize(("noise", "reads"), [(0.0, 20), (0.04, 60)])
def test_a_rise_counts_with_its_standard_error(monkeypatch: pytest.MonkeyPatch, tiny: Tiny, noise: float, reads: int) -> None:
    """A rise of 0.8 % for a budget of 1 %: kept where it is certain, given up where its standard error is 0.4 %."""
    space: Any = OneLayer()

    def nll(model: Transformer, ids_WT: Tensor, selection: Selection = DENSE) -> Tensor:
        if space.chosen is None:
            return torch.zeros(1, 100)
        rise = torch.full((1, 100), math.log1p({20: 0.008, 60: 0.002}[space.chosen.reads]))
        return rise + noise * torch.tensor([1.0, -1.0]).repeat(50) if space.chosen.reads == 20 else rise

    def divergence(*_: object) -> Tensor:
        return torch.tensor([0.0 if space.chosen is None else space.chosen.divergence])

    monkeypatch.setattr("dejavu.offline.budget.token_nll", nll)
    monkeypatch.setattr("dejavu.offline.budget.states_nll", lambda *_: torch.zeros(1, 100))
    monkeypatch.setattr("dejavu.offline.budget.token_divergence", divergence)
    monkeypatch.setattr("dejavu.offline.budget.divergence_for", lambda *_: 0.0065)
    ids_WT = torch.ones(1, 8, dtype=torch.long)
    model, split = tiny("opt", num_layers=1), Split(train=torch.empty(0), calibrate=ids_WT, check=ids_WT)
    fitted = fit(model, split, DenseRuns.of(model, split), space, 0.01, None)
    [chosen] = fitted.choice
    assert chosen is not None and chosen.reads == reads
    assert fitted.checked.rise == pytest.approx({20: 0.008, 60: 0.002}[reads], abs=1e-4)


def test_a_divergence_leaves_room_for_the_standard_error_of_its_rise() -> None:
    for budget, ratio, spread in ((0.005, 0.7, 0.02), (0.03, 2.0, 0.1), (0.0, 1.0, 0.1)):
        found = divergence_for(budget, ratio, spread)
        assert ratio * found + spread * math.sqrt(found) == pytest.approx(math.log1p(budget))


def test_what_measures_is_the_beginning_of_every_window() -> None:
    ids_WT = torch.arange(40)[:, None] * 1000 + torch.arange(1000)
    split = Split(train=ids_WT, calibrate=ids_WT[:6], check=ids_WT[:8])
    small, large = split.measured(10**6), split.measured(10**10)
    assert small.check is not split.train and torch.equal(small.check, split.check) and small.train is split.train
    assert small.calibrate.shape == (6, 4096 // 6) and torch.equal(small.calibrate, split.calibrate[:, : 4096 // 6])
    assert large.check.shape == (8, 384) and large.calibrate.shape == (3, 256)


def test_losses_are_those_of_all_logits_at_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama"), torch.tensor([random_ids(30, seed) for seed in range(3)])
    option = MaskedSelection((LayerAdapter(neurons=GateThreshold(threshold=0.02)),) * 2)
    dense, sparse = model(ids)[:, :-1].log_softmax(-1), model(ids, option)[:, :-1].log_softmax(-1)
    monkeypatch.setattr("dejavu.offline.fidelity.LOGITS", 7 * model.config.vocab_size)
    monkeypatch.setattr("dejavu.offline.fidelity.AT_ONCE", 60)
    torch.testing.assert_close(token_nll(model, ids, option), -sparse.gather(-1, ids[:, 1:, None])[..., 0])
    found = token_divergence(model, ids, hidden_states(model, ids), option)
    torch.testing.assert_close(found, (dense.exp() * (dense - sparse)).sum(-1), atol=1e-6, rtol=1e-4)


def test_interpolation_goes_through_the_measured_points() -> None:
    masses, costs = [0.8, 0.9, 0.99], [0.1, 0.02, 0.001]
    for mass, cost in zip(masses, costs, strict=True):
        assert interpolate_divergence(masses, costs, mass) == pytest.approx(cost)
    assert 0.001 < interpolate_divergence(masses, costs, 0.95) < 0.02
    assert interpolate_divergence(masses, costs, 0.999) < 0.001


def test_divergence_is_that_of_the_whole_masked_model(tiny: Tiny) -> None:
    model = skewed(tiny)
    ids = torch.tensor([random_ids(40)])
    data = data_of(model, ids)[1]
    predictor = dataclasses.replace(start_mlp(data, model.blocks[1], 2, 1, 40), threshold=1.0)
    option = predicted(mlp=predictor)
    found = divergences(model, ids, [[], [option], []])
    dense = model(ids).log_softmax(-1)
    masked = model(ids, MaskedSelection((LayerAdapter(), option, LayerAdapter()))).log_softmax(-1)
    assert found[1][0] == pytest.approx(float((dense.exp() * (dense - masked)).sum(-1).mean()), rel=1e-4)
    assert found[1][0] > 0


def test_adapter_keeps_its_budget_and_resumes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    documents = [random_ids(500, seed) for seed in range(6)]
    config = TrainConfig(budget=0.01, rank=8, epochs=1, seed=1)
    adapter, result = train_adapter(checkpoint, documents, config, text_hash="abc", work_folder=tmp_path / "work")
    assert len(result["layers"]) == 3
    assert result["rise"] <= 0.01 and result["within_budget"]
    assert result["ppl_sparse"] / result["ppl_dense"] - 1 == pytest.approx(result["rise"], rel=1e-6, abs=1e-9)
    assert 0 < result["mlp_density"] < 1
    assert adapter.config.calibration_text_hash == "abc"
    for row in result["layers"]:
        assert row["lookahead"] in (0, 1, None)
        assert (row["lookahead"] is None) == (row["density"] == 1.0)

    # The rise that is reported is that of the saved adapter, on the windows that calibration did not see.
    adapter.save(tmp_path / "adapter")
    loaded = Adapter.load(tmp_path / "adapter", model=checkpoint.config, base_hash=checkpoint.base_hash)
    check = split_windows(pack_windows(documents, context=64, bos=2)).check
    nll = token_nll(checkpoint.model, check, MaskedSelection(loaded.layers))
    assert math.exp(float(nll.double().mean())) == pytest.approx(result["ppl_sparse"], rel=1e-6)

    # A second run takes finished layers from the work folder (one is lost) and gives the same adapter.
    (tmp_path / "work" / "layer_1.safetensors").unlink()
    seen: list[str] = []
    again, _ = train_adapter(
        checkpoint, documents, config, text_hash="abc", work_folder=tmp_path / "work", progress=lambda what, done, total: seen.append(what)
    )
    assert again.config == adapter.config
    assert seen.count("training predictors") == 4  # three layers swept, one of them trained


def test_training_refuses_what_has_no_zeros(checkpoint: Checkpoint, tiny: Tiny) -> None:
    smooth = dataclasses.replace(checkpoint, model=tiny("opt", activation="gelu"), config=tiny("opt", activation="gelu").config)
    with pytest.raises(ValueError, match="gelu"):
        train_adapter(smooth, [random_ids(900)], TrainConfig(), text_hash="x")
    with pytest.raises(ValueError, match="at least 3"):
        train_adapter(checkpoint, [random_ids(100)], TrainConfig(), text_hash="x")
    for wrong in ({"budget": -0.1}, {"loss": "mse"}, {"rank": 0}, {"lookahead": "3"}, {"epochs": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TrainConfig.from_dict(wrong)
    with pytest.raises(ValueError, match="unknown keys"):
        TrainConfig.from_dict({"budgte": 0.1})


def test_predictors_are_rounded_before_they_are_calibrated(checkpoint: Checkpoint) -> None:
    adapter, _ = train_adapter(checkpoint, [random_ids(2000)], TrainConfig(budget=0.05, rank=8, epochs=1), text_hash="x")
    predictor = next(mlp_of(layer) for layer in adapter.layers if layer.neurons.selects)
    assert torch.equal(wide(quantized(predictor).B_OR), wide(predictor.B_OR))


def test_profile_tells_dead_always_on_and_contextual_apart(tiny: Tiny) -> None:
    model = skewed(tiny)
    with torch.no_grad():
        model.blocks[1].up.weight[:32].zero_()
        model.blocks[1].up.bias[:16] = -1.0  # 16 of 128 can never fire
        model.blocks[1].up.bias[16:32] = 1.0  # 16 always do
    result = profile(model, {"a": random_ids(150), "b": random_ids(70, 1)}, bos=2, oracle_tokens=60)
    row = result["layers"][1]
    assert row["dead"] >= 16 / 128 and row["always_on"] == pytest.approx(16 / 128)
    assert row["dead"] + row["always_on"] + row["contextual"] == pytest.approx(1.0)
    assert result["tokens"] == 150 + 70 + 3 + 2  # one BOS for each window of 63 tokens
    counts = []  # natural density equals a direct count

    class Count(OracleNeurons):
        def neurons(self, layer, inputs, act_BTF):  # type: ignore[no-untyped-def]
            if layer == 1:
                counts.append(float((act_BTF != 0).float().sum()))
            return act_BTF

    for ids in (random_ids(150), random_ids(70, 1)):
        for first in range(0, len(ids), 63):
            model(torch.tensor([[2, *ids[first : first + 63]]]), Count(model, 1.0))
    assert row["mlp_density"] == pytest.approx(sum(counts) / (225 * 128), rel=1e-5)
    for layer in result["layers"]:
        densities, masses = zip(*layer["mass_curve"], strict=True)
        assert list(densities) == sorted(densities) and list(masses) == sorted(masses)
        assert masses[-1] == pytest.approx(1.0, abs=1e-4)
        assert 0 < layer["heads90"] <= 1 and -1 <= layer["cosine"] <= 1
        assert layer["head_curve"][-1] == [1.0, pytest.approx(1.0, abs=1e-4)]
    mlp = [row for row in result["oracle"] if row["part"] == "mlp"]
    assert [row["density"] for row in mlp] == sorted(row["density"] for row in mlp)
    heads = {row["density"]: row["ppl"] for row in result["oracle"] if row["part"] == "heads"}
    assert heads[1.0] == pytest.approx(result["ppl_dense"], rel=1e-6)


def test_a_token_on_which_nothing_fires_needs_no_neuron(tiny: Tiny) -> None:
    model = skewed(tiny)
    with torch.no_grad():
        model.blocks[1].up.weight.zero_()
        model.blocks[1].up.bias.fill_(-1.0)
        model.blocks[2].up.weight.zero_()
        model.blocks[2].up.bias.fill_(-1.0)
        model.blocks[2].up.bias[:4] = 1.0
    rows = profile(model, {"a": random_ids(60)}, bos=2, oracle_tokens=60)["layers"]
    assert rows[1]["dead"] == 1.0 and rows[1]["mass99_density"] == 0.0
    assert all(mass == 1.0 for _, mass in rows[1]["mass_curve"])
    assert 0 < rows[2]["mass99_density"] <= 4 / 128


def test_heads_look_ahead_only_where_it_costs_little(tiny: Tiny) -> None:
    """Head contributions that are a function of the layer's own input, of which the input before says nothing."""
    generator = torch.Generator().manual_seed(0)
    first, second, third = data_of(skewed(tiny), torch.tensor([random_ids(60, s) for s in range(10)]))
    own = torch.randn(600, 32, generator=generator).bfloat16()
    data = dataclasses.replace(second, attention_ND=own, group_norms_NG=own[:, :4].float().exp())
    other = dataclasses.replace(third, previous_mlp_ND=own, group_norms_NG=own[:, :4].float().exp())
    assert choose_head_lookahead(data, 4, TrainConfig(), 400) == 0
    assert choose_head_lookahead(other, 4, TrainConfig(), 400) == 1
    assert choose_head_lookahead(data, 4, TrainConfig(lookahead="1"), 400) == 1
    assert choose_head_lookahead(other, 4, TrainConfig(lookahead="0"), 400) == 0
    assert choose_head_lookahead(first, 4, TrainConfig(lookahead="1"), 400) == 0


def test_curves_reach_dense_and_mark_their_kind(checkpoint: Checkpoint) -> None:
    adapter, _ = train_adapter(checkpoint, [random_ids(2500)], TrainConfig(budget=0.02, rank=8, epochs=2), text_hash="x")
    ids = random_ids(600, 5)
    curves = perplexity_curves(checkpoint.model, adapter.layers, ids, bos=2)
    for part_name in ("mlp", "heads"):
        kinds = {row["kind"] for row in curves[part_name]}
        assert kinds == {"predicted", "oracle"}
        assert all(0 < row["density"] <= 1 and row["ppl"] > 1 for row in curves[part_name])
    rows = recall_curves(checkpoint.model, adapter.layers, ids, bos=2)
    for row, layer in zip(rows, adapter.layers, strict=True):
        assert (row["mlp"] is None) == (not layer.neurons.selects)
        if row["mlp"] is not None:
            masses = [mass for _, _, mass in row["mlp"]]
            assert masses == sorted(masses)


def test_activations_stay_within_memory(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that is too long is thinned evenly, not cut; where the machine has not even that memory, it is refused."""
    config = tiny("opt").config
    windows = torch.arange(100)[:, None].expand(100, 64)
    assert fitting_windows(windows, config) is windows
    monkeypatch.setattr("dejavu.offline.split.MEMORY_LIMIT", 20 * 64 * (10 * config.hidden_size + 0.4 * config.intermediate_size))
    kept = fitting_windows(windows, config)[:, 0].tolist()
    assert len(kept) == 20 and kept[0] == 0 and kept[-1] == 99
    assert max(b - a for a, b in itertools.pairwise(kept)) <= 6
    monkeypatch.setattr("dejavu.offline.memory.available_bytes", lambda root: 5 * 32 * 1000)
    with pytest.raises(MemoryError, match="of 1,280 tokens .* at most --max-tokens 500$"):
        next(sweep_layers(tiny("opt"), windows[:20]))
    wide = dataclasses.replace(config, intermediate_size=65536)
    assert held_out_tokens(wide) == 256 and held_out_tokens(config) == 3072
