"""The paper's first experiment: how sparse a model is by nature, before anything is predicted.

In: a model and token ids of documents. Out, per layer: how many neurons fire (`mlp_density`), which are dead, always on or
contextual, how few carry the mass, how much the residual stream turns (`cosine` of before and after the layer), how few
heads carry 90 % of the attention's contribution; and perplexity when an oracle keeps only the part that matters.
Source: Deja Vu, section 3 (arXiv 2310.17157).

Letters: T tokens  D model  F neurons  H query heads  P points of a curve
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.config import Progress, require
from dejavu.model.finite import require_finite_stream
from dejavu.model.transformer import DENSE, LayerInputs, Selection, Transformer
from dejavu.offline.collect import down_norms, group_norms, pack_windows, window_names
from dejavu.offline.fidelity import token_nll
from dejavu.offline.oracle import OracleHeads, OracleNeurons

ALWAYS_ON = 0.99  # share of tokens above which a neuron counts as always on
CURVE_EVERY = 8  # mass curves sort every eighth token
CURVE_DENSITIES = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)
ORACLE_MASSES = (0.8, 0.9, 0.95, 0.98, 0.99, 0.999)


class _LayerTally(Selection):
    """Adds up what one layer does over all tokens."""

    def __init__(self, model: Transformer, layer: int) -> None:
        config = model.config
        self.model, self.block = model, model.blocks[layer]
        self.norms_F = down_norms(self.block)
        self.fired_F = torch.zeros(config.intermediate_size, device=model.device)
        self.tokens = self.sampled = 0
        self.cosine = self.mass99 = self.heads90 = 0.0
        points = sorted({max(1, round(d * config.intermediate_size)) for d in CURVE_DENSITIES})
        self.kept_P = torch.tensor(points, device=model.device)
        self.mass_P = torch.zeros(len(points), device=model.device)
        self.head_share_H = torch.zeros(config.num_heads, device=model.device)

    def heads(self, layer: int, inputs: LayerInputs, mixed_BTHK: Tensor) -> Tensor:
        norms_TH = group_norms(self.block, mixed_BTHK, mixed_BTHK.shape[-2]).flatten(0, -2)
        share_TH = (norms_TH.sort(-1, descending=True).values.cumsum(-1) / norms_TH.sum(-1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
        self.head_share_H += share_TH.sum(0)
        self.heads90 += float(((share_TH < 0.9).sum(-1) + 1).clamp_max(norms_TH.shape[-1]).sum()) / norms_TH.shape[-1]
        return mixed_BTHK

    def neurons(self, layer: int, inputs: LayerInputs, act_BTF: Tensor) -> Tensor:
        act_TF = act_BTF.flatten(0, 1)
        self.fired_F += (act_TF != 0).sum(0)
        self.tokens += len(act_TF)
        sample_TF = act_TF[::CURVE_EVERY].abs().float() * self.norms_F
        ordered = sample_TF.sort(-1, descending=True).values.cumsum(-1)
        total = ordered[:, -1:]
        share = torch.where(total > 0, ordered / total, 1.0)  # a token on which nothing fires loses nothing
        self.mass_P += share[:, self.kept_P - 1].sum(0)
        needed = (share < 0.99).sum(-1).add(1).clamp_max(share.shape[1]) * (total[:, 0] > 0)
        self.mass99 += float(needed.sum()) / share.shape[1]
        self.sampled += len(sample_TF)
        return act_BTF

    def row(self) -> dict[str, Any]:
        rate_F = self.fired_F / self.tokens
        dead, always = float((rate_F == 0).float().mean()), float((rate_F > ALWAYS_ON).float().mean())
        heads = len(self.head_share_H)
        mass = (self.mass_P / self.sampled).tolist()
        return {
            "mlp_density": float(rate_F.mean()),
            "dead": dead,
            "always_on": always,
            "contextual": 1.0 - dead - always,
            "mass99_density": self.mass99 / self.sampled,
            "cosine": self.cosine / self.tokens,
            "heads90": self.heads90 / self.tokens,
            "mass_curve": [[int(k) / len(self.fired_F), m] for k, m in zip(self.kept_P.tolist(), mass, strict=True)],
            "head_curve": [[(i + 1) / heads, s] for i, s in enumerate((self.head_share_H / self.tokens).tolist())],
        }


def _perplexity(model: Transformer, ids_WT: Tensor, selection: Selection = DENSE) -> float:
    return math.exp(float(token_nll(model, ids_WT, selection).double().mean()))


def oracle_curves(model: Transformer, ids_WT: Tensor, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Perplexity on windows [W, T] when only the neurons (or heads) that matter most are kept, against density."""
    heads = model.config.num_heads
    counts = sorted({heads - round(step * heads / 12) for step in range(7)}, reverse=True)  # from all to half
    rows: list[dict[str, Any]] = []
    total = len(ORACLE_MASSES) + len(counts)
    for mass in ORACLE_MASSES:
        oracle = OracleNeurons(model, mass)
        ppl = _perplexity(model, ids_WT, oracle)
        rows.append({"part": "mlp", "density": oracle.counter.mlp_density(), "ppl": ppl, "mass": mass})
        if progress is not None:
            progress("oracle selection", len(rows), total)
    for count in counts:
        rows.append({"part": "heads", "density": count / heads, "ppl": _perplexity(model, ids_WT, OracleHeads(model, count))})
        if progress is not None:
            progress("oracle selection", len(rows), total)
    return rows


@torch.inference_mode()
def profile(
    model: Transformer,
    documents: Mapping[str, Sequence[int]],
    *,
    bos: int | None,
    oracle_tokens: int = 4000,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Profile a dense model on documents (name -> token ids); see the file's docstring for what comes out.

    Raises ValueError, with the first layer and token, for values that are not finite.
    The oracle's perplexities are measured on `oracle_tokens` tokens in all, taken evenly from the documents.
    """
    require(len(documents) > 0, "there is no text to profile on; give --text")
    tallies = [_LayerTally(model, layer) for layer in range(model.config.num_layers)]
    context, windows = model.config.max_positions, []
    for ids in documents.values():
        packed = [ids[first : first + context - 1] for first in range(0, len(ids), context - 1)]
        windows += [torch.tensor([[*([] if bos is None else [bos]), *piece]], device=model.device) for piece in packed if len(piece) > 0]
    for done, ids_1T in enumerate(windows):
        position_T = torch.arange(ids_1T.shape[1], device=model.device)
        x, mlp_in = model.embedded(ids_1T, position_T), None
        require_finite_stream(x, "the embedding", ids_1T, window_names(done, 1))
        for layer, tally in enumerate(tallies):
            before = x
            x, mlp_in = model.layer(layer, x, position_T, mlp_in, tally)
            require_finite_stream(x, f"layer {layer}", ids_1T, window_names(done, 1))
            tally.cosine += float(F.cosine_similarity(before.float(), x.float(), dim=-1).sum())
        if progress is not None:
            progress("natural sparsity", done + 1, len(windows))
    share = max(2, oracle_tokens // len(documents))
    sample = pack_windows([ids[:share] for ids in documents.values()], context=min(context, max(2, oracle_tokens)), bos=bos)
    sample = sample.to(model.device)
    return {
        "layers": [tally.row() for tally in tallies],
        "oracle": oracle_curves(model, sample, progress),
        "ppl_dense": _perplexity(model, sample),
        "tokens": tallies[0].tokens,
        "oracle_tokens": sample.numel(),
    }
