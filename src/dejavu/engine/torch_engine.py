"""The engine that defines decoding: plain torch, any device, any float dtype.

In: token ids and slots. Out: logits, and per layer the neurons and heads that were computed. For each layer of a step
    scores -> mask -> index list -> rows of q, reads of the cache and rows of o for the selected head groups;
    scores -> mask -> index list -> rows of up (and gate) and down for the selected neurons.
Where a layer selects without predictors (model/selectors/), likewise
    the activated gate of every neuron -> mask -> index list -> rows of up and down for those kept;
    what a linear map reads -> mask -> index list -> columns (of o and down: rows) of the kept inputs, for all maps of the point.
Keys and values are computed and stored for every head. Rows of a step are computed one after the other, each as if it
were alone: its tokens are bit-identical whatever its batch mates, in every dtype. Other engines are tested against this.

Letters: B rows of a step  D model  F neurons  H query heads  G key/value heads  R query heads per group
K head_dim  A selected groups or neurons  V vocabulary  L layers
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dejavu.engine.capabilities import Capabilities
from dejavu.engine.interface import LayerSelection, StepResult
from dejavu.engine.options import EngineOptions
from dejavu.engine.paged import PagedEngine
from dejavu.engine.prefill import prefill, prefill_logits
from dejavu.kernels.attention import attend_pages, output_heads, query_heads
from dejavu.kernels.quantized import wide
from dejavu.kernels.sparse_linear import linear_columns, linear_rows
from dejavu.kernels.sparse_mlp import MlpWeights, activated, activated_gate, dense_mlp, gate_mlp, sparse_mlp
from dejavu.model.counts import Counts
from dejavu.model.predictor import mlp_predictor_input
from dejavu.model.selectors import POINTS, AllNeurons, GateThreshold, InputPoints, InputSelector, LayerAdapter, NeuronSelector
from dejavu.model.transformer import Block, LayerInputs, Transformer

TORCH = Capabilities(backend="torch", dtypes=("fp32", "fp16", "bf16", "fp64"), parts=None)


class TorchEngine(PagedEngine):
    """See `dejavu.engine.interface.Engine`. Reads the weights of `model` in place: no copy is made. Of quantised
    ones those of a layer are dequantised when it runs, at every token: slow; `model.widened()` is not.

    layers: the predictors of each layer, or None for a dense engine.
    """

    capabilities = TORCH

    def __init__(self, model: Transformer, layers: Sequence[LayerAdapter] | None = None, options: EngineOptions = EngineOptions()) -> None:
        super().__init__(model, layers, options)
        self.model = model
        self._blocks = model.blocks
        self._norms = tuple(layer.inputs.norms(block) for layer, block in zip(self.layers, self._blocks, strict=True))
        self._all_groups = torch.arange(self.config.num_kv_heads, device=model.device)

    @torch.inference_mode()
    def _prefill(self, slot: int, token_ids: Sequence[int], *, every: bool) -> Tensor:
        return (prefill_logits if every else prefill)(self.model, self._cache, slot, token_ids)

    @torch.inference_mode()
    def _step(self, token_ids_B: Sequence[int], slots_B: Sequence[int], *, sparse: bool, record: bool) -> StepResult:
        """Row after row."""
        rows = [self._row(token_id, slot, sparse=sparse) for token_id, slot in zip(token_ids_B, slots_B, strict=True)]
        self._count_rows(slots_B)
        neurons, heads = self.config.intermediate_size, self.config.num_heads
        selections = tuple(selected for _, selected in rows)
        points = self.info.input_points
        return StepResult(
            logits_BV=torch.stack([logits_V for logits_V, _ in rows]),
            counts=Counts(
                neurons=torch.tensor([[_count(layer.neurons_A, neurons) for layer in row] for row in selections]),
                heads=torch.tensor([[_count(layer.heads_A, heads) for layer in row] for row in selections]),
                kept_inputs=None
                if points is None
                else torch.tensor([[_input_counts(layer, points) for layer in row] for row in selections]),
            ),
            selections=tuple(tuple(layer.cpu() for layer in row) for row in selections) if record else None,
            union_L=torch.tensor([_union(of_layer, neurons) for of_layer in zip(*selections, strict=True)]),
            fallback_layers=0,
        )

    def _normed(self, x_D: Tensor) -> Tensor:
        return x_D if self.model.final_norm is None else self.model.final_norm(x_D)

    def _row(self, token_id: int, slot: int, *, sparse: bool) -> tuple[Tensor, tuple[LayerSelection, ...]]:
        """One token of one slot through every layer: logits fp32 [V] and what each layer computed."""
        position = self._cache.lengths[slot]
        device = self._all_groups.device
        position_T = torch.tensor([position], device=device)
        x_D = self.model.embedded(torch.tensor([token_id], device=device), position_T)[0]
        page_N = self._cache.pages(slot, position + 1)
        previous_mlp: Tensor | None = None
        selections = []
        for index, (block, layer) in enumerate(zip(self._blocks, self._layers_for(sparse), strict=True)):
            attention_D = block.attention_input(x_D)
            groups_A = _indices(layer.heads.mask(LayerInputs(attention_D, None, previous_mlp)))
            kept = _KeptInputs(layer.inputs, self._norms[index])
            y_D = self._attention(index, attention_D, position_T, slot, page_N, groups_A, kept)
            x_D, mlp_D = block.after_attention(x_D, y_D)
            y_D, neurons_A = _lowered_mlp(layer, _mlp_weights(block))(LayerInputs(attention_D, mlp_D, previous_mlp), kept)
            x_D, previous_mlp = block.after_mlp(x_D, y_D), mlp_D
            selections.append(LayerSelection(neurons_A=neurons_A, heads_A=self._heads_of(groups_A), inputs_P=kept.found))
        return self.model.logits(self._normed(x_D)), tuple(selections)

    def _attention(
        self, index: int, x_D: Tensor, position_T: Tensor, slot: int, page_N: Tensor, groups_A: Tensor | None, kept: _KeptInputs
    ) -> Tensor:
        """Attention block of one token: stores k and v of every head, computes the selected groups."""
        block, config, position = self._blocks[index], self.config, self._cache.lengths[slot]
        inputs_A = kept.at("attention", x_D)
        if inputs_A is None:
            q_N = query_heads(x_D, wide(block.q.matrix), block.q.bias, groups_A, config.num_kv_heads)
            k_N, v_N = block.k(x_D), block.v(x_D)
        else:
            q_N, k_N, v_N = (linear_columns(x_D, wide(of.matrix), of.bias, inputs_A) for of in (block.q, block.k, block.v))
        q_HK, k_GK, v_GK = (heads.view(-1, config.head_dim) for heads in (q_N, k_N, v_N))
        q_HK, k_GK = (heads[0] for heads in block.placed_heads(q_HK[None], k_GK[None], position_T, self.model.frequencies(index)))
        self._cache.write(index, self._cache.places(slot, position, 1), block.as_cached(k_GK)[None], block.as_cached(v_GK)[None])
        mixed_ARK = attend_pages(
            q_HK.view(-1, config.heads_per_group, config.head_dim),
            self._cache.k_LPGSK[index],
            self._cache.v_LPGSK[index],
            page_N,
            position + 1,
            self._all_groups if groups_A is None else groups_A,
            block.scores,
        )
        inputs_A = kept.at("output", mixed_ARK.flatten())
        if inputs_A is not None:
            return linear_rows(mixed_ARK.flatten(), wide(block.o.matrix), block.o.bias, inputs_A)
        return output_heads(mixed_ARK, wide(block.o.matrix), block.o.bias, groups_A, config.num_kv_heads)

    def _heads_of(self, groups_A: Tensor | None) -> Tensor | None:
        """Query heads of the groups."""
        per_group = self.config.heads_per_group
        if groups_A is None or per_group == 1:
            return groups_A
        return (groups_A[:, None] * per_group + torch.arange(per_group, device=groups_A.device)).flatten()


def _indices(mask: Tensor | None) -> Tensor | None:
    """int64 [A] of what a mask keeps; None for all."""
    return None if mask is None else mask.nonzero().squeeze(1)


class _KeptInputs:
    """Which inputs one layer keeps for one token, point by point as they come to be. found: their indices; None where it selects none."""

    def __init__(self, selector: InputSelector, norms: Mapping[str, Tensor]) -> None:
        self._selector, self._norms = selector, norms
        self._kept: dict[str, Tensor | None] = {}

    def at(self, point: str, x_I: Tensor) -> Tensor | None:
        """Indices int64 [A] of the kept inputs; None for all."""
        self._kept[point] = _indices(self._selector.mask(point, x_I, self._norms))
        return self._kept[point]

    @property
    def found(self) -> tuple[Tensor | None, ...] | None:
        return tuple(self._kept.get(point) for point in POINTS) if self._selector.selects else None


Mlp = Callable[[LayerInputs, _KeptInputs], tuple[Tensor, Tensor | None]]
"""What an MLP adds, and the neurons that it computed; None for all."""


def _lowered_mlp(layer: LayerAdapter, weights: MlpWeights) -> Mlp:
    """How the MLP of a layer that selects so runs. Nothing else in this engine asks by which method."""
    match layer.neurons:
        case AllNeurons() if layer.inputs.selects:
            return lambda inputs, kept: (_mlp_of_inputs(mlp_predictor_input(inputs, 0), weights, kept), None)
        case AllNeurons():
            return lambda inputs, kept: (dense_mlp(mlp_predictor_input(inputs, 0), weights), None)
        case GateThreshold():
            return functools.partial(_mlp_by_gate, layer.neurons, weights)
        case _:  # what can be told before the MLP
            return functools.partial(_mlp_of_list, layer.neurons, weights)


def _mlp_of_list(selector: NeuronSelector, weights: MlpWeights, inputs: LayerInputs, kept: _KeptInputs) -> tuple[Tensor, Tensor | None]:
    neurons_A = _indices(selector.mask(inputs))
    assert neurons_A is not None, f"{selector} keeps all neurons"
    return sparse_mlp(mlp_predictor_input(inputs, 0), weights, neurons_A), neurons_A


def _mlp_by_gate(selector: NeuronSelector, weights: MlpWeights, inputs: LayerInputs, kept: _KeptInputs) -> tuple[Tensor, Tensor | None]:
    """Selected by the activated gate of every neuron, which is computed first."""
    x_D = mlp_predictor_input(inputs, 0)
    gate_F = activated_gate(x_D, weights)
    neurons_A = _indices(selector.mask(dataclasses.replace(inputs, gate=gate_F)))
    assert neurons_A is not None, f"{selector} keeps all neurons"
    return gate_mlp(x_D, gate_F, weights, neurons_A), neurons_A


def _mlp_of_inputs(x_D: Tensor, weights: MlpWeights, kept: _KeptInputs) -> Tensor:
    """The MLP of which the maps read kept inputs alone: columns of up and gate, rows of down."""
    inputs_A = kept.at("mlp", x_D)
    up_F = linear_columns(x_D, weights.up_FD, weights.up_bias_F, inputs_A)
    gate_F = None if weights.gate_FD is None else linear_columns(x_D, weights.gate_FD, weights.gate_bias_F, inputs_A)
    act_F = activated(up_F, gate_F, weights)
    return linear_rows(act_F, weights.down_FD, weights.down_bias_D, kept.at("down", act_F))


def _mlp_weights(block: Block) -> MlpWeights:
    return MlpWeights(
        up_FD=wide(block.up.matrix),
        down_FD=wide(block.down.matrix),
        gate_FD=wide(block.gate.matrix) if block.gate else None,
        up_bias_F=block.up.bias,
        gate_bias_F=getattr(block.gate, "bias", None),
        down_bias_D=block.down.bias,
        activation=block.config.activation,
        activation_threshold=block.config.activation_threshold,
        up_activation=block.config.up_activation,
    )


def _input_counts(selected: LayerSelection, points: InputPoints) -> list[int]:
    kept_P = selected.inputs_P or (None,) * len(points.sizes)
    return [_count(indices, size) for indices, size in zip(kept_P, points.sizes, strict=True)]


def _count(selected: Tensor | None, total: int) -> int:
    return total if selected is None else selected.shape[0]


def _union(rows: Sequence[LayerSelection], total: int) -> int:
    """Neurons of one layer that some row selected."""
    chosen = [row.neurons_A for row in rows if row.neurons_A is not None]
    return torch.cat(chosen).unique().shape[0] if chosen else total
