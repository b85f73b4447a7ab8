"""A model's weights as the native library packs them, made once for each model and dtype.

In: a Transformer on the CPU, fp32 or quantised. Out: a handle of the library. fp32 takes the values as they are, fp16 and bf16 round
them; int8 and int4 quantise every matrix per row and per group of a row (kernels/quantize.py), and take what is stored so as it is.
stored takes each matrix in the grid that it is held in, blocks of GGUF as they lie in the file; those of a type that the library does not
compute with become fp16. Norms, biases and the position table stay fp32.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dejavu.config import ModelConfig, require
from dejavu.engine.native.capabilities import NATIVE
from dejavu.kernels import native
from dejavu.kernels.activation import ACTIVATION_CODES
from dejavu.kernels.memory import give_back_pages, take_pages
from dejavu.kernels.processors import default_threads
from dejavu.kernels.quantized import Matrix, QuantizedMatrix, rounded_to, wide
from dejavu.model.grids import grid_of, grids_of
from dejavu.model.layers import Held, InputMajorLinear, Norm, Rows
from dejavu.model.selectors import column_norms
from dejavu.model.transformer import Block, Transformer
from dejavu.model.versions import weights_version


class MatrixView:
    """A `native.MatrixStruct` and the tensors that it points into."""

    def __init__(self, matrix: Matrix, bias: Tensor | None = None) -> None:
        """matrix: in a grid that the library knows, or fp32, [rows, columns] or one row."""
        held = matrix if isinstance(matrix, QuantizedMatrix) else None
        values = matrix if isinstance(matrix, Tensor) else matrix.values
        scales, order = (None, None) if held is None else (held.scales, held.order)
        self.tensors = [None if tensor is None else tensor.detach().contiguous() for tensor in (values, scales, bias, order)]
        data, scale, biases, stored_rows = (None if tensor is None else tensor.data_ptr() for tensor in self.tensors)
        rows = 1 if values.dim() == 1 else len(values) if order is None else len(order)
        columns = values.shape[-1] if held is None else held.columns
        dtype, transposed = ("fp32", False) if held is None else (held.grid, held.transposed)
        self.matrix = native.MatrixStruct(data, scale, biases, stored_rows, rows, columns, native.DTYPE_CODES[dtype], transposed)

    def take(self) -> None:
        """Have the pages of a file that the values are read from."""
        for tensor in self.tensors[:2]:
            if tensor is not None:
                take_pages(tensor)

    def let_go(self) -> None:
        """Give back the pages of a file that the values were read from."""
        for tensor in self.tensors[:2]:
            if tensor is not None:
                give_back_pages(tensor)


def matrix_view(dtype: str, matrix: Matrix, bias: Tensor | None = None) -> MatrixView:
    """The matrix as that dtype stores it: what is stored so already as it is."""
    return MatrixView(_in_dtype(matrix.detach() if isinstance(matrix, Tensor) else matrix, dtype), bias)


def _in_dtype(matrix: Matrix, dtype: str) -> Matrix:
    if isinstance(matrix, Tensor):
        return rounded_to(matrix, dtype)
    if dtype == "stored":
        return matrix if _is_known(matrix) else _in_dtype(matrix, "fp16")
    if dtype == "fp32":
        return matrix.dequantize()
    return rounded_to(matrix, dtype)


def _is_known(matrix: QuantizedMatrix) -> bool:
    """Whether the library computes with it as it is stored. Rows of int8 and int4 have to be those that it reads."""
    return matrix.grid in native.DTYPE_CODES and not (matrix.transposed and matrix.grid in ("int8", "int4"))


def _stored_grid(matrix: Matrix) -> str:
    return grid_of(matrix) if isinstance(matrix, Tensor) or _is_known(matrix) else "fp16"


def predictor_view(matrix: Matrix, bias: Tensor | None = None) -> MatrixView:
    """A predictor's matrix int8, as every stored adapter's is, or fp32."""
    if isinstance(matrix, QuantizedMatrix):
        return MatrixView(matrix.to(torch.device("cpu")), bias)
    return MatrixView(matrix.detach().float().cpu(), bias)


class NativeModel:
    """A packed model, which stands alone once it is made. Freed with the last engine that uses it.

    take: whether the model is the caller's to give away: its matrices are let go one by one as they are packed. grids: of its
    matrices, where they are packed as they are stored; else None.
    """

    def __init__(self, model: Transformer, dtype: str, layout: str = "by-neuron", *, take: bool = False) -> None:
        model.require_weights()
        require(dtype in NATIVE.dtypes, f"dtype {dtype!r} is not available on backend 'native'; choose one of {', '.join(NATIVE.dtypes)}")
        require(
            model.dtype == torch.float32 and model.device.type == "cpu",
            f"the native engine needs a model loaded as fp32 on the cpu, not {model.dtype} on {model.device}",
        )
        NATIVE.check_architecture(model.config)
        self.dtype, self.layout = dtype, layout
        self.grids = grids_of(model, _stored_grid) if dtype == "stored" else None
        self.handle = ctypes.c_void_p()
        self._library = native.library()
        native.check(self._library.dejavu_model_new(native_config(model.config, layout), ctypes.byref(self.handle)))
        self._finalizer = weakref.finalize(self, self._library.dejavu_model_free, self.handle)
        self._norms: dict[int, dict[str, Tensor]] = {}
        if take:
            self.prepare(model)
        for layer in model.config.windowed:
            native.check(self._library.dejavu_model_window(self.handle, layer, model.config.window))
        for part, layer, views in _parts(model, dtype, take=take):
            self._set(part, layer, views)

    def _set(self, part: int | None, layer: int, views: Sequence[MatrixView | None]) -> None:
        """One part, or (None) the MLP of a layer: its gate, where there is one, up and down."""
        matrices = [None if view is None else view.matrix for view in views]
        for view in views:
            if view is not None:
                view.take()
        if part is None:
            native.check(self._library.dejavu_model_set_mlp(self.handle, layer, *matrices))
        else:
            native.check(self._library.dejavu_model_set(self.handle, part, layer, *matrices))
        for view in views:
            if view is not None:
                view.let_go()

    def prepare(self, model: Transformer) -> None:
        """Work out what engines need besides, while there are weights to work it out from."""
        for index, block in enumerate(model.blocks if self.layout == "input-major" else ()):
            self.column_norms(index, block)

    def column_norms(self, index: int, block: Block) -> dict[str, Tensor]:
        """Those of a layer (model/selectors/inputs.py), worked out once."""
        if index not in self._norms:
            self._norms[index] = column_norms(block)
        return self._norms[index]


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


def hand_over(model: Transformer, dtype: str, layouts: Sequence[str]) -> None:
    """Pack the model in these layouts and let its own weights go meanwhile: from then on there are only these packed forms of it.

    A model of inference mode, whose changes nothing tells, keeps its weights.
    """
    state = weights_version(model)
    if state is None or model.handed_over:
        return
    *others, last = layouts
    for layout in others:
        packed = packed_model(model, dtype, layout)
        packed.prepare(model)
    kept = _packed.setdefault(model, {})
    kept.pop((dtype, last), None)
    kept[dtype, last] = state, NativeModel(model, dtype, last, take=True)


def native_config(config: ModelConfig, layout: str) -> native.ConfigStruct:
    """The architecture for the library."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_positions")
    return native.ConfigStruct(
        **{name: getattr(config, name) for name in sizes},
        embed_size=config.embed_width,
        position_offset=config.position_offset,
        activation=ACTIVATION_CODES[config.activation],
        gated=config.gated,
        rms=config.norm == "rmsnorm",
        pre_norm=config.pre_norm,
        parallel=config.parallel,
        final_norm=config.final_norm,
        rope=config.positions == "rope",
        tied_head=config.tied_head,
        layout=native.LAYOUTS[layout],
        threads=default_threads(),
        norm_eps=config.norm_eps,
        activation_threshold=config.activation_threshold,
        rotary_factor=1.0 if config.rope is None else config.rope.attention_factor,
        local_rotary_factor=1.0 if config.local_rope is None else config.local_rope.attention_factor,
        attention_scale=config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
        embed_scale=config.embed_scale,
        residual_scale=config.residual_scale,
        logit_scale=config.logit_scale,
        attention_cap=config.attention_cap,
        logit_cap=config.logit_cap,
    )


def _parts(model: Transformer, dtype: str, *, take: bool) -> Iterator[tuple[int | None, int, tuple[MatrixView | None, ...]]]:
    """(part, layer, values) of everything that the model has, as `NativeModel._set` takes them. take: let go what was yielded before."""
    view = functools.partial(matrix_view, dtype)
    reused = _reusing(view) if _share(model.blocks) else lambda part, matrix, bias: view(matrix, bias)
    size = model.config.hidden_size
    yield native.EMBED, -1, (matrix_view(dtype, model.embed.matrix),)
    for part, module in ((native.PROJECT_IN, model.project_in), (native.PROJECT_OUT, model.project_out), (native.HEAD, model.head)):
        if module is not None:
            yield part, -1, (matrix_view(dtype, module.matrix),)
    if model.position is not None:
        yield native.POSITION, -1, (MatrixView(wide(model.position.matrix)),)
    for part, inv_freq in ((native.INV_FREQ, model.inv_freq), (native.LOCAL_INV_FREQ, model.local_inv_freq)):
        if inv_freq is not None:
            yield part, -1, (MatrixView(inv_freq),)
    if model.final_norm is not None:
        yield native.FINAL_NORM, -1, (_norm(model.final_norm, size),)
    if take:
        model.hand_over(*(child for child in model.children() if isinstance(child, Held)))
    for index, block in enumerate(model.blocks):
        yield native.NORM1, index, (_norm(block.norm1, size),)
        yield native.NORM2, index, (_norm(block.norm2 or block.norm1, size),)
        for part, norm, width in (
            (native.QUERY_NORM, block.q_norm, model.config.head_dim),
            (native.KEY_NORM, block.k_norm, model.config.head_dim),
            (native.ATTENTION_NORM, block.norm1_out, size),
            (native.MLP_NORM, block.norm2_out, size),
        ):
            if norm is not None:
                yield part, index, (_norm(norm, width),)
        attention: tuple[tuple[int, Rows | InputMajorLinear], ...] = (
            *((native.QUERY, block.q), (native.KEY, block.k), (native.VALUE, block.v), (native.OUTPUT, block.o)),
        )
        for part, module in attention:
            yield part, index, (reused(str(part), module.matrix, module.bias),)
        mlp = {"gate": block.gate, "up": block.up, "down": block.down}
        yield None, index, tuple(None if module is None else reused(name, module.matrix, module.bias) for name, module in mlp.items())
        if take:
            model.hand_over(block)


def _share(blocks: Sequence[Block]) -> bool:
    """Whether the first layers have the same weights (bench/models/random.py)."""
    first, second = (_address(block.up.matrix) for block in (blocks[0], blocks[min(1, len(blocks) - 1)]))
    return len(blocks) > 1 and first == second


def _address(matrix: Matrix) -> tuple[int, ...]:
    tensors = (matrix,) if isinstance(matrix, Tensor) else (matrix.values, matrix.order)
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _reusing(view: Callable[[Matrix, Tensor | None], MatrixView]) -> Callable[..., MatrixView]:
    """`view` of a part's matrix and bias, made once where layers share them and not for each of them."""
    last: dict[str, tuple[tuple[int, ...], MatrixView]] = {}

    def reuse(part: str, matrix: Matrix, bias: Tensor | None = None) -> MatrixView:
        key = *_address(matrix), 0 if bias is None else bias.data_ptr()
        if part not in last or last[part][0] != key:
            last[part] = key, view(matrix, bias)
        return last[part][1]

    return reuse


def _norm(norm: Norm, size: int) -> MatrixView:
    return MatrixView(torch.ones(size) if norm.weight is None else norm.weight, norm.bias)
