"""A screened head in an adapter's files: `head.centroids` [C, E] int8 with `head.centroids.scale` [C], `head.bias` [C] fp32, `head.sizes`
[C] and `head.members` [V] int32. Threshold and measurements are in the config (ScreenConfig).

Letters: V vocabulary  E width of the head  C clusters
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dejavu.config import ModelConfig, require
from dejavu.kernels.quantized import QuantizedMatrix
from dejavu.kernels.screen import Screen
from dejavu.model.adapter_config import ScreenConfig

CENTROIDS = "head.centroids"


def screen_tensors(screen: Screen) -> dict[str, Tensor]:
    """By name."""
    own = {"head.bias": screen.bias_C, "head.sizes": screen.sizes_C, "head.members": screen.members_V}
    return screen.centroids.int8_tensors(CENTROIDS) | {name: tensor.cpu().contiguous() for name, tensor in own.items()}


def read_screen(config: ScreenConfig, tensors: dict[str, Tensor], model: ModelConfig, path: Path) -> Screen:
    """Takes its tensors, of the file `path`, out of `tensors`. Raises ValueError for one that is missing or cannot be."""
    clusters, width = config.clusters, model.embed_width
    shapes = {
        CENTROIDS: (torch.int8, (clusters, width)),
        f"{CENTROIDS}.scale": (torch.float32, (clusters,)),
        "head.bias": (torch.float32, (clusters,)),
        "head.sizes": (torch.int32, (clusters,)),
        "head.members": (torch.int32, (model.vocab_size,)),
    }
    held = {}
    for name, (dtype, shape) in shapes.items():
        require(name in tensors, f"{path} lacks {name}")
        held[name] = tensors.pop(name)
        found = held[name]
        require(
            found.dtype == dtype and tuple(found.shape) == shape,
            f"{path}: {name} is {found.dtype} of shape {tuple(found.shape)}, and must be {dtype} of {shape}",
        )
        require(dtype != torch.float32 or bool(found.isfinite().all()), f"{path}: {name} has values that are not finite")
    try:
        return Screen(
            centroids=QuantizedMatrix("int8", held[CENTROIDS], held[f"{CENTROIDS}.scale"], width),
            bias_C=held["head.bias"],
            members_V=held["head.members"],
            sizes_C=held["head.sizes"],
            threshold=config.threshold,
            tokens=config.tokens,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
