"""One token of each of several sequences on the GPU: weights are read once for all rows, and each row keeps its own selection.

For each layer: norm, q, k, v, attention and O by row with its own heads, norm, and the MLP over the union of what the rows select, each
row masked to its own, or dense where that is measured to be faster. Predictors run row by row in fp32, with a lookahead of 1 or 2 as
further programs of other kernels: their first half of q, k, v's, the second of attention's. The residual stream y_BD is fp32;
products with O and down are left in parts, which the next norm adds up. A layer that runs dense selects nothing: its rows count as dense,
as they do in any dense layer.

Whether a layer's MLP runs over the union depends on the union's size and on the device: crossover.py times both ways, for heads too.

Where each row's own gate selects, the gate is read whole, and up and down are read over the union. Where inputs are
selected, each row's are masked and the matrices read whole: the union of a few rows would be nearly all of them. Neither is timed.

Letters: B rows  D model  L layers  H query heads  G key/value heads  K head_dim  V vocabulary  F neurons
S slices of a product's inputs  W = (H + 2G) K
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from dejavu.engine.cache import PagedCache
from dejavu.engine.cuda.crossover import Crossover
from dejavu.engine.cuda.weights import LayerPredictors, StepModel, all_counts
from dejavu.kernels.cuda.attention import Partials, Places, WholeHeads, attend, splits_for
from dejavu.kernels.cuda.common import PredictorScores, Side
from dejavu.kernels.cuda.embed import embed_rows
from dejavu.kernels.cuda.gate_rows import GateRows, select_gate_rows, up_given_rows
from dejavu.kernels.cuda.inputs import mask_rows
from dejavu.kernels.cuda.linear_rows import activated_rows, linear_rows, linear_slices, padded_rows
from dejavu.kernels.cuda.logits import finish_logits
from dejavu.kernels.cuda.mlp_rows import DownShape, down_rows, mlp_rows, shares_of
from dejavu.kernels.cuda.project import GroupScores
from dejavu.kernels.cuda.rows import combine_rows, group_rows, norm_rows
from dejavu.kernels.cuda.select_rows import UnionScores, project_rows, select_rows
from dejavu.kernels.sparse_mlp import MlpWeights
from dejavu.model.selectors import POINTS


class BatchStep:
    """The kernels of a step of several rows, over memory that stays where it is: a graph of them can be replayed.

    inputs: int32 [3, B]: token, slot, position; rows of the slot `padding` only fill the bucket. counts: int32 [M, B, L] of each row, in
    place, as `layer_predictors` has them of one, and unions int32 [L], the neurons that were read; valid after `run`. deterministic: sums
    in a fixed order, and of a dense step the same ones whatever other rows there are, up to 16, and however long. record: keep what
    the rows select. crossover: what its bucket's steps were measured to run faster dense; None: nothing does.
    """

    def __init__(
        self,
        model: StepModel,
        cache: PagedCache,
        *,
        tokens: int,
        deterministic: bool,
        inputs: Tensor,
        padding: int,
        record: bool = False,
        crossover: Crossover | None = None,
    ) -> None:
        config, device, dtype, rows = model.config, model.head.device, model.head.dtype, inputs.shape[1]
        self.model, self.cache = model, cache
        self.config, self.weights, self.predictors = config, model.weights, model.predictors
        self.inputs, self.padding, self.deterministic = inputs, padding, deterministic
        self.tokens, self.crossover = tokens, crossover
        size, neurons, layers = config.hidden_size, config.intermediate_size, config.num_layers
        # Where a row's sums are to be the same whatever rows and tokens there are, so are its splits.
        alike = (1, config.max_positions) if deterministic else (rows, tokens)
        splits = splits_for(alike[0], config.num_heads, device, tokens=alike[1])
        self._y_BD, self._delta_BD = torch.zeros(2, rows, size, device=device).unbind(0)
        self._x_BD = torch.zeros(rows, size, device=device, dtype=dtype)
        self._mixed_BHK = torch.zeros(rows, config.num_heads, config.head_dim, device=device, dtype=dtype)
        self._partials = Partials(
            mixed=torch.zeros(rows, config.num_heads, splits, config.head_dim, device=device),
            stats=torch.zeros(rows, config.num_heads, splits, 2, device=device),
        )
        self._whole = WholeHeads(
            out=self._mixed_BHK, tickets=torch.zeros(rows, config.num_heads, dtype=torch.int32, device=device)
        )  # fmt: skip
        self._places = Places(slot_B=inputs[1], position_B=inputs[2], table=cache.table)
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self._qkv_BW = torch.zeros(rows, width, device=device, dtype=dtype)
        self._act_BF = torch.zeros(rows, neurons, device=device, dtype=dtype)
        first = self.weights[0]
        self._out_SBD, self._down_SBD = (
            torch.zeros(linear_slices(weight.T), rows, size, device=device) for weight in (first.o, first.mlp.down_FD)
        )  # fmt: skip
        self._act_FB = torch.zeros(neurons, padded_rows(rows), device=device, dtype=dtype)
        self._row_mask_F, self._union_F = torch.zeros(2, neurons, dtype=torch.int32, device=device).unbind(0)
        shares = shares_of(size, DownShape(), device) if deterministic else 0
        self._sums = torch.zeros(shares, rows, size, device=device)
        self._row_counts = torch.zeros(model.counts.shape[0], rows, layers, dtype=torch.int32, device=device)
        self._union_counts = torch.zeros(layers, dtype=torch.int32, device=device)
        self._groups_LBG = torch.zeros(layers, rows, config.num_kv_heads, dtype=torch.int32, device=device)
        self._kept = {
            (index, point): torch.zeros(rows, kept.norm.shape[0], device=device, dtype=dtype)
            for index, layer in enumerate(model.inputs if record else ())
            for point, kept in ({} if layer is None else layer.points).items()
        }
        self._row_masks_LF = torch.zeros(layers, neurons, dtype=torch.int32, device=device) if record else None
        self.dense_layers = frozenset(index for index, own in enumerate(model.predictors) if own.selector is None)
        self.dense_heads = False
        self._gates = [self._gate_of(index, own) for index, own in enumerate(model.predictors)]
        self._halves = [self._rows_of(index, own, rows) for index, own in enumerate(model.predictors)]
        self.logits = torch.zeros(rows, config.vocab_size, device=device)
        self._start()

    @property
    def counts(self) -> Tensor:
        return self._row_counts

    @property
    def unions(self) -> Tensor:
        return self._union_counts

    @property
    def fallback_layers(self) -> int:
        """How many of the layers that select neurons run dense, as that was measured to be faster."""
        return sum(self.predictors[index].neurons is not None for index in self.dense_layers)

    def neurons_of(self, index: int, row: int) -> Tensor | None:
        """See Step; where they are recorded."""
        if index in self.dense_layers:
            return None
        assert self._row_masks_LF is not None
        return ((self._row_masks_LF[index] >> row) & 1).nonzero().squeeze(1)

    def groups_of(self, index: int, row: int) -> Tensor | None:
        if self.predictors[index].group_scores is None:
            return None
        return self._groups_LBG[index, row, : int(self._row_counts[1, row, index])].long()

    def inputs_of(self, index: int, point: str, row: int) -> Tensor:
        """See Step; where they are recorded: zero ones never are."""
        return self._kept[index, point][row].nonzero().squeeze(1)

    def settle(self) -> None:
        if self.crossover is not None:
            self.run()  # and nothing behind it: what is measured then writes where this step does
            self.crossover.settle(self)

    def run(self) -> None:
        """Start every kernel on the current stream."""
        config = self.config
        model = self.model
        self._row_counts.copy_(self._first_counts)
        self._union_counts.copy_(self._first_unions)
        delta: Tensor = self._delta_BD
        embed_rows(
            self.inputs[0], self.inputs[2], model.embed, model.positions, config.position_offset, self._y_BD, self._delta_BD,
            scale=model.embed_scale,
        )  # fmt: skip
        for index in range(config.num_layers):
            delta = self._layer(index, delta)
        norm_rows(self._y_BD, delta, model.final_norm, self._x_BD, added=model.joined(config.num_layers), programmatic=True)
        linear_rows(self._x_BD, model.head, None, self.logits, programmatic=True)
        finish_logits(self.logits, scale=config.logit_scale, cap=config.logit_cap)

    def _rows_of(
        self, index: int, own: LayerPredictors, rows: int
    ) -> tuple[Side | None, GroupScores | None, Side | None, UnionScores | None]:
        """One layer's predictors with room for several rows: the halves of the heads' and of the neurons'."""
        heads_first = neurons_first = groups = neurons = None
        if own.group_scores is not None and own.heads_first is not None:
            heads_first = _for_rows(own.heads_first, rows)
            groups = dataclasses.replace(
                own.group_scores, h=heads_first.out, groups=self._groups_LBG[index], count=self._row_counts[1, :, index : index + 1]
            )
        if own.neurons is not None and own.neurons_first is not None:
            neurons_first = _for_rows(own.neurons_first, rows)
            own_scores = {field.name: getattr(own.neurons, field.name) for field in dataclasses.fields(PredictorScores)}
            neurons = UnionScores(
                **own_scores | {"h": neurons_first.out},
                slot_B=self.inputs[1],
                padding=self.padding,
                row_mask_F=self._row_mask_F,
                union=self._union_F,
                count=self._union_counts[index : index + 1],
                row_count=self._row_counts[0, :, index : index + 1],
            )
        return heads_first, groups, neurons_first, neurons

    def _gate_of(self, index: int, own: LayerPredictors) -> GateRows | None:
        if own.gate_neurons is None:
            return None
        count, row_count = self._union_counts[index : index + 1], self._row_counts[0, :, index : index + 1]
        return GateRows(
            threshold=own.gate_neurons.threshold, row_mask_F=self._row_mask_F, union=self._union_F, count=count, row_count=row_count
        )

    def _start(self) -> None:
        """What the counts are before a step: nothing where it selects, everything where it does not."""
        config = self.config
        self._first_counts, self._first_unions = torch.zeros_like(self._row_counts), torch.zeros_like(self._union_counts)
        for index, own in enumerate(self.predictors):
            if index in self.dense_layers:
                self._first_counts[0, :, index] = self._first_unions[index] = config.intermediate_size
            if own.group_scores is None or self.dense_heads:
                self._first_counts[1, :, index] = config.num_kv_heads
        for index, layer in enumerate(self.model.inputs):
            for at, size in enumerate(all_counts(config, inputs=True)[2 : len(self._first_counts)]):
                if layer is None or not layer.selects[at]:
                    self._first_counts[2 + at, :, index] = size

    def _layer(self, index: int, delta: Tensor) -> Tensor:
        """One layer; what it adds to the residual stream last, or the parts of it, which the next norm takes in."""
        layer, own, x_BD = self.weights[index], self.predictors[index], self._x_BD
        heads_first, groups, neurons_first, neurons = self._halves[index]
        gate_rows, product_BF = self._gates[index], None
        if index in self.dense_layers:
            neurons_first = neurons = None
        if self.dense_heads:
            heads_first = groups = None
        early = neurons if own.neurons_lookahead > 0 else None  # selected beside attention
        norm_rows(self._y_BD, delta, layer.norm1, x_BD, added=self.model.joined(index), programmatic=True)
        if groups is not None and heads_first is not None:
            if not own.heads_before:
                project_rows(heads_first, x_BD, programmatic=True)
            group_rows(groups, programmatic=True)
        read_BD, side = self._masked(index, "attention", x_BD), neurons_first if own.neurons_lookahead == 1 else None
        assert side is None or read_BD is x_BD, "a layer selects neurons or inputs"
        linear_rows(read_BD, layer.qkv, layer.qkv_bias, self._qkv_BW, side=side, programmatic=True)
        self._attend(index, self._qkv_BW, groups, early)
        self._output(index)
        cleared = None if neurons is None and gate_rows is None else self._delta_BD
        norm_rows(self._y_BD, self._out_SBD, layer.norm2, x_BD, cleared, added=layer.attention_out, programmatic=True)
        if neurons is not None and neurons_first is not None:
            if early is None:
                project_rows(neurons_first, x_BD, programmatic=True)
                select_rows(neurons, programmatic=True)
        elif gate_rows is not None:
            product_BF = self._gate_products(layer.mlp)
            select_gate_rows(
                product_BF, gate_rows, layer.mlp.activation, layer.mlp.activation_threshold, self.inputs[1], self.padding, programmatic=True
            )
        if self._row_masks_LF is not None and index not in self.dense_layers:
            self._row_masks_LF[index].copy_(self._row_mask_F)
        self._run_before(index + 1)
        if index in self.dense_layers:
            return self._dense_mlp(index)
        return self._union_mlp(index, product_BF)

    def _dense_mlp(self, index: int) -> Tensor:
        """Parts [slices, B, D] of the MLP with every neuron."""
        mlp = self.weights[index].mlp
        activated_rows(self._masked(index, "mlp", self._x_BD), mlp, self._act_BF, programmatic=True)
        act_BF = self._masked(index, "down", self._act_BF)
        linear_rows(act_BF, mlp.down_FD.T, mlp.down_bias_D, self._down_SBD, programmatic=True)
        return self._down_SBD

    def _gate_products(self, mlp: MlpWeights) -> Tensor:
        """What the activation is of, [B, F]: products with the gate, or with up where there is none."""
        weight_FD, bias_F = (mlp.up_FD, mlp.up_bias_F) if mlp.gate_FD is None else (mlp.gate_FD, mlp.gate_bias_F)
        linear_rows(self._x_BD, weight_FD, bias_F, self._act_BF, programmatic=True)
        return self._act_BF

    def _masked(self, index: int, point: str, x_BI: Tensor) -> Tensor:
        """What each row keeps at a point, the rest set to zero; x itself where a layer keeps all."""
        layer, at = self.model.inputs[index], POINTS.index(point)
        if layer is None or not layer.selects[at]:
            return x_BI
        kept, out_BI = layer.points[point], self._kept.get((index, point))
        out_BI = torch.empty_like(x_BI) if out_BI is None else out_BI
        mask_rows(x_BI, kept.norm, kept.threshold, out_BI, self._row_counts[2 + at, :, index : index + 1], programmatic=True)
        return out_BI

    def _attend(self, index: int, qkv_BW: Tensor, scores: GroupScores | None, select: UnionScores | None = None) -> None:
        """Store the rows' keys and values and put their heads together in `_mixed_BHK`; select: neurons that are selected beside that."""
        chosen = (None, None) if scores is None else (scores.groups, scores.count)
        whole = self._whole if scores is None else None
        attend(
            qkv_BW, self.cache.k_LPGSK[index], self.cache.v_LPGSK[index], self._places, self._partials, heads=self.config.num_heads,
            how=self.weights[index].scores, groups_BG=chosen[0], count_B=chosen[1], select=select, whole=whole,
            programmatic=True,
        )  # fmt: skip
        if whole is None:
            combine_rows(self._partials, *chosen, self._mixed_BHK, programmatic=True)

    def _output(self, index: int) -> None:
        """Parts [slices, B, D] of what attention gives, in `_out_SBD`."""
        layer = self.weights[index]
        mixed_BQ = self._masked(index, "output", self._mixed_BHK.flatten(1))
        linear_rows(mixed_BQ, layer.o.T, layer.o_bias, self._out_SBD, programmatic=True)

    def _run_before(self, index: int) -> None:
        """The first halves of the next layer's predictors that read this layer's MLP input."""
        if index == self.config.num_layers:
            return
        own = self.predictors[index]
        heads_first, _, neurons_first, _ = self._halves[index]
        if heads_first is not None and own.heads_before and not self.dense_heads:
            project_rows(heads_first, self._x_BD, programmatic=True)
        if neurons_first is not None and own.neurons_lookahead == 2 and index not in self.dense_layers:
            project_rows(neurons_first, self._x_BD, programmatic=True)

    def _union_mlp(self, index: int, product_BF: Tensor | None = None) -> Tensor:
        """product_BF: products with the gate, where it selected."""
        mlp = self.weights[index].mlp
        out = self._sums if self.deterministic else self._delta_BD
        union, count = self._union_F, self._union_counts[index : index + 1]
        early = self.predictors[index].neurons_lookahead > 0 and not self.deterministic
        if self.deterministic:  # a union in order, so that sums are too
            chosen_F = (self._row_mask_F != 0).int()
            place_F = torch.where(chosen_F == 1, chosen_F.cumsum(0) - 1, chosen_F.shape[0]).long()
            ordered = torch.zeros(chosen_F.shape[0] + 1, dtype=torch.int32, device=chosen_F.device)
            ordered.scatter_(0, place_F, torch.arange(chosen_F.shape[0], dtype=torch.int32, device=chosen_F.device))
            union = ordered
        if product_BF is None:
            mlp_rows(
                self._x_BD,
                mlp,
                self._row_mask_F,
                union,
                count,
                self._act_FB,
                out,
                partial=self.deterministic,
                early=early,
                programmatic=True,
            )
        else:
            up_given_rows(self._x_BD, product_BF, mlp, self._row_mask_F, union, count, self._act_FB, programmatic=True)
            down_rows(self._act_FB, mlp, union, count, out, partial=self.deterministic, programmatic=True)
        return self._sums.sum(0) if self.deterministic else self._delta_BD

    def run_dense(self, layers: frozenset[int], *, heads: bool = False) -> None:
        """Run these layers, and heads, dense from now on, too. Where they do, nothing changes: a graph may read what `_start` replaces."""
        if not layers <= self.dense_layers or heads > self.dense_heads:
            self.dense_layers |= layers
            self.dense_heads |= heads
            self._start()

    # For timing (crossover.py): work of one layer, whose selection, keys, values and results are then not those of the rows.

    def attention_ways(self, index: int) -> tuple[Callable[[], None], Callable[[], None]]:
        """Attention at the positions of the last run, over selected heads, with their selection, and over all."""
        first, scores, _, _ = self._halves[index]
        assert first is not None and scores is not None
        linear_rows(self._x_BD, self.weights[index].qkv, self.weights[index].qkv_bias, self._qkv_BW)

        def selected() -> None:
            project_rows(first, self._x_BD, programmatic=True)
            group_rows(scores, programmatic=True)
            self._attend(index, self._qkv_BW, scores)

        return selected, lambda: self._attend(index, self._qkv_BW, None)

    def union_mlp(self, index: int, count: int) -> Callable[[], None]:
        """A layer without norms: its MLP over a union of so many neurons, anywhere, and its selection. Counts of the step are lost."""
        _, _, first, scores = self._halves[index]
        layer, early = self.weights[index], self.predictors[index].neurons_lookahead > 0
        assert first is not None and scores is not None
        self._union_F.copy_(torch.randperm(self.config.intermediate_size, device=self._union_F.device))

        def work() -> None:
            self._union_counts[index].zero_()
            linear_rows(self._x_BD, layer.qkv, layer.qkv_bias, self._qkv_BW, side=first if early else None, programmatic=True)
            self._attend(index, self._qkv_BW, None, scores if early else None)
            if not early:
                project_rows(first, self._x_BD, programmatic=True)
                select_rows(scores, programmatic=True)
            self._union_counts[index].fill_(count)
            self._output(index)
            self._union_mlp(index)

        return work

    def dense_mlp(self, index: int) -> Callable[[], object]:
        """The same layer with a dense MLP."""
        layer = self.weights[index]

        def work() -> None:
            linear_rows(self._x_BD, layer.qkv, layer.qkv_bias, self._qkv_BW, programmatic=True)
            self._attend(index, self._qkv_BW, None)
            self._output(index)
            self._dense_mlp(index)

        return work


def _for_rows(side: Side, rows: int) -> Side:
    return dataclasses.replace(side, out=torch.zeros(rows, side.matrix.shape[0], device=side.out.device))
