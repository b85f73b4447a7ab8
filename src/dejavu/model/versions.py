"""Whether weights have changed since somebody made something of them: packed them, captured a graph, merged an adapter.

In: a model or an adapter. Out: a number, another one whenever a tensor of it was replaced or changed in place. What changes a tensor
behind PyTorch's back (`parameter.data`) is not seen.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Hashable, Iterable, Iterator
from typing import Protocol

from torch import Tensor


class Weighted(Protocol):
    """What has weights. handed_over: they were given away, see Transformer.hand_over; what was made of them stays valid."""

    @property
    def handed_over(self) -> bool: ...

    def tensors(self) -> Iterator[Tensor]: ...


_numbers = itertools.count()
_lock = threading.RLock()  # the garbage collector may ask in the middle of an answer
_known: weakref.WeakKeyDictionary[Weighted, tuple[Hashable, int]] = weakref.WeakKeyDictionary()


def weights_version(*owners: Weighted | None) -> tuple[int, ...] | None:
    """A number for each owner; None where a tensor does not count its changes (those of inference mode), and so may change unseen."""
    found = [_version(owner) for owner in owners if owner is not None]
    return None if None in found else tuple(number for number in found if number is not None)


@contextlib.contextmanager
def same_weights(owner: Weighted) -> Iterator[None]:
    """What is done within moves the owner's tensors to other memory, and changes no value: its number stays."""
    with _lock:
        number = _version(owner)
        yield
        if number is not None:
            _known[owner] = _state(owner.tensors()), number


def _version(owner: Weighted) -> int | None:
    with _lock:
        known = _known.get(owner)
        if owner.handed_over and known is not None:
            return known[1]
        tensors = list(owner.tensors())
        if any(tensor.is_inference() for tensor in tensors):
            return None
        state = _state(tensors)
        if known is None or known[0] != state:
            known = _known[owner] = state, next(_numbers)
        return known[1]


def _state(tensors: Iterable[Tensor]) -> Hashable:
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
