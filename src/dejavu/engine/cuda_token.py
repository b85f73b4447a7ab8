"""One token of one sequence on the GPU: the kernels of a decode step, in order, each started on what the last ones left.

    embed; for each layer: q, k, v (with the norm, the heads' selection, the A of the neurons' predictor);
    attention, with the neurons' selection beside it; rows of O; the MLP (with the norm, the A of the next layer's predictors);
    the head (with the norm)

Four kernels a layer. The residual stream is y + delta: q, k, v read y0 + delta_mlp and write the sum to y1, to which O adds
delta_attention; the MLP reads y1 + delta_attention, writes the sum to y0 and adds its own to delta_mlp. Deltas are set to zero
by a kernel that runs while nobody reads or adds to them.

Letters: B rows (1)  D model  L layers  H query heads  G key/value heads  K head_dim  V vocabulary  W = (H + 2G) K
"""

from __future__ import annotations

import torch
from torch import Tensor

from dejavu.engine.cache import PagedCache
from dejavu.engine.cuda_weights import StepModel
from dejavu.kernels.cuda.attention import Partials, Places, attend, output_token, splits_for
from dejavu.kernels.cuda.common import NormWeights, Side
from dejavu.kernels.cuda.embed import embed_rows
from dejavu.kernels.cuda.mlp import default_shape, mlp_token, programs_of
from dejavu.kernels.cuda.project import project_token
from dejavu.kernels.cuda.select import NeuronScores, order_token, select_token

AHEAD = ("beside", "branch", "in-line")


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
        assert ahead in AHEAD and inputs.shape == (3, 1)
        config, device = model.config, model.head.device
        self.model, self.cache = model, cache
        self.config, self.weights, self.predictors = config, model.weights, model.predictors
        self.ahead, self.deterministic = ahead, deterministic
        self.inputs = inputs  # int32 [3, 1]: token, slot, position
        size, neurons = config.hidden_size, config.intermediate_size
        self._chained = not deterministic and ahead != "branch"  # kernels may start before the one before has ended
        self._y0, self._y1, self._delta_attention, self._delta_mlp = torch.zeros(4, size, device=device).unbind(0)
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self._qkv = torch.zeros(1, width, device=device)
        splits = splits_for(1, config.num_heads, device, tokens=tokens)
        self._partials = Partials(
            mixed=torch.zeros(1, config.num_heads, splits, config.head_dim, device=device),
            stats=torch.zeros(1, config.num_heads, splits, 2, device=device),
        )
        self._places = Places(slot_B=inputs[1], position_B=inputs[2], table=cache.table, inv_freq=model.inv_freq)
        self._shape = default_shape(size, gated=config.gated)
        if deterministic:
            self._mlp_sums = torch.zeros(programs_of(self._shape, device), size, device=device)
            self._head_sums = torch.zeros(config.num_heads, size, device=device)
            self._marks, self._ordered = torch.zeros(2, neurons, dtype=torch.int32, device=device).unbind(0)
        self.logits = torch.zeros(1, config.vocab_size, device=device)
        self._branch = torch.cuda.Stream(device) if ahead == "branch" and device.type == "cuda" else None

    def run(self) -> None:
        """Start every kernel on the current stream. Afterwards `logits` and the predictors' counts are the step's."""
        model = self.model
        first = self._y0[None], self._delta_mlp[None]
        embed_rows(self.inputs[0], self.inputs[2], model.embed, model.positions, self.config.position_offset, *first)
        for index in range(self.config.num_layers):
            self._layer(index)
        project_token(self._y0, self._delta_mlp, model.final_norm, model.head, None, self.logits[0], programmatic=self._chained)

    def _layer(self, index: int) -> None:
        layer, own, config, chained = self.weights[index], self.predictors[index], self.config, self._chained
        following = self.predictors[index + 1] if index + 1 < config.num_layers else None
        heads = own.heads
        if own.own_heads is not None:
            self._first_half(index, self._y0, self._delta_mlp, layer.norm1, own.own_heads)
        project_token(
            self._y0, self._delta_mlp, layer.norm1, layer.qkv, layer.qkv_bias, self._qkv[0],
            queries=config.num_heads * config.head_dim, num_groups=config.num_kv_heads, scores=heads, side=own.beside,
            y_out_D=self._y1, cleared_D=self._delta_attention, counter=None if own.neurons is None else own.neurons.count,
            programmatic=chained,
        )  # fmt: skip
        early = own.neurons if own.own_mlp is None else None  # its h is there before attention
        if self._branch is not None and early is not None:
            self._branch.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._branch):
                select_token(early)
        attend(
            self._qkv, self.cache.k_LPGSK[index], self.cache.v_LPGSK[index], self._places, self._partials, heads=config.num_heads,
            groups_BG=None if heads is None else heads.groups[None], count_B=None if heads is None else heads.count,
            select=early if self.ahead == "beside" else None, cleared=self._delta_mlp, programmatic=chained,
        )  # fmt: skip
        output_token(
            self._partials, layer.o, layer.o_bias, self._head_sums if self.deterministic else self._delta_attention,
            num_groups=config.num_kv_heads, groups_G=None if heads is None else heads.groups, count=None if heads is None else heads.count,
            partial=self.deterministic, programmatic=chained,
        )  # fmt: skip
        if self.deterministic:
            torch.sum(self._head_sums, 0, out=self._delta_attention)
        listed_early = self._selected_late(index, early)
        neurons = own.neurons
        if neurons is not None and self.deterministic:
            order_token(neurons, self._marks, self._ordered)
        mlp_token(
            self._y1, self._delta_attention, self._y0, self._mlp_sums if self.deterministic else self._delta_mlp, layer.norm2, layer.mlp,
            None if neurons is None else self._ordered if self.deterministic else neurons.neurons,
            None if neurons is None else neurons.count,
            side=None if following is None else following.before, shape=self._shape, partial=self.deterministic,
            programmatic=chained and listed_early,
        )  # fmt: skip
        if self.deterministic:
            torch.sum(self._mlp_sums, 0, out=self._delta_mlp)

    def _first_half(self, index: int, y_D: Tensor, delta_D: Tensor, norm: NormWeights, side: Side) -> None:
        """A predictor's A in a kernel of its own: rows beside a product of no rows."""
        project_token(y_D, delta_D, norm, self.weights[index].qkv[:0], None, self._qkv[0], side=side, programmatic=self._chained)

    def _selected_late(self, index: int, early: NeuronScores | None) -> bool:
        """Select what was not selected beside attention; whether the MLP's list was there before the kernel before it."""
        own, layer = self.predictors[index], self.weights[index]
        if own.neurons is None:
            return True
        if early is not None and self.ahead == "beside":
            return True
        if early is not None and self._branch is not None:
            torch.cuda.current_stream().wait_stream(self._branch)
            return False
        if own.own_mlp is not None:
            self._first_half(index, self._y1, self._delta_attention, layer.norm2, own.own_mlp)
        select_token(own.neurons, programmatic=self._chained)
        return False
