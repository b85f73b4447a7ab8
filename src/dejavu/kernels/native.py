"""The library of the native CPU engine: where it lies, its C interface, and how many threads it should use.

In: nothing. Out: `library()`, a ctypes library with every function of native/dejavu_native.h declared, and the structures
that they take. The library comes with an installed package; from a source tree `make native` builds it into build/native.
Where it is missing, everything else works, and `missing_reason()` says why.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import dejavu.kernels

ABI_VERSION = 9  # DEJAVU_ABI_VERSION: what the layouts of structures do not show
FILE_NAME = "dejavu_native.so"
OK, BAD_VALUE, NO_MEMORY, NOT_FINITE, INTERNAL = range(5)
DTYPES = (
    *("fp32", "int8", "bf16", "int4", "fp16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"),
    *("w4_fp16", "w4_bf16", "w8_fp16", "w8_bf16"),
)
DTYPE_CODES = {name: code for code, name in enumerate(DTYPES)}  # dejavu_dtype
EMBED, POSITION, PROJECT_IN, PROJECT_OUT, HEAD, FINAL_NORM, INV_FREQ, NORM1, NORM2, QUERY, KEY, VALUE, OUTPUT = range(13)
QUERY_NORM, KEY_NORM, ATTENTION_NORM, MLP_NORM, LOCAL_INV_FREQ = range(13, 18)
MLP, HEADS = range(2)
LAYOUTS = {"by-neuron": 0, "gate-apart": 1, "input-major": 2}  # dejavu_layout
HEAD_PAD = 16  # a head takes a multiple of this many values in the cache
MAX_ROWS = 32  # tokens that the library computes together


class ConfigStruct(Structure):
    """dejavu_config."""

    _fields_ = (
        *((name, c_int64) for name in ("vocab_size", "hidden_size", "embed_size", "intermediate_size", "num_layers", "num_heads")),
        *((name, c_int64) for name in ("num_kv_heads", "head_dim", "max_positions", "position_offset")),
        *((name, c_int32) for name in ("activation", "gated", "rms", "pre_norm", "parallel", "final_norm")),
        *((name, c_int32) for name in ("rope", "tied_head", "layout", "threads")),
        ("norm_eps", c_float),
        *((name, c_float) for name in ("activation_threshold", "rotary_factor", "local_rotary_factor", "attention_scale")),
        *((name, c_float) for name in ("embed_scale", "residual_scale", "logit_scale", "attention_cap", "logit_cap")),
    )


class MatrixStruct(Structure):
    """dejavu_matrix: addresses of data that live at least as long as the call."""

    _fields_ = (
        *((name, c_void_p) for name in ("data", "scale", "bias", "order")),
        *((name, c_int64) for name in ("rows", "columns")),
        *((name, c_int32) for name in ("dtype", "transposed")),
    )


class BlockStruct(Structure):
    """dejavu_block."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "first_logits", "num_pages", "page_size", "head_stride")),
        *((name, c_void_p) for name in ("token", "position", "table", "k_pool", "v_pool", "k_scale", "v_scale")),
        ("cache_dtype", c_int32),
        ("sparse", c_int32),
        ("prompt", c_int32),
        ("full_head", c_int32),
        *(
            (name, c_void_p)
            for name in ("logits", "neurons", "heads", "neuron_mask", "group_mask", "inputs", "input_mask", "unions", "in_order")
        ),
    )


OPS = ("predictor", "attention", "mlp", "head", "other")  # dejavu_op


class ProfileStruct(Structure):
    """dejavu_profile."""

    _fields_ = (("seconds", c_double * len(OPS)), *((name, c_void_p) for name in ("fired", "groups", "inputs")))


STRUCTURES = (ConfigStruct, MatrixStruct, BlockStruct, ProfileStruct)
# Kinds of dejavu_layouts.
_KINDS: dict[type, str] = {c_int64: "i", c_int32: "i", c_float: "f", c_double: "f", c_double * len(OPS): "f", c_void_p: "p"}

_SIGNATURES = {
    "dejavu_error": (c_char_p, ()),
    "dejavu_instruction_sets": (c_char_p, ()),
    "dejavu_model_new": (c_int, (POINTER(ConfigStruct), POINTER(c_void_p))),
    "dejavu_model_set": (c_int, (c_void_p, c_int, c_int64, POINTER(MatrixStruct))),
    "dejavu_model_set_mlp": (c_int, (c_void_p, c_int64, *(POINTER(MatrixStruct),) * 3)),
    "dejavu_model_window": (c_int, (c_void_p, c_int64, c_int64)),
    "dejavu_model_free": (None, (c_void_p,)),
    "dejavu_engine_new": (c_int, (c_void_p, c_int, c_int64, c_char_p, POINTER(c_void_p))),
    "dejavu_engine_predictor": (c_int, (c_void_p, c_int64, c_int, POINTER(MatrixStruct), POINTER(MatrixStruct), c_float, c_int)),
    "dejavu_engine_gate": (c_int, (c_void_p, c_int64, c_float)),
    "dejavu_engine_inputs": (c_int, (c_void_p, c_int64, c_int, c_void_p, c_int64, c_float)),
    "dejavu_engine_screen": (c_int, (c_void_p, POINTER(MatrixStruct), c_void_p, c_void_p, c_float)),
    "dejavu_engine_run": (c_int, (c_void_p, POINTER(BlockStruct))),
    "dejavu_engine_profile": (c_int, (c_void_p, POINTER(BlockStruct), POINTER(ProfileStruct))),
    "dejavu_engine_read": (c_int, (c_void_p, c_void_p, c_int64, POINTER(c_double))),
    "dejavu_engine_free": (None, (c_void_p,)),
}


def library_folders() -> list[Path]:
    """Where the library may lie: next to this package's files, wherever they are installed, then a source tree's build folder."""
    packaged = [Path(folder) for folder in dejavu.kernels.__path__]
    return [*packaged, Path(__file__).resolve().parents[3] / "build" / "native"]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    found = [folder / FILE_NAME for folder in library_folders() if (folder / FILE_NAME).is_file()]
    if not found:
        return None, "its library was not built: install dejavu where a C++ compiler (g++ or clang++) is found, or run `make native`"
    try:
        loaded = ctypes.CDLL(str(found[0]))
        difference = _difference(loaded)
        if difference is not None:  # it may lack a function, too
            return None, f"its library {found[0].name} is of another version of dejavu ({difference}): build it again"
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"its library {found[0].name} cannot be loaded: {error}"
    return loaded, None


def _difference(loaded: ctypes.CDLL) -> str | None:
    """Where the library's interface is not the one that this file declares; None where they agree. The version comes first:
    an older library may lack a function.
    """
    version = loaded.dejavu_abi_version()
    if version != ABI_VERSION:
        return f"interface {version}, not {ABI_VERSION}"
    loaded.dejavu_layouts.restype = c_char_p
    theirs = loaded.dejavu_layouts().decode().splitlines()
    return next((f"another layout of {ours.split()[0]}" for ours in map(_layout, STRUCTURES) if ours not in theirs), None)


def c_name(structure: type[Structure]) -> str:
    """What the header calls it: dejavu_block for BlockStruct."""
    return f"dejavu_{structure.__name__.removesuffix('Struct').lower()}"


def _layout(structure: type[Structure]) -> str:
    """A line of dejavu_layouts, for the structure as ctypes lays it out."""
    fields = [(name, kind, getattr(structure, name)) for name, kind, *_ in structure._fields_]
    described = [f"{name}:{_KINDS[kind]}{field.size}@{field.offset}" for name, kind, field in fields]
    return " ".join([c_name(structure), *described, f"size:{ctypes.sizeof(structure)}"])


def missing_reason() -> str | None:
    """Why there is no library; None where there is one."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """The library. Raises ValueError with the reason where there is none."""
    loaded, reason = _load()
    if loaded is None:
        raise ValueError(f"the native engine is missing: {reason}")
    return loaded


def instruction_sets() -> list[str]:
    """What the library can use on this machine, best first."""
    return library().dejavu_instruction_sets().decode().split()


def check(status: int) -> None:
    """Raise what a status of the library stands for: ValueError, MemoryError, or RuntimeError for a fault of ours."""
    if status == OK:
        return
    message = library().dejavu_error().decode(errors="replace")
    if status == NO_MEMORY:
        raise MemoryError(message)
    if status in (BAD_VALUE, NOT_FINITE):
        raise ValueError(message)
    raise RuntimeError(f"native engine: {message}")
