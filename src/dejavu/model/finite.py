"""Where values stop being numbers. In: a model, the ids of whole sequences, a selection. Out: the first layer and token, in words.

A pass is run again, layer by layer, once a loss has come out that is not finite: the check costs nothing where all is well.

Letters: B batch  T tokens  D model  N losses
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dejavu.model.transformer import Selection, Transformer

FIX = "the checkpoint is damaged, or overflows in this dtype: try fp32"


def require_finite(nll_N: Tensor, model: Transformer, ids_BT: Tensor, selection: Selection, places: Sequence[str]) -> None:
    """Raise ValueError where a loss is not finite, naming the first layer and token. places: of each sequence, such as "window 3"."""
    if not bool(nll_N.isfinite().all()):
        raise ValueError(f"{first_bad(model, ids_BT, selection, places)}; {FIX}")


def require_finite_stream(x_BTD: Tensor, where: str, ids_BT: Tensor, places: Sequence[str]) -> None:
    """The same of a residual stream. where: which, such as "layer 3"."""
    found = _first_bad_token(x_BTD, where, ids_BT, places)
    if found is not None:
        raise ValueError(f"{found}; {FIX}")


@torch.inference_mode()
def first_bad(model: Transformer, ids_BT: Tensor, selection: Selection, places: Sequence[str]) -> str:
    """Where NaN or infinity comes up first: by layer, then by token."""
    for where, x_BTD in _streams(model, ids_BT, selection):
        found = _first_bad_token(x_BTD, where, ids_BT, places)
        if found is not None:
            return found
    return "the logits are not finite (NaN or infinite), and what the head reads is"


def _first_bad_token(x_BTD: Tensor, where: str, ids_BT: Tensor, places: Sequence[str]) -> str | None:
    bad_BT = ~x_BTD.isfinite().all(-1)
    if not bool(bad_BT.any()):
        return None
    token = int(bad_BT.any(0).nonzero()[0, 0])
    row = int(bad_BT[:, token].nonzero()[0, 0])
    found = f"token {token + 1} (id {int(ids_BT[row, token])}) of {places[row]}"
    return f"values are not finite (NaN or infinite), first in {where}, at {found}"


def _streams(model: Transformer, ids_BT: Tensor, selection: Selection) -> Iterator[tuple[str, Tensor]]:
    """The residual stream after the embedding and each layer, and what the head reads: what `Transformer.hidden` computes, in its steps."""
    position_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    x_BTD, mlp_in = model.embedded(ids_BT, position_T), None
    yield "the embedding", x_BTD
    for index in range(model.config.num_layers):
        x_BTD, mlp_in = model.layer(index, x_BTD, position_T, mlp_in, selection)
        yield f"layer {index}", x_BTD
    if model.final_norm is not None:
        yield "the final norm", model.final_norm(x_BTD)
