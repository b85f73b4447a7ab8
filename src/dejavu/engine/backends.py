"""Which backends this machine offers, and the engine of the one that was picked."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dejavu.config import BACKENDS, require
from dejavu.engine.interface import Engine
from dejavu.engine.native.engine import NativeEngine, check_shortlist
from dejavu.engine.native.weights import NATIVE_CACHE_DTYPES, NATIVE_DTYPES, default_cache_dtype
from dejavu.engine.torch_engine import TorchEngine
from dejavu.kernels.dtypes import DTYPE_NAMES
from dejavu.kernels.native import missing_reason
from dejavu.model.lora import adapted_model
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import Transformer

BACKEND_DTYPES = {"native": NATIVE_DTYPES, "cuda": ("fp32", "fp16", "bf16"), "torch": ("fp32", "fp16", "bf16", "fp64")}


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStatus:
    """A backend by name; `reason` says why it cannot be used, None where it can."""

    name: str
    reason: str | None = None

    @property
    def available(self) -> bool:
        return self.reason is None


def backends() -> tuple[BackendStatus, ...]:
    """Every backend, the one that `auto` prefers first."""
    return (
        BackendStatus(name="cuda", reason=_no_cuda()),
        BackendStatus(name="native", reason=missing_reason()),
        BackendStatus(name="torch"),
    )


def _no_cuda() -> str | None:
    """Why the cuda engine cannot run here; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (it comes with PyTorch for CUDA on Linux)"
    return None if torch.cuda.is_available() else "PyTorch sees no NVIDIA GPU"


def pick_backend(name: str = "auto", *, dtype: str = "fp32") -> str:
    """The backend to use for a value of --backend; `auto` takes the first that offers the dtype.

    Raises ValueError naming the reason and what is available.
    """
    statuses = {status.name: status for status in backends()}
    available = [status.name for status in statuses.values() if status.available]
    if name == "auto":
        fitting = [each for each in available if dtype in BACKEND_DTYPES[each]]
        return fitting[0] if fitting else available[0]
    if name not in statuses:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    reason = statuses[name].reason
    if reason is not None:
        raise ValueError(f"backend {name!r} is not available: {reason}; available: {', '.join(available)} (or auto)")
    return name


def pick_cache_dtype(name: str = "auto", *, backend: str, dtype: str) -> str:
    """The dtype of the key/value cache for a value of --cache-dtype, beside weights of `dtype`.

    auto: native takes fp32 beside fp32 weights, else fp16; torch has one dtype for all. Raises ValueError naming what is offered.
    """
    offered = NATIVE_CACHE_DTYPES if backend == "native" else (dtype,)
    if name == "auto":
        return default_cache_dtype(dtype) if backend == "native" else dtype
    require(
        name in offered,
        f"cache dtype {name!r} is not available on backend {backend!r} in {dtype}; choose one of auto, {', '.join(offered)}",
    )
    return name


def check_screen(count: int, *, backend: str, vocab_size: int) -> None:
    """Raise ValueError for a value of --screened-head that the backend or the vocabulary cannot have."""
    require(
        count == 0 or backend == "native", f"a screened head is not available on backend {backend!r}; leave --screened-head {count} out"
    )
    check_shortlist(count, vocab_size)


def make_engine(
    model: Transformer,
    layers: Sequence[LayerAdapter] | None = None,
    *,
    backend: str = "auto",
    num_slots: int = 1,
    cache_tokens: int | None = None,
    record: bool = False,
    dtype: str | None = None,
    cache_dtype: str | None = None,
    screened_head: int = 0,
    threads: int | None = None,
    ahead: str | None = None,
) -> Engine:
    """An engine over the model, dense without `layers`; see TorchEngine for the arguments. Its `info.backend` says which it is.

    backend: auto takes torch for an architecture that the kernels do not compute (ModelConfig.beyond).

    dtype: what to compute in, where the engine packs its own weights (native: fp32, bf16, int8, int4); None takes the model's.
    cache_dtype: see `pick_cache_dtype`. screened_head: see NativeEngine. threads: of the native engine (None: every processor
    that this process may use); torch has one number for the whole process. ahead: of the cuda engine, see CudaEngine.
    """
    model = model if layers is None else adapted_model(model, layers)
    weight = model.embed.weight
    stored = DTYPE_NAMES[weight.dtype]
    picked = pick_backend(backend, dtype=dtype or stored)
    if backend == "auto" and weight.device.type == "cuda":  # the model is where it is
        picked = pick_backend("cuda") if _no_cuda() is None else "torch"
    elif backend == "auto":  # what native packs is fp32 on the CPU
        native = stored == "fp32" and missing_reason() is None and (dtype or stored) in NATIVE_DTYPES
        picked = "native" if native else "torch"
    if backend == "auto" and model.config.beyond(picked):
        picked = "torch"
    require(ahead is None or picked == "cuda", f"a way of looking ahead is of backend 'cuda', not {picked!r}; leave --ahead out")
    if picked == "native":
        return NativeEngine(
            model,
            layers,
            num_slots=num_slots,
            cache_tokens=cache_tokens,
            record=record,
            dtype=dtype or stored,
            cache_dtype=cache_dtype,
            screened_head=screened_head,
            threads=threads,
        )
    require(
        dtype in (None, stored),
        f"dtype {dtype!r} is not available on backend {picked!r} for a model loaded as {stored}; load it as {dtype}",
    )
    pick_cache_dtype(cache_dtype or "auto", backend=picked, dtype=stored)
    check_screen(screened_head, backend=picked, vocab_size=model.config.vocab_size)
    if picked == "cuda":
        from dejavu.engine.cuda.engine import CudaEngine  # needs triton

        return CudaEngine(model, layers, num_slots=num_slots, cache_tokens=cache_tokens, record=record, ahead=ahead or "beside")
    assert picked == "torch", f"{picked=} has no engine"
    return TorchEngine(model, layers, num_slots=num_slots, cache_tokens=cache_tokens, record=record)
