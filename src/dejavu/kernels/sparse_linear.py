"""A linear map of one token over the inputs that are kept. Tensors in, tensors out.

    y_O = sum over the kept inputs i of x_i W[:, i], + bias_O

so that an input left out is one column of W not read; a matrix that holds a row for each input (o, down) has that row instead. With
each function: the bytes that any implementation of it has to move.

Letters: I inputs  O outputs  A kept inputs
"""

from __future__ import annotations

import torch
from torch import Tensor

from dejavu.kernels.sparse_mlp import weighted_rows


def linear_columns(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor | None, idx_A: Tensor | None) -> Tensor:
    """y_O from the inputs idx_A (int64 [A], each at most once; all when None)."""
    if idx_A is not None:
        weight_OI, x_I = weight_OI.index_select(1, idx_A), x_I.index_select(0, idx_A)
    return torch.mv(weight_OI, x_I) if bias_O is None else torch.addmv(bias_O, weight_OI, x_I)


def linear_rows(x_I: Tensor, weight_IO: Tensor, bias_O: Tensor | None, idx_A: Tensor | None) -> Tensor:
    """The same of a matrix that holds a row for each input."""
    if idx_A is not None:
        return weighted_rows(x_I.index_select(0, idx_A), weight_IO, bias_O, idx_A)
    y_O = x_I @ weight_IO
    return y_O if bias_O is None else y_O + bias_O


def linear_columns_bytes(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor | None, idx_A: Tensor | None) -> int:
    return _bytes(x_I, weight_OI.shape[0], bias_O, idx_A)


def linear_rows_bytes(x_I: Tensor, weight_IO: Tensor, bias_O: Tensor | None, idx_A: Tensor | None) -> int:
    return _bytes(x_I, weight_IO.shape[1], bias_O, idx_A)


def masked_columns(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor | None, idx_A: Tensor | None) -> Tensor:
    """The definition of `linear_columns`: the whole product, the other inputs being zero."""
    y_O = weight_OI @ _kept(x_I, idx_A)
    return y_O if bias_O is None else y_O + bias_O


def masked_rows(x_I: Tensor, weight_IO: Tensor, bias_O: Tensor | None, idx_A: Tensor | None) -> Tensor:
    """The definition of `linear_rows`."""
    y_O = _kept(x_I, idx_A) @ weight_IO
    return y_O if bias_O is None else y_O + bias_O


def _kept(x_I: Tensor, idx_A: Tensor | None) -> Tensor:
    return x_I if idx_A is None else x_I * torch.zeros_like(x_I).index_fill(0, idx_A, 1)


def _bytes(x_I: Tensor, outputs: int, bias_O: Tensor | None, idx_A: Tensor | None) -> int:
    kept = x_I.shape[0] if idx_A is None else idx_A.shape[0]
    return ((kept + 1 + (bias_O is not None)) * outputs + kept) * x_I.element_size() + (0 if idx_A is None else idx_A.nbytes)
