"""What the cuda engine computes; read where triton is not installed, too."""

from __future__ import annotations

from dejavu.engine.capabilities import Capabilities

CUDA = Capabilities(backend="cuda", dtypes=("fp32", "fp16", "bf16"), ahead=("beside", "branch", "in-line"))
