"""A made-up model of any size as a Hugging Face folder, written layer by layer: memory holds a shard, not the model.

In: what is to be made (made_up.py), a folder. Out: config.json, a tokenizer of made-up words (words.py), and safetensors shards of at most
SHARD_BYTES (one layer may take more) with their index. The disk is looked at first.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dejavu.bench.models.made_up import MadeUp
from dejavu.bench.models.planted import Makers, fill_ends
from dejavu.bench.models.words import word_tokenizer
from dejavu.config import ModelConfig, Progress
from dejavu.files import absolute, check_replaceable, new_folder, write_json, write_safetensors
from dejavu.kernels.dtypes import TORCH_DTYPES
from dejavu.model.families import FAMILIES, config_to_hf, empty_model
from dejavu.model.generation_config import GENERATION_FILE
from dejavu.model.transformer import Transformer

ENDS = -1  # in place of a layer's number
MADE_UP_KEY = "dejavu_made_up"  # of config.json: the shape that has these weights, which are nobody's
SHARD_BYTES = 2_000_000_000
SMALL_FILES = 50_000_000  # bytes of the disk for config, index and tokenizer
HF_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """How a model is cut into files: of each file its parts (layers by number, ENDS: what belongs to none); the file of each tensor."""

    parts: list[list[int]]
    weight_map: dict[str, str]
    total_bytes: int
    layer_bytes: int

    @property
    def index(self) -> dict[str, object]:
        """What model.safetensors.index.json holds."""
        return {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(self.weight_map.items()))}


def shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def plan(config: ModelConfig, dtype: str) -> Shards:
    """The shards of a model of that architecture, from its shapes alone."""
    made, width = _one_layer(config), TORCH_DTYPES[dtype].itemsize
    names = {part: list(_stored(made, part, config)) for part in (ENDS, *range(config.num_layers))}
    sizes = {part: sum(map(torch.Tensor.numel, _stored(made, part, config).values())) * width for part in (ENDS, 0)}
    parts, held = [[ENDS]], sizes[ENDS]
    for layer in range(config.num_layers):
        if held + sizes[0] > SHARD_BYTES:
            parts.append([])
            held = 0
        parts[-1].append(layer)
        held += sizes[0]
    places = ((name, shard_name(number, len(parts))) for number, these in enumerate(parts) for part in these for name in names[part])
    total = sizes[ENDS] + config.num_layers * sizes[0]
    return Shards(parts=parts, weight_map=dict(places), total_bytes=total, layer_bytes=sizes[0])


def check_disk(asked: MadeUp, shards: Shards, folder: Path) -> None:
    """Raise ValueError where the disk of the folder has no room for the model, with how many layers it has room for."""
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free, needed = shutil.disk_usage(place).free, shards.total_bytes + SMALL_FILES
    if needed <= free:
        return
    fits = asked.config.num_layers - math.ceil((needed - free) / shards.layer_bytes)
    fewer = f", or write the first layers only: --layers {fits} at most" if fits >= 1 else ""
    raise ValueError(
        f"{asked.name} in {asked.dtype} takes {needed / 1e9:.1f} GB and the disk of {folder} has {free / 1e9:.1f} GB free; "
        f"choose a folder on another, a smaller shape{fewer}"
    )


def write_planted(
    asked: MadeUp, folder: str | Path, *, device: str | torch.device = "cpu", seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Write the folder, whole or not at all; the object that `dejavu plant` prints.

    Raises ValueError for a folder in use and a disk without room, before anything is made.
    """
    config, target = asked.config, absolute(folder)
    check_replaceable(target)
    shards, dtype = plan(config, asked.dtype), TORCH_DTYPES[asked.dtype]
    check_disk(asked, shards, target)
    makers = Makers(device=torch.device(device), dtype=dtype, seed=seed)
    with new_folder(target) as partial:
        for number, parts in enumerate(shards.parts):
            tensors: dict[str, Tensor] = {}
            for part in parts:
                made = _one_layer(config)
                if part == ENDS:
                    fill_ends(made, makers.ends())
                else:
                    asked.fill(made.blocks[0], makers.layer(part), part)
                tensors |= {key: value.contiguous().cpu() for key, value in _stored(made, part, config).items()}
                if progress is not None:
                    progress("writing layers", part + 1, config.num_layers)
            write_safetensors(partial / shard_name(number, len(shards.parts)), tensors, metadata={"format": "pt"})
        write_json(partial / "model.safetensors.index.json", shards.index)
        write_json(partial / "config.json", config_to_hf(config) | {"dtype": HF_DTYPES[asked.dtype], MADE_UP_KEY: asked.name})
        write_json(partial / GENERATION_FILE, {"bos_token_id": 0, "eos_token_id": 0})
        word_tokenizer(config.vocab_size).save(partial)
    about: dict[str, Any] = {"shape": asked.name, "layers": config.num_layers, "parameters": shards.total_bytes // dtype.itemsize}
    return about | {"dtype": asked.dtype, "density": asked.density, "bytes": shards.total_bytes, "folder": str(target)}


def _one_layer(config: ModelConfig) -> Transformer:
    """A layer and what belongs to none, on the meta device."""
    return empty_model(dataclasses.replace(config, num_layers=1))


def _stored(made: Transformer, part: int, config: ModelConfig) -> dict[str, Tensor]:
    """What files hold of a part, by the names that they have there; the one layer of `made` stands for any."""
    family, of_layer = FAMILIES[config.family], part != ENDS
    held = {name: values for name, values in made.named_weights() if name.startswith("layers.0.") == of_layer}
    named = {name.replace("layers.0.", f"layers.{part}.", 1): values for name, values in held.items()}
    return {family.full_name(name): values for name, values in family.stored(named, config).items()}
