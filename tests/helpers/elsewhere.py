"""A second device on a machine that has only the CPU: code that mixes tensors of two devices fails on it as it does on a GPU.

`with elsewhere(): model.to(DEVICE)` gives a model whose tensors say that they are on DEVICE; what is computed with them is computed on
the CPU, with its bits. An operation of a tensor there and one of the CPU raises RuntimeError, as does reading one as a NumPy array. Single
numbers (no dimensions) may be of the CPU, as on a GPU. `Generator` of a device there is one of the CPU.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Generator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")  # a kind of device that any torch has
CPU = torch.device("cpu")
MOVES = ("aten::_to_copy", "aten::copy_")
INDEXES = ("aten::index", "aten::index_put_", "aten::_index_put_impl_")  # an index may be of the CPU


class _There(Tensor):
    """A tensor of DEVICE; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _There:
        with torch.inference_mode(False):  # a view of a parameter has to be an ordinary tensor
            made = Tensor._make_wrapper_subclass(
                cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=DEVICE
            )  # fmt: skip
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"There({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # pyrefly: ignore[bad-override]
        return _run(func, args, kwargs or {})


def _each(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same with its tensors changed: those of arguments and results, which lists and tuples hold."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)([_each(part, change) for part in value]) if type(value) in (list, tuple) else value


def _held(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, _There) else tensor


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[Tensor] = []
    _each([*args, *kwargs.values()], tensors.append)
    there = any(isinstance(tensor, _There) for tensor in tensors)
    name = func._schema.name
    if there and name not in MOVES:
        of_one = tensors[:1] if name in INDEXES else tensors
        if any(tensor.dim() > 0 and not isinstance(tensor, _There) for tensor in of_one):
            raise RuntimeError(f"{name}: tensors of {DEVICE} and of the CPU")
    asked = kwargs.get("device")
    named = {key: CPU if key == "device" else _each(value, _held) for key, value in kwargs.items()}
    found = func(*_each(args, _held), **named)
    if name == "aten::copy_" or (there and name.endswith("_") and isinstance(found, Tensor)):  # what is written into is what it was
        return args[0]
    return _each(found, _There) if (there if asked is None else torch.device(asked) == DEVICE) else found


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:  # made below what a dispatch mode sees
            device = kwargs.pop("device")
            return torch.tensor(*args, **kwargs).to(device)
        return func(*args, **kwargs)


@contextlib.contextmanager
def elsewhere() -> Generator[None]:
    """DEVICE exists meanwhile."""
    importlib.import_module("torch._dynamo")  # which dispatch modes import when first used: it annotates with the real Generator
    real = torch.Generator
    with mock.patch.object(torch, "Generator", lambda device="cpu": real()), _Functions(), _Dispatch():
        yield
