"""A model's weights and predictors as the cuda engine reads them.

In: a Transformer on the device and its LayerAdapters. Out: the model's own tensors, read in place, and predictors int8 or
fp32, as they are. For a layer that selects inputs, an input left out is a row not read of a matrix with a row per
input, as O and down are: q, k, v and gate, up are brought into that order once, and the model's own become views of it, which products
of several tokens read as well. A dense step of such a layer keeps every input. A dense engine of the same model has copies in rows.

A predictor's A runs with a product of the same input: `before` in the MLP of the layer before, `with_qkv` in q, k and v of its
own. One that reads what only its own block's norm gives has a kernel of its own: `own_heads`, `own_mlp`. For several
rows each runs alone: `heads_first`, `neurons_first`.

Letters: D model  F neurons  Q = H K, rows of queries  N = 2 G K, rows of keys and values  R predictor rank
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.config import ModelConfig
from dejavu.kernels.cuda.attention import ScoreWeights
from dejavu.kernels.cuda.common import AS_IT_IS, BlockOutput, NormWeights, Side
from dejavu.kernels.cuda.gate import GateNeurons
from dejavu.kernels.cuda.inputs import KeptInputs
from dejavu.kernels.cuda.project import GroupScores
from dejavu.kernels.cuda.select import NeuronScores
from dejavu.kernels.quantized import Matrix, QuantizedMatrix, stacked
from dejavu.kernels.sparse_mlp import MlpWeights
from dejavu.model.layers import Held, Norm
from dejavu.model.predictor import Predictor
from dejavu.model.selectors import POINTS, GateThreshold, InputPoints, InputThresholds, LayerAdapter, PredictedHeads, PredictedNeurons
from dejavu.model.transformer import Block, Transformer
from dejavu.model.versions import same_weights

KEEP_ALL = -1.0  # a threshold that every input exceeds


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer: qkv [Q + N, D] and its bias, o [Q, D] and its bias, the MLP, both norms; how it makes scores, and how what attention and
    the MLP give joins the residual stream."""

    qkv: Tensor
    qkv_bias: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    mlp: MlpWeights
    norm1: NormWeights
    norm2: NormWeights
    scores: ScoreWeights
    attention_out: BlockOutput
    mlp_out: BlockOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPredictors:
    """The two halves of one layer's predictors, by where the first one runs; None where there is none. gate_neurons: what selects the
    neurons in the place of one."""

    before: Side | None = None
    with_qkv: Side | None = None
    own_heads: Side | None = None
    own_mlp: Side | None = None
    group_scores: GroupScores | None = None
    neurons: NeuronScores | None = None
    gate_neurons: GateNeurons | None = None
    heads_first: Side | None = None
    neurons_first: Side | None = None
    heads_before: bool = False
    neurons_lookahead: int = 0

    @property
    def selector(self) -> NeuronScores | GateNeurons | None:
        """What lists the neurons; None where the MLP runs dense."""
        return self.neurons or self.gate_neurons


@dataclass(frozen=True, slots=True, kw_only=True)
class InputLayer:
    """One layer that selects inputs: its points by name, qkv [D, Q + N] and up [D, F] or gate and up [D, 2F] with a row per input, the
    bias of the latter. selects: by point, whether it has a threshold; where it has none, all is kept."""

    points: dict[str, KeptInputs]
    selects: tuple[bool, ...]
    qkv: Tensor
    up: Tensor
    up_bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepModel:
    """What the steps of an engine read: layers and how they select, embedding and position table, head, final norm. embed_scale: of the
    embedding, as its dtype holds it. counts: int32 [M, L], see `layer_predictors`: of a step of one row, in place."""

    config: ModelConfig
    weights: list[LayerWeights]
    predictors: Sequence[LayerPredictors]
    inputs: Sequence[InputLayer | None]
    counts: Tensor
    embed: Tensor
    positions: Tensor | None
    head: Tensor
    final_norm: NormWeights
    embed_scale: float

    def joined(self, index: int) -> BlockOutput:
        """How what the layers before this one gave last joins the residual stream."""
        return self.weights[index - 1].mlp_out if index > 0 else AS_IT_IS


def layer_weights(block: Block, inv_freq: Tensor | None, *, in_rows: bool) -> LayerWeights:
    """The layer's weights in place. inv_freq: its rotary frequencies. in_rows: q, k, v, gate and up with a row per output, copied
    where they lie otherwise; else as they lie."""
    qkv, up, gate = (_detached(getattr(held, "weight", None)) for held in (block.qkv, block.up, block.gate))
    if in_rows:
        qkv, up, gate = (None if matrix is None else matrix.contiguous() for matrix in (qkv, up, gate))
    assert qkv is not None and up is not None
    mlp = MlpWeights(
        up_FD=up,
        down_FD=block.down.weight.detach(),
        gate_FD=gate,
        up_bias_F=_detached(block.up.bias),
        gate_bias_F=_detached(getattr(block.gate, "bias", None)),
        down_bias_D=_detached(block.down.bias),
        activation=block.config.activation,
        activation_threshold=block.config.activation_threshold,
    )
    assert block.norm2 is not None, "see Capabilities.check_architecture"
    norms = [norm_weights(norm) for norm in (block.norm1, block.norm2)]
    return LayerWeights(
        qkv=qkv,
        qkv_bias=_detached(block.qkv.bias),
        o=block.o.weight.detach(),
        o_bias=_detached(block.o.bias),
        mlp=mlp,
        norm1=norms[0],
        norm2=norms[1],
        scores=ScoreWeights(
            scores=block.scores,
            inv_freq=None if inv_freq is None else inv_freq.float(),
            factor=block.rotary_factor,
            q_norm=None if block.q_norm is None else norm_weights(block.q_norm),
            k_norm=None if block.k_norm is None else norm_weights(block.k_norm),
        ),
        attention_out=_block_output(block.norm1_out, block.config.residual_scale),
        mlp_out=_block_output(block.norm2_out, block.config.residual_scale),
    )


def _block_output(norm: Norm | None, scale: float) -> BlockOutput:
    if norm is None:
        return BlockOutput(scale=scale)
    weights = norm_weights(norm)
    assert weights.rms and weights.weight is not None, "norms of what blocks add are RMSNorms"
    return BlockOutput(weight=weights.weight, eps=weights.eps, scale=scale)


def norm_weights(norm: Norm | None) -> NormWeights:
    assert norm is not None
    return NormWeights(weight=_detached(norm.weight), bias=_detached(norm.bias), eps=norm.eps, rms=norm.rms)


def head_weight(model: Transformer) -> Tensor:
    return (model.embed.weight if model.head is None else model.head.weight).detach()


def layer_predictors(layers: Sequence[LayerAdapter], config: ModelConfig, device: torch.device) -> tuple[list[LayerPredictors], Tensor]:
    """How every layer selects neurons and heads, packed, with room for what it selects; and the counts of it, int32 [M, L]: neurons and
    groups, and where some layer selects inputs those of each point. What a layer selects is counted in an element of that; a part
    that selects nothing counts all it has."""
    every = all_counts(config, inputs=any(layer.inputs.selects for layer in layers))
    counts_ML = torch.tensor(every, dtype=torch.int32, device=device)[:, None].repeat(1, len(layers))
    found = [_layer(layer, config, device, counts_ML[:, index : index + 1]) for index, layer in enumerate(layers)]
    return found, counts_ML


def all_counts(config: ModelConfig, *, inputs: bool) -> list[int]:
    """What a layer that selects nothing counts: neurons, groups; with `inputs`, the inputs of each point too."""
    return [config.intermediate_size, config.num_kv_heads, *(InputPoints.of(config).sizes if inputs else ())]


def step_model(model: Transformer, layers: Sequence[LayerAdapter], predictors: Sequence[LayerPredictors], counts_ML: Tensor) -> StepModel:
    """The model's weights in place, with these predictors and counts: what `layer_predictors` made of the same layers."""
    with same_weights(model):
        inputs = _input_layers(model, layers, counts_ML[2:])
    weights = [layer_weights(block, model.frequencies(index), in_rows=inputs[index] is None) for index, block in enumerate(model.blocks)]
    return StepModel(
        config=model.config,
        weights=weights,
        predictors=predictors,
        counts=counts_ML,
        inputs=inputs,
        embed=model.embed.weight.detach(),
        positions=None if model.position is None else model.position.weight.detach(),
        head=head_weight(model),
        final_norm=norm_weights(model.final_norm),
        embed_scale=float(torch.tensor(model.config.embed_scale, dtype=model.dtype)),
    )


def dense_model(model: StepModel) -> StepModel:
    """The same weights without predictors, every input kept, with counts of its own: of all that there is."""
    config, (rows, layers), device = model.config, model.counts.shape, model.counts.device
    every = all_counts(config, inputs=rows > 2)
    counts_ML = torch.tensor(every, dtype=torch.int32, device=device)[:, None].repeat(1, layers)
    keep_all = torch.tensor([KEEP_ALL], device=device)

    def dense(index: int, layer: InputLayer) -> InputLayer:
        points = {
            point: dataclasses.replace(
                kept, threshold=keep_all, inputs=torch.zeros_like(kept.inputs), count=counts_ML[2 + at, index : index + 1]
            )
            for at, (point, kept) in enumerate(layer.points.items())
        }
        return dataclasses.replace(layer, points=points, selects=(False,) * len(points))

    return dataclasses.replace(
        model,
        predictors=[LayerPredictors()] * layers,
        inputs=[None if layer is None else dense(index, layer) for index, layer in enumerate(model.inputs)],
        counts=counts_ML,
    )


def _input_layers(model: Transformer, layers: Sequence[LayerAdapter], counts_PL: Tensor) -> list[InputLayer | None]:
    """Of the layers that select inputs; their matrices now lie with a row per input. counts_PL: by point; a layer's count is an element
    of it."""
    device, sizes = model.device, InputPoints.of(model.config).sizes
    found: list[InputLayer | None] = []
    for index, (block, layer) in enumerate(zip(model.blocks, layers, strict=True)):
        selector = layer.inputs
        if not isinstance(selector, InputThresholds):
            found.append(None)
            continue
        norms, points = selector.norms(block), {}
        for at, point in enumerate(POINTS):
            threshold = selector.of(point)
            points[point] = KeptInputs(
                norm=norms[point],
                threshold=torch.tensor([KEEP_ALL if threshold is None else threshold], device=device),
                inputs=torch.zeros(sizes[at], dtype=torch.int32, device=device),
                count=counts_PL[at, index : index + 1],
            )
        activated = [part for part in (block.gate, block.up) if part is not None]
        biases = [part.bias.detach() for part in activated if part.bias is not None]
        found.append(
            InputLayer(
                points=points,
                selects=tuple(selector.of(point) is not None for point in POINTS),
                qkv=_laid_by_input(block.qkv),
                up=_laid_by_input(*activated),
                up_bias=torch.cat(biases) if biases else None,
            )
        )
    return found


def _laid_by_input(*maps: Held) -> Tensor:
    """The matrix [I, outputs of all] of maps of the same input, with a row per input; theirs are views of it from now on."""
    together_IO = torch.cat([each.weight.detach().t() for each in maps], 1).contiguous()
    for each, part_IO in zip(maps, together_IO.split([each.weight.shape[0] for each in maps], 1), strict=True):
        each.weight.data = part_IO.t()
    return together_IO


@dataclass(slots=True)
class _Selectors:
    """What a layer's selectors are here: the one place of this engine that asks by which method a layer selects."""

    group_predictor: Predictor | None = None
    neuron_predictor: Predictor | None = None
    gate_threshold: float | None = None

    @classmethod
    def of(cls, layer: LayerAdapter) -> _Selectors:
        found = cls()
        for selector in layer.stored.values():
            match selector:
                case PredictedHeads():
                    found.group_predictor = selector.predictor
                case PredictedNeurons():
                    found.neuron_predictor = selector.predictor
                case GateThreshold():
                    found.gate_threshold = selector.threshold
                case InputThresholds():  # see _input_layers
                    pass
                case _:
                    raise ValueError(f"a layer selects by method {selector.method}: backend 'cuda' does not; use --backend torch")
        return found


def _layer(layer: LayerAdapter, config: ModelConfig, device: torch.device, count_M1: Tensor) -> LayerPredictors:
    selectors = _Selectors.of(layer)
    of_groups, of_neurons = selectors.group_predictor, selectors.neuron_predictor
    both = (of_groups, of_neurons)
    before = [predictor for predictor in both if predictor is not None and _runs_before(predictor, heads=predictor is of_groups)]
    side = None if not before else _side([predictor.A_RD for predictor in before], device)
    places: dict[int, Side] = {}
    if side is not None:
        first = 0
        for predictor in before:
            rows = slice(first, first + predictor.A_RD.shape[0])
            places[id(predictor)] = Side(matrix=side.matrix[rows], scale=side.scale[rows], out=side.out[rows])
            first = rows.stop
    own_heads = _side([of_groups.A_RD], device) if of_groups is not None and id(of_groups) not in places else None
    own_mlp = with_qkv = None
    if of_neurons is not None and id(of_neurons) not in places:
        made = _side([of_neurons.A_RD], device)
        own_mlp, with_qkv = (made, None) if of_neurons.lookahead == 0 else (None, made)
    if of_groups is not None and own_heads is not None:
        places[id(of_groups)] = own_heads
    made = own_mlp or with_qkv
    if of_neurons is not None and made is not None:
        places[id(of_neurons)] = made
    gate_neurons = None
    if selectors.gate_threshold is not None:
        threshold, marks = torch.tensor([selectors.gate_threshold], device=device), _room(config.intermediate_size, device)
        gate_neurons = GateNeurons(threshold=threshold, marks=marks, count=count_M1[0])
    return LayerPredictors(
        before=side,
        with_qkv=with_qkv,
        own_heads=own_heads,
        own_mlp=own_mlp,
        group_scores=None
        if of_groups is None
        else GroupScores(**_scores(of_groups, places[id(of_groups)].out), groups=_room(config.num_kv_heads, device), count=count_M1[1]),
        neurons=None
        if of_neurons is None
        else NeuronScores(
            **_scores(of_neurons, places[id(of_neurons)].out), neurons=_room(config.intermediate_size, device), count=count_M1[0]
        ),
        gate_neurons=gate_neurons,
        heads_first=None if of_groups is None else places[id(of_groups)],
        neurons_first=None if of_neurons is None else places[id(of_neurons)],
        heads_before=of_groups is not None and of_groups.lookahead == 1,
        neurons_lookahead=0 if of_neurons is None else of_neurons.lookahead,
    )


def _runs_before(predictor: Predictor, *, heads: bool) -> bool:
    """Whether it reads the MLP input of the layer before."""
    return predictor.lookahead == (1 if heads else 2)


def _packed(matrix: Matrix, device: torch.device) -> tuple[Tensor, Tensor]:
    """int8 with its scales, or fp32 and ones."""
    matrix = matrix.to(device)
    if isinstance(matrix, QuantizedMatrix):
        assert matrix.grid == "int8" and matrix.scales is not None, f"a predictor in {matrix.grid}"
        # Copies, so that the predictors of all layers lie together: scattered among the weights they cost a sparse step a hundredth.
        return matrix.values.clone(), matrix.scales.clone()
    return matrix.detach().float().contiguous(), torch.ones(matrix.shape[0], device=device)


def _side(matrices: Sequence[Matrix], device: torch.device) -> Side:
    matrix, scale = _packed(stacked(matrices), device)
    return Side(matrix=matrix, scale=scale, out=torch.zeros(matrix.shape[0], device=device))


def _scores(predictor: Predictor, h: Tensor) -> dict[str, Tensor]:
    """The fields of `PredictorScores`."""
    matrix, scale = _packed(predictor.B_OR, h.device)
    bias, threshold = predictor.bias_O.float().to(h.device), torch.tensor([predictor.threshold], device=h.device)
    return {"matrix": matrix, "scale": scale, "bias": bias, "threshold": threshold, "h": h}


def _room(count: int, device: torch.device) -> Tensor:
    """For a list of so many, or their marks."""
    return torch.zeros(count, dtype=torch.int32, device=device)


def _detached(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()
