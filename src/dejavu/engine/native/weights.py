"""A model's weights as the native library packs them, made once for each model and dtype.

In: a Transformer on the CPU, fp32 or quantised. Out: a handle of the library. fp32 takes the values as they are, bf16 rounds them;
int8 and int4 quantise every matrix per row and per group of a row (kernels/quantize.py), and take what is stored so as it is; norms,
biases and the position table stay fp32.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dejavu.config import ModelConfig, require
from dejavu.engine.native.capabilities import NATIVE
from dejavu.kernels import native
from dejavu.kernels.activation import ACTIVATION_CODES
from dejavu.kernels.quantized import Matrix, QuantizedMatrix, rounded_to, wide
from dejavu.kernels.screen import low_rank, screen_rank
from dejavu.model.layers import Held, InputMajorLinear, Linear, Norm, Rows
from dejavu.model.selectors import column_norms
from dejavu.model.transformer import Block, Transformer
from dejavu.model.versions import weights_version


class MatrixView:
    """A `native.MatrixStruct` and the tensors that it points into."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, dtype: str = "fp32", scale: Tensor | None = None) -> None:
        self.tensors = [None if tensor is None else tensor.detach().contiguous() for tensor in (weight, scale, bias)]
        data, scales, biases = (None if tensor is None else tensor.data_ptr() for tensor in self.tensors)
        rows, columns = weight.shape if weight.dim() == 2 else (1, weight.shape[0])
        self.matrix = native.MatrixStruct(data, scales, biases, rows, columns, native.DTYPE_CODES[dtype])


def matrix_view(dtype: str, matrix: Matrix, bias: Tensor | None = None) -> MatrixView:
    """The matrix as that dtype stores it: what is stored so already as it is."""
    held = rounded_to(matrix.detach() if isinstance(matrix, Tensor) else matrix, dtype)
    if dtype == "fp32" or isinstance(held, Tensor):
        return MatrixView(wide(held), bias)
    held = held.in_order()
    if held.transposed:
        held = dataclasses.replace(held, values=held.values.T, columns=held.shape[1], transposed=False)
    return MatrixView(held.values if dtype == "bf16" else held.integers(), bias, dtype=dtype, scale=held.scales)


def predictor_view(matrix: Matrix, bias: Tensor | None = None) -> MatrixView:
    """A predictor's matrix int8, as every stored adapter's is, or fp32."""
    if isinstance(matrix, QuantizedMatrix):
        return matrix_view(matrix.grid, matrix.to(torch.device("cpu")), bias)
    return MatrixView(matrix.detach().float().cpu(), bias)


class NativeModel:
    """A packed model, which stands alone once it is made. Freed with the last engine that uses it.

    take: whether the model is the caller's to give away: its matrices are let go one by one as they are packed.
    """

    def __init__(self, model: Transformer, dtype: str, layout: str = "by-neuron", *, screened: bool = False, take: bool = False) -> None:
        model.require_weights()
        if dtype == "stored":
            dtype = model.stored_as if model.stored_as in NATIVE.dtypes else "fp32"
        require(dtype in NATIVE.dtypes, f"dtype {dtype!r} is not available on backend 'native'; choose one of {', '.join(NATIVE.dtypes)}")
        require(
            model.dtype == torch.float32 and model.device.type == "cpu",
            f"the native engine needs a model loaded as fp32 on the cpu, not {model.dtype} on {model.device}",
        )
        NATIVE.check_architecture(model.config)
        self.dtype, self.layout = dtype, layout
        self.handle = ctypes.c_void_p()
        self._library = native.library()
        native.check(self._library.dejavu_model_new(native_config(model.config, dtype, layout), ctypes.byref(self.handle)))
        self._finalizer = weakref.finalize(self, self._library.dejavu_model_free, self.handle)
        self._screen: tuple[MatrixView, MatrixView] | None = None
        self._norms: dict[int, dict[str, Tensor]] = {}
        if take:
            self.prepare(model, screened=screened)
        for part, layer, view in _parts(model, dtype, take=take):
            native.check(self._library.dejavu_model_set(self.handle, part, layer, view.matrix))

    def prepare(self, model: Transformer, *, screened: bool) -> None:
        """Work out what engines need besides, while there are weights to work it out from."""
        if screened:
            self.screen(model)
        for index, block in enumerate(model.blocks if self.layout == "input-major" else ()):
            self.column_norms(index, block)

    def column_norms(self, index: int, block: Block) -> dict[str, Tensor]:
        """Those of a layer (model/selectors/inputs.py), worked out once."""
        if index not in self._norms:
            self._norms[index] = column_norms(block)
        return self._norms[index]

    def screen(self, model: Transformer) -> tuple[MatrixView, MatrixView]:
        """A and B of the screened head (kernels/screen.py) of the packed model, int8 per row; worked out once."""
        if self._screen is None:
            head_VE = wide(rounded_to(model.head_matrix, self.dtype)).detach()
            A_RE, B_VR = low_rank(head_VE, screen_rank(head_VE.shape[1]))
            self._screen = matrix_view("int8", A_RE), matrix_view("int8", B_VR)
        return self._screen


_packed: weakref.WeakKeyDictionary[Transformer, dict[tuple[str, str], tuple[tuple[int, ...], NativeModel]]] = weakref.WeakKeyDictionary()


def packed_model(model: Transformer, dtype: str, layout: str = "by-neuron") -> NativeModel:
    """The packed form of a model, made anew where a weight was replaced or changed in place since the last time.

    layout: where rows lie, by how decoding selects (dejavu_layout): each is a copy of its own while an engine or this cache has it.
    """
    state = weights_version(model)
    if state is None:  # nothing tells whether it is still the same the next time
        return NativeModel(model, dtype, layout)
    kept, key = _packed.setdefault(model, {}), (dtype, layout)
    if key not in kept or kept[key][0] != state:
        kept.pop(key, None)
        kept[key] = (state, NativeModel(model, dtype, layout))
    return kept[key][1]


def hand_over(model: Transformer, dtype: str, layouts: Sequence[str], *, screened: bool) -> None:
    """Pack the model in these layouts and let its own weights go meanwhile: from then on there are only these packed forms of it.

    screened: engines with a screened head will be made. A model of inference mode, whose changes nothing tells, keeps its weights.
    """
    state = weights_version(model)
    if state is None or model.handed_over:
        return
    *others, last = layouts
    for layout in others:
        packed = packed_model(model, dtype, layout)
        packed.prepare(model, screened=screened)
    kept = _packed.setdefault(model, {})
    kept.pop((dtype, last), None)
    kept[dtype, last] = state, NativeModel(model, dtype, last, screened=screened, take=True)


def native_config(config: ModelConfig, dtype: str, layout: str) -> native.ConfigStruct:
    """The architecture for the library."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_positions")
    return native.ConfigStruct(
        **{name: getattr(config, name) for name in sizes},
        embed_size=config.embed_width,
        position_offset=config.position_offset,
        dtype=native.DTYPE_CODES[dtype],
        activation=ACTIVATION_CODES[config.activation],
        gated=config.gated,
        rms=config.norm == "rmsnorm",
        pre_norm=config.pre_norm,
        final_norm=config.final_norm,
        rope=config.positions == "rope",
        tied_head=config.tied_head,
        layout=native.LAYOUTS[layout],
        norm_eps=config.norm_eps,
        activation_threshold=config.activation_threshold,
        rotary_factor=1.0 if config.rope is None else config.rope.attention_factor,
        attention_scale=config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
    )


def _parts(model: Transformer, dtype: str, *, take: bool) -> Iterator[tuple[int, int, MatrixView]]:
    """(part, layer, values) of everything that the model has. take: let go what was yielded before."""
    view = _reusing(functools.partial(matrix_view, dtype))
    size = model.config.hidden_size
    yield native.EMBED, -1, matrix_view(dtype, model.embed.matrix)
    for part, module in ((native.PROJECT_IN, model.project_in), (native.PROJECT_OUT, model.project_out), (native.HEAD, model.head)):
        if module is not None:
            yield part, -1, matrix_view(dtype, module.matrix)
    if model.position is not None:
        yield native.POSITION, -1, MatrixView(wide(model.position.matrix))
    if model.inv_freq is not None:
        yield native.INV_FREQ, -1, MatrixView(model.inv_freq)
    if model.final_norm is not None:
        yield native.FINAL_NORM, -1, _norm(model.final_norm, size)
    if take:
        model.hand_over(*(child for child in model.children() if isinstance(child, Held)))
    for index, block in enumerate(model.blocks):
        yield native.NORM1, index, _norm(block.norm1, size)
        assert block.norm2 is not None, "see Capabilities.check_architecture"
        yield native.NORM2, index, _norm(block.norm2, size)
        for part, norm in ((native.QUERY_NORM, block.q_norm), (native.KEY_NORM, block.k_norm)):
            if norm is not None:
                yield part, index, _norm(norm, model.config.head_dim)
        linear: tuple[tuple[int, Rows | Linear | InputMajorLinear | None], ...] = (
            *((native.QUERY, block.q), (native.KEY, block.k), (native.VALUE, block.v), (native.OUTPUT, block.o)),
            *((native.GATE, block.gate), (native.UP, block.up), (native.DOWN, block.down)),
        )
        for part, module in linear:
            if module is not None:
                yield part, index, view(part, module.matrix, module.bias)
        if take:
            model.hand_over(block)


def _reusing(view: Callable[[Matrix, Tensor | None], MatrixView]) -> Callable[..., MatrixView]:
    """`view` of a part's matrix and bias, made once where layers share them (bench/models/random.py) and not for each of them."""
    last: dict[int, tuple[tuple[int, int], MatrixView]] = {}

    def reuse(part: int, matrix: Matrix, bias: Tensor | None = None) -> MatrixView:
        values = matrix if isinstance(matrix, Tensor) else matrix.values
        key = (values.data_ptr(), 0 if bias is None else bias.data_ptr())
        if part not in last or last[part][0] != key:
            last[part] = key, view(matrix, bias)
        return last[part][1]

    return reuse


def _norm(norm: Norm, size: int) -> MatrixView:
    return MatrixView(torch.ones(size) if norm.weight is None else norm.weight, norm.bias)
