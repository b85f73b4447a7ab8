"""Formats of numbers by the names that users write, and torch's types for them."""

from __future__ import annotations

import torch

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64, "int8": torch.int8}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
