"""What a dense model does on a text, layer by layer: the inputs that predictors read and the labels they learn.

In: a model and windows of token ids [W, T]. Out: for one layer at a time, the inputs of its attention and MLP blocks, its
active neurons as (index, value) pairs and the norm of every head group's contribution. Only the residual stream of one layer is kept,
4 bytes x W x T x D, so memory does not grow with depth; the pass over all layers costs one forward pass in all.

Letters: W windows  T tokens of a window  N = W x T tokens  D model  F neurons  H query heads  G head groups  K head_dim
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.config import Progress, require
from dejavu.kernels.quantized import wide
from dejavu.model.finite import require_finite_stream
from dejavu.model.predictor import mlp_predictor_input
from dejavu.model.transformer import Block, LayerInputs, Selection, Transformer

BLOCK = 256  # tokens that are shuffled together
FP16_LIMIT = 65504.0


def pack_windows(documents: Sequence[Sequence[int]], *, context: int, bos: int | None) -> Tensor:
    """Token ids [W, T] of documents laid end to end, each behind one BOS; a rest shorter than a window is dropped.

    A text shorter than the context becomes one window. Raises ValueError for a text of fewer than 2 tokens.
    """
    start = [] if bos is None else [bos]
    flat = [token for document in documents for token in (*start, *document)]
    require(len(flat) >= 2, f"the text has {len(flat)} tokens; give a longer one")
    length = min(context, len(flat))
    count = len(flat) // length
    return torch.tensor(flat[: count * length], dtype=torch.long).view(count, length)


def window_names(first: int, count: int) -> list[str]:
    """What messages call the windows from an index on."""
    return [f"window {first + index + 1}" for index in range(count)]


def down_norms(block: Block) -> Tensor:
    """|down row| of every neuron [F], fp32."""
    return wide(block.down.matrix).float().norm(dim=1)


def group_norms(block: Block, mixed_BTHK: Tensor, num_groups: int) -> Tensor:
    """Norm of what each head group adds to the residual stream, [.., G] fp32, from head outputs before the projection."""
    shape = mixed_BTHK.shape
    grouped = mixed_BTHK.float().reshape(*shape[:-2], num_groups, -1)
    rows_GID = wide(block.o.matrix).float().view(num_groups, grouped.shape[-1], -1)
    gram_GII = rows_GID @ rows_GID.transpose(1, 2)
    squared = torch.einsum("...gi,gij,...gj->...g", grouped, gram_GII, grouped)
    return squared.clamp_min(0).sqrt()


@dataclass(slots=True)
class ActiveNeurons:
    """The non-zero activations of N tokens: of token n, entries start_N[n] to start_N[n + 1]."""

    start_N: Tensor
    index_A: Tensor
    value_A: Tensor
    num_neurons: int

    @classmethod
    def of(cls, act_NF: Tensor) -> ActiveNeurons:
        on = act_NF != 0
        start = torch.zeros(len(act_NF) + 1, dtype=torch.long)
        torch.cumsum(on.sum(1), 0, out=start[1:])
        small = torch.int16 if act_NF.shape[1] < 2**15 else torch.int32
        return cls(start, on.nonzero()[:, 1].to(small), act_NF[on].to(torch.bfloat16), act_NF.shape[1])

    @classmethod
    def joined(cls, parts: Sequence[ActiveNeurons]) -> ActiveNeurons:
        starts, offset = [torch.zeros(1, dtype=torch.long)], 0
        for part in parts:
            starts.append(part.start_N[1:] + offset)
            offset += int(part.start_N[-1])
        return cls(torch.cat(starts), torch.cat([p.index_A for p in parts]), torch.cat([p.value_A for p in parts]), parts[0].num_neurons)

    def dense(self, first: int, last: int) -> Tensor:
        """Activations [last - first, F] fp32 of a run of tokens."""
        begin, end = int(self.start_N[first]), int(self.start_N[last])
        counts = self.start_N[first + 1 : last + 1] - self.start_N[first:last]
        row = torch.repeat_interleave(torch.arange(last - first), counts)
        out = torch.zeros(last - first, self.num_neurons)
        out[row, self.index_A[begin:end].long()] = self.value_A[begin:end].float()
        return out


def mean_input(x_ND: Tensor) -> Tensor:
    """The mean input, fp32 [D]."""
    return x_ND.mean(0, dtype=torch.float32)


@dataclass(slots=True)
class LayerData:
    """One layer over N tokens. Inputs are fp16 [N, D]: after a norm, with what may be a large mean; previous_mlp_ND is None in layer 0."""

    layer: int
    attention_ND: Tensor
    mlp_ND: Tensor
    previous_mlp_ND: Tensor | None
    active: ActiveNeurons
    group_norms_NG: Tensor

    def mlp_input(self, lookahead: int) -> Tensor:
        chosen = (self.mlp_ND, self.attention_ND, self.previous_mlp_ND)[lookahead]
        assert chosen is not None, f"layer {self.layer} has no input for {lookahead=}"
        return chosen

    def head_input(self, lookahead: int) -> Tensor:
        chosen = (self.attention_ND, self.previous_mlp_ND)[lookahead]
        assert chosen is not None, f"layer {self.layer} has no input for {lookahead=}"
        return chosen


class _Recorder(Selection):
    """Keeps what one layer shows in one batch of windows."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.attention = self.mlp = self.norms = torch.empty(0)
        self.active: ActiveNeurons | None = None

    def heads(self, layer: int, inputs: LayerInputs, mixed_BTHK: Tensor) -> Tensor:
        self.norms = group_norms(self.model.blocks[layer], mixed_BTHK, self.model.config.num_kv_heads)
        return mixed_BTHK

    def neurons(self, layer: int, inputs: LayerInputs, act_BTF: Tensor) -> Tensor:
        self.attention, self.mlp = inputs.attention, mlp_predictor_input(inputs, 0)
        self.active = ActiveNeurons.of(act_BTF.flatten(0, 1))
        return act_BTF


@torch.no_grad()
def sweep_layers(model: Transformer, ids_WT: Tensor, *, batch: int = 4, progress: Progress | None = None) -> Iterator[LayerData]:
    """The data of layer 0, 1, ... in turn. A consumer that is done with one deletes it before it takes the next: memory holds one.

    Raises ValueError, with the first layer and token, for values that are not finite.
    """
    num_layers, count = model.config.num_layers, len(ids_WT)
    position_T = torch.arange(ids_WT.shape[1], device=ids_WT.device)
    x_WTD = torch.empty(*ids_WT.shape, model.config.hidden_size)
    for first in range(0, count, batch):
        ids = ids_WT[first : first + batch]
        x_WTD[first : first + batch] = model.embedded(ids, position_T).float()
        require_finite_stream(x_WTD[first : first + batch], "the embedding", ids, window_names(first, len(ids)))
    dtype = model.dtype
    previous: Tensor | None = None
    for layer in range(num_layers):
        attention_ND, mlp_ND = (torch.empty(x_WTD.shape[:2].numel(), x_WTD.shape[2], dtype=torch.float16) for _ in range(2))
        norms, active = [], []
        for first in range(0, count, batch):
            recorder = _Recorder(model)
            stop = first + batch
            x, _ = model.layer(layer, x_WTD[first:stop].to(dtype), position_T, None, recorder)
            x_WTD[first:stop] = x.float()
            require_finite_stream(x, f"layer {layer}", ids_WT[first:stop], window_names(first, len(x)))
            tokens = slice(first * ids_WT.shape[1], stop * ids_WT.shape[1])
            for kept_ND, seen_BTD in ((attention_ND, recorder.attention), (mlp_ND, recorder.mlp)):
                kept_ND[tokens] = seen_BTD.flatten(0, 1).clamp(-FP16_LIMIT, FP16_LIMIT)
            norms.append(recorder.norms.flatten(0, 1))
            assert recorder.active is not None
            active.append(recorder.active)
            if progress is not None:
                progress(f"layer {layer}: reading activations", min(stop, count), count)
        joined = ActiveNeurons.joined(active)
        active.clear()
        yield LayerData(layer, attention_ND, mlp_ND, previous, joined, torch.cat(norms))
        previous = mlp_ND
        del joined, attention_ND
