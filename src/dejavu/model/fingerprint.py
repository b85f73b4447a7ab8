"""The hash by which an adapter knows its base.

In: the architecture and every weight as stored on disk, dequantised to fp32, under our names and layout. Out: a hex string,

    SHA-256(architecture fields, then for each parameter by name: SHA-256(shape, up to 4096 of its values, bit for bit))

The values are at fixed positions spread over the tensor, so that the hash of a large model costs nothing and still
changes with any fine-tuning. Fields at their default are left out: a field added later leaves the hash of a model alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dejavu.config import Config, ModelConfig
from dejavu.kernels.quantized import AnyMatrix, QuantizedMatrix, wide
from dejavu.model.transformer import Transformer

SAMPLES = 4096
STRIDE = 2654435761  # a prime: i * STRIDE mod size visits distinct positions that favour no column
NOT_ARCHITECTURE = ("family", "bos_token_id", "eos_token_ids")


def tensor_digest(values: AnyMatrix) -> bytes:
    """Digest of one parameter in our layout, of its fp32 values: its shape and up to 4096 values at fixed positions."""
    size = math.prod(values.shape)
    position = torch.from_numpy(np.arange(min(SAMPLES, size), dtype=np.int64) * STRIDE % size).to(values.device)
    if isinstance(values, QuantizedMatrix):
        sampled = values.at(position // values.shape[1], position % values.shape[1])
    else:
        sampled = wide(values).detach().reshape(-1)[position]
    assert sampled.dtype == torch.float32, "the hash is taken of fp32 values"
    shape = ",".join(map(str, values.shape))
    return hashlib.sha256(shape.encode() + b";" + sampled.cpu().numpy().astype("<f4").tobytes()).digest()


def base_hash(config: ModelConfig, digests: Mapping[str, bytes]) -> str:
    """The hash of a model from its architecture and the digest of each parameter by our name."""
    fields = {name: value for name, value in _set_fields(config).items() if name not in NOT_ARCHITECTURE}
    text = json.dumps(fields, sort_keys=True, default=_set_fields)
    parameters = b"".join(name.encode() + b"=" + digests[name] for name in sorted(digests))
    return hashlib.sha256(text.encode() + b"\n" + parameters).hexdigest()


def _set_fields(config: Config) -> dict[str, Any]:
    """The fields of a configuration that are not at their default."""
    return {field.name: value for field in dataclasses.fields(config) if (value := getattr(config, field.name)) != field.default}


def model_hash(model: Transformer, *, stored_as: torch.dtype = torch.float32) -> str:
    """The hash that a copy of this model will have: its matrices as they are held, or with stored_as all of it in that dtype."""
    as_held = stored_as == torch.float32
    digests = {name: tensor_digest(held if as_held else wide(held).to(stored_as).float()) for name, held in model.named_matrices()}
    return base_hash(model.config, digests)
