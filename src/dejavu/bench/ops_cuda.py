"""The cuda engine's single kernels for `dejavu bench --ops`: what runs, on how many copies, what it must read, and its check.

In: a model on a GPU with predictors. Out: ops by density and selection, and the read that they are compared with. A copy is a
layer of the model, so that weights are shared with it; indices are drawn, not predicted, so that every density is exact.

    mlp         batch 1: the fused kernel, norm included; larger batches: two kernels, of sparse ones over a union that every row shares,
                dense as a step runs it, which leaves parts of the sums
    head        the head's product with the norm

Letters: B rows  D model  F neurons  A selected
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from dejavu.bench.memory import buffer_bytes
from dejavu.bench.ops import OpRun, OpsAt, copies_for, index_lists
from dejavu.config import require
from dejavu.engine.cuda.weights import LayerWeights, head_weight, layer_weights, norm_weights
from dejavu.kernels.cuda.common import NormWeights, norm_definition
from dejavu.kernels.cuda.linear_rows import activated_rows, linear_rows, linear_slices
from dejavu.kernels.cuda.mlp import mlp_token
from dejavu.kernels.cuda.mlp_rows import mlp_rows, mlp_rows_definition, padded_rows
from dejavu.kernels.cuda.project import project_token, project_token_definition
from dejavu.kernels.cuda.read import read_buffer
from dejavu.kernels.cuda.select_rows import MAX_ROWS
from dejavu.kernels.memory import free_gpu_bytes
from dejavu.kernels.sparse_mlp import MlpWeights, masked_mlp
from dejavu.model.transformer import Transformer


def cuda_ops(model: Transformer, *, batch: int, seed: int) -> tuple[OpsAt, OpRun]:
    """See OpsAt. Raises ValueError where the model is not on a GPU."""
    device = model.device
    require(batch <= MAX_ROWS, f"--ops times kernels of at most {MAX_ROWS} rows, not {batch}")
    require(device.type == "cuda", f"--ops times kernels of the cuda backend, and the model is on {device}")
    weights = [layer_weights(block, model.frequencies(index), in_rows=True) for index, block in enumerate(model.blocks)]
    matrices = 3 if model.config.gated else 2
    dense_bytes = matrices * weights[0].mlp.up_FD.nbytes
    bench = _Mlp(weights, batch, seed)

    def ops_at(density: float | None, selection: str | None) -> dict[str, OpRun]:
        if density is None:
            return {"head": _head(model), "mlp": bench.dense(dense_bytes)} if batch == 1 else {"mlp": bench.dense(dense_bytes)}
        return {"mlp": bench.sparse(density, selection or "uniform", dense_bytes)}

    size, _ = buffer_bytes(1 << 32, str(device), free_gpu_bytes(str(device)))
    buffer = torch.ones(int(size) // 4, dtype=torch.int32, device=device)
    sums = read_buffer(buffer)

    def read(_: int) -> None:
        read_buffer(buffer, sums)

    return ops_at, OpRun(run=read, bytes=buffer.nbytes, check=lambda: 0.0, copies=1, sparse=False)


def _uncached(what: str, one: float, copies: int, device: torch.device) -> None:
    """Raise ValueError where all that the calls of an op read fits into the device's cache: its speed would be the cache's."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    require(
        one * copies > cache,
        f"{what} reads {one * copies / 1e6:.0f} MB in all, and the GPU's cache holds {cache / 1e6:.0f} MB; take a larger model for --ops",
    )


class _Mlp:
    """MLPs of the model's layers, with the buffers they need."""

    def __init__(self, weights: list[LayerWeights], batch: int, seed: int) -> None:
        up_FD = weights[0].mlp.up_FD
        self.weights, self.batch, self.seed, self.device = weights, batch, seed, up_FD.device
        self.neurons, self.size = up_FD.shape
        generator = torch.Generator(self.device).manual_seed(seed)
        self.y_BD = torch.randn(batch, self.size, device=self.device, generator=generator)
        self.delta_BD, self.y_out_BD, self.out_BD = torch.zeros(3, batch, self.size, device=self.device).unbind(0)
        self.x_BD = norm_definition(self.y_BD.to(up_FD.dtype), weights[0].norm2)
        self.act_FB = torch.zeros(self.neurons, padded_rows(batch), dtype=up_FD.dtype, device=self.device)
        self.act_BF = torch.zeros(batch, self.neurons, dtype=up_FD.dtype, device=self.device)
        self.parts_SBD = torch.zeros(linear_slices(weights[0].mlp.down_FD.T), batch, self.size, device=self.device)
        self.every_word_F = torch.full((self.neurons,), -1, dtype=torch.int32, device=self.device)

    def sparse(self, density: float, selection: str, dense_bytes: int) -> OpRun:
        count = min(len(self.weights), copies_for(density * dense_bytes))
        _uncached(f"the MLP at density {density:g}", density * dense_bytes, count, self.device)
        drawn = index_lists(self.neurons, density, selection, count, self.seed, self.device)
        lists = [torch.zeros(self.neurons, dtype=torch.int32, device=self.device) for _ in drawn]
        for whole_F, idx_A in zip(lists, drawn, strict=True):
            whole_F[: idx_A.numel()] = idx_A
        counts = [torch.tensor([idx_A.numel()], dtype=torch.int32, device=self.device) for idx_A in drawn]

        def run(index: int) -> None:
            layer = self.weights[index]
            if self.batch == 1:
                mlp_token(
                    self.y_BD[0], self.delta_BD[0], self.y_out_BD[0], self.out_BD[0], layer.norm2, layer.mlp, lists[index], counts[index],
                    programmatic=True,
                )  # fmt: skip
            else:
                mlp_rows(self.x_BD, layer.mlp, self.every_word_F, lists[index], counts[index], self.act_FB, self.out_BD, programmatic=True)

        used = drawn[0].numel() / self.neurons * dense_bytes
        return OpRun(run=run, bytes=used, check=lambda: self._error(run, drawn[0].long()), copies=count)

    def dense(self, dense_bytes: int) -> OpRun:
        def run(index: int) -> None:
            layer = self.weights[index]
            if self.batch == 1:
                mlp_token(
                    self.y_BD[0], self.delta_BD[0], self.y_out_BD[0], self.out_BD[0], layer.norm2, layer.mlp, programmatic=True
                )  # fmt: skip
            else:
                activated_rows(self.x_BD, layer.mlp, self.act_BF, programmatic=True)
                linear_rows(self.act_BF, layer.mlp.down_FD.T, layer.mlp.down_bias_D, self.parts_SBD, programmatic=True)

        every = torch.arange(self.neurons, device=self.device)
        copies = min(len(self.weights), copies_for(dense_bytes))
        _uncached("the dense MLP", dense_bytes, copies, self.device)
        return OpRun(run=run, bytes=dense_bytes, check=lambda: self._error(run, every), copies=copies, sparse=False)

    def _error(self, run: Callable[[int], None], idx_A: Tensor) -> float:
        """Error of a call on layer 0 over twice that of the plain version in the same dtype, both against fp64."""
        layer = self.weights[0]
        self.out_BD.zero_()
        self.parts_SBD.zero_()
        run(0)
        if self.batch == 1:
            x_D = norm_definition(self.y_BD[0].to(self.x_BD.dtype), layer.norm2)
            plain, exact = masked_mlp(x_D, layer.mlp, idx_A), masked_mlp(_wide_norm(self.y_BD[0], layer.norm2), _wide(layer.mlp), idx_A)
            found = self.out_BD[0]
        else:
            keep_BF = torch.zeros(self.batch, self.neurons, device=self.device).index_fill(1, idx_A, 1)
            plain = mlp_rows_definition(self.x_BD, layer.mlp, keep_BF)
            exact = mlp_rows_definition(self.x_BD.double(), _wide(layer.mlp), keep_BF)
            found = self.out_BD + self.parts_SBD.sum(0)
        return _over(found, plain, exact, self.x_BD.dtype)


def _head(model: Transformer) -> OpRun:
    matrix, norm = head_weight(model), norm_weights(model.final_norm)
    y_D = torch.randn(matrix.shape[1], device=matrix.device, generator=torch.Generator(matrix.device).manual_seed(0))
    zero_D, out_V = torch.zeros_like(y_D), torch.zeros(matrix.shape[0], device=matrix.device)

    def run(_: int) -> None:
        project_token(y_D, zero_D, norm, matrix, None, out_V, programmatic=True)

    def error() -> float:
        run(0)
        plain = project_token_definition(y_D, zero_D, norm, matrix, None)
        exact = matrix.double() @ _wide_norm(y_D, norm)
        return _over(out_V, plain, exact, matrix.dtype)

    _uncached("the head", matrix.nbytes, 1, matrix.device)
    return OpRun(run=run, bytes=matrix.nbytes, check=error, copies=1, sparse=False)


def _wide_norm(y_D: Tensor, norm: NormWeights) -> Tensor:
    weight, bias = (None if each is None else each.double() for each in (norm.weight, norm.bias))
    return norm_definition(y_D.double(), NormWeights(weight=weight, bias=bias, eps=norm.eps, rms=norm.rms))


def _wide(weights: MlpWeights) -> MlpWeights:
    names = ("up_FD", "down_FD", "gate_FD", "up_bias_F", "gate_bias_F", "down_bias_D")
    there = {name: getattr(weights, name).double() for name in names if getattr(weights, name) is not None}
    return dataclasses.replace(weights, **there)


def _over(found: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    limit = 2 * (plain.double() - exact).abs().max() + 0.1 * torch.finfo(dtype).eps * exact.abs().max()
    return float((found.double() - exact).abs().max() / limit)
