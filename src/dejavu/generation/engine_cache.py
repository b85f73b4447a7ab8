"""A cache of engines that no generation uses: making one takes time (on a GPU kernels are compiled and graphs captured).

In: a model, an adapter and EngineOptions. Out: an engine of one slot that nobody else has, and what gives it back. An
engine in use is not in here: a second text at the same time gets one of its own, and one that is never given back is simply gone.
The layers of the adapter that was used last are kept, too: merging changed weights takes time and memory.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch

from dejavu.engine.backends import make_engine
from dejavu.engine.interface import Engine
from dejavu.engine.options import EngineOptions
from dejavu.model.adapter import Adapter
from dejavu.model.lora import adapted_model
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import Transformer
from dejavu.model.versions import weights_version

KEPT = 2  # dense and sparse
SMALLEST = 128  # tokens of the smallest key/value cache


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """state: of the weights that the engine was made of. adapter: kept, so that no other object gets its identity."""

    engine: Engine
    adapter: Adapter | None
    state: Hashable


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layers:
    """What `attached` gave for an adapter, and the model that runs with it. state: of the weights that it was made of."""

    adapter: Adapter
    dtype: str | None
    state: Hashable
    layers: tuple[LayerAdapter, ...]
    model: Transformer


class EngineCache:
    """At most KEPT engines, the last ones used. One whose weights were replaced or changed in place is not used again.

    See model/versions.py. A copy has no engines.
    """

    def __init__(self) -> None:
        # The garbage collector may end a text, in the middle of anything that this thread does, and its engine comes back then. So the
        # thread that has the lock may take it again, and finds other entries after any line.
        self._lock = threading.RLock()
        self._entries: dict[Hashable, _Entry] = {}
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
            found = self._entries.pop(key, None)
        if found is not None and found.engine.info.cache_tokens >= tokens:
            engine, state = found.engine, found.state
        else:
            found = None  # its memory goes before another takes some
            room = min(max(SMALLEST, 1 << (tokens - 1).bit_length()), model.config.max_positions)
            with torch.inference_mode(False), torch.no_grad():  # also for a caller outside of the mode that this one may be in
                attached, layers = self.attached(model, adapter, dtype=options.dtype)
                engine = make_engine(attached, layers, replace(options, cache_tokens=room))
            state = weights_version(model, adapter)

        # What is collected together with the text that it wrote has let its memory go before that text ends.
        whole = weakref.finalize(engine, lambda: None)

        def give_back() -> None:
            if whole.detach() is None or state is None or state != weights_version(model, adapter):
                return
            with self._lock:
                self._entries[key] = _Entry(engine=engine, adapter=adapter, state=state)
                while len(self._entries) > KEPT:
                    self._entries.pop(next(iter(self._entries)), None)

        return engine, give_back

    def _drop_stale(self, model: Transformer) -> None:
        for key, entry in self._entries.copy().items():
            if entry.state != weights_version(model, entry.adapter):
                self._entries.pop(key, None)

    def attached(
        self, model: Transformer, adapter: Adapter | None, *, dtype: str | None
    ) -> tuple[Transformer, tuple[LayerAdapter, ...] | None]:
        """The model that runs with an adapter, and `adapter.attached(model, dtype=dtype)`, made anew only for another adapter, or where
        weights have changed. Without an adapter the model alone."""
        if adapter is None:
            return model, None
        held, state = self._layers, weights_version(model, adapter)
        if held is None or state is None or held.adapter is not adapter or (held.dtype, held.state) != (dtype, state):
            self._layers = held = None  # its memory goes before another takes some
            with torch.inference_mode(False):
                layers = adapter.attached(model, dtype=dtype)
                held = _Layers(adapter=adapter, dtype=dtype, state=state, layers=layers, model=adapted_model(model, layers))
            self._layers = held
        return held.model, held.layers

    def __reduce__(self) -> tuple[type[EngineCache], tuple[()]]:
        return EngineCache, ()

    def clear(self) -> None:
        """Let all of them go, and their memory."""
        with self._lock:
            self._entries.clear()
        self._layers = None
