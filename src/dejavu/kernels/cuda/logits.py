"""Logits of products with the head, for models that scale or cap them: cap(scale z), in place, with cap(s) = c tanh(s / c).

Letters: B rows  V vocabulary
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.cuda.common import launch, soft_cap

BLOCK = 1024


@triton.jit
def _finish_logits(logits, scale, cap, size, CAPPED: tl.constexpr, BLOCK: tl.constexpr, programmatic: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + i, mask=i < size, other=0.0) * scale
    tl.store(logits + i, soft_cap(z, cap, CAPPED), mask=i < size)


def finish_logits(logits_BV: Tensor, *, scale: float, cap: float) -> None:
    """Scale fp32 logits and cap them (0: no cap), in place; nothing runs where neither changes them."""
    if scale == 1 and cap == 0:
        return
    assert logits_BV.is_contiguous()
    size = logits_BV.numel()
    launch(_finish_logits, (triton.cdiv(size, BLOCK),), logits_BV, scale, cap, size, CAPPED=cap > 0, BLOCK=BLOCK, num_warps=4)


def finish_logits_definition(logits_BV: Tensor, *, scale: float, cap: float) -> Tensor:
    logits_BV = logits_BV * scale
    return logits_BV if cap == 0 else cap * (logits_BV / cap).tanh()
