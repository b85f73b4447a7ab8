"""Useful bytes: what a decode step cannot do without reading, whatever computes it, from the counts of what it selected.

In: a ModelConfig, how values are stored, and a step's counts. Out: bytes by op. With row(n) the bytes of a row of n weights and
its scales, v those of one value of a vector (norms, biases, positions), c(K) those of one cached head vector, and for each
layer N neurons and U heads that some row of the batch selected and M neurons whose row of down some row needed:

    predictor   R row(D) + O row(R) + O v for each predictor of rank R with O outputs
    attention   U K row(D) of q and of o + G K row(D) of k and of v + biases + 2 c(K) sum over rows of (its groups x its tokens)
    mlp         N (row(D) of up and, where gated, of the gate + biases) + M row(D) of down + D v
                where the gate selects, its matrix (where not gated: up) is read for all F neurons
    head        V row(E) + E row(D) where the embedding is narrower; with a shortlist of S tokens by scores of rank R, int8,
                R row(E) + V row(R) + S row(E) instead of V row(E)
    other       B row(E) + B D v (positions) + norms + D row(E) where the embedding is narrower

Each matrix may be stored in a format of its own. Where inputs are selected, of the rows of q, k, v, gate and up only the values of the
C inputs that some row of the batch kept at that point, and the scales of the rows; of o and down the C rows; and 4 bytes for the norm
of each input of a point (op predictor).

Rows of a batch share what they read of the weights, so it counts once; each reads its own cache. Padding, writes and
activations do not count, and neither do rows that an engine reads without need.

Letters: B rows of a step  L layers  D model  F neurons  H query heads  G key/value heads  K head_dim  V vocabulary
E embedding width  R predictor rank  O outputs of a predictor
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from dejavu.config import ModelConfig
from dejavu.engine.interface import EngineInfo
from dejavu.generation.generation import GeneratedText
from dejavu.kernels.quantized import QuantizedMatrix
from dejavu.kernels.screen import Screen
from dejavu.model.counts import Counts
from dejavu.model.grids import Grids
from dejavu.model.selectors import InputPoints, LayerAdapter, Scoring

OPS = ("predictor", "attention", "mlp", "head", "other")


@dataclass(frozen=True, slots=True)
class StorageFormat:
    """Bytes of one value, of a scale for each row, and of a scale for each group of so many values of a row."""

    value: float
    row_scale: int = 0
    group: int = 0
    group_scale: int = 0

    def row(self, columns: int) -> float:
        """Bytes of a row of values with its scales."""
        groups = -(-columns // self.group) if self.group else 0
        return columns * self.value + self.row_scale + groups * self.group_scale

    def part(self, columns: int, kept: float) -> float:
        """Bytes of so many values of such a row, with all of its scales."""
        return self.row(columns) - (columns - kept) * self.value


STORAGE_FORMATS = {
    "fp64": StorageFormat(8),
    "fp32": StorageFormat(4),
    "fp16": StorageFormat(2),
    "bf16": StorageFormat(2),
    "int8": StorageFormat(1, row_scale=4),
    "int4": StorageFormat(0.5, group=32, group_scale=2),
    "q8_0": StorageFormat(1, group=32, group_scale=2),
    "q4_0": StorageFormat(0.5, group=32, group_scale=2),
    "q4_1": StorageFormat(0.5, group=32, group_scale=4),
    "q5_0": StorageFormat(0.625, group=32, group_scale=2),
    "q5_1": StorageFormat(0.625, group=32, group_scale=4),
    "q4_k": StorageFormat(0.5, group=256, group_scale=16),
    "q5_k": StorageFormat(0.625, group=256, group_scale=16),
    "q6_k": StorageFormat(0.75, group=256, group_scale=18),
    "w4_fp16": StorageFormat(0.5, group=32, group_scale=3),
    "w4_bf16": StorageFormat(0.5, group=32, group_scale=3),
    "w8_fp16": StorageFormat(1, group=32, group_scale=3),
    "w8_bf16": StorageFormat(1, group=32, group_scale=3),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """Dtypes of the matrices, the cache, and vectors; predictors may be int8 where their values are. screen: of a screened
    head; None: the full one. grids: of each matrix, where they are not all of the dtype `weights`."""

    weights: str
    cache: str
    vectors: str
    int8_predictors: bool
    screen: Screen | None = None
    grids: Grids | None = None

    def of_layer(self, index: int) -> Callable[[str], StorageFormat]:
        """How a matrix of a layer is stored, by the names of LayerGrids."""
        grids = self.grids
        return lambda part: STORAGE_FORMATS[self.weights if grids is None else getattr(grids.layers[index], part) or self.weights]

    @property
    def embed(self) -> StorageFormat:
        return STORAGE_FORMATS[self.weights if self.grids is None else self.grids.embed]

    @property
    def head(self) -> StorageFormat:
        return STORAGE_FORMATS[self.weights if self.grids is None else self.grids.head]

    @property
    def projections(self) -> tuple[StorageFormat, StorageFormat]:
        """Into the model's width and out of it."""
        grids = self.grids
        first, second = (self.weights, self.weights) if grids is None else grids.projections or (grids.embed, grids.embed)
        return STORAGE_FORMATS[first], STORAGE_FORMATS[second]


def formats_of(info: EngineInfo) -> Formats:
    """How an engine stores what it reads: native and cuda keep predictors int8; native vectors fp32; torch has one dtype for all."""
    if info.backend == "native":
        return Formats(
            weights=info.dtype, cache=info.cache_dtype, vectors="fp32", int8_predictors=True, screen=info.screen, grids=info.grids
        )
    return Formats(weights=info.dtype, cache=info.cache_dtype, vectors=info.dtype, int8_predictors=info.backend == "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """Of one step, or means over steps. counts [L]: what some row selected. fired_L: neurons whose row of down is needed. cached_L: sum
    over rows of (its selected key/value heads x the tokens it attends to)."""

    rows: int
    counts: Counts
    fired_L: Sequence[float]
    cached_L: Sequence[float]


def attended(config: ModelConfig, tokens: float) -> list[float]:
    """By layer: so many tokens, or the last ones of them that its window holds."""
    seen = tokens if config.window is None else min(tokens, config.window)
    return [seen if index in config.windowed else tokens for index in range(config.num_layers)]


def dense_reads(config: ModelConfig, *, rows: int = 1, tokens: float = 0) -> Reads:
    """Everything, for rows of so many tokens each."""
    layers, neurons = config.num_layers, config.intermediate_size
    counts = Counts(neurons=torch.full((layers,), neurons), heads=torch.full((layers,), config.num_heads))
    cached = [rows * config.num_kv_heads * seen for seen in attended(config, tokens)]
    return Reads(rows=rows, counts=counts, fired_L=[neurons] * layers, cached_L=cached)


def step_bytes(config: ModelConfig, formats: Formats, reads: Reads, layers: Sequence[LayerAdapter] | None = None) -> dict[str, float]:
    """Useful bytes of a step by op, with what `layers` select (None: it runs dense)."""
    vector, cache = STORAGE_FORMATS[formats.vectors].value, STORAGE_FORMATS[formats.cache]
    size, head_dim, groups, embed = config.hidden_size, config.head_dim, config.num_kv_heads, config.embed_width
    attention = mlp = predictor = 0.0
    sizes, chosen_L = InputPoints.of(config).sizes, layers or (LayerAdapter(),) * config.num_layers
    kept_LP = [sizes] * config.num_layers if reads.counts.kept_inputs is None else reads.counts.kept_inputs.tolist()
    neurons_L, heads_L = reads.counts.neurons.tolist(), reads.counts.heads.tolist()
    by_layer = zip(neurons_L, reads.fired_L, heads_L, reads.cached_L, chosen_L, kept_LP, strict=True)
    for index, (neurons, fired, heads, cached, chosen, kept) in enumerate(by_layer):
        stored = formats.of_layer(index)
        at_attention, at_output, at_mlp, at_down = kept
        outputs = heads + 2 * groups
        for part, number in (("q", heads), ("k", groups), ("v", groups)):
            attention += number * head_dim * stored(part).part(size, at_attention)
        attention += heads * head_dim * at_output / sizes[1] * stored("o").row(size)
        attention += 2 * cached * cache.row(head_dim)
        attention += config.qkv_bias * outputs * head_dim * vector + config.out_bias * size * vector
        rows_in = chosen.neurons.rows_in(config, neurons)
        rows_up = neurons if config.gated else rows_in  # whatever else is read is of the gate
        mlp += rows_up * stored("up").part(size, at_mlp) + (rows_in - rows_up) * stored("gate").part(size, at_mlp)
        mlp += (rows_in + size) * config.mlp_bias * vector
        mlp += chosen.inputs.rows_down(fired, at_down) * stored("down").row(size)
        scorings = [selector.scoring(config) for selector in chosen.selectors]
        predictor += sum(scoring_bytes(each, may_be_int8=formats.int8_predictors) for each in scorings)
    wide_norms = config.num_layers * (2 - config.shared_norm + 2 * config.block_norms) + config.final_norm
    norm_values = wide_norms * size + config.num_layers * 2 * config.qk_norm * head_dim
    norms = norm_values * vector * (1 + (config.norm == "layernorm")) * config.norm_affine
    narrow = embed != size
    positions = (config.positions == "learned") * size * vector
    project_in, project_out = formats.projections
    return {
        "predictor": predictor,
        "attention": attention,
        "mlp": mlp,
        "head": _head_rows(config, formats) + narrow * embed * project_out.row(size),
        "other": reads.rows * (formats.embed.row(embed) + positions) + norms + narrow * size * project_in.row(embed),
    }


def _head_rows(config: ModelConfig, formats: Formats) -> float:
    width, row = config.embed_width, formats.head.row(config.embed_width)
    screen = formats.screen
    if screen is None:
        return config.vocab_size * row
    clusters, bias = len(screen.sizes_C), STORAGE_FORMATS["fp32"].value
    return clusters * (STORAGE_FORMATS["int8"].row(width) + bias) + (screen.tokens or config.vocab_size) * row


def weight_bytes(config: ModelConfig, formats: Formats) -> float:
    """What a dense token reads besides the cache: the size of the buffer of the read ceiling."""
    return sum(step_bytes(config, formats, dense_reads(config)).values())


def scoring_bytes(scoring: Scoring, *, may_be_int8: bool) -> float:
    """Matrices int8 with scales where they are quantised and else fp32, and values fp32."""
    total = scoring.values * STORAGE_FORMATS["fp32"].value
    for matrix in scoring.matrices:
        stored = "int8" if may_be_int8 and isinstance(matrix, QuantizedMatrix) else "fp32"
        total += matrix.shape[0] * STORAGE_FORMATS[stored].row(matrix.shape[1])
    return total


def read_share(
    config: ModelConfig, formats: Formats, reads: Reads, layers: Sequence[LayerAdapter] | None, *, tokens: float | None = None
) -> float:
    """Useful bytes of a step over those of the same step run dense: predictors, gates, norms, cache and head included.

    tokens: of each row; not given: as many as the layer that reads most of the cache does with all of its heads.
    """
    tokens = max(reads.cached_L) / (reads.rows * config.num_kv_heads) if tokens is None else tokens
    dense = step_bytes(config, replace(formats, screen=None), dense_reads(config, rows=reads.rows, tokens=tokens))
    return sum(step_bytes(config, formats, reads, layers).values()) / sum(dense.values())


def text_read_share(config: ModelConfig, text: GeneratedText, layers: Sequence[LayerAdapter] | None) -> float | None:
    """The read_share of the mean decode step of a text, written with the `layers` of an adapter (None: dense); None without a step.

    Rows of down count for every neuron selected: a text does not tell which of them came out as zero.
    """
    counts = text.counts
    if counts is None:
        return None
    seen_L = attended(config, counts.tokens)
    cached_L = [heads * config.num_kv_heads / config.num_heads * seen for heads, seen in zip(counts.heads_L, seen_L, strict=True)]
    reads = Reads(rows=1, counts=counts.mean, fired_L=counts.neurons_L, cached_L=cached_L)
    return read_share(config, formats_of(text.engine), reads, layers, tokens=counts.tokens)
