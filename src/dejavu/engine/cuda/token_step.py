"""One token of one sequence on the GPU: the kernels of a decode step, in order, each started on what the last ones left.

    embed; for each layer: q, k, v (with the norm, the heads' selection, the A of the neurons' predictor);
    attention, with the neurons' selection in parallel; rows of O; the MLP (with the norm, the A of the next layer's predictors);
    the head (with the norm)

Four kernels a layer. The residual stream is y + delta: q, k, v read y0 + delta_mlp and write the sum to y1, to which O adds
delta_attention; the MLP reads y1 + delta_attention, writes the sum to y0 and adds its own to delta_mlp. Deltas are set to zero
by a kernel that runs while nobody reads or adds to them.

Where the gate selects neurons, the MLP is one kernel too, which selects as it goes.
Where inputs are selected, q, k, v, O, gate and up, and down are a kernel each, which makes its input, keeps some of it and sums their rows.

Letters: B rows (1)  D model  L layers  H query heads  G key/value heads  K head_dim  V vocabulary  W = (H + 2G) K
I inputs of a map  O outputs of a map  S slices of inputs
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dejavu.engine.cache import PagedCache
from dejavu.engine.cuda.capabilities import CUDA
from dejavu.engine.cuda.weights import InputLayer, LayerPredictors, StepModel, all_counts
from dejavu.kernels.cuda.attention import Partials, Places, attend, output_token, splits_for
from dejavu.kernels.cuda.common import BlockOutput, NormWeights, Side
from dejavu.kernels.cuda.embed import embed_rows
from dejavu.kernels.cuda.gate import GateNeurons, mlp_by_gate
from dejavu.kernels.cuda.inputs import ActivatedInputs, HeadInputs, KeptInputs, NormedInputs, sum_inputs, sum_scratch, sum_slices
from dejavu.kernels.cuda.logits import finish_logits
from dejavu.kernels.cuda.mlp import mlp_token, programs_of
from dejavu.kernels.cuda.project import project_token
from dejavu.kernels.cuda.select import NeuronScores, order_list, select_token
from dejavu.kernels.cuda.shapes import grid_shape, measured_shape


class TokenStep:
    """The kernels of a step of one row, over memory that stays where it is: a graph of them can be replayed.

    ahead: where neurons are selected whose predictor reads something that exists early: "beside" attention in its own kernel,
    on a "branch" of the graph, or "in-line" before the MLP. deterministic: sums in a fixed order, for a few kernels more.
    """

    def __init__(
        self,
        model: StepModel,
        cache: PagedCache,
        *,
        tokens: int,
        ahead: str,
        deterministic: bool,
        inputs: Tensor,
    ) -> None:
        assert ahead in CUDA.ahead and inputs.shape == (3, 1)
        config, device = model.config, model.head.device
        self.model, self.cache = model, cache
        self.config, self.weights, self.predictors = config, model.weights, model.predictors
        self.ahead, self.deterministic = ahead, deterministic
        self.inputs = inputs  # int32 [3, 1]: token, slot, position
        size, neurons = config.hidden_size, config.intermediate_size
        self._chained = not deterministic and ahead != "branch"  # kernels may start before the one before has ended
        self._y0, self._y1 = torch.zeros(2, size, device=device).unbind(0)
        by_inputs = [index for index, layer in enumerate(model.inputs) if layer is not None]
        up_width = neurons * (2 if config.gated else 1) if by_inputs else 0
        self._mlp_sums = torch.zeros(size + up_width, device=device)  # side by side, for attention to clear
        self._delta_mlp, self._up = self._mlp_sums.split([size, up_width])
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self._delta_attention, self._qkv = torch.zeros(size, device=device), torch.zeros(1, width, device=device)
        splits = splits_for(1, config.num_heads, device, tokens=tokens)
        self._partials = Partials(
            mixed=torch.zeros(1, config.num_heads, splits, config.head_dim, device=device),
            stats=torch.zeros(1, config.num_heads, splits, 2, device=device),
        )
        self._places = Places(slot_B=inputs[1], position_B=inputs[2], table=cache.table)
        # Sums in a fixed order are those of shapes that no timing chose.
        chosen = (lambda kernel: measured_shape(kernel, size)) if deterministic else (lambda kernel: grid_shape(kernel, size, device))
        self._shape, self._gate_shape = chosen("gated mlp" if config.gated else "mlp"), chosen("mlp by gate")
        self._product_shape = chosen("project")
        self._first_counts: Tensor | None = None
        if by_inputs:
            queries = config.num_heads * config.head_dim
            matrices = ((size, width), (queries, size), (size, up_width), (neurons, size))
            self._sums = InputSums(matrices, device, deterministic=deterministic, chained=self._chained)
            every = torch.tensor(all_counts(config, inputs=len(model.counts) > 2), dtype=torch.int32, device=device)
            self._first_counts = every[:, None].repeat(1, config.num_layers)
            self._first_counts[2:, by_inputs] = 0
        if deterministic:
            programs = max(programs_of(shape, device) for shape in (self._shape, self._gate_shape))
            self._program_sums = torch.zeros(programs, size, device=device)
            self._head_sums = torch.zeros(config.num_heads, size, device=device)
            self._marks, self._ordered = torch.zeros(2, neurons, dtype=torch.int32, device=device).unbind(0)
        self.logits = torch.zeros(1, config.vocab_size, device=device)
        self._branch = torch.cuda.Stream(device) if ahead == "branch" and device.type == "cuda" else None

    @property
    def counts(self) -> Tensor:
        return self.model.counts[:, None]

    @property
    def unions(self) -> None:
        return None

    @property
    def fallback_layers(self) -> int:
        return 0

    def settle(self) -> None:
        """Nothing is chosen by measurement."""

    def neurons_of(self, index: int, row: int) -> Tensor | None:
        own = self.predictors[index]
        if own.gate_neurons is not None:
            return own.gate_neurons.marks.nonzero().squeeze(1)
        return None if own.neurons is None else _listed(own.neurons.neurons, own.neurons.count)

    def groups_of(self, index: int, row: int) -> Tensor | None:
        scores = self.predictors[index].group_scores
        return None if scores is None else scores.groups[: int(scores.count)].long()

    def inputs_of(self, index: int, point: str, row: int) -> Tensor:
        layer = self.model.inputs[index]
        assert layer is not None
        return _listed(layer.points[point].inputs, layer.points[point].count)

    def run(self) -> None:
        """Start every kernel on the current stream. Afterwards `logits` and the predictors' counts are the step's."""
        model = self.model
        first = self._y0[None], self._delta_mlp[None]
        if self._first_counts is not None:
            model.counts.copy_(self._first_counts)
        embed_rows(
            self.inputs[0], self.inputs[2], model.embed, model.positions, self.config.position_offset, *first, scale=model.embed_scale
        )
        for index, by_inputs in enumerate(model.inputs):
            if by_inputs is None:
                self._attention(index)
                self._mlp(index)
            else:
                self._layer_of_inputs(index, by_inputs)
        last = model.joined(self.config.num_layers)
        project_token(
            self._y0, self._delta_mlp, model.final_norm, model.head, None, self.logits[0], added=last, shape=self._product_shape,
            programmatic=self._chained,
        )  # fmt: skip
        finish_logits(self.logits, scale=self.config.logit_scale, cap=self.config.logit_cap)

    def _attention(self, index: int) -> None:
        """A layer but for its MLP, with the selection of the neurons that can be selected in parallel with attention."""
        layer, own, config, chained = self.weights[index], self.predictors[index], self.config, self._chained
        groups, selector = own.group_scores, own.selector
        if own.own_heads is not None:
            self._first_half(index, self._y0, self._delta_mlp, layer.norm1, own.own_heads, self.model.joined(index))
        project_token(
            self._y0, self._delta_mlp, layer.norm1, layer.qkv, layer.qkv_bias, self._qkv[0],
            added=self.model.joined(index), queries=config.num_heads * config.head_dim, num_groups=config.num_kv_heads, scores=groups,
            side=own.with_qkv, y_out_D=self._y1, cleared_D=self._delta_attention, counter=None if selector is None else selector.count,
            shape=self._product_shape, programmatic=chained,
        )  # fmt: skip
        early = self._early(own)
        if self._branch is not None and early is not None:
            self._branch.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._branch):
                select_token(early)
        attend(
            self._qkv, self.cache.k_LPGSK[index], self.cache.v_LPGSK[index], self._places, self._partials, heads=config.num_heads,
            how=layer.scores, groups_BG=None if groups is None else groups.groups[None], count_B=None if groups is None else groups.count,
            select=early if self.ahead == "beside" else None, cleared=self._mlp_sums, programmatic=chained,
        )  # fmt: skip
        output_token(
            self._partials, layer.o, layer.o_bias, self._head_sums if self.deterministic else self._delta_attention,
            num_groups=config.num_kv_heads, groups_G=None if groups is None else groups.groups,
            count=None if groups is None else groups.count,
            partial=self.deterministic, programmatic=chained,
        )  # fmt: skip
        if self.deterministic:
            torch.sum(self._head_sums, 0, out=self._delta_attention)

    def _mlp(self, index: int) -> None:
        layer, own = self.weights[index], self.predictors[index]
        side = self._before(index + 1)
        if own.gate_neurons is not None:
            self._gate_mlp(index, own.gate_neurons, side)
            return
        listed_early = self._selected_late(index, self._early(own))
        neurons = own.neurons
        if neurons is not None and self.deterministic:
            order_list(neurons.neurons, neurons.count, self._marks, self._ordered)
        sums = self._program_sums[: programs_of(self._shape, self._y0.device)] if self.deterministic else self._delta_mlp
        mlp_token(
            self._y1, self._delta_attention, self._y0, sums, layer.norm2, layer.mlp,
            None if neurons is None else self._ordered if self.deterministic else neurons.neurons,
            None if neurons is None else neurons.count,
            added=layer.attention_out, side=side, shape=self._shape, partial=self.deterministic,
            programmatic=self._chained and listed_early,
        )  # fmt: skip
        if self.deterministic:
            torch.sum(sums, 0, out=self._delta_mlp)

    def _gate_mlp(self, index: int, gate: GateNeurons, side: Side | None) -> None:
        """The MLP whose neurons its gate (an ungated one's activation) selects; the counter was set to zero with q, k and v."""
        layer, device = self.weights[index], self._y0.device
        programs = programs_of(self._gate_shape, device)
        out = self._program_sums[:programs] if self.deterministic else self._delta_mlp
        mlp_by_gate(
            self._y1, self._delta_attention, self._y0, out, layer.norm2, layer.mlp, gate, added=layer.attention_out,
            side=side, shape=self._gate_shape, partial=self.deterministic, programmatic=self._chained,
        )  # fmt: skip
        if self.deterministic:
            torch.sum(out, 0, out=self._delta_mlp)

    def _layer_of_inputs(self, index: int, inputs: InputLayer) -> None:
        layer, points, config, sums, chained = self.weights[index], inputs.points, self.config, self._sums, self._chained
        mlp = layer.mlp
        normed = NormedInputs(
            y=self._y0, delta=self._delta_mlp, y_out=self._y1, norm=layer.norm1, added=self.model.joined(index)
        )  # fmt: skip
        sums.add(normed, points["attention"], inputs.qkv, layer.qkv_bias, sums.qkv)
        attend(
            sums.qkv[None], self.cache.k_LPGSK[index], self.cache.v_LPGSK[index], self._places, self._partials, heads=config.num_heads,
            how=layer.scores, cleared=self._mlp_sums, programmatic=chained,
        )  # fmt: skip
        sums.add(HeadInputs(partials=self._partials), points["output"], layer.o, layer.o_bias, sums.attention, cleared=sums.qkv)
        side = self._before(index + 1)
        if side is not None:
            self._first_half(index, self._y1, sums.attention, layer.norm2, side, layer.attention_out)
        normed = NormedInputs(y=self._y1, delta=sums.attention, y_out=self._y0, norm=layer.norm2, added=layer.attention_out)
        sums.add(normed, points["mlp"], inputs.up, inputs.up_bias, self._up)
        activated = ActivatedInputs(
            sums=self._up, activation=mlp.activation, activation_threshold=mlp.activation_threshold, gated=config.gated
        )  # fmt: skip
        sums.add(activated, points["down"], mlp.down_FD, mlp.down_bias_D, self._delta_mlp, cleared=sums.attention)

    def _before(self, index: int) -> Side | None:
        """What the predictors of a layer read, computed with the MLP of the one before."""
        return self.predictors[index].before if index < self.config.num_layers else None

    def _early(self, own: LayerPredictors) -> NeuronScores | None:
        """What selects neurons by an h that is there before attention."""
        return own.neurons if own.own_mlp is None else None

    def _first_half(self, index: int, y_D: Tensor, delta_D: Tensor, norm: NormWeights, side: Side, added: BlockOutput) -> None:
        """A predictor's A in a kernel of its own: side rows of a product of no rows."""
        nothing = self.weights[index].qkv[:0]
        project_token(
            y_D, delta_D, norm, nothing, None, self._qkv[0], added=added, side=side, shape=self._product_shape, programmatic=self._chained
        )

    def _selected_late(self, index: int, early: NeuronScores | None) -> bool:
        """Select what was not selected together with attention; whether the MLP's list was there before the kernel before it."""
        own, layer = self.predictors[index], self.weights[index]
        if own.neurons is None:
            return True
        if early is not None and self.ahead == "beside":
            return True
        if early is not None and self._branch is not None:
            torch.cuda.current_stream().wait_stream(self._branch)
            return False
        if own.own_mlp is not None:
            self._first_half(index, self._y1, self._delta_attention, layer.norm2, own.own_mlp, layer.attention_out)
        select_token(own.neurons, programmatic=self._chained)
        return False


class InputSums:
    """Layers that select inputs: products of what their points keep, and the memory that they take.

    qkv and attention: sums of q, k, v, [W], and of O, [D]; zero before a layer and after it. deterministic: sums in a fixed order, for more
    kernels. chained: kernels may start before the one before has ended.
    """

    def __init__(self, matrices: Sequence[tuple[int, int]], device: torch.device, *, deterministic: bool, chained: bool) -> None:
        """matrices: inputs and outputs of each map, q, k, v first, then O."""
        self._deterministic, self._chained = deterministic, chained
        self.qkv, self.attention = (torch.zeros(outputs, device=device) for _, outputs in matrices[:2])
        listed = max(sum_scratch(*size, device) for size in matrices)
        self._scratch = torch.zeros(listed, dtype=torch.int32, device=device), torch.zeros(listed, device=device)
        parts = max(sum_slices(*size, device) * size[1] for size in matrices) if deterministic else 0
        self._parts = torch.zeros(parts, device=device)

    def add(
        self,
        x: NormedInputs | HeadInputs | ActivatedInputs,
        kept: KeptInputs,
        weight_IO: Tensor,
        bias_O: Tensor | None,
        out_O: Tensor,
        *,
        cleared: Tensor | None = None,
    ) -> None:
        """out_O, which holds zeros, becomes the product. cleared: sums that nobody reads any more."""
        if not self._deterministic:
            sum_inputs(x, kept, self._scratch, weight_IO, bias_O, out_O, cleared=cleared, programmatic=self._chained)
            return
        inputs, size = weight_IO.shape
        slices = sum_slices(inputs, size, weight_IO.device)
        parts_SO = self._parts[: slices * size].view(slices, size)
        sum_inputs(x, kept, self._scratch, weight_IO, bias_O, parts_SO, cleared=cleared, partial=True)
        torch.sum(parts_SO, 0, out=out_O)


def _listed(listed: Tensor, count: Tensor) -> Tensor:
    return listed[: int(count)].long().sort().values
