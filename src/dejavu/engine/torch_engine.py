"""The engine that defines decoding: plain torch, any device, any float dtype.

In: token ids and slots. Out: logits, and per layer the neurons and heads that were computed. For each layer of a step
    scores -> mask -> index list -> rows of q, reads of the cache and rows of o for the selected head groups;
    scores -> mask -> index list -> rows of up (and gate) and down for the selected neurons.
Keys and values are computed and stored for every head. Rows of a step are computed one after the other, each as if it
were alone: its tokens are bit-identical whatever its batch mates, in every dtype. Other engines are tested against this.

Letters: B rows of a step  D model  F neurons  H query heads  G key/value heads  R query heads per group
K head_dim  A selected groups or neurons  V vocabulary  L layers
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dejavu.config import ModelConfig, require
from dejavu.engine.cache import PAGE_SIZE, PagedCache
from dejavu.engine.interface import EngineInfo, LayerSelection, StepResult
from dejavu.engine.paged import PagedEngine
from dejavu.engine.prefill import prefill
from dejavu.kernels.attention import attend_pages, output_heads, query_heads
from dejavu.kernels.sparse_mlp import MlpWeights, dense_mlp, sparse_mlp
from dejavu.model.predictor import (
    HEAD_LOOKAHEADS,
    MLP_LOOKAHEADS,
    LayerAdapter,
    Predictor,
    head_predictor_input,
    mlp_predictor_input,
)
from dejavu.model.transformer import Block, LayerInputs, Transformer

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


class TorchEngine(PagedEngine):
    """See `dejavu.engine.interface.Engine`. Reads the weights of `model` in place: no copy is made.

    layers: the predictors of each layer, or None for a dense engine. cache_tokens: room of the key/value pool over all
    slots (default: the whole context for each slot). record: keep the selections of every step.
    """

    def __init__(
        self,
        model: Transformer,
        layers: Sequence[LayerAdapter] | None = None,
        *,
        num_slots: int = 1,
        cache_tokens: int | None = None,
        page_size: int = PAGE_SIZE,
        record: bool = False,
    ) -> None:
        config = model.config
        self.model = model
        self.config = config
        self.layers = tuple(layers) if layers is not None else (LayerAdapter(),) * config.num_layers
        check_layers(self.layers, config)
        weight = model.embed.weight
        require(page_size >= 1, f"a page of the key/value cache holds at least 1 token, not {page_size}")
        tokens = num_slots * _round_up(config.max_positions, page_size) if cache_tokens is None else cache_tokens
        cache = PagedCache(
            num_layers=config.num_layers,
            num_groups=config.num_kv_heads,
            head_dim=config.head_dim,
            num_slots=num_slots,
            num_pages=_round_up(tokens, page_size) // page_size,
            page_size=page_size,
            dtype=weight.dtype,
            device=weight.device,
        )
        self._record = record
        self._blocks = model.blocks
        self._mlps = tuple(_mlp_weights(block) for block in self._blocks)
        self._all_groups = torch.arange(config.num_kv_heads, device=weight.device)
        info = EngineInfo(
            backend="torch",
            dtype=DTYPE_NAMES[weight.dtype],
            cache_dtype=DTYPE_NAMES[weight.dtype],
            device=str(weight.device),
            threads=torch.get_num_threads(),
            sparse=any(layer.mlp is not None or layer.heads is not None for layer in self.layers),
            vocab_size=config.vocab_size,
            num_layers=config.num_layers,
            num_neurons=config.intermediate_size,
            num_heads=config.num_heads,
            max_positions=config.max_positions,
            num_slots=num_slots,
            page_size=page_size,
            num_pages=cache.num_pages,
        )
        super().__init__(info, cache)

    @torch.inference_mode()
    def prefill(self, slot: int, token_ids: Sequence[int]) -> Tensor:
        """Append tokens to the slot densely, in chunks; logits fp32 [V] after the last one."""
        require(len(token_ids) > 0, "there are no tokens to prefill; give at least one")
        self._admit(slot, token_ids)
        return prefill(self.model, self._cache, slot, token_ids)

    @torch.inference_mode()
    def step(self, token_ids_B: Sequence[int], slots_B: Sequence[int]) -> StepResult:
        """Append one token to each of B different slots, row after row."""
        assert len(token_ids_B) == len(slots_B) == len(set(slots_B)) > 0, f"{token_ids_B=} {slots_B=}"
        for token_id, slot in zip(token_ids_B, slots_B, strict=True):
            self._admit(slot, (token_id,))
        rows = [self._row(token_id, slot) for token_id, slot in zip(token_ids_B, slots_B, strict=True)]
        neurons, heads = self.config.intermediate_size, self.config.num_heads
        selections = tuple(selected for _, selected in rows)
        return StepResult(
            logits_BV=torch.stack([logits_V for logits_V, _ in rows]),
            neurons_BL=torch.tensor([[_count(layer.neurons_A, neurons) for layer in row] for row in selections]),
            heads_BL=torch.tensor([[_count(layer.heads_A, heads) for layer in row] for row in selections]),
            selections=tuple(tuple(layer.cpu() for layer in row) for row in selections) if self._record else None,
        )

    def _normed(self, x_D: Tensor) -> Tensor:
        return x_D if self.model.final_norm is None else self.model.final_norm(x_D)

    def _row(self, token_id: int, slot: int) -> tuple[Tensor, tuple[LayerSelection, ...]]:
        """One token of one slot through every layer: logits fp32 [V] and what each layer computed."""
        position = self._cache.lengths[slot]
        device = self._all_groups.device
        position_T = torch.tensor([position], device=device)
        x_D = self.model.embedded(torch.tensor([token_id], device=device), position_T)[0]
        page_N = self._cache.pages(slot, position + 1)
        previous_mlp: Tensor | None = None
        selections = []
        for index, block in enumerate(self._blocks):
            attention_D = block.attention_input(x_D)
            inputs = LayerInputs(attention_D, None, previous_mlp)
            groups_A = self._selected_groups(index, inputs)
            y_D = self._attention(index, attention_D, position_T, slot, page_N, groups_A)
            x_D, mlp_D = block.after_attention(x_D, y_D)
            neurons_A = self._selected_neurons(index, LayerInputs(attention_D, mlp_D, previous_mlp))
            weights = self._mlps[index]
            y_D = dense_mlp(mlp_D, weights) if neurons_A is None else sparse_mlp(mlp_D, weights, neurons_A)
            x_D, previous_mlp = block.after_mlp(x_D, y_D), mlp_D
            selections.append(LayerSelection(neurons_A=neurons_A, heads_A=self._heads_of(groups_A)))
        self._cache.advance(slot, 1)
        return self.model.logits(self._normed(x_D)), tuple(selections)

    def _selected_groups(self, index: int, inputs: LayerInputs) -> Tensor | None:
        predictor = self.layers[index].heads
        if predictor is None:
            return None
        return predictor.group_mask(head_predictor_input(inputs, predictor.lookahead)).nonzero().squeeze(1)

    def _selected_neurons(self, index: int, inputs: LayerInputs) -> Tensor | None:
        predictor = self.layers[index].mlp
        if predictor is None:
            return None
        return predictor.neuron_mask(mlp_predictor_input(inputs, predictor.lookahead)).nonzero().squeeze(1)

    def _attention(self, index: int, x_D: Tensor, position_T: Tensor, slot: int, page_N: Tensor, groups_A: Tensor | None) -> Tensor:
        """Attention block of one token: stores k and v of every head, computes the selected groups."""
        block, config, position = self._blocks[index], self.config, self._cache.lengths[slot]
        q_HK = query_heads(x_D, block.q.weight, block.q.bias, groups_A, config.num_kv_heads).view(-1, config.head_dim)
        k_GK, v_GK = (project(x_D).view(-1, config.head_dim) for project in (block.k, block.v))
        q_HK, k_GK = (heads[0] for heads in block.placed_heads(q_HK[None], k_GK[None], position_T, self.model.frequencies(index)))
        self._cache.write(index, slot, position, block.as_cached(k_GK)[None], block.as_cached(v_GK)[None])
        mixed_ARK = attend_pages(
            q_HK.view(-1, config.heads_per_group, config.head_dim),
            self._cache.k_LPGSK[index],
            self._cache.v_LPGSK[index],
            page_N,
            position + 1,
            self._all_groups if groups_A is None else groups_A,
            block.scores,
        )
        return output_heads(mixed_ARK, block.o.weight, block.o.bias, groups_A, config.num_kv_heads)

    def _heads_of(self, groups_A: Tensor | None) -> Tensor | None:
        """Query heads of the groups."""
        per_group = self.config.heads_per_group
        if groups_A is None or per_group == 1:
            return groups_A
        return (groups_A[:, None] * per_group + torch.arange(per_group, device=groups_A.device)).flatten()


def _mlp_weights(block: Block) -> MlpWeights:
    gate = block.gate
    return MlpWeights(
        up_FD=block.up.weight,
        down_FD=block.down.weight,
        gate_FD=None if gate is None else gate.weight,
        up_bias_F=block.up.bias,
        gate_bias_F=None if gate is None else gate.bias,
        down_bias_D=block.down.bias,
        activation=block.config.activation,
        activation_threshold=block.config.activation_threshold,
        up_activation=block.config.up_activation,
    )


def check_layers(layers: tuple[LayerAdapter, ...], config: ModelConfig) -> None:
    """Raise ValueError where the predictors cannot be those of this model."""
    require(len(layers) == config.num_layers, f"the adapter has {len(layers)} layers and the model {config.num_layers}")
    for index, layer in enumerate(layers):
        _check_predictor(f"layer {index}'s MLP", layer.mlp, config.hidden_size, config.intermediate_size, MLP_LOOKAHEADS)
        _check_predictor(f"layer {index}'s heads", layer.heads, config.hidden_size, config.num_kv_heads, HEAD_LOOKAHEADS)
    first = layers[0]
    require(first.mlp is None or first.mlp.lookahead < 2, "layer 0 has no layer before it: its MLP's lookahead must be 0 or 1")
    require(first.heads is None or first.heads.lookahead < 1, "layer 0 has no layer before it: its heads' lookahead must be 0")


def _check_predictor(name: str, predictor: Predictor | None, inputs: int, outputs: int, lookaheads: tuple[int, ...]) -> None:
    if predictor is None:
        return
    found = (predictor.A_RD.shape[1], predictor.B_OR.shape[0])
    require(found == (inputs, outputs), f"the predictor of {name} maps {found[0]} to {found[1]} values, the model {inputs} to {outputs}")
    require(predictor.lookahead in lookaheads, f"the lookahead of {name} must be one of {lookaheads}, not {predictor.lookahead}")


def _count(selected: Tensor | None, total: int) -> int:
    return total if selected is None else selected.shape[0]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
