"""What the native engine computes."""

from __future__ import annotations

from dejavu.engine.capabilities import Capabilities

NATIVE = Capabilities(
    backend="native",
    dtypes=("fp32", "fp16", "bf16", "int8", "int4", "stored"),
    packs=True,
    cache_dtypes=("fp32", "fp16", "int8"),
    parts=frozenset(
        {
            "post_norm",
            "no_final_norm",
            "narrow_embedding",
            "odd_head",
            "partial_rotary",
            "rotary_scale",
            "qk_norm",
            "block_norms",
            "local_rope",
            "window",
            "scales",
            "caps",
            "parallel",
            "attention_scale",
        }
    ),
    screened_head=True,
)
