"""Several processes that train one model, each on its own windows: plain data parallelism under torchrun.

In: a process started by torchrun, or alone. Out: its rank, and averages over all. Alone, nothing is initialised and an
average is the value itself.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def joined_ranks(device: str) -> Generator[int]:
    """Join the processes that torchrun started (nccl on cuda, gloo on the CPU); yields this one's rank. Alone: 0.

    The variables are torchrun's own way of telling a process its place.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    if device == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
        dist.init_process_group("nccl", device_id=own)
    else:
        dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average_(values: Tensor) -> Tensor:
    """The mean of the tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values.div_(dist.get_world_size())
    return values


def same_(values: Tensor) -> Tensor:
    """The first process's tensor in all of them, in place."""
    if dist.is_initialized():
        dist.broadcast(values, 0)
    return values


def wait() -> None:
    """Until every process is here."""
    if dist.is_initialized():
        dist.barrier()
