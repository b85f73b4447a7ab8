"""What a model takes in memory, before it is there: so that what does not fit is refused, and what fits is told.

In: how many values of which type it has, its architecture, a backend and dtypes. Out: bytes

    weights = sum over types of (values x bytes of one, scales included), in the dtype that they are held in
    cache   = tokens x layers x 2 x key/value heads x head_dim x bytes of one       (int8: 4 bytes more for each vector)

and how many tokens the free memory has room for. RUNTIME is what the process itself takes (Python, PyTorch), and what a pass computes in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dejavu.config import ModelConfig
from dejavu.kernels.memory import available_bytes, free_gpu_bytes
from dejavu.kernels.native import DTYPE_CODES, HEAD_PAD
from dejavu.kernels.quantized import VALUE_BYTES, bytes_of_value

RUNTIME = 400 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """weights: bytes. per_token: of the cache, bytes of one token of one sequence."""

    weights: int
    per_token: int

    def tokens(self, free: int) -> int:
        """How many tokens of keys and values there is room for beside the weights."""
        return max(0, (free - self.weights - RUNTIME) // self.per_token)


def footprint(sizes: Mapping[str, int], config: ModelConfig, *, backend: str, dtype: str, cache_dtype: str) -> Footprint:
    """Of a model whose matrices are held in `dtype`, or, where it is none of ours, as they are stored."""
    sizes = native_sizes(sizes) if backend == "native" and dtype == "stored" else sizes
    return Footprint(weights=weight_bytes(sizes, dtype), per_token=cache_bytes(config, backend=backend, cache_dtype=cache_dtype))


def native_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Values of each type as the native engine holds a stored model: fp16 in the place of types that it has no kernels for."""
    found = {kind: count for kind, count in sizes.items() if kind in DTYPE_CODES}
    others = sum(sizes.values()) - sum(found.values())
    return found | {"fp16": found.get("fp16", 0) + others} if others else found


def weight_bytes(sizes: Mapping[str, int], dtype: str) -> int:
    """Bytes of so many values of each type, in `dtype`; stored: each type as it is."""
    return round(sum(count * bytes_of_value(kind if dtype == "stored" else dtype) for kind, count in sizes.items()))


def cache_bytes(config: ModelConfig, *, backend: str, cache_dtype: str) -> int:
    """Bytes that the keys and values of one token take."""
    head = -(-config.head_dim // HEAD_PAD) * HEAD_PAD if backend == "native" else config.head_dim
    vector = head * VALUE_BYTES[cache_dtype] + (4 if cache_dtype == "int8" else 0)
    return round(2 * config.num_layers * config.num_kv_heads * vector)


def free_bytes(backend: str) -> int | None:
    """Memory that a model of this backend may take; None where nothing says."""
    return free_gpu_bytes("cuda") if backend == "cuda" and torch.cuda.is_available() else available_bytes(Path("/"))


def check_fits(name: str, sizes: Mapping[str, int], *, dtypes: Sequence[str], dtype: str, free: int | None) -> None:
    """Raise ValueError where the weights do not fit into so many free bytes (None: not known), with the dtypes that do. dtypes: of the
    backend."""
    needed = weight_bytes(sizes, dtype) + RUNTIME
    if free is None or needed <= free:
        return
    smaller = [each for each in dtypes if weight_bytes(sizes, each) + RUNTIME <= free]
    ways = f"take --dtype {' or '.join(smaller)}" if smaller else f"take a smaller model{', or a file of fewer bits' * (dtype == 'stored')}"
    held = "as it is stored" if dtype == "stored" else f"in {dtype}"
    raise ValueError(f"{name} {held} takes about {_words(needed)} of memory and {_words(free)} are free; {ways}")


def check_cache_fits(tokens: int, per_token: int, free: int | None) -> None:
    """Raise MemoryError where keys and values of so many tokens do not fit into so many free bytes (None: not known)."""
    if free is not None and tokens * per_token > free:
        raise MemoryError(
            f"the key/value cache of {tokens:,} tokens does not fit into memory: it takes {_words(tokens * per_token)}, and "
            f"{_words(free)} are free, room for {free // per_token:,} tokens; give it fewer tokens"
        )


def _words(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
