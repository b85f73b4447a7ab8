"""Engines between two generations: making one takes time (on a GPU kernels are compiled and graphs captured), so the next takes it over.

In: a model, an adapter and EngineOptions. Out: an engine of one slot that nobody else has, and what gives it back. An
engine in use is not in here: a second text at the same time gets one of its own, and one that is never given back is simply gone.
The layers of the adapter that was used last are kept, too: merging changed weights takes time and memory.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dejavu.engine.backends import make_engine
from dejavu.engine.interface import Engine
from dejavu.engine.options import EngineOptions
from dejavu.model.adapter import Adapter
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import Transformer

KEPT = 2  # dense and sparse
SMALLEST = 128  # tokens of the smallest key/value cache


@dataclass(frozen=True, slots=True, kw_only=True)
class _Idle:
    """state: of the weights that the engine was made of. adapter: kept, so that no other object gets its identity."""

    engine: Engine
    adapter: Adapter | None
    state: Hashable


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layers:
    """What `attached` gave for an adapter. state: of the weights that it was made of."""

    adapter: Adapter
    dtype: str | None
    state: Hashable
    layers: tuple[LayerAdapter, ...]


class IdleEngines:
    """At most KEPT engines, the last ones used. One whose weights were replaced or changed in place is not used again.

    What changes a weight behind PyTorch's back (`parameter.data`) is not seen. A copy has no engines.
    """

    def __init__(self) -> None:
        # The garbage collector may end a text, in the middle of anything that this thread does, and its engine comes back then. So the
        # thread that has the lock may take it again, and finds other entries after any line.
        self._lock = threading.RLock()
        self._idle: dict[Hashable, _Idle] = {}
        self._layers: _Layers | None = None

    def take(
        self, model: Transformer, adapter: Adapter | None, options: EngineOptions, *, tokens: int
    ) -> tuple[Engine, Callable[[], None]]:
        """An empty engine whose cache holds `tokens`, dense without an adapter, and a function that gives it back, empty again.

        The cache of a new one is larger, a power of two, so that longer and longer texts need few engines. options: but for the cache.
        """
        key = (id(adapter), options)
        with self._lock:
            self._drop_stale(model)
            found = self._idle.pop(key, None)
        if found is not None and found.engine.info.cache_tokens >= tokens:
            engine, state = found.engine, found.state
        else:
            found = None  # its memory goes before another takes some
            room = min(max(SMALLEST, 1 << (tokens - 1).bit_length()), model.config.max_positions)
            with torch.inference_mode(False), torch.no_grad():  # also for a caller outside of the mode that this one may be in
                layers = None if adapter is None else self.layers(model, adapter, dtype=options.dtype)
                engine = make_engine(model, layers, replace(options, cache_tokens=room))
            state = weights_state(model, adapter)  # an engine may lay the weights out anew

        # What is collected together with the text that it wrote has let its memory go before that text ends.
        whole = weakref.finalize(engine, lambda: None)

        def give_back() -> None:
            if whole.detach() is None or state is None or state != weights_state(model, adapter):
                return
            with self._lock:
                self._idle[key] = _Idle(engine=engine, adapter=adapter, state=state)
                while len(self._idle) > KEPT:
                    self._idle.pop(next(iter(self._idle)), None)

        return engine, give_back

    def _drop_stale(self, model: Transformer) -> None:
        for key, idle in self._idle.copy().items():
            if idle.state != weights_state(model, idle.adapter):
                self._idle.pop(key, None)

    def layers(self, model: Transformer, adapter: Adapter, *, dtype: str | None) -> tuple[LayerAdapter, ...]:
        """`adapter.attached(model, dtype=dtype)`, made anew only for another adapter, or where weights have changed."""
        held, state = self._layers, weights_state(model, adapter)
        if held is None or state is None or held.adapter is not adapter or (held.dtype, held.state) != (dtype, state):
            self._layers = held = None  # its memory goes before another takes some
            with torch.inference_mode(False):
                held = _Layers(adapter=adapter, dtype=dtype, state=state, layers=adapter.attached(model, dtype=dtype))
            self._layers = held
        return held.layers

    def __reduce__(self) -> tuple[type[IdleEngines], tuple[()]]:
        return IdleEngines, ()

    def clear(self) -> None:
        """Let all of them go, and their memory."""
        with self._lock:
            self._idle.clear()
        self._layers = None


def weights_state(model: Transformer, adapter: Adapter | None) -> Hashable:
    """Where the weights lie and how often each was changed in place; None where a tensor does not count its changes."""
    tensors = [*model.parameters(), *_tensors(adapter)]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)


def _tensors(adapter: Adapter | None) -> Iterator[Tensor]:
    for lora in () if adapter is None or adapter.lora is None else adapter.lora:
        yield from (factor for factors in lora.factors.values() for factor in factors)
        yield from lora.norms.values()
    for layer in () if adapter is None else adapter.layers:
        for selector in layer.selectors:
            yield from selector.tensors
