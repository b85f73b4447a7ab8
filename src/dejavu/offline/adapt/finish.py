"""From a trained student to an adapter: rounded to what is stored, then measured on text that training did not see.

In: a checkpoint, a Student, training and held-out windows [W, T]. Out: an Adapter and its measurements; the sparse numbers are those of
the rounded predictors and changes, in the dtype of the training, with every token masked.
`ppl_unmasked` is the perplexity of the changed weights with
all neurons, which is what a prompt runs with. What a step of the training selects swings about its target, so in the end all thresholds
are moved together until training windows select the density asked for.

Letters: B windows of a batch  T tokens  F neurons  L layers
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from dejavu.config import Progress
from dejavu.model.adapter import Adapter, quantized
from dejavu.model.adapter_config import SCHEMA_VERSIONS, AdapterConfig, LayerConfig
from dejavu.model.checkpoint import Checkpoint
from dejavu.model.lora import LoraConfig, adapted_model, quantized_lora
from dejavu.model.masked import MaskedSelection
from dejavu.model.selectors import GateThreshold, LayerAdapter, PredictedNeurons
from dejavu.model.transformer import DENSE, LayerInputs, Transformer
from dejavu.offline.adapt.divergence import chunk_tokens
from dejavu.offline.adapt.student import Student
from dejavu.offline.adapt.training import LORA_SCALE, AdaptConfig
from dejavu.offline.collect import down_norms
from dejavu.offline.fidelity import compare_runs

LARGEST_SHIFT, HALVINGS = 1.0, 9  # of a score, which is a logit
DENSITY_WINDOWS = 8


class _Measured(MaskedSelection):
    """Masks, and adds up per layer which share of the neurons that are not zero, and of the contribution, it keeps."""

    def __init__(self, model: Transformer, layers: tuple[LayerAdapter, ...]) -> None:
        super().__init__(layers)
        self.norms_LF = [down_norms(block) for block in adapted_model(model, layers).blocks]
        self.active_L, self.recalled_L, self.mass_L, self.kept_L = ([0.0] * len(layers) for _ in range(4))

    def neurons(self, layer: int, inputs: LayerInputs, act_BTF: Tensor) -> Tensor:
        mask_BTF = self.layers[layer].neurons.mask(inputs)
        assert mask_BTF is not None
        contribution_BTF = act_BTF.abs() * self.norms_LF[layer]
        active_BTF = act_BTF != 0
        self.active_L[layer] += float(active_BTF.sum())
        self.recalled_L[layer] += float((active_BTF & mask_BTF).sum())
        self.mass_L[layer] += float(contribution_BTF.sum())
        self.kept_L[layer] += float((contribution_BTF * mask_BTF).sum())
        return super().neurons(layer, inputs, act_BTF)


def rounded_layers(student: Student) -> tuple[LayerAdapter, ...]:
    """How the student selects: with its predictors as an adapter stores them, or by the zeros of its activation."""
    if student.activation is not None:
        return tuple(LayerAdapter(neurons=GateThreshold(threshold=0.0)) for _ in student.blocks)
    return tuple(LayerAdapter(neurons=PredictedNeurons(quantized(trained.predictor()))) for trained in student.trained)


def moved(layers: tuple[LayerAdapter, ...], shift: float) -> tuple[LayerAdapter, ...]:
    """The layers with the thresholds of all predictors of neurons moved."""
    return tuple(dataclasses.replace(layer, neurons=layer.neurons.shifted(shift)) for layer in layers)


@torch.inference_mode()
def shift_to(
    model: Transformer, layers: tuple[LayerAdapter, ...], ids_WT: Tensor, density: float, *, progress: Progress | None = None
) -> float:
    """How far thresholds move for a mean MLP density on the windows. By bisection: what a layer leaves out changes what later ones read."""
    low, high = -LARGEST_SHIFT, LARGEST_SHIFT
    for halving in range(HALVINGS):
        shift = (low + high) / 2
        selection = MaskedSelection(moved(layers, shift))
        for ids_T in ids_WT:
            model.hidden(ids_T[None].to(model.device), selection)
        found = selection.counter.mlp_density()
        assert found is not None
        low, high = (shift, high) if found > density else (low, shift)
        if progress is not None:
            progress("setting thresholds", halving + 1, HALVINGS)
    return (low + high) / 2


@torch.inference_mode()
def measured(
    model: Transformer, layers: tuple[LayerAdapter, ...], ids_WT: Tensor, *, batch: int = 1, progress: Progress | None = None
) -> tuple[dict[str, float], _Measured]:
    """kl, ppl_dense, ppl_sparse, rise, rise_stderr, ppl_unmasked on the windows, and what was selected."""
    selection, unmasked = _Measured(model, layers), adapted_model(model, layers)
    rows: dict[str, list[Tensor]] = {"dense": [], "sparse": [], "unmasked": []}
    divergence = 0.0
    for first in range(0, len(ids_WT), batch):
        ids = ids_WT[first : first + batch].to(model.device)
        following = ids.roll(-1, dims=1).flatten()  # of the last token nothing is kept
        hidden = {"dense": model.hidden(ids, DENSE), "sparse": model.hidden(ids, selection), "unmasked": unmasked.hidden(ids, DENSE)}
        size = chunk_tokens(ids.numel(), model.config.vocab_size)
        scored: dict[str, list[Tensor]] = {name: [] for name in rows}
        for start in range(0, ids.numel(), size):
            found = {}
            for name, states in hidden.items():
                found[name] = model.logits(states.flatten(0, 1)[start : start + size]).log_softmax(-1)
                scored[name].append(found[name].gather(1, following[start : start + size, None])[:, 0])
            divergence += float((found["dense"].exp() * (found["dense"] - found["sparse"])).sum())
        for name, parts in scored.items():
            rows[name].append(-torch.cat(parts).view(ids.shape)[:, :-1].cpu())
        if progress is not None:
            progress("measuring on held-out text", min(first + batch, len(ids_WT)), len(ids_WT))
    nll = {name: torch.cat(values) for name, values in rows.items()}
    compared = compare_runs(nll["dense"], nll["sparse"])
    return {
        "kl": max(0.0, divergence / ids_WT.numel()),
        "ppl_dense": compared.ppl_dense,
        "ppl_sparse": compared.ppl_sparse,
        "rise": compared.rise,
        "rise_stderr": compared.stderr,
        "ppl_unmasked": math.exp(float(nll["unmasked"].double().mean())),
    }, selection


def make_adapter(
    checkpoint: Checkpoint,
    student: Student,
    config: AdaptConfig,
    trained_WT: Tensor,
    held_out_WT: Tensor,
    *,
    text_hash: str,
    cosine_L: list[float],
    progress: Progress | None = None,
) -> tuple[Adapter, dict[str, Any]]:
    """The adapter of a student with what `dejavu adapt` prints.

    trained_WT: windows of the training, on which thresholds are set.
    """
    model, layers = student.teacher[0], rounded_layers(student)
    student.writer.clear()  # its memory is needed for the rounded weights
    lora = tuple(quantized_lora(change) for change in student.lora())
    described = AdapterConfig(
        schema_version=SCHEMA_VERSIONS["adapted"],
        base_id=checkpoint.name,
        base_hashes=(checkpoint.base_hash,),
        method="adapted",
        budget=None,
        calibration_text_hash=text_hash,
        quality={},
        mlp_density=1.0,
        head_density=1.0,
        seed=config.seed,
        layers=_unmeasured(layers),
        lora=LoraConfig(rank=config.lora_rank, scale=LORA_SCALE, activation=config.activation),
    )
    adapter = Adapter(layers=layers, config=described, lora=lora)
    if student.activation is None:
        shift = shift_to(model, adapter.attached(model), trained_WT, config.density, progress=progress)
        layers = moved(layers, shift)
        described = dataclasses.replace(described, layers=_unmeasured(layers))
        adapter = dataclasses.replace(adapter, layers=layers, config=described)
    quality, selection = measured(model, adapter.attached(model), held_out_WT, progress=progress)
    density_L = selection.counter.mlp_per_layer()
    mlp_density = selection.counter.mlp_density()
    assert mlp_density is not None
    rows = []
    for index, layer in enumerate(layers):
        row = {"density": density_L[index], "lookahead": layer.neurons.lookahead, "cosine": cosine_L[index]}
        row["recall"] = selection.recalled_L[index] / max(selection.active_L[index], 1.0)
        row["mass"] = selection.kept_L[index] / max(selection.mass_L[index], 1e-30)
        rows.append(row)
    entries = tuple(LayerConfig.of(i, layer, **_measures(row)) for i, (layer, row) in enumerate(zip(layers, rows, strict=True)))
    described = dataclasses.replace(described, quality=quality, mlp_density=mlp_density, layers=entries)
    result = {"layers": rows, **quality, "mlp_density": mlp_density, "head_density": 1.0, "held_out_tokens": held_out_WT.numel()}
    return dataclasses.replace(adapter, config=described), result


def _measures(row: dict[str, Any]) -> dict[str, float]:
    return {name: row[name] for name in ("density", "recall", "mass")}


def _unmeasured(layers: tuple[LayerAdapter, ...]) -> tuple[LayerConfig, ...]:
    """What the config says of layers of which nothing is known yet."""
    return tuple(LayerConfig.of(index, layer, density=1.0, recall=1.0, mass=1.0) for index, layer in enumerate(layers))
