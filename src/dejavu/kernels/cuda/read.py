"""A read of device memory and nothing else: what the bandwidth of every other kernel is measured against.

In: a buffer. Out: a sum for each program, so that no load can be left out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dejavu.kernels.cuda.common import begin, launch, multiprocessors

BLOCK, WARPS, PROGRAMS = 4096, 4, 8


@triton.jit
def _read(buffer, out, count, BLOCK: tl.constexpr, programmatic: tl.constexpr):
    begin(programmatic)
    pid = tl.program_id(0).to(tl.int64)  # the loop's last step may go beyond 2^31
    acc = tl.zeros([BLOCK], tl.int32)
    for first in range(pid * BLOCK, count, tl.num_programs(0) * BLOCK):
        at = first + tl.arange(0, BLOCK)
        acc += tl.load(buffer + at, mask=at < count, other=0, eviction_policy="evict_first")
    tl.store(out + pid, tl.sum(acc, 0))


def read_buffer(buffer: Tensor, sums: Tensor | None = None, *, programmatic: bool = False) -> Tensor:
    """Read a contiguous buffer of whole 4-byte words once; int32 sums, one for each program."""
    words = buffer.view(torch.int32)
    programs = multiprocessors(buffer.device) * PROGRAMS
    sums = torch.empty(programs, dtype=torch.int32, device=buffer.device) if sums is None else sums
    launch(_read, (programs,), words, sums, words.numel(), BLOCK=BLOCK, num_warps=WARPS, programmatic=programmatic)
    return sums
