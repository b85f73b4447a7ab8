"""Which backends this machine offers, and the engine of the one that was picked."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dejavu.config import BACKENDS
from dejavu.engine.cuda.capabilities import CUDA
from dejavu.engine.interface import Engine
from dejavu.engine.native.capabilities import NATIVE
from dejavu.engine.native.engine import NativeEngine
from dejavu.engine.options import EngineOptions
from dejavu.engine.torch_engine import TORCH, TorchEngine
from dejavu.kernels.dtypes import DTYPE_NAMES
from dejavu.kernels.native import missing_reason
from dejavu.model.lora import adapted_model
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import Transformer

CAPABILITIES = {each.backend: each for each in (CUDA, NATIVE, TORCH)}


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
        fitting = [each for each in available if dtype in CAPABILITIES[each].dtypes]
        return fitting[0] if fitting else available[0]
    if name not in statuses:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    reason = statuses[name].reason
    if reason is not None:
        raise ValueError(f"backend {name!r} is not available: {reason}; available: {', '.join(available)} (or auto)")
    return name


def backend_for(model: Transformer, options: EngineOptions) -> str:
    """The backend for a model where it is, in the dtype that it is loaded in. auto takes torch for an architecture that the first choice
    does not compute. Raises ValueError as `pick_backend` does."""
    stored = DTYPE_NAMES[model.dtype]
    dtype = stored if options.dtype in ("auto", "stored") else options.dtype
    picked = pick_backend(options.backend, dtype=dtype)
    if options.backend != "auto":
        return picked
    if model.device.type == "cuda":  # the model is where it is
        picked = pick_backend("cuda") if _no_cuda() is None else "torch"
    else:  # what native packs is fp32 on the CPU
        picked = "native" if stored == "fp32" and missing_reason() is None and dtype in NATIVE.dtypes else "torch"
    return "torch" if CAPABILITIES[picked].beyond(model.config) else picked


def make_engine(model: Transformer, layers: Sequence[LayerAdapter] | None = None, options: EngineOptions = EngineOptions()) -> Engine:
    """An engine over the model, dense without `layers`. Its `info.backend` says which it is.

    Raises ValueError for a backend that is not there, and for what it does not compute or obey.
    """
    model = model if layers is None else adapted_model(model, layers)
    picked = backend_for(model, options)
    if picked == "native":
        return NativeEngine(model, layers, options)
    if picked == "cuda":
        from dejavu.engine.cuda.engine import CudaEngine  # needs triton

        return CudaEngine(model, layers, options)
    assert picked == "torch", f"{picked=} has no engine"
    return TorchEngine(model, layers, options)
