"""A made-up model of any size as a Hugging Face folder, written layer by layer: memory holds a shard, not the model.

In: a shape's name, a folder, a dtype, the share of neurons that fire. Out: config.json, a tokenizer of made-up words (words.py), and
safetensors shards of at most SHARD_BYTES (one layer may take more) with their index, the same model as `planted.planted_model` makes. A
shape in which no sparsity can be planted (SiLU, or no biases of the MLPs) gets random weights. The disk is looked at first.
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

from dejavu.bench.models.planted import PLANTED_DTYPES, RANK, Makers, fill_ends, fill_layer, fill_random_layer, not_plantable
from dejavu.bench.models.random import shape_of
from dejavu.bench.models.words import word_tokenizer
from dejavu.config import ModelConfig, Progress, require
from dejavu.files import absolute, check_replaceable, new_folder, write_json, write_safetensors
from dejavu.kernels.dtypes import TORCH_DTYPES
from dejavu.model.families import FAMILIES, config_to_hf, empty_model
from dejavu.model.generation_config import GENERATION_FILE
from dejavu.model.transformer import Transformer

ENDS = -1  # in place of a layer's number
SHARD_BYTES = 2_000_000_000
USUAL_DENSITY = 0.05  # what fires of a planted model where nobody says
SMALL_FILES = 50_000_000  # bytes of the disk for config, index and tokenizer
HF_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """How a model is cut into files: of each file its parts (layers by number, ENDS: what belongs to none); the file of each tensor."""

    parts: list[list[int]]
    weight_map: dict[str, str]
    total_bytes: int

    @property
    def index(self) -> dict[str, object]:
        """What model.safetensors.index.json holds."""
        return {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(self.weight_map.items()))}


def shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def settled_density(name: str, config: ModelConfig, density: float | None) -> float | None:
    """The density to plant: None where weights are to be random, as sparsity cannot be planted in that shape.

    Raises ValueError where it is asked for all the same, or lies outside (0, 1).
    """
    wrong = not_plantable(config)
    if density is None:
        return None if wrong else USUAL_DENSITY
    require(not wrong, f"{name} has {', '.join(wrong)}: no sparsity can be planted in it; leave --density out for random weights")
    require(0 < density < 1, f"density must lie between 0 and 1, not {density:g}")
    return density


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
    return Shards(parts=parts, weight_map=dict(places), total_bytes=sizes[ENDS] + config.num_layers * sizes[0])


def check_disk(name: str, config: ModelConfig, dtype: str, folder: Path) -> None:
    """Raise ValueError where the disk of the folder has no room for the model, with how many layers it has room for."""
    total = plan(config, dtype).total_bytes
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free, needed = shutil.disk_usage(place).free, total + SMALL_FILES
    if needed <= free:
        return
    layer = (
        total - plan(dataclasses.replace(config, num_layers=config.num_layers - 1), dtype).total_bytes if config.num_layers > 1 else total
    )
    fits = config.num_layers - math.ceil((needed - free) / layer)
    fewer = f", or write the first layers only: --layers {fits} at most" if fits >= 1 else ""
    raise ValueError(
        f"{name} in {dtype} takes {needed / 1e9:.1f} GB and the disk of {folder} has {free / 1e9:.1f} GB free; "
        f"choose a folder on another, a smaller shape{fewer}"
    )


def write_planted(
    name: str,
    folder: str | Path,
    *,
    dtype: str = "fp16",
    density: float | None = None,
    rank: int | None = None,
    num_layers: int | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the folder, whole or not at all; what `dejavu plant` prints: `shape`, `parameters`, `density`, `bytes`, `folder`.

    density: None plants USUAL_DENSITY where that is possible. rank: as of `planted_model`, None: RANK.
    num_layers: the first ones alone. Raises ValueError for an unknown shape, what is out of range, a folder in use, and a disk without
    room, before anything is made.
    """
    full = shape_of(name)
    require(dtype in PLANTED_DTYPES, f"dtype {dtype!r} cannot be written; choose one of {', '.join(PLANTED_DTYPES)}")
    density = settled_density(name, full, density)
    rank = min(RANK, full.hidden_size) if rank is None else rank
    require(1 <= rank <= full.hidden_size, f"rank must lie between 1 and {full.hidden_size} (the hidden size), not {rank}")
    layers = full.num_layers if num_layers is None else num_layers
    require(1 <= layers <= full.num_layers, f"layers must lie between 1 and {full.num_layers} (those of {name}), not {layers}")
    config = dataclasses.replace(full, num_layers=layers, bos_token_id=0, eos_token_ids=(0,))
    tokenizer, target = word_tokenizer(config.vocab_size), absolute(folder)
    check_replaceable(target)
    check_disk(name, config, dtype, target)
    shards = plan(config, dtype)
    makers = Makers(device=torch.device(device), dtype=TORCH_DTYPES[dtype], seed=seed)
    with new_folder(target) as partial:
        for number, parts in enumerate(shards.parts):
            tensors: dict[str, Tensor] = {}
            for part in parts:
                made = _one_layer(config)
                _fill(made, makers, part, full.num_layers, density=density, rank=rank)
                tensors |= {key: value.contiguous().cpu() for key, value in _stored(made, part, config).items()}
                if progress is not None:
                    progress("writing layers", part + 1, layers)
            write_safetensors(partial / shard_name(number, len(shards.parts)), tensors, metadata={"format": "pt"})
        write_json(partial / "model.safetensors.index.json", shards.index)
        write_json(partial / "config.json", config_to_hf(config) | {"dtype": HF_DTYPES[dtype]})
        write_json(partial / GENERATION_FILE, {"bos_token_id": 0, "eos_token_id": 0})
        tokenizer.save(partial)
    parameters = shards.total_bytes // TORCH_DTYPES[dtype].itemsize
    about: dict[str, Any] = {"shape": name, "layers": layers, "parameters": parameters, "dtype": dtype, "density": density}
    return about | {"bytes": shards.total_bytes, "folder": str(target)}


def _one_layer(config: ModelConfig) -> Transformer:
    """A layer and what belongs to none, on the meta device."""
    return empty_model(dataclasses.replace(config, num_layers=1))


def _fill(made: Transformer, makers: Makers, part: int, full: int, *, density: float | None, rank: int) -> None:
    if part == ENDS:
        fill_ends(made, makers.ends())
    elif density is None:
        fill_random_layer(made.blocks[0], makers.layer(part), full)
    else:
        fill_layer(made.blocks[0], makers.layer(part), part, full, density=density, rank=rank)


def _stored(made: Transformer, part: int, config: ModelConfig) -> dict[str, Tensor]:
    """What files hold of a part, by the names that they have there; the one layer of `made` stands for any."""
    family, of_layer = FAMILIES[config.family], part != ENDS
    held = {name: values for name, values in made.named_weights() if name.startswith("layers.0.") == of_layer}
    named = {name.replace("layers.0.", f"layers.{part}.", 1): values for name, values in held.items()}
    return {family.full_name(name): values for name, values in family.stored(named, config).items()}
