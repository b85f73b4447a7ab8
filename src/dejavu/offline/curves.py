"""Curves over density: what predictors recall, and what perplexity does when more or less is selected than was calibrated.

In: a model, the predictors of an adapter and token ids. The first half of the text sets thresholds (and fits head
predictors, which an adapter may lack where the budget kept heads dense), the second half is measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dejavu.config import Progress, require
from dejavu.model.lora import adapted_model
from dejavu.model.masked import MaskedSelection
from dejavu.model.predictor import Predictor
from dejavu.model.selectors import LayerAdapter, PredictedHeads, PredictedNeurons, Selector
from dejavu.model.transformer import DENSE, Selection, Transformer
from dejavu.offline.collect import LayerData, pack_windows, sweep_layers
from dejavu.offline.fidelity import token_nll
from dejavu.offline.oracle import OracleHeads, OracleNeurons
from dejavu.offline.predictors import train_heads
from dejavu.offline.thresholds import Scored, score_heads, score_mlp

FACTORS = (0.4, 0.6, 0.8, 1.0, 1.4, 2.0)  # densities tried, relative to the calibrated ones
HEAD_DENSITIES = (0.5, 0.65, 0.75, 0.85, 0.92)
MASSES = (0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)
ORACLE_MASSES = (0.8, 0.9, 0.95, 0.98, 0.99)
SCORED_TOKENS = 1536


def _halves(model: Transformer, ids: Sequence[int], bos: int | None) -> tuple[Tensor, Tensor]:
    context = min(model.config.max_positions, max(2, len(ids) // 4))
    windows = pack_windows([ids], context=context, bos=bos).to(model.device)
    require(len(windows) >= 2, f"{len(ids)} tokens are too few for curves; give a longer text")
    return windows[: len(windows) // 2], windows[len(windows) // 2 :]


def _points(scored: Scored) -> list[list[float]]:
    qualities = (scored.quality(scored.threshold_for_mass(mass)) for mass in MASSES)
    return [[q.density, q.recall, q.mass] for q in qualities]


def recall_curves(model: Transformer, layers: tuple[LayerAdapter, ...], ids: Sequence[int], *, bos: int | None) -> list[dict[str, Any]]:
    """Per layer, [density, recall, mass] of the MLP and head predictors over thresholds; null where there is no predictor."""
    windows, _ = _halves(model, ids, bos)
    model = adapted_model(model, layers)
    rows: list[dict[str, Any]] = []
    for data in sweep_layers(model, windows):
        layer, tokens = layers[data.layer], slice(0, SCORED_TOKENS)
        mlp, heads = _predictor(layer.neurons), _predictor(layer.heads)
        rows.append(
            {
                "mlp": mlp and _points(score_mlp(mlp, data, model.blocks[data.layer], tokens)),
                "heads": heads and _points(score_heads(heads, data, tokens)),
            }
        )
    return rows


def _fit(
    model: Transformer, layers: tuple[LayerAdapter, ...], windows: Tensor
) -> tuple[list[Scored | None], list[Predictor], list[Scored]]:
    """Scores of the MLP predictors on the first half, and head predictors for every layer with their scores."""
    mlp: list[Scored | None] = []
    heads: list[Predictor] = []
    head_scores: list[Scored] = []
    generator = torch.Generator().manual_seed(0)
    for data in sweep_layers(model, windows):
        predictor = _predictor(layers[data.layer].neurons)
        mlp.append(None if predictor is None else score_mlp(predictor, data, model.blocks[data.layer], slice(0, SCORED_TOKENS)))
        heads.append(_head_predictor(layers[data.layer], data, model, generator))
        head_scores.append(score_heads(heads[-1], data, slice(0, len(data.group_norms_NG))))
    return mlp, heads, head_scores


def _predictor(selector: Selector) -> Predictor | None:
    """Of a part that is predicted: other methods have no curve."""
    return selector.predictor if isinstance(selector, PredictedNeurons | PredictedHeads) else None


def _head_predictor(layer: LayerAdapter, data: LayerData, model: Transformer, generator: torch.Generator) -> Predictor:
    predictor = _predictor(layer.heads)
    if predictor is not None:
        return predictor
    lookahead = 0 if data.previous_mlp_ND is None else 1
    return train_heads(data, model.config.num_kv_heads, lookahead, tokens=len(data.group_norms_NG), steps=100, generator=generator)


def perplexity_curves(
    model: Transformer,
    layers: tuple[LayerAdapter, ...],
    ids: Sequence[int],
    *,
    bos: int | None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity against MLP density and against head density, predicted and oracle; layers without a predictor run dense."""
    fit, test = _halves(model, ids, bos)
    dense_nll = token_nll(model, test, DENSE)  # of the base, whatever weights the adapter brings
    model = adapted_model(model, layers)
    mlp_scores, heads, head_scores = _fit(model, layers, fit)
    num_heads = model.config.num_heads
    counts = sorted({max(1, round(density * num_heads)) for density in HEAD_DENSITIES})
    predicted = FACTORS if any(_predictor(layer.neurons) for layer in layers) else ()
    total, done = len(predicted) + len(ORACLE_MASSES) + len(HEAD_DENSITIES) + len(counts), 0
    curves: dict[str, Any] = {"mlp": [], "heads": [], "tokens": test.numel()}

    def measure(selection: Selection) -> float:
        nonlocal done
        done += 1
        if progress is not None:
            progress("perplexity against density", done, total)
        return math.exp(float(token_nll(model, test, selection).double().mean()))

    curves["ppl_dense"] = math.exp(float(dense_nll.double().mean()))
    for factor in predicted:
        scaled = []
        for layer, scored in zip(layers, mlp_scores, strict=True):
            predictor = _predictor(layer.neurons)
            if predictor is None or scored is None:
                scaled.append(LayerAdapter())
                continue
            density = min(1.0, factor * scored.quality(predictor.threshold).density)
            threshold = predictor.threshold if factor == 1.0 else scored.threshold_for_density(density)
            scaled.append(LayerAdapter(neurons=PredictedNeurons(dataclasses.replace(predictor, threshold=threshold))))
        selection = MaskedSelection(tuple(scaled))
        ppl = measure(selection)
        curves["mlp"].append({"kind": "predicted", "density": selection.counter.mlp_density(), "ppl": ppl})
    for mass in ORACLE_MASSES:
        oracle = OracleNeurons(model, mass)
        ppl = measure(oracle)
        curves["mlp"].append({"kind": "oracle", "density": oracle.counter.mlp_density(), "ppl": ppl})
    for density in HEAD_DENSITIES:
        tuned = (
            LayerAdapter(heads=PredictedHeads(dataclasses.replace(predictor, threshold=scored.threshold_for_density(density))))
            for predictor, scored in zip(heads, head_scores, strict=True)
        )
        selection = MaskedSelection(tuple(tuned))
        ppl = measure(selection)
        curves["heads"].append({"kind": "predicted", "density": selection.counter.head_density(), "ppl": ppl})
    for count in counts:
        curves["heads"].append({"kind": "oracle", "density": count / num_heads, "ppl": measure(OracleHeads(model, count))})
    return curves
