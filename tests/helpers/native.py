"""The native engine: which tests need its library, its instruction sets, and the models that it is held to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from dejavu.engine.native.engine import NativeEngine
from dejavu.engine.options import EngineOptions
from dejavu.kernels import native
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import Transformer
from helpers.engines import GEMMA, MODELS

MISSING = native.missing_reason()
DTYPES = ("fp32", "bf16", "int8", "int4")  # every kind of kernel; fp16, and what files store, have tests of their own
ISAS = native.instruction_sets() if MISSING is None else []
# How near an engine is to the same weights in fp32: what is left is how it rounds activations and cache.
NEARNESS = {"fp16": 2e-3, "bf16": 2e-3, "int8": 2e-3, "int4": 3e-2}
# Sizes that are no multiple of any vector, and the rest of the architecture's values.
NATIVE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **MODELS,
    "opt-odd": ("opt", {"hidden_size": 33, "num_heads": 3, "num_kv_heads": 3, "head_dim": 11, "intermediate_size": 67, "vocab_size": 97}),
    "opt-no-affine": ("opt", {"norm_affine": False, "tied_head": False, "num_layers": 3}),
    "llama-odd": ("llama", {"hidden_size": 50, "head_dim": 6, "intermediate_size": 129, "vocab_size": 101, "activation": "relu2"}),
    "llama-gelu": ("llama", {"activation": "gelu", "qkv_bias": True, "mlp_bias": True, "out_bias": True}),
    "llama-gelu-tanh": ("llama", {"activation": "gelu_tanh", "tied_head": True, "num_kv_heads": 1}),
    "llama-fatrelu": ("llama", {"activation": "fatrelu", "activation_threshold": 0.2}),
    "gemma": ("llama", GEMMA),
    "opt-one": ("opt", {"hidden_size": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 1, "intermediate_size": 1}),
}
needs_library = pytest.mark.skipif(MISSING is not None, reason=f"the native library is absent: {MISSING}")


def engine_of(model: Transformer, layers: Sequence[LayerAdapter] | None = None, **options: Any) -> NativeEngine:
    """options: of EngineOptions, and the instruction set."""
    isa = options.pop("instruction_set", None)
    values: dict[str, Any] = {"threads": 2, "page_size": 3, **options}
    return NativeEngine(model, layers, EngineOptions(**values), instruction_set=isa)


def rounded(model: Transformer, dtype: str = "int8") -> Transformer:
    """The model, every matrix but the position table rounded: what an engine of that dtype computes with."""
    return model.rounded(dtype).widened()
