"""The keys of a row of results."""

from __future__ import annotations

KEYS = {
    *("op", "mode", "backend", "model", "layers", "dtype", "batch", "context", "threads", "mlp_density", "head_density"),
    *("p20_us", "p50_us", "p80_us", "tok_s", "gbs", "pct_ceiling", "selection", "union_density", "nodes", "synthetic"),
    *("device", "versions", "commit", "time"),
    *("cache_dtype", "screened_head", "adapter", "read_share", "method", "new_tokens"),
    *("peer", "sparse", "sparse_heads", "ahead", "shape", "shape_layers", "device_kind", "cores", "dirty"),
}  # fmt: skip
