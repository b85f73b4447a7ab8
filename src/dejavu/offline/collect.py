"""What a dense model does on a text, layer by layer: the inputs that predictors read and the labels they learn.

In: a model and windows of token ids [W, T]. Out: for one layer at a time, the inputs of its attention and MLP blocks, its
active neurons as (index, value) pairs and the norm of every head group's contribution. Only the residual stream of one layer is kept,
4 bytes x W x T x D, so memory does not grow with depth; the pass over all layers costs one forward pass in all. What is kept lies on the
model's device while it fits (memory.py): who reads it moves the rows that it needs to `LayerData.device`.

Letters: W windows  T tokens of a window  N = W x T tokens  D model  F neurons  H query heads  G head groups  K head_dim
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dejavu.config import Progress, require
from dejavu.kernels.quantized import wide
from dejavu.model.finite import require_finite_stream
from dejavu.model.predictor import mlp_predictor_input
from dejavu.model.transformer import Block, LayerInputs, Selection, Transformer
from dejavu.offline.memory import ALL_FREE, CPU, Room, WorkMemory, tokens_at_once

BLOCK = 256  # tokens that are shuffled together
MOMENT_CHUNK = 8192  # tokens that moments are summed up over at a time
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
    """The non-zero activations of N tokens, in one or more runs of them, on the device that they were computed on or the host.

    Of token n of a run, entries start[n] to start[n + 1]; start is on the CPU, where runs are looked up.
    """

    runs: list[tuple[Tensor, Tensor, Tensor]]  # start, index, value
    num_neurons: int

    @classmethod
    def of(cls, act_NF: Tensor) -> ActiveNeurons:
        on = act_NF != 0
        start = torch.zeros(len(act_NF) + 1, dtype=torch.long)
        start[1:] = on.sum(1).cumsum(0)
        small = torch.int16 if act_NF.shape[1] < 2**15 else torch.int32
        return cls([(start, on.nonzero()[:, 1].to(small), act_NF[on].to(torch.bfloat16))], act_NF.shape[1])

    @classmethod
    def joined(cls, parts: Sequence[ActiveNeurons], room: Room | None = None) -> ActiveNeurons:
        """The parts one after the other; what does not fit into the room moves to the host."""
        runs = [run for part in parts for run in part.runs]
        if room is not None:
            runs = [(start, *room.moved(index, value)) for start, index, value in runs]
        return cls(runs, parts[0].num_neurons)

    def dense(self, first: int, last: int, device: torch.device = CPU) -> Tensor:
        """Activations [last - first, F] fp32 of a run of tokens."""
        out, offset = torch.zeros(last - first, self.num_neurons, device=device), 0
        for start, index, value in self.runs:
            low, high = max(first - offset, 0), min(last - offset, len(start) - 1)
            if low < high:
                begin, end = int(start[low]), int(start[high])
                counts = (start[low + 1 : high + 1] - start[low:high]).to(device)
                token = torch.arange(low + offset - first, high + offset - first, device=device)
                row = token.repeat_interleave(counts, output_size=end - begin)  # its size is known: nothing waits for the device
                out[row, index[begin:end].to(device).long()] = value[begin:end].to(device).float()
            offset += len(start) - 1
        return out


def mean_input(x_ND: Tensor, device: torch.device) -> Tensor:
    """The mean input, fp32 [D], summed up there in parts of MOMENT_CHUNK: the same bits wherever the inputs are kept."""
    total_D = torch.zeros(x_ND.shape[1], device=device)
    for chunk in x_ND.split(MOMENT_CHUNK):
        total_D += chunk.to(device).sum(0, dtype=torch.float32)
    return total_D / len(x_ND)


@dataclass(slots=True)
class LayerData:
    """One layer over N tokens. Inputs are fp16 [N, D]: after a norm, with what may be a large mean; previous_mlp_ND is None in layer 0.

    device: where to compute; what is kept may lie on the host.
    """

    layer: int
    attention_ND: Tensor
    mlp_ND: Tensor
    previous_mlp_ND: Tensor | None
    active: ActiveNeurons
    group_norms_NG: Tensor
    device: torch.device

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


def sweep_layers(
    model: Transformer, ids_WT: Tensor, *, batch: int = 4, work: WorkMemory = ALL_FREE, progress: Progress | None = None
) -> Iterator[LayerData]:
    """The data of layer 0, 1, ... in turn. A consumer that is done with one deletes it before it takes the next: memory holds one.

    work: where what is kept may lie. Raises ValueError, with the first layer and token, for values that are not finite, MemoryError where
    there is no room.
    """
    device, dtype = model.device, model.dtype
    (count, length), size, num_layers = ids_WT.shape, model.config.hidden_size, model.config.num_layers
    batch = max(1, tokens_at_once(model, batch * length) // length)
    position_T, room = torch.arange(length, device=device), Room.on(device, work)
    tokens = count * length
    stream, one_input = 4 * tokens * size, 2 * tokens * size
    stream_at, inputs_at = room.places([stream], [one_input] * 3, tokens=tokens)  # of two layers three inputs are alive
    x_WTD = room.empty(stream_at, count, length, size, dtype=torch.float32)
    with torch.no_grad():  # not around the generator: torch's wrapper would hold each layer's data while the next is read
        for first in range(0, count, batch):
            ids = ids_WT[first : first + batch]
            x_WTD[first : first + batch] = model.embedded(ids, position_T).float()
            require_finite_stream(x_WTD[first : first + batch], "the embedding", ids, window_names(first, len(ids)))
    previous: Tensor | None = None
    for layer in range(num_layers):
        with torch.no_grad():
            attention_ND, mlp_ND = (room.empty(inputs_at, tokens, size, dtype=torch.float16) for _ in range(2))
            norms, active, left = [], [], replace(room)
            for first in range(0, count, batch):
                recorder = _Recorder(model)
                stop = first + batch
                x, _ = model.layer(layer, x_WTD[first:stop].to(device).to(dtype), position_T, None, recorder)
                x_WTD[first:stop] = x.float()
                require_finite_stream(x, f"layer {layer}", ids_WT[first:stop], window_names(first, len(x)))
                here = slice(first * length, stop * length)
                for kept_ND, seen_BTD in ((attention_ND, recorder.attention), (mlp_ND, recorder.mlp)):
                    kept_ND[here] = seen_BTD.flatten(0, 1).clamp(-FP16_LIMIT, FP16_LIMIT)
                norms.append(recorder.norms.flatten(0, 1))
                assert recorder.active is not None
                active.append(ActiveNeurons.joined([recorder.active], left))
                if progress is not None:
                    progress(f"layer {layer}: reading activations", min(stop, count), count)
        joined = ActiveNeurons.joined(active)
        active.clear()
        yield LayerData(layer, attention_ND, mlp_ND, previous, joined, torch.cat(norms), device)
        previous = mlp_ND
        del joined, attention_ND
