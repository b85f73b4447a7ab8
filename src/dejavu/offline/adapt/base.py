"""The frozen weights that teacher and student share: one copy, on the device and in the dtype that training computes in.

In: a loaded model, its matrices in any form. Out: a model with tensors, none of which is trained. What has the dtype and is on the device
already is shared with the model that came in; nobody writes into it.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from dejavu.kernels.memory import give_back_pages
from dejavu.kernels.quantized import QuantizedMatrix, wide
from dejavu.model.layers import Held
from dejavu.model.transformer import Transformer, sharing

M = TypeVar("M", bound=nn.Module)


def frozen(module: M, device: torch.device | None = None, dtype: torch.dtype | None = None) -> M:
    """A copy of a module without gradients; its tensors are the module's own where they have that place and dtype (None: any)."""
    made = sharing(module, lambda each: each.held)
    for part in made.modules():
        if isinstance(part, Held) and part.quantized is not None:
            held = part.quantized
            part.hold(wide(held).to(device=device, dtype=dtype).contiguous())  # one at a time: never the whole model in fp32
            for tensor in held.tensors if isinstance(held, QuantizedMatrix) else ():
                give_back_pages(tensor)
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.detach().to(device=device, dtype=dtype), requires_grad=False)
    return made


def shared_base(model: Transformer, device: str | torch.device, dtype: torch.dtype) -> Transformer:
    """The model as tensors of that dtype on that device, frozen."""
    made = frozen(model, torch.device(device), dtype)
    made.fill_frequencies(device)  # fp32 whatever the dtype
    return made
