"""Safetensors files without a copy in memory. In: a path. Out: tensors by name, views of the mapped file that nobody may write into.

Their pages come from the disk when they are read, and go where `give_back_pages` says so (kernels/memory.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from dejavu.files import whole_safetensors
from dejavu.kernels.memory import mapped_file

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def mapped_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, by name. Raises ValueError where it is missing, not whole, or has a tensor of an unknown type."""
    with whole_safetensors(path) as path:
        with safetensors.safe_open(path, framework="pt"):  # checks the header: offsets within the file, without gaps, sizes that fit
            pass
        data = mapped_file(path)
    size = int.from_bytes(bytes(data[:8].tolist()), "little")
    header, start = json.loads(bytes(data[8 : 8 + size].numpy())), 8 + size
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"tensor {name!r} in {path} is {entry['dtype']}; supported: {', '.join(SAFETENSORS_DTYPES)}")
        begin, end = (start + offset for offset in entry["data_offsets"])
        held = data[begin:end]
        held = held if begin % dtype.itemsize == 0 else held.clone()  # of a header that was not padded
        found[name] = held.view(dtype).view(entry["shape"])
    return found
