"""A model rounded to few bits with its activations in view, layer by layer over a calibration text.

In: a model, windows of token ids, the grids that matrices get. Out: a model whose matrices are held in them, with new biases where it has
any. Two streams run through the layers, of the model as it is (dense) and of what is rounded so far. A map is fitted (compensated.py) to
give, on the second stream's inputs, what it gives on the first's; o and down, which add to the stream, are fitted to give besides what
the second stream lacks of the first. A token weighs by the inverse of its stream's mean square: a norm follows, so that only the relative
error of it counts, and the first token of a text may be a thousand times as large as others.

Memory: the model as it is held, its rounded copy, one layer in fp32, six values of width D for each token.

Letters: W windows  T tokens  D model
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dejavu.config import Config, ModelConfig, Progress, require
from dejavu.kernels.memory import give_back_freed
from dejavu.kernels.quantized import Matrix, QuantizedMatrix, blocks, check_blocks, rounded_to, stacked, wide
from dejavu.model.layers import InputMajorLinear, Linear
from dejavu.model.texts import spread_windows
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import Block, Transformer, sharing
from dejavu.offline.collect import pack_windows
from dejavu.offline.compensated import BLOCK_GRIDS, Moments, rounded_alone, rounded_by_input, rounded_by_output
from dejavu.offline.fidelity import token_nll
from dejavu.offline.split import split_windows
from dejavu.version import __version__

GRIDS = ("int4", "int8", *BLOCK_GRIDS)
KINDS = ("embed", "qkv", "o", "up", "down")
WINDOW = 512  # tokens
BATCH_TOKENS = 2048
EVAL_TOKENS = 32 * WINDOW
SHIFT_PARTS = 4  # batches that a bias's shift is chosen on
SHIFTS = torch.linspace(-3, 1, 33)  # of a bias before a ReLU, in deviations of the error in front of it


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeConfig(Config):
    """dtype: of every matrix but those of the kinds `int8`, of KINDS, where up is up and gate, and embed the embedding, the head and what
    is beside them: these get int8, or q8_0 where dtype is a type of GGUF. max_tokens: of the calibration text."""

    dtype: str = "int4"
    int8: tuple[str, ...] = ("embed",)
    max_tokens: int = 64 * WINDOW

    def __post_init__(self) -> None:
        require(self.dtype in GRIDS, f"dtype {self.dtype!r} is no grid to quantise to; choose one of {', '.join(GRIDS)}")
        for kind in self.int8:
            require(kind in KINDS, f"{kind!r} is no kind of matrix; choose of {', '.join(KINDS)}")
        require(self.max_tokens >= 1, f"max_tokens must be at least 1, not {self.max_tokens}")

    def grid(self, kind: str) -> str:
        """That of a kind of matrix."""
        eight = "q8_0" if self.dtype in BLOCK_GRIDS else "int8"
        return eight if kind in self.int8 else self.dtype


@torch.no_grad()
def quantized(model: Transformer, ids_WT: Tensor, config: QuantizeConfig, progress: Progress | None = None) -> Transformer:
    """The model in those grids, for these windows of its tokens, a BOS included where it takes one. model: on the CPU, fp32 or as held."""
    sizes = model.config
    lengths = sizes.hidden_size, sizes.num_heads * sizes.head_dim, sizes.intermediate_size, model.embed.matrix.shape[1]
    for columns in lengths if config.dtype in BLOCK_GRIDS else ():
        check_blocks(columns, config.dtype)
    made = sharing(model, lambda held: held.held)
    made.embed.hold(_table(model.embed.matrix, config.grid("embed")))
    for module in (made.head, made.project_in, made.project_out):
        if module is not None:
            module.hold(_table(module.matrix, config.grid("embed")))
    streams = _Streams(model, made, ids_WT)
    for index, (dense, rounded) in enumerate(zip(model.blocks, made.blocks, strict=True)):
        if progress is not None:
            progress("layers quantised", index, len(made.blocks))
        wide_block = sharing(dense, lambda held: wide(held.held))
        wide_block.cache_dtype = rounded.cache_dtype = None
        _quantize_layer(wide_block, rounded, streams, model.frequencies(index), config)
        del wide_block
        give_back_freed()
    made.label = config.dtype
    if progress is not None:
        progress("layers quantised", len(made.blocks), len(made.blocks))
    return made


class _Streams:
    """The residual streams [W, T, D] before a layer, dense and rounded."""

    def __init__(self, model: Transformer, made: Transformer, ids_WT: Tensor) -> None:
        self.position_T = torch.arange(ids_WT.shape[1])
        self.dense, self.rounded = model.embedded(ids_WT, self.position_T), made.embedded(ids_WT, self.position_T)
        step = max(1, BATCH_TOKENS // ids_WT.shape[1])
        self.parts = [slice(first, first + step) for first in range(0, len(ids_WT), step)]


def _quantize_layer(dense: Block, rounded: Block, streams: _Streams, inv_freq: Tensor | None, grids: QuantizeConfig) -> None:
    """Round the layer, and take both streams to its end. dense: with its matrices as tensors."""
    config, x, x_q, place = dense.config, streams.dense, streams.rounded, streams.position_T
    weight_WT = x.square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
    weight_WT /= weight_WT.mean()

    def moments(x: Tensor, y: Tensor, bias: Tensor | None) -> Moments:
        return Moments(x.shape[-1], y.shape[-1], centred=bias is not None)

    sums: Moments | None = None
    for part in streams.parts:
        inputs = rounded.attention_input(x_q[part])
        wanted = dense.qkv(dense.attention_input(x[part]))
        sums = sums or moments(inputs, wanted, dense.qkv.bias)
        sums.add(inputs, wanted, weight_WT[part])
    _round_rows([rounded.qkv], [dense.qkv], sums, grids.grid("qkv"))

    sums = None
    added, mixed_q = torch.empty_like(x), []
    for part in streams.parts:
        mixed = dense.attend(dense.attention_input(x[part]), place, inv_freq).flatten(-2)
        mixed_q.append(rounded.attend(rounded.attention_input(x_q[part]), place, inv_freq).flatten(-2))
        added[part] = dense.o(mixed)
        sums = sums or moments(mixed, x[part], dense.o.bias)
        sums.add(mixed_q[-1], _restoring(dense, dense.norm1_out, added[part], x[part], x_q[part]), weight_WT[part])
    _round_inputs(rounded.o, dense.o, sums, grids.grid("o"))

    sums = None
    inputs, inputs_q = torch.empty_like(x), torch.empty_like(x)
    maps = [(each, of) for each, of in ((rounded.gate, dense.gate), (rounded.up, dense.up)) if each is not None and of is not None]
    for part, mixed in zip(streams.parts, mixed_q, strict=True):
        x[part], inputs[part] = dense.after_attention(x[part], added[part])
        x_q[part], inputs_q[part] = rounded.after_attention(x_q[part], rounded.o(mixed))
        wanted = torch.cat([of(inputs[part]) for _, of in maps], dim=-1)
        sums = sums or moments(inputs, wanted, dense.up.bias)
        sums.add(inputs_q[part], wanted, weight_WT[part])
    del added, mixed_q
    _round_rows([each for each, _ in maps], [of for _, of in maps], sums, grids.grid("up"))
    if config.activation == "relu" and not config.gated and rounded.up.bias is not None:
        _shift_bias(dense.up, rounded.up, inputs, inputs_q, streams.parts)

    sums = None
    for part in streams.parts:
        active, active_q = dense.activations(inputs[part]), rounded.activations(inputs_q[part])
        y = dense.down(active)
        sums = sums or moments(active, y, dense.down.bias)
        sums.add(active_q, _restoring(dense, dense.norm2_out, y, x[part], x_q[part]), weight_WT[part])
        x[part] = dense.after_mlp(x[part], y)
    _round_inputs(rounded.down, dense.down, sums, grids.grid("down"))
    for part in streams.parts:
        x_q[part] = rounded.after_mlp(x_q[part], rounded.down(rounded.activations(inputs_q[part])))


def _restoring(block: Block, norm_out: nn.Module | None, y: Tensor, x: Tensor, x_q: Tensor) -> Tensor:
    """What a map that adds to the stream should give: y, and what x_q lacks of x, unless a norm of its own comes between."""
    return y if norm_out is not None else y + (x - x_q) / block.config.residual_scale


def _round_rows(modules: Sequence[Linear], dense: Sequence[Linear], sums: Moments | None, grid: str) -> None:
    """Maps of the same inputs, a row for each output."""
    assert sums is not None, "there are tokens"
    held = rounded_by_output(*sums.fitted(torch.cat([each.weight for each in dense])), grid)
    bias = sums.bias(held.dequantize()) if sums.centred else None
    first = 0
    for module in modules:
        rows = slice(first, first + module.out_features)
        first = rows.stop
        module.hold(held.rows(rows))
        if bias is not None:
            module.bias = nn.Parameter(bias[rows].clone(), requires_grad=False)


def _round_inputs(module: InputMajorLinear, dense: InputMajorLinear, sums: Moments | None, grid: str) -> None:
    """A map with a row for each input."""
    assert sums is not None, "there are tokens"
    fitted_OI, moment_II = sums.fitted(dense.weight.T)
    if grid in BLOCK_GRIDS:
        held = rounded_by_output(fitted_OI, moment_II, grid).swapped()
    else:
        held = rounded_by_input(fitted_OI.T.contiguous(), moment_II, grid)
    module.hold(held)
    if sums.centred:
        module.bias = nn.Parameter(sums.bias(held.dequantize().T), requires_grad=False)


def _shift_bias(dense: Linear, rounded: Linear, inputs: Tensor, inputs_q: Tensor, parts: Sequence[slice]) -> None:
    """Move the biases before a ReLU to where the activations err least: noise wakes silent neurons more often than it silences others."""
    sample = parts[:: -(-len(parts) // SHIFT_PARTS)]
    before, before_q = (torch.cat([up(x[part]).flatten(0, -2) for part in sample]) for up, x in ((dense, inputs), (rounded, inputs_q)))
    spread_F, wanted = (before_q - before).std(0), before.relu()
    error_SF = torch.stack([((before_q + shift * spread_F).relu_() - wanted).square_().sum(0) for shift in SHIFTS])
    assert rounded.bias is not None, "a bias to move"
    rounded.bias = nn.Parameter(rounded.bias + SHIFTS[error_SF.argmin(0)] * spread_F, requires_grad=False)


def _table(matrix: Matrix, grid: str) -> Matrix:
    """The embedding, the head or a projection beside them: rounded by itself."""
    if grid in ("int8", "q8_0") or (isinstance(matrix, QuantizedMatrix) and matrix.grid == grid):
        return rounded_to(matrix, grid)
    parts = [rounded_alone(matrix[rows] if isinstance(matrix, Tensor) else matrix.dequantize(rows), grid) for rows in blocks(*matrix.shape)]
    return stacked(parts)


def window_perplexity(model: Transformer, ids_WT: Tensor) -> float:
    """Of each token after the first of its window."""
    return math.exp(float(token_nll(model, ids_WT).double().mean()))


def calibration_windows(
    tokenizer: Tokenizer, architecture: ModelConfig, texts: Sequence[str], unseen: Sequence[str] | None, config: QuantizeConfig
) -> tuple[Tensor, Tensor]:
    """Windows [W, T] to calibrate on, and others to measure on: of the texts `unseen`, or every fourteenth of the former."""
    bos, context = tokenizer.document_bos, min(WINDOW, architecture.max_positions)

    def windows(of: Sequence[str], tokens: int) -> Tensor:
        found = spread_windows(tokenizer, of, max_tokens=tokens, length=context - (bos is not None))
        return pack_windows(found, context=context, bos=bos)

    ids_WT = windows(texts, config.max_tokens)
    if unseen is not None:
        return ids_WT, windows(unseen, EVAL_TOKENS)
    split = split_windows(ids_WT)
    return torch.cat([split.train, split.calibrate]), split.check


def quantized_card(base: str, stored_dtype: str, found: Mapping[str, Any]) -> str:
    """The README.md of a folder: what it was made of, how, and what that costs. found: the object that the command prints."""
    text = "a part of the text that was left out" if found["eval_text_hash"] is None else f"a text of SHA-256 `{found['eval_text_hash']}`"
    kept = f", {', '.join(found['int8'])} int8" if found["int8"] and found["dtype"] != "int8" else ""
    return f"""---
library_name: dejavu
base_model: {base}
base_model_relation: quantized
---
# {base} in {found["dtype"]}

Matrices are {found["dtype"]}{kept}, vectors fp32; made from {stored_dtype} by
`dejavu quantize`, dejavu {__version__}, on {found["tokens"]:,} tokens of a text of SHA-256
`{found["calibration_text_hash"]}`. Only dejavu reads this folder.

| perplexity of {found["eval_tokens"]:,} tokens of {text} | |
|---|---|
| before | {found["ppl_before"]:.4f} |
| after | {found["ppl_after"]:.4f} |
| rise | {found["rise"]:+.2%} |
"""
