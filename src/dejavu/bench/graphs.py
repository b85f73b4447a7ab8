"""What a captured graph is made of. In: a graph that torch captured. Out: how many nodes it has."""

from __future__ import annotations

import ctypes

import torch


def node_count(graph: torch.cuda.CUDAGraph) -> int | None:
    """cudaGraphGetNodes, through the runtime library that torch has loaded; None where it is not found."""
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        paths = [line.split()[-1] for line in maps if "libcudart" in line]
    if not paths:
        return None
    count = ctypes.c_size_t()
    status = ctypes.CDLL(paths[0]).cudaGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    return count.value if status == 0 else None
