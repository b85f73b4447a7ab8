"""The residual stream before the first layer: y_D = scale embed[token] + position_table[position + offset], and delta_D = 0.

Letters: B rows  D model
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.cuda.common import launch, or_any

BLOCK = 1024


@triton.jit
def _embed(
    tokens, positions, table, position_table, offset, scale, y, cleared, D,
    POSITIONS: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr, programmatic: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(table + tl.load(tokens + b).to(tl.int64) * D + c, mask=c < D, other=0.0).to(tl.float32)
    if SCALED:
        v = (v * scale).to(table.dtype.element_ty).to(tl.float32)  # rounded as the model's own embedding is
    if POSITIONS:
        place = tl.load(positions + b).to(tl.int64) + offset
        v += tl.load(position_table + place * D + c, mask=c < D, other=0.0).to(tl.float32)
    tl.store(y + b * D + c, v, mask=c < D)
    tl.store(cleared + b * D + c, tl.zeros([BLOCK], tl.float32), mask=c < D)


def embed_rows(
    token_B: Tensor, position_B: Tensor, table_VD: Tensor, position_table: Tensor | None, offset: int, y_BD: Tensor, cleared_BD: Tensor,
    *, scale: float = 1.0,
) -> None:  # fmt: skip
    """Fill y_BD fp32 and set cleared_BD to zero. token_B and position_B are int32; the scale is one that the table's dtype holds."""
    rows, size = y_BD.shape
    launch(
        _embed, (rows, triton.cdiv(size, BLOCK)), token_B, position_B, table_VD, or_any(position_table, table_VD), offset, scale,
        y_BD, cleared_BD, size, POSITIONS=position_table is not None, SCALED=scale != 1, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
