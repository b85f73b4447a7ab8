"""The grid that each matrix of a model is stored in, by name: what an engine that packs them as they are reads.

In: a model. Out: a `Grids`, which stays when the weights are handed over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dejavu.kernels.dtypes import DTYPE_NAMES
from dejavu.kernels.quantized import Matrix
from dejavu.model.transformer import Transformer


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGrids:
    """Of one layer's matrices; gate is None where there is none."""

    q: str
    k: str
    v: str
    o: str
    gate: str | None
    up: str
    down: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Grids:
    """Of a model's matrices. projections: of an embedding narrower than the model, into it and out of it; else None."""

    embed: str
    head: str
    projections: tuple[str, str] | None
    layers: tuple[LayerGrids, ...]


def grid_of(matrix: Matrix) -> str:
    """The dtype of a tensor, or the grid."""
    return DTYPE_NAMES[matrix.dtype] if isinstance(matrix, Tensor) else matrix.grid


def grids_of(model: Transformer, name: Callable[[Matrix], str] = grid_of) -> Grids:
    """Those that the model holds. name: what an engine calls the grid in which it takes a matrix."""
    narrow = None
    if model.project_in is not None and model.project_out is not None:
        narrow = name(model.project_in.matrix), name(model.project_out.matrix)
    layers = tuple(
        LayerGrids(
            q=name(block.q.matrix),
            k=name(block.k.matrix),
            v=name(block.v.matrix),
            o=name(block.o.matrix),
            gate=None if block.gate is None else name(block.gate.matrix),
            up=name(block.up.matrix),
            down=name(block.down.matrix),
        )
        for block in model.blocks
    )
    return Grids(embed=name(model.embed.matrix), head=name(model.head_matrix), projections=narrow, layers=layers)
