"""A made-up model of any shape, loaded: what `dejavu.load` would give of the folder that `dejavu plant` writes, made on its device instead.

In: a shape's name, a device, a dtype, the share of neurons that fire. Out: a Checkpoint with a tokenizer of made-up words (words.py). A
shape in which no sparsity can be planted (SiLU, or no biases of the MLPs and their norms) gets random weights.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from dejavu.bench.models.planted import (
    PLANTED_DTYPES,
    RANK,
    Maker,
    Makers,
    check_planted_memory,
    fill_ends,
    fill_layer,
    fill_random_layer,
    free_bytes,
    not_plantable,
)
from dejavu.bench.models.random import shape_of
from dejavu.bench.models.words import word_tokenizer
from dejavu.config import ModelConfig, require
from dejavu.kernels.dtypes import TORCH_DTYPES
from dejavu.model.checkpoint import Checkpoint
from dejavu.model.families import empty_model
from dejavu.model.fingerprint import model_hash
from dejavu.model.transformer import Block, Transformer

USUAL_DENSITY = 0.05  # what fires of a planted model where nobody says


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MadeUp:
    """What is to be made, checked by `made_up`. config: of the layers made, with the tokenizer's ids; full: layers of the shape."""

    name: str
    config: ModelConfig
    full: int
    dtype: str
    density: float | None
    rank: int

    def fill(self, block: Block, maker: Maker, index: int) -> None:
        """Weights of layer `index`."""
        if self.density is None:
            fill_random_layer(block, maker, self.full)
        else:
            fill_layer(block, maker, index, self.full, density=self.density, rank=self.rank)


def made_up(
    name: str, *, dtype: str = "fp16", density: float | None = None, rank: int | None = None, num_layers: int | None = None
) -> MadeUp:
    """density: None plants USUAL_DENSITY where that is possible. rank: as of `planted_model`, None: RANK. num_layers: the first ones alone.

    Raises ValueError for an unknown shape and what is out of range, a density where none can be planted among it.
    """
    full = shape_of(name)
    require(dtype in PLANTED_DTYPES, f"dtype {dtype!r} is not available for a made-up model; choose one of {', '.join(PLANTED_DTYPES)}")
    wrong = not_plantable(full)
    if density is not None:
        require(not wrong, f"{name} has {', '.join(wrong)}: no sparsity can be planted in it; leave --density out for random weights")
        require(0 < density < 1, f"density must lie between 0 and 1, not {density:g}")
    rank = min(RANK, full.hidden_size) if rank is None else rank
    require(1 <= rank <= full.hidden_size, f"rank must lie between 1 and {full.hidden_size} (the hidden size), not {rank}")
    layers = full.num_layers if num_layers is None else num_layers
    require(1 <= layers <= full.num_layers, f"layers must lie between 1 and {full.num_layers} (those of {name}), not {layers}")
    return MadeUp(
        name=name,
        config=dataclasses.replace(full, num_layers=layers, bos_token_id=0, eos_token_ids=(0,)),
        full=full.num_layers,
        dtype=dtype,
        density=USUAL_DENSITY if density is None and not wrong else density,
        rank=rank,
    )


def made_up_model(asked: MadeUp, *, device: str | torch.device, seed: int = 0) -> Transformer:
    """Raises ValueError where the device has no memory for it, before any is taken."""
    device, dtype = torch.device(device), TORCH_DTYPES[asked.dtype]
    check_planted_memory(asked.name, asked.config, device=str(device), dtype=asked.dtype, rank=asked.rank, available=free_bytes(device))
    makers, model = Makers(device=device, dtype=dtype, seed=seed), empty_model(asked.config)
    fill_ends(model, makers.ends())
    for index, block in enumerate(model.blocks):
        asked.fill(block, makers.layer(index), index)
    model.fill_frequencies(device)
    return model.eval()


def made_up_checkpoint(asked: MadeUp, *, device: str | torch.device, seed: int = 0) -> Checkpoint:
    """made_up_model with a tokenizer."""
    model = made_up_model(asked, device=device, seed=seed)
    return Checkpoint(
        model=model,
        tokenizer=word_tokenizer(asked.config.vocab_size),
        config=asked.config,
        name=asked.name,
        base_hash=model_hash(model, stored_as=TORCH_DTYPES[asked.dtype]),
        stored_dtype=asked.dtype,
        notes=(),
        path=Path(asked.name),
    )
