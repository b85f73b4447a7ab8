"""What it costs to leave values out, for all thresholds at once: one forward and one backward pass instead of a pass for each.

In: a model and windows of token ids. Out: `LayerSlopes` of each layer, the last one first, and of scores and thresholds what is kept and
lost. With g the gradient of -log p(y), y drawn from the model itself, leaving the values S of one point out of a token diverges by

    KL(dense || without S) = 1/2 E[(sum over S of g_i x_i)^2]      to second order

which is the Fisher information along the error (Martens, arXiv 1412.1193). Only the residual streams between layers are kept; each layer
is computed again when its turn comes backward, so that no more than one has a graph.

Letters: W windows  T tokens of a window  N = W x T tokens  I values of a point  K thresholds  F neurons
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.config import Progress
from dejavu.model.finite import require_finite_stream
from dejavu.model.selectors import POINTS
from dejavu.model.transformer import DENSE, LayerInputs, Selection, Transformer
from dejavu.offline.collect import window_names
from dejavu.offline.thresholds import SelectionQuality

LOGITS = 1 << 26  # of tokens whose logits are computed together


@dataclass(frozen=True, slots=True)
class LayerSlopes:
    """One layer. By point: values x [N, I] and their slopes g x [N, I]; gate: what passed the activation [N, F]. All fp32."""

    layer: int
    values: dict[str, Tensor]
    slopes: dict[str, Tensor]
    gate: Tensor


class _Points(Selection):
    """Keeps what every point reads; a view of it, as the residual stream of a post-norm model is read by others too."""

    def __init__(self) -> None:
        self.at: dict[str, Tensor] = {}
        self.gate = torch.empty(0)

    def inputs(self, layer: int, point: str, x: Tensor) -> Tensor:
        self.at[point] = x.view_as(x)
        return self.at[point]

    def neurons(self, layer: int, inputs: LayerInputs, act_BTF: Tensor) -> Tensor:
        assert inputs.gate is not None, "the activated gate is there once neurons are selected"
        self.gate = inputs.gate.detach()
        return act_BTF


def layer_slopes(model: Transformer, ids_WT: Tensor, *, seed: int, progress: Progress | None = None) -> Iterator[LayerSlopes]:
    """The slopes of the last layer, of the one before, ... in turn.

    Raises ValueError, with the first layer and token, for values that are not finite.
    """
    position_T, count = torch.arange(ids_WT.shape[1], device=model.device), model.config.num_layers
    streams, names = list[Tensor](), window_names(0, len(ids_WT))
    with torch.no_grad():
        x_WTD = model.embedded(ids_WT, position_T)
        require_finite_stream(x_WTD, "the embedding", ids_WT, names)
        for layer in range(count):
            streams.append(x_WTD)
            x_WTD, _ = model.layer(layer, x_WTD, position_T, None, DENSE)
            require_finite_stream(x_WTD, f"layer {layer}", ids_WT, names)
    slope_WTD = _head_slopes(model, x_WTD, torch.Generator(model.device).manual_seed(seed))
    for layer in reversed(range(count)):
        seen, x_WTD = _Points(), streams.pop().detach().requires_grad_()
        with torch.enable_grad():
            y_WTD, _ = model.layer(layer, x_WTD, position_T, None, seen)
        found = torch.autograd.grad(y_WTD, [x_WTD, *(seen.at[point] for point in POINTS)], slope_WTD)
        slope_WTD = found[0]
        values = {point: seen.at[point].detach().float().flatten(0, 1) for point in POINTS}
        slopes = {point: values[point] * g.float().flatten(0, 1) for point, g in zip(POINTS, found[1:], strict=True)}
        if progress is not None:
            progress("what each part costs", count - layer, count)
        yield LayerSlopes(layer, values, slopes, seen.gate.float().flatten(0, 1))


def _head_slopes(model: Transformer, x_WTD: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of -log p(y) by the last residual stream, some tokens at a time: about six tensors of the size of their logits are alive."""
    found = []
    for x_ND in x_WTD.flatten(0, 1).split(max(1, LOGITS // model.config.vocab_size)):
        x = x_ND.detach().requires_grad_()
        with torch.enable_grad():
            log_probs_NV = model.logits(x if model.final_norm is None else model.final_norm(x)).log_softmax(-1)
            drawn_N1 = torch.multinomial(log_probs_NV.detach().exp(), 1, generator=generator)
            found += torch.autograd.grad(-log_probs_NV.gather(1, drawn_N1).sum(), x)
    return torch.cat(found).view_as(x_WTD)


@dataclass(frozen=True, slots=True)
class Loss:
    """What the threshold keeps of a part, and the divergence in nats a token of leaving the rest out."""

    threshold: float
    quality: SelectionQuality
    divergence: float


def losses(score_NI: Tensor, slope_NI: Tensor, contribution_NI: Tensor, thresholds: Sequence[float], *, every: int = 1) -> list[Loss]:
    """Of every threshold, from few kept to many: values whose score is not above it are left out.

    The divergence is that of all tokens, what is kept that of one in so many.
    """
    ascending_K = torch.tensor(sorted(thresholds), dtype=torch.float32, device=score_NI.device)
    count, tokens = len(ascending_K), len(score_NI)
    first_NI = torch.bucketize(score_NI, ascending_K)  # the lowest threshold that leaves a value out
    lost_NK = slope_NI.new_zeros(tokens, count + 1).scatter_add_(1, first_NI, slope_NI).cumsum(1)[:, :count]
    first_NI, contribution_NI = first_NI[::every], contribution_NI[::every]

    def kept_share(weight_NI: Tensor) -> list[float]:
        total = torch.bincount(first_NI.flatten(), weights=weight_NI.flatten().double(), minlength=count + 1)
        above = total.flip(0).cumsum(0).flip(0)
        return (above[1:] / above[0].clamp_min(1e-30)).tolist()

    density_K, mass_K = kept_share(torch.ones_like(contribution_NI)), kept_share(contribution_NI)
    recall_K = kept_share((contribution_NI > 0).float())
    divergence_K = (0.5 * lost_NK.square().mean(0)).tolist()
    found = zip(ascending_K.tolist(), density_K, recall_K, mass_K, divergence_K, strict=True)
    return [Loss(t, SelectionQuality(density=d, recall=r, mass=m), lost) for t, d, r, m, lost in found][::-1]
