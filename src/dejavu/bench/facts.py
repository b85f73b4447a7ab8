"""What a row of speed says of who ran: our engine, one of its variants, or another program.

In: an engine's info and its model, a variant, a peer. Out: fields of `SpeedRow`, to be joined with what was measured.
"""

from __future__ import annotations

from typing import Any

from dejavu.bench.rows import Shape, device_facts
from dejavu.bench.variants import Peer, Variant, method_of, runs_same, selects_heads
from dejavu.config import ModelConfig
from dejavu.engine.interface import EngineInfo


def on_gpu(device: str) -> bool:
    return device.startswith("cuda")


def engine_facts(info: EngineInfo, config: ModelConfig, *, name: str, shape: Shape | None) -> dict[str, Any]:
    """Of our engine, dense. shape: of a made-up model."""
    made_up = {} if shape is None else {"shape": shape.name, "shape_layers": shape.layers}
    return {
        "mode": "dense",
        "backend": info.backend,
        "model": name,
        "layers": config.num_layers,
        "dtype": info.dtype,
        **device_facts(cuda=on_gpu(info.device)),
        "synthetic": shape is not None,
        **made_up,
        "cache_dtype": info.cache_dtype,
        "screened_head": 0.0 if info.screen is None else info.screen.threshold,
        "threads": info.threads,
        "mlp_density": 1.0,
        "head_density": 1.0,
    }


def variant_facts(variant: Variant, *, adapter: str | None, ahead: str | None) -> dict[str, Any]:
    """What a variant changes of them. adapter: the digest of the one it comes from. ahead: where the cuda engine selects."""
    sparse = variant.layers is not None
    return {
        "mode": variant.mode,
        "selection": variant.selection,
        "sparse": sparse,
        "sparse_heads": selects_heads(variant.layers),
        "method": method_of(variant.layers),
        "ahead": ahead if sparse else None,
        "adapter": adapter if sparse or variant.screen is not None else None,
        "screened_head": 0.0 if variant.screen is None else variant.screen.threshold,
    }


def peer_facts(peer: Peer, *, name: str) -> dict[str, Any]:
    """What another program changes of them, beside our model of that name."""
    facts: dict[str, Any] = {"mode": peer.mode, "backend": peer.mode, "dtype": peer.dtype, "batch": 1, "threads": peer.threads}
    facts |= {"peer": True, "cache_dtype": None, "screened_head": 0, "read_share": None, **device_facts(cuda=on_gpu(peer.device))}
    if not runs_same(peer, name):
        facts |= {"model": peer.model, "layers": None, "synthetic": False, "shape": None, "shape_layers": None}
    return facts
