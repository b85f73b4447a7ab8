"""What the cuda engine computes; read where triton is not installed, too."""

from __future__ import annotations

from dejavu.engine.capabilities import Capabilities

CUDA = Capabilities(
    backend="cuda",
    dtypes=("fp32", "fp16", "bf16"),
    parts=frozenset(
        ("partial_rotary", "rotary_scale", "local_rope", "qk_norm", "block_norms", "window", "attention_scale", "caps", "scales")
    ),
    ahead=("beside", "branch", "in-line"),
    prompts_together=True,
    prefill_chunk=1024,
)
