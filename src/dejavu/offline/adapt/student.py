"""The student: the teacher's frozen weights with low-rank changes, trained norms, and a hard mask over the neurons of every layer.

In: a model in the computing dtype on its device (base.py), of whose weights teacher and student share one copy.
Out: hidden states of teacher and student for windows of ids, and the densities of the student's masks. Forward, the
mask of a predictor multiplies the activations, exactly as decoding would skip; backward, its gradient is that of a sigmoid:

    s = B (A x) + b        mask = [s > 0] + sigmoid(s) - stop(sigmoid(s))

Positions marked dense keep every neuron, as a prompt does: so the changed weights stay good for both. The predictor starts
as the rank-R approximation of the gate (of up, where there is no gate): it selects where the gate is positive.

A student that is given an activation with exact zeros has no predictors: its own zeros are the mask, and what steers the
density is sigmoid(gate / (SOFTNESS x the gate's root mean square)).

With checkpointed layers only the residual stream before each layer is kept, and backward computes the layer again: a third more work for
a fraction of the memory. Source: arXiv 1604.06174.

Letters: B windows  T tokens  D model  R rank  F neurons  L layers  I inputs  O outputs  N tokens of all windows
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dejavu.config import require
from dejavu.kernels.activation import activate
from dejavu.kernels.quantize import rounded
from dejavu.kernels.quantized import wide
from dejavu.model.adapter import Adapter
from dejavu.model.layers import InputMajorLinear, Rows, SeparateQueryKeyValue
from dejavu.model.lora import LayerLora, changed_norms, linear_shapes, merged_block, merged_weight, with_activation
from dejavu.model.predictor import Predictor
from dejavu.model.selectors import PredictedNeurons
from dejavu.model.transformer import DENSE, Block, Transformer, sharing
from dejavu.offline.adapt.base import frozen
from dejavu.offline.predictors import best_of_rank

COSINE_WINDOWS = 4
SOFTNESS = 0.25
COMPILED: dict[str, Any] = {"dynamic": False}


class LowRankLinear(nn.Module):
    """y = x W^T + bias + scale * (x A^T) B^T. W and bias are the base's own, frozen; A and B are fp32, and used in the dtype of x.

    After `round_to` the sum W + scale B A is what an engine of that dtype holds; gradients pass through as if it were not rounded.
    """

    def __init__(
        self, base: nn.Linear | InputMajorLinear | Rows, outputs: int, inputs: int, rank: int, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.input_major = isinstance(base, InputMajorLinear)
        self.scale = scale
        self.register_buffer("weight", base.weight.detach())
        self.register_buffer("bias", None if base.bias is None else base.bias.detach())
        self.A_RI = nn.Parameter(torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs))
        self.B_OR = nn.Parameter(torch.zeros(outputs, rank))
        self.register_buffer("rest", None, persistent=False)  # of the rounded sum without the change, in the place of W

    @torch.no_grad()
    def round_to(self, dtype: str) -> None:
        """For the weights of now; again once they have changed."""
        assert isinstance(self.weight, Tensor)
        change_OI = self.scale * (self.B_OR @ self.A_RI)
        change = change_OI.T if self.input_major else change_OI
        rest = rounded(self.weight.float() + change, dtype) - change
        if isinstance(self.rest, Tensor):
            self.rest.copy_(rest)
        else:
            self.rest = rest.to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.rest is None else self.rest
        assert isinstance(weight, Tensor)
        y = x @ weight if self.input_major else F.linear(x, weight)
        if isinstance(self.bias, Tensor):
            y = y + self.bias
        return y + F.linear(F.linear(x, self.A_RI.to(x.dtype)), (self.scale * self.B_OR).to(x.dtype))


class TrainedPredictor(nn.Module):
    """Scores [.., F] of x [.., D], computed in the dtype of x."""

    def __init__(self, block: Block, rank: int, lookahead: int) -> None:
        super().__init__()
        matrix = block.activated
        weight_FD = matrix.weight.detach().float()
        B_FR, A_RD = best_of_rank(weight_FD, min(rank, *weight_FD.shape))
        self.lookahead = lookahead
        self.A_RD, self.B_FR = (nn.Parameter(factor.contiguous()) for factor in (A_RD, B_FR))
        self.bias_F = nn.Parameter(weight_FD.new_zeros(len(weight_FD)) if matrix.bias is None else matrix.bias.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        return F.linear(F.linear(x, self.A_RD.to(dtype)), self.B_FR.to(dtype), self.bias_F.to(dtype))

    def predictor(self) -> Predictor:
        """As an adapter has it, fp32 on the CPU."""
        A_RD, B_FR, bias_F = (parameter.detach().float().cpu() for parameter in (self.A_RD, self.B_FR, self.bias_F))
        return Predictor(A_RD=A_RD, B_OR=B_FR, bias_O=bias_F, threshold=0.0, lookahead=self.lookahead)


def plain_layer(block: Block, x_BTD: Tensor, position_T: Tensor, inv_freq: Tensor | None) -> Tensor:
    """A layer of the teacher."""
    mixed_BTHK = block.attend(block.attention_input(x_BTD), position_T, inv_freq)
    x_BTD, mlp_in = block.after_attention(x_BTD, block.o(mixed_BTHK.flatten(-2)))
    return block.after_mlp(x_BTD, block.down(block.activations(mlp_in)))


def masked_layer(
    block: Block, predictor: TrainedPredictor, x_BTD: Tensor, position_T: Tensor, inv_freq: Tensor | None, dense_BT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer of the student: the residual stream, and the soft and the hard density of its masked positions, fp32."""
    attention_in = block.attention_input(x_BTD)
    mixed_BTHK = block.attend(attention_in, position_T, inv_freq)
    x_BTD, mlp_in = block.after_attention(x_BTD, block.o(mixed_BTHK.flatten(-2)))
    act_BTF = block.activations(mlp_in)
    score_BTF = predictor(attention_in if predictor.lookahead else mlp_in).float()
    soft_BTF, hard_BTF = score_BTF.sigmoid(), (score_BTF > 0).float()
    dense_BT1 = dense_BT[..., None]
    mask_BTF = torch.where(dense_BT1, 1.0, hard_BTF + soft_BTF - soft_BTF.detach())
    x_BTD = block.after_mlp(x_BTD, block.down(act_BTF * mask_BTF.to(act_BTF.dtype)))
    counted_BT = (~dense_BT).float()
    total = counted_BT.sum().clamp_min(1)
    soft, hard = ((each.mean(-1) * counted_BT).sum() / total for each in (soft_BTF, hard_BTF.detach()))
    return x_BTD, soft, hard


def zeroed_layer(block: Block, x_BTD: Tensor, position_T: Tensor, inv_freq: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """A layer of a student whose activation has zeros of its own: the residual stream, the soft and the hard density, fp32."""
    config = block.config
    mixed_BTHK = block.attend(block.attention_input(x_BTD), position_T, inv_freq)
    x_BTD, mlp_in = block.after_attention(x_BTD, block.o(mixed_BTHK.flatten(-2)))
    gate_BTF = block.activated(mlp_in)
    act_BTF = activate(gate_BTF, config.activation, config.activation_threshold)
    if config.gated:
        up_BTF = block.up(mlp_in)
        act_BTF = act_BTF * (up_BTF if config.up_activation is None else activate(up_BTF, config.up_activation))
    x_BTD = block.after_mlp(x_BTD, block.down(act_BTF))
    wide_BTF = gate_BTF.float()
    scale = wide_BTF.detach().square().mean().sqrt() + 1e-6
    return x_BTD, (wide_BTF / (SOFTNESS * scale)).sigmoid().mean(), (gate_BTF.detach() > 0).float().mean()


class Student(nn.Module):
    """Trainable: `A_RI`, `B_OR` of every linear map, both norms and the predictor of every layer, all fp32. The rest is the teacher's.

    model: the teacher, on the device and in the dtype that both compute in; it is not changed. lookahead_L: 0 or 1 of each layer's
    predictor. activation: what the MLPs get in the place of their own; then there are no predictors. checkpoint_layers: whether backward
    computes layers again; may be set at any time. rounded: the dtype of an engine, int8 or int4, whose rounding the student is trained to
    bear (None: none); `round_weights` has to come before each step.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        rank: int,
        lora_rank: int,
        scale: float,
        lookahead_L: tuple[int, ...],
        seed: int,
        activation: str | None = None,
        checkpoint_layers: bool = False,
        rounded: str | None = None,
    ) -> None:
        super().__init__()
        self.rounded = rounded
        config, generator = with_activation(model.config, activation), torch.Generator().manual_seed(seed)
        self.config, self.activation, self.scale, self.checkpoint_layers = config, activation, scale, checkpoint_layers
        self.predictors = nn.ModuleList(
            TrainedPredictor(block, rank, lookahead)
            for block, lookahead in zip(model.blocks, lookahead_L, strict=True)
            if activation is None
        )
        self.layers = nn.ModuleList()
        for block in model.blocks:
            changed = frozen(block)
            changed.config = config
            maps = {
                name: LowRankLinear(getattr(changed, name), outputs, inputs, lora_rank, scale, generator)
                for name, (outputs, inputs) in linear_shapes(config).items()
            }
            changed.qkv = SeparateQueryKeyValue(*(maps.pop(name) for name in ("q", "k", "v")))  # pyrefly: ignore[bad-assignment]  # it stands in for one
            for name, module in maps.items():
                setattr(changed, name, module)
            for name in changed_norms(config):
                norm = getattr(changed, name)
                norm.weight = nn.Parameter(norm.weight.detach().float().clone())
            self.layers.append(changed)
        self.to(model.device)
        self.teacher = (model,)  # not a submodule: it has nothing to train or to save
        self.rank, self.writer = lora_rank, list[Transformer]()
        compiled = model.device.type != "cpu"
        self.plain = torch.compile(plain_layer, **COMPILED) if compiled else plain_layer
        self.masked = torch.compile(masked_layer, **COMPILED) if compiled else masked_layer
        self.zeroed = torch.compile(zeroed_layer, **COMPILED) if compiled else zeroed_layer

    @property
    def device(self) -> torch.device:
        return self.teacher[0].device

    @property
    def blocks(self) -> list[Block]:
        return list(self.layers)  # pyrefly: ignore[bad-return]  # nn.ModuleList is typed as a list of Module

    @property
    def trained(self) -> list[TrainedPredictor]:
        return list(self.predictors)  # pyrefly: ignore[bad-return]

    def round_weights(self) -> None:
        """Compute with the weights of now as they are rounded; nothing where none are."""
        for block in self.blocks if self.rounded is not None else ():
            for name in linear_shapes(self.config):
                getattr(block, name).round_to(self.rounded)

    def head(self) -> Tensor:
        """The head of both [V, D], in the computing dtype."""
        teacher = self.teacher[0]
        return (teacher.embed if teacher.head is None else teacher.head).weight

    def trainable(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name.replace(".qkv.", "."): parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def _start(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        position_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        return self.teacher[0].embedded(ids_BT, position_T), position_T

    def _finish(self, x_BTD: Tensor) -> Tensor:
        final_norm = self.teacher[0].final_norm
        return (x_BTD if final_norm is None else final_norm(x_BTD)).flatten(0, 1) * self.config.logit_scale

    @torch.no_grad()
    def taught(self, ids_BT: Tensor) -> Tensor:
        """Last hidden states of the teacher [N, D], as the head reads them."""
        teacher = self.teacher[0]
        x_BTD, position_T = self._start(ids_BT)
        for index, block in enumerate(teacher.blocks):
            x_BTD = self.plain(block, x_BTD, position_T, teacher.frequencies(index))
        return self._finish(x_BTD)

    def forward(self, ids_BT: Tensor, dense_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Last hidden states of the student [N, D], soft and hard densities of its layers [L]. dense_BT: positions without a mask."""
        x_BTD, position_T = self._start(ids_BT)
        soft, hard = [], []
        for index, block in enumerate(self.blocks):
            inv_freq = self.teacher[0].frequencies(index)
            if self.activation is None:
                found = self._layer(self.masked, block, self.trained[index], x_BTD, position_T, inv_freq, dense_BT)
            else:
                found = self._layer(self.zeroed, block, x_BTD, position_T, inv_freq)
            x_BTD, soft_density, hard_density = found
            soft.append(soft_density)
            hard.append(hard_density)
        return self._finish(x_BTD), torch.stack(soft), torch.stack(hard)

    def _layer(self, layer: Callable[..., tuple[Tensor, Tensor, Tensor]], *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        if not self.checkpoint_layers:
            return layer(*arguments)
        return checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)  # nothing is drawn in a layer

    def _changes(self) -> Iterator[LayerLora]:
        """The changes of every layer where they are, fp32."""
        for block in self.blocks:
            modules = {name: getattr(block, name) for name in linear_shapes(self.config)}
            factors = {name: (module.A_RI.detach(), module.B_OR.detach()) for name, module in modules.items()}
            yield LayerLora(factors=factors, norms={name: getattr(block, name).weight.detach() for name in changed_norms(self.config)})

    def lora(self) -> tuple[LayerLora, ...]:
        """The changes of every layer, fp32 on the CPU."""
        return tuple(
            LayerLora(
                factors={name: (wide(A).cpu(), wide(B).cpu()) for name, (A, B) in changes.factors.items()},
                norms={name: weight.cpu() for name, weight in changes.norms.items()},
            )
            for changes in self._changes()
        )

    @torch.no_grad()
    def merged(self) -> Transformer:
        """A model with the weights of now, in the computing dtype: what the student decodes with.

        It is one object, whose weights change with each call, so that steps compiled for it stay so.
        """
        teacher = self.teacher[0]
        pairs = zip(teacher.blocks, self._changes(), strict=True)
        fresh = (self._merged(block, changes) for block, changes in pairs)  # one at a time
        if not self.writer:
            model = sharing(teacher, lambda module: module.held)
            model.config, model.layers = self.config, nn.ModuleList(fresh)
            self.writer.append(model)
            return model
        for block, made in zip(self.writer[0].blocks, fresh, strict=True):
            for parameter, value in zip(block.parameters(), made.parameters(), strict=True):
                parameter.copy_(value)
        return self.writer[0]

    def _merged(self, block: Block, changes: LayerLora) -> Block:
        merged = merged_block(block, changes, self.scale, activation=self.activation)
        for name in linear_shapes(self.config) if self.rounded is not None else ():
            matrix = getattr(merged, name).weight
            matrix.copy_(rounded(merged_weight(getattr(block, name), *changes.factors[name], self.scale), self.rounded or ""))
        return merged

    @torch.no_grad()
    def start_from(self, adapter: Adapter) -> None:
        """Take over what an adapter of the same model holds. Raises ValueError where its ranks or its way to select are others."""
        held = adapter.config.lora
        require(held is not None, f"an adapter of method {adapter.config.method} changes no weights; start from one that adapt wrote")
        assert held is not None and adapter.lora is not None
        ours = (self.activation, self.scale, self.rank, [predictor.lookahead for predictor in self.trained])
        neurons = [layer.neurons for layer in adapter.layers]
        predictors = [each.predictor for each in neurons if isinstance(each, PredictedNeurons)]
        theirs = (held.activation, held.scale, held.rank, [predictor.lookahead for predictor in predictors])
        named = "activation, scale, rank of changes and lookaheads"
        require(ours == theirs, f"the adapter to start from has {named} {theirs}, and this run {ours}; give the same options")
        for block, changes in zip(self.blocks, adapter.lora, strict=True):
            for name, (A_RI, B_OR) in changes.factors.items():
                module = getattr(block, name)
                module.A_RI.copy_(wide(A_RI))
                module.B_OR.copy_(wide(B_OR))
            for name, weight_D in changes.norms.items():
                getattr(block, name).weight.copy_(weight_D)
        for mine, other in zip(self.trained, predictors, strict=True):
            ranks = (mine.A_RD.shape[0], other.A_RD.shape[0])
            require(ranks[0] == ranks[1], f"the adapter to start from has predictors of rank {ranks[1]}; give --rank {ranks[1]}")
            mine.A_RD.copy_(wide(other.A_RD))
            mine.B_FR.copy_(wide(other.B_OR))
            mine.bias_F.copy_(other.bias_O - other.threshold)


@torch.inference_mode()
def residual_cosines(model: Transformer, ids_WT: Tensor) -> list[float]:
    """Per layer, the mean cosine of a token's residual stream before attention and after it, on a few windows [W, T]."""
    ids_WT = ids_WT[:COSINE_WINDOWS].to(model.device)
    position_T = torch.arange(ids_WT.shape[1], device=ids_WT.device)
    x, found = model.embedded(ids_WT, position_T), []
    for index, block in enumerate(model.blocks):
        mixed = block.attend(block.attention_input(x), position_T, model.frequencies(index))
        after, _ = block.after_attention(x, block.o(mixed.flatten(-2)))
        found.append(float(F.cosine_similarity(x.float(), after.float(), dim=-1).mean()))
        x, _ = model.layer(index, x, position_T, None, DENSE)
    return found


def choose_lookaheads(cosine_L: list[float], threshold: float) -> tuple[int, ...]:
    """1 (the predictor reads the attention's input) where attention changes the stream little; never in layer 0."""
    return tuple(int(layer > 0 and cosine >= threshold) for layer, cosine in enumerate(cosine_L))
