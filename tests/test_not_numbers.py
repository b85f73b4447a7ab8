"""NaN is never taken for zero: activations hand it on, selections keep it, and evaluation says where it came from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from conftest import Tiny
from dejavu.config import ACTIVATIONS
from dejavu.engine.torch_engine import TorchEngine
from dejavu.kernels.activation import activate
from dejavu.model.checkpoint import Checkpoint
from dejavu.model.masked import MaskedSelection
from dejavu.model.selectors import GateThreshold, InputThresholds, LayerAdapter, PredictedHeads, PredictedNeurons
from dejavu.model.selectors.inputs import input_mask
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import LayerInputs
from dejavu.offline.fidelity import DenseStates
from dejavu.offline.profile import profile
from dejavu.offline.split import training_context
from dejavu.offline.thresholds import Scored
from dejavu.offline.train import train_adapter
from dejavu.offline.train_config import TrainConfig
from dejavu.quality.perplexity import perplexity
from dejavu.quality.tasks import make_request, score_requests
from helpers.engines import ids_of, predictor
from helpers.native import engine_of, needs_library

NAN, INF = math.nan, math.inf
X = torch.tensor([[0.5, -1.0], [NAN, 0.1], [INF, 0.0]])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_of_nan_is_nan(activation: str) -> None:
    values = activate(torch.tensor([NAN, 1.0]), activation, 0.5)
    assert values.isnan().tolist() == [True, False]


def test_what_is_nan_or_infinite_is_selected_by_every_method(tiny: Tiny) -> None:
    model = tiny("opt")
    size = model.config.hidden_size
    x_TD = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    x_TD[1, 4] = NAN
    inputs = LayerInputs(x_TD, x_TD, None, X)
    mlp = predictor(0, model, 64, 0, threshold=1e9)
    assert PredictedNeurons(mlp).mask(inputs).any(-1).tolist() == [False, True, False]
    assert PredictedNeurons(mlp).mask(inputs)[1].all()
    assert PredictedHeads(predictor(0, model, 4, 0, threshold=1e9)).mask(inputs).sum(-1).tolist() == [1, 4, 1]
    assert GateThreshold(threshold=0.7).mask(inputs).tolist() == [[False, True], [True, False], [True, False]]
    assert input_mask(X, torch.ones(2), 0.7).tolist() == [[False, True], [True, False], [True, False]]


@pytest.mark.parametrize("layer", [
    LayerAdapter(neurons=GateThreshold(threshold=0.5)),
    LayerAdapter(inputs=InputThresholds(attention=0.5, mlp=0.5, down=0.5)),
], ids=["gate", "inputs"])  # fmt: skip
def test_where_the_dense_model_gives_nan_the_sparse_one_does(tiny: Tiny, layer: LayerAdapter) -> None:
    model = tiny("llama", activation="fatrelu", activation_threshold=0.2)
    model.blocks[1].up.weight[5, 5] = NAN
    ids_BT = torch.tensor([ids_of(3)])
    dense, sparse = model(ids_BT), model(ids_BT, MaskedSelection((layer, layer)))
    assert dense.isnan().any()
    assert sparse.isnan()[dense.isnan()].all()


@needs_library
def test_engines_do_not_lose_nan_in_fatrelu(tiny: Tiny) -> None:
    model = tiny("llama", activation="fatrelu", activation_threshold=0.2)
    model.blocks[0].activated.weight[7] = NAN
    assert TorchEngine(model).prefill(0, ids_of(1)).isnan().all()
    with pytest.raises(ValueError, match="not numbers|not finite"):
        engine_of(model).prefill(0, ids_of(1))


def test_evaluation_names_the_first_layer_and_token_that_are_not_finite(tiny: Tiny) -> None:
    model = tiny("opt")
    ids = [5, 6, 7, 8, 9, 10, 11, 12]
    model.embed.weight[10] = NAN
    with pytest.raises(ValueError, match=r"first in the embedding, at token 3 \(id 10\) of window 2"):
        perplexity(model, ids, bos=2, context=4)
    model = tiny("opt")
    model.blocks[1].down.weight[3, 3] = INF
    with pytest.raises(ValueError, match=r"first in layer 1, at token 1 \(id 5\) of request 1; .*try fp32"):
        score_requests(model, [make_request([5, 6], [7, 8], 64, "row 1")])


@pytest.mark.parametrize("method", ["predicted", "gate", "input"])
def test_training_names_the_layer_whose_weights_hold_nan(tiny: Tiny, tokenizer: Tokenizer, method: str) -> None:
    """Also where the NaN is met in training windows alone, behind those that the dense model runs on first."""
    model = tiny("llama", activation="relu")
    checkpoint = Checkpoint(
        model=model, tokenizer=tokenizer, config=model.config, name="tiny", base_hash="0" * 64, stored_dtype="fp32", notes=(), path=Path()
    )  # fmt: skip
    ids = [5 + index % 80 for index in range(2000)]
    model.blocks[1].up.weight.data[3, 3] = NAN
    with pytest.raises(ValueError, match=r"first in layer 1, at token 1 \(id \d+\) of window 1; .*try fp32"):
        train_adapter(checkpoint, [ids], TrainConfig.from_dict({"method": method}), text_hash="x")
    model.blocks[1].up.weight.data[3, 3] = 0
    model.embed.weight.data[90] = NAN
    ids[2 * training_context(model.config) + 6] = 90  # the first two windows check and calibrate
    with pytest.raises(ValueError, match=r"first in the embedding, at token 8 \(id 90\) of window 1; .*try fp32"):
        train_adapter(checkpoint, [ids], TrainConfig.from_dict({"method": method}), text_hash="x")


def test_a_profile_names_the_layer_whose_weights_hold_nan(tiny: Tiny) -> None:
    model = tiny("opt")
    model.blocks[1].down.weight.data[3, 3] = NAN
    with pytest.raises(ValueError, match=r"first in layer 1, at token 1 \(id 2\) of window 1"):
        profile(model, {"a": ids_of(20)}, bos=2)


def test_scores_and_costs_that_are_no_numbers_set_no_threshold(tiny: Tiny) -> None:
    good = torch.ones(3, 2)
    for scores, contribution, name in ((X, good, "scores"), (good, X, "contributions")):
        with pytest.raises(ValueError, match=f"layer 4: {name} are not finite"):
            Scored(4, scores, contribution, contribution > 0, at_least_one=False)
    model = tiny("opt")
    states = DenseStates(model, torch.tensor([ids_of(3)]))
    model.blocks[1].down.weight.data[3, 3] = NAN
    with pytest.raises(ValueError, match="layer 0: what a selection costs is nan, no number"):
        states.divergence(0, MaskedSelection((LayerAdapter(), LayerAdapter())))
