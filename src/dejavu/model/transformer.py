"""The model: a decoder-only transformer whose families are values of ModelConfig.

In: token ids [B, T]. Out: hidden states [B, T, D] and logits [B, T, V] fp32. A layer is
    x = x + O(attention(norm1 x));  x = x + down(activation(up(norm2 x)))                (pre-norm)
    x = norm1(x + O(attention x));  x = norm2(x + down(activation(up x)))                (post-norm)
    x = x + O(attention(norm1 x)) + down(activation(up(norm2 x)))                        (parallel)
What a block adds may pass a norm of its own (block_norms) and a scale.
A `Selection` sees every head's output and every neuron's activation on the way and may zero some: with the base class
the model is dense; measurement, training and masked evaluation are other Selections over the same forward.

Letters: B batch  T tokens  D model  F neurons  H query heads  G key/value heads  K head_dim  V vocabulary
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dejavu.config import ModelConfig, require
from dejavu.kernels.activation import activate
from dejavu.kernels.attention import ScoreConfig, attend_tokens
from dejavu.kernels.dtypes import DTYPE_NAMES
from dejavu.kernels.memory import give_back_freed
from dejavu.kernels.quantize import rounded_vectors
from dejavu.kernels.quantized import AnyMatrix, Matrix, QuantizedMatrix, Stacked, linear, wide
from dejavu.model.layers import (
    Embedding,
    Held,
    InputMajorLinear,
    Linear,
    Norm,
    QueryKeyValue,
    Rows,
    capped,
    inverse_frequencies,
    rotate,
)

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What exists when a layer selects. In a post-norm model these are the un-normed inputs of the two blocks.

    attention [.., D] is read by q, k, v; mlp [.., D] by up and gate (None while heads are selected: it does not exist
    yet); previous_mlp is `mlp` of the layer before (None in layer 0); gate [.., F] the activated gate (of an ungated MLP its
    activations), there once neurons are selected.
    """

    attention: Tensor
    mlp: Tensor | None
    previous_mlp: Tensor | None
    gate: Tensor | None = None


class Selection:
    """What a forward pass keeps. The base class keeps everything: the dense model."""

    def block_of(self, layer: int, own: Block) -> Block:
        """The weights that layer `layer` runs with: the model's own, unless an adapter changes them."""
        return own

    def heads(self, layer: int, inputs: LayerInputs, mixed_BTHK: Tensor) -> Tensor:
        """Head outputs before the output projection; returns them with the heads left out set to zero."""
        return mixed_BTHK

    def neurons(self, layer: int, inputs: LayerInputs, act_BTF: Tensor) -> Tensor:
        """Activations (gate x up where gated) before the down projection; returns them with the rest set to zero."""
        return act_BTF

    def inputs(self, layer: int, point: str, x: Tensor) -> Tensor:
        """What the linear maps of a point (selectors/inputs.py) read; returns it with the inputs left out set to zero."""
        return x


DENSE = Selection()


def sharing(module: M, change: Callable[[Held], AnyMatrix]) -> M:
    """A copy of a module that shares its tensors, but for the matrices in whose place `change` gives others."""
    made = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules"):
        made.__dict__[table] = dict(getattr(module, table))
    if isinstance(module, Held) and isinstance(made, Held):
        matrix = change(module)
        if matrix is not module.held:
            made.hold(matrix)
    for name, child in module.named_children():
        setattr(made, name, sharing(child, change))
    return made


class Block(nn.Module):
    """One decoder layer. `down` and `o` hold a row per input, `up` and `gate` a row per neuron; q, k and v are views of `qkv`."""

    def __init__(self, config: ModelConfig, index: int = 0) -> None:
        super().__init__()
        size, head = config.hidden_size, config.head_dim
        self.config = config
        self.cache_dtype: str | None = None  # what keys and values are rounded to: see Transformer.rounded
        windowed = index in config.windowed
        self.scores = ScoreConfig(scale=config.attention_scale, cap=config.attention_cap, window=config.window if windowed else None)
        rope = config.local_rope if windowed and config.local_rope is not None else config.rope
        self.rotary_factor = 1.0 if rope is None else rope.attention_factor
        self.norm1 = Norm(config)
        self.qkv = QueryKeyValue(config)
        self.q_norm = Norm(config, head) if config.qk_norm else None
        self.k_norm = Norm(config, head) if config.qk_norm else None
        self.o = InputMajorLinear(config.num_heads * head, size, bias=config.out_bias)
        self.norm1_out = Norm(config) if config.block_norms else None
        self.norm2 = None if config.shared_norm else Norm(config)
        self.up = Linear(size, config.intermediate_size, bias=config.mlp_bias)
        self.gate = Linear(size, config.intermediate_size, bias=config.mlp_bias) if config.gated else None
        self.down = InputMajorLinear(config.intermediate_size, size, bias=config.mlp_bias)
        self.norm2_out = Norm(config) if config.block_norms else None

    @property
    def q(self) -> Rows:
        return self.qkv.q

    @property
    def k(self) -> Rows:
        return self.qkv.k

    @property
    def v(self) -> Rows:
        return self.qkv.v

    def attention_input(self, x: Tensor) -> Tensor:
        return self.norm1(x) if self.config.pre_norm else x

    def after_attention(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Residual stream and MLP input, from the residual stream before and what O gave."""
        if self.norm1_out is not None:
            y = self.norm1_out(y)
        if self.config.residual_scale != 1:
            y = y * self.config.residual_scale
        if self.config.parallel:
            return x + y, self._mlp_input(x)
        x = x + y
        if self.config.pre_norm:
            return x, self._mlp_input(x)
        x = self.norm1(x)
        return x, x

    def _mlp_input(self, x: Tensor) -> Tensor:
        return self.norm1(x) if self.norm2 is None else self.norm2(x)

    def after_mlp(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual stream from the one before and what the MLP gave."""
        if self.norm2_out is not None:
            y = self.norm2_out(y)
        if self.config.residual_scale != 1:
            y = y * self.config.residual_scale
        if self.config.pre_norm:
            return x + y
        assert self.norm2 is not None, "blocks in turn have a norm each"
        return self.norm2(x + y)

    def placed_heads(self, q: Tensor, k: Tensor, position_T: Tensor, inv_freq: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries and keys [.., T, heads, K] normed and rotated, where the model does either."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if inv_freq is None:
            return q, k
        return rotate(q, position_T, inv_freq, self.rotary_factor), rotate(k, position_T, inv_freq, self.rotary_factor)

    def query_key_value(self, x_TD: Tensor, position_T: Tensor, inv_freq: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q [.., T, H, K], k and v [.., T, G, K] of the attention input, rotated where positions are rotary, rounded as cached."""
        split = (-1, self.config.head_dim)
        q, k, v = (project(x_TD).unflatten(-1, split) for project in (self.q, self.k, self.v))
        q, k = self.placed_heads(q, k, position_T, inv_freq)
        return q, self.as_cached(k), self.as_cached(v)

    def as_cached(self, vectors: Tensor) -> Tensor:
        """Keys or values [.., K] as the cache holds them."""
        return vectors if self.cache_dtype is None else rounded_vectors(vectors, self.cache_dtype)

    @property
    def activated(self) -> Linear:
        """The map whose outputs pass the activation: gate, or up where the MLP is not gated."""
        return self.gate or self.up

    def gated(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Activated gate act(gate x) and activation act(gate x) * up x of every neuron [.., T, F]; act(up x) twice where not gated."""
        config = self.config
        gate = activate(self.activated(x_TD), config.activation, config.activation_threshold)
        if not config.gated:
            return gate, gate
        up = self.up(x_TD)
        return gate, gate * (up if config.up_activation is None else activate(up, config.up_activation))

    def activations(self, x_TD: Tensor) -> Tensor:
        """Activation of every neuron [.., T, F]."""
        return self.gated(x_TD)[1]

    def attend(self, x_BTD: Tensor, position_T: Tensor, inv_freq: Tensor | None) -> Tensor:
        """Causal attention over the sequence itself: head outputs [B, T, H, K] before the output projection."""
        q, k, v = (t.transpose(1, 2) for t in self.query_key_value(x_BTD, position_T, inv_freq))
        if self.scores.cap == 0 and self.scores.window is None:
            grouped = self.config.heads_per_group > 1
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scores.scale, enable_gqa=grouped)
        else:
            mixed = attend_tokens(q, k, v, self.scores.seen(position_T, k.shape[-2]), self.scores)
        return mixed.transpose(1, 2)


class Transformer(nn.Module):
    """The whole model. `hidden` runs the layers, `logits` applies the (tied or own) head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.handed_over = False
        self.label: str | None = None  # what its checkpoint calls the form that its matrices are held in
        size, width = config.hidden_size, config.embed_width
        self.embed = Embedding(config.vocab_size, width)
        learned = config.positions == "learned"
        self.position = Embedding(config.max_positions + config.position_offset, size) if learned else None
        self.project_in = Linear(width, size, bias=False) if width != size else None
        self.project_out = Linear(size, width, bias=False) if width != size else None
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.final_norm = Norm(config) if config.final_norm else None
        self.head = None if config.tied_head else Linear(width, config.vocab_size, bias=False)
        self.inv_freq: Tensor | None
        self.local_inv_freq: Tensor | None
        for name, rope in (("inv_freq", config.rope), ("local_inv_freq", config.local_rope)):
            self.register_buffer(name, None if rope is None else inverse_frequencies(rope, config.head_dim), persistent=False)

    def tensors(self) -> Iterator[Tensor]:
        """What the weights lie in."""
        yield from self.parameters()
        for module in self.modules():
            if isinstance(module, Held) and module.quantized is not None:
                yield from module.quantized.tensors

    def require_weights(self) -> None:
        """Raise ValueError where they were handed over."""
        require(not self.handed_over, "the weights of this model were handed over to an engine, which alone has them; load the model again")

    def hand_over(self, *parts: nn.Module) -> None:
        """Let the matrices of these parts of it go, of which an engine has its own. From now on the model has shapes and no values."""
        self.handed_over = True
        for module in (each for part in parts for each in part.modules()):
            if isinstance(module, Held):
                module.hold(torch.empty(module.held.shape, device="meta"))
        give_back_freed()

    @property
    def head_matrix(self) -> Matrix:
        """The head's own matrix, or the embedding that it is tied to."""
        return (self.embed if self.head is None else self.head).matrix

    @property
    def device(self) -> torch.device:
        """Where the weights are; of ones that were handed over, which the native engine has, the CPU."""
        return torch.device("cpu") if self.handed_over else self.embed.matrix.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        embed = self.embed.matrix
        return embed.dtype if isinstance(embed, Tensor) else torch.float32

    @property
    def stored_as(self) -> str:
        """The form that its matrices are held in, most of them: fp32, fp16, bf16, int8, int4, or a file's own word, such as q4_k_m."""
        return self.label or self.sizes().most_common(1)[0][0]

    def sizes(self) -> Counter[str]:
        """How many values of it are held as which type."""
        sizes: Counter[str] = Counter()
        for parameter in self.parameters():
            sizes[DTYPE_NAMES[parameter.dtype]] += parameter.numel()
        for module in self.modules():
            quantized = module.quantized if isinstance(module, Held) else None
            for part in () if quantized is None else quantized.parts if isinstance(quantized, Stacked) else (quantized,):
                sizes[part.grid if isinstance(part, QuantizedMatrix) else DTYPE_NAMES[part.dtype]] += part.numel()
        return sizes

    @property
    def num_parameters(self) -> int:
        """How many numbers the weights are."""
        held = [module.quantized for module in self.modules() if isinstance(module, Held)]
        return sum(each.numel() for each in (*self.parameters(), *held) if each is not None)

    @property
    def blocks(self) -> list[Block]:
        return list(self.layers)  # pyrefly: ignore[bad-return]  # nn.ModuleList is typed as a list of Module

    def named_matrices(self) -> Iterator[tuple[str, Matrix]]:
        """(name, what is held) of every parameter as files and hashes know it: q, k and v by their own names, as views of `qkv`."""
        self.require_weights()
        for prefix, module in self.named_modules():
            parts: list[tuple[str, Any]] = [(prefix.replace(".qkv.", "."), module)]
            if isinstance(module, QueryKeyValue):
                parts = [(prefix.removesuffix("qkv") + name, getattr(module, name)) for name in ("q", "k", "v")]
            for name, part in parts:
                matrix = part.matrix if isinstance(part, Held | Rows) else getattr(part, "weight", None)
                for kind, values in (("weight", matrix), ("bias", getattr(part, "bias", None))):
                    if values is not None:
                        yield f"{name}.{kind}", values

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The same as tensors: of a quantised matrix the values fp32, one at a time."""
        return ((name, wide(matrix)) for name, matrix in self.named_matrices())

    def frequencies(self, index: int) -> Tensor | None:
        """inv_freq of a layer; None where positions are learned."""
        local = self.local_inv_freq is not None and index in self.config.windowed
        return self.local_inv_freq if local else self.inv_freq

    def fill_frequencies(self, device: torch.device | str) -> None:
        """Work the rotary frequencies out again: those of a model made on the meta device have no values."""
        for name, rope in (("inv_freq", self.config.rope), ("local_inv_freq", self.config.local_rope)):
            if rope is not None:
                setattr(self, name, inverse_frequencies(rope, self.config.head_dim).to(device))

    def rounded(self, dtype: str, *, cache_dtype: str = "fp32") -> Transformer:
        """The model with the values that an engine of that dtype (fp32, fp16, bf16, int8, int4, a block type of GGUF, or stored: its
        own) computes with, and keys and values as a cache of cache_dtype (fp32, fp16, int8) holds them: quality and speed are then of the
        same weights. It shares what stays as it is."""
        self.require_weights()
        made = sharing(self, lambda module: module.held if module is self.position else module.rounded(dtype))
        made.label = self.label if dtype == "stored" else dtype
        for block in made.blocks:
            block.cache_dtype = None if cache_dtype == "fp32" else cache_dtype
        return made

    def widened(self) -> Transformer:
        """The model for what needs its weights as tensors (training, export): itself, or one with fp32 in the place of quantised matrices,
        which takes four bytes a weight. It shares what stays as it is."""
        self.require_weights()
        if all(module.quantized is None for module in self.modules() if isinstance(module, Held)):
            return self
        return sharing(self, lambda module: wide(module.held))

    def embedded(self, ids_BT: Tensor, position_T: Tensor) -> Tensor:
        """The residual stream before layer 0, from ids [.., T] at positions [T]."""
        self.require_weights()
        x = self.embed(ids_BT)
        if self.config.embed_scale != 1:
            # The scale as a value of the stream's dtype: what transformers multiplies with.
            x = x * torch.tensor(self.config.embed_scale, dtype=x.dtype)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.position is not None:
            x = x + self.position(position_T + self.config.position_offset)
        return x

    def layer(
        self, index: int, x_BTD: Tensor, position_T: Tensor, previous_mlp: Tensor | None, selection: Selection
    ) -> tuple[Tensor, Tensor]:
        """One layer over a whole sequence: the residual stream after it and the MLP input within it."""
        block = selection.block_of(index, self.blocks[index])
        attention_in = block.attention_input(x_BTD)
        mixed = block.attend(selection.inputs(index, "attention", attention_in), position_T, self.frequencies(index))
        mixed = selection.heads(index, LayerInputs(attention_in, None, previous_mlp), mixed)
        x_BTD, mlp_in = block.after_attention(x_BTD, block.o(selection.inputs(index, "output", mixed.flatten(-2))))
        gate, act = block.gated(selection.inputs(index, "mlp", mlp_in))
        act = selection.neurons(index, LayerInputs(attention_in, mlp_in, previous_mlp, gate), act)
        return block.after_mlp(x_BTD, block.down(selection.inputs(index, "down", act))), mlp_in

    def hidden(self, ids_BT: Tensor, selection: Selection = DENSE) -> Tensor:
        """Hidden states [B, T, D] after the final norm (before project_out), for whole sequences from position 0.

        Raises ValueError when T exceeds the context of the model.
        """
        length = ids_BT.shape[1]
        if length > self.config.max_positions:
            raise ValueError(f"{length} tokens exceed the model's context of {self.config.max_positions}; shorten the text")
        position_T = torch.arange(length, device=ids_BT.device)
        x, mlp_in = self.embedded(ids_BT, position_T), None
        for index in range(self.config.num_layers):
            x, mlp_in = self.layer(index, x, position_T, mlp_in, selection)
        return x if self.final_norm is None else self.final_norm(x)

    def head_inputs(self, hidden: Tensor) -> Tensor:
        """What meets the rows of the head [.., E], from hidden states [.., D]."""
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        if self.config.logit_scale != 1:
            hidden = hidden * self.config.logit_scale
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [.., V] in fp32 from hidden states [.., D]."""
        return self.head_logits(self.head_inputs(hidden))

    def head_logits(self, states: Tensor) -> Tensor:
        """Logits [.., V] in fp32 of what meets the rows of the head [.., E]."""
        return capped(linear(states, self.head_matrix, None).float(), self.config.logit_cap)

    def forward(self, ids_BT: Tensor, selection: Selection = DENSE) -> Tensor:
        """Logits [B, T, V] in fp32 of whole sequences."""
        return self.logits(self.hidden(ids_BT, selection))
