"""Which backends this machine offers, and the engine of the one that was picked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dejavu.config import BACKENDS
from dejavu.engine.interface import Engine
from dejavu.engine.torch_engine import TorchEngine
from dejavu.model.predictor import LayerAdapter
from dejavu.model.transformer import Transformer


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
        BackendStatus(name="native", reason="this version of dejavu has no native engine"),
        BackendStatus(name="cuda", reason="this version of dejavu has no cuda engine"),
        BackendStatus(name="torch"),
    )


def pick_backend(name: str = "auto") -> str:
    """The backend to use for a value of --backend. Raises ValueError naming the reason and what is available."""
    statuses = {status.name: status for status in backends()}
    available = [status.name for status in statuses.values() if status.available]
    if name == "auto":
        return available[0]
    if name not in statuses:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    reason = statuses[name].reason
    if reason is not None:
        raise ValueError(f"backend {name!r} is not available: {reason}; available: {', '.join(available)} (or auto)")
    return name


def make_engine(
    model: Transformer,
    layers: Sequence[LayerAdapter] | None = None,
    *,
    backend: str = "auto",
    num_slots: int = 1,
    cache_tokens: int | None = None,
    record: bool = False,
) -> Engine:
    """An engine over the model, dense without `layers`; see TorchEngine for the arguments. Its `info.backend` says which it is."""
    picked = pick_backend(backend)
    assert picked == "torch", f"{picked=} has no engine"
    return TorchEngine(model, layers, num_slots=num_slots, cache_tokens=cache_tokens, record=record)
