"""How one predictor is made: a closed-form start, then a few passes of gradient descent, then rounding to what is stored.

In: LayerData of a layer (collect.py). Out: a Predictor whose scores rank neurons (or head groups) by how surely they matter.
Start: reduced-rank regression of the pre-activations z = W m + b on the predictor's input x. With the covariances
C = E[x x'] and S = E[m x'], the best linear map is W S C^-1; its best rank-R approximation comes from the SVD of
diag(w) W S C^-1/2 (w weighs a neuron by its contribution). It needs no labels, only two D x D matrices.
Loss, from a score s: "contribution" is  c softplus(-s) + price softplus(s)  with c = |activation| x |down row| over its mean
where active. Its minimum is s = log(E[c | x] / price), so a threshold on s ranks neurons by the contribution to expect, which
is what a selection buys. "bce" is plain binary cross entropy on "the neuron fires", where every active neuron counts alike.

Letters: N tokens  D model  R predictor rank  F neurons  G head groups  O outputs
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dejavu.kernels.quantized import wide
from dejavu.model.predictor import Predictor
from dejavu.model.transformer import Block
from dejavu.offline.collect import BLOCK, LayerData, down_norms, mean_input

MOMENT_CHUNK = 8192  # tokens


def _inverse_root(covariance_DD: Tensor) -> Tensor:
    """C^-1/2 of a covariance, with a ridge that keeps unused directions out."""
    values, vectors = torch.linalg.eigh(covariance_DD.double())
    values = values.clamp_min(0) + 1e-5 * values.mean()
    return ((vectors * values.rsqrt()) @ vectors.T).float()


def _moments(x_ND: Tensor, m_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means of x and m, covariance of x, and cross-covariance of m with x, in fp32; reads a chunk of tokens at a time."""
    mean_x, mean_m = mean_input(x_ND), mean_input(m_ND)
    covariance, cross = torch.zeros(len(mean_x), len(mean_x)), torch.zeros(len(mean_m), len(mean_x))
    for x_chunk, m_chunk in zip(x_ND.split(MOMENT_CHUNK), m_ND.split(MOMENT_CHUNK), strict=True):
        x, m = x_chunk.float() - mean_x, m_chunk.float() - mean_m
        covariance += x.T @ x
        cross += m.T @ x
    return mean_x, mean_m, covariance / len(x_ND), cross / len(x_ND)


def regression_start(
    x_ND: Tensor, target_ND: Tensor, weight_OD: Tensor, bias_O: Tensor, importance_O: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A [R, D], B [O, R], bias [O] of the best rank-R prediction of weight @ target + bias from x, rows weighed by importance."""
    mean_x, mean_m, covariance_DD, cross_DD = _moments(x_ND, target_ND)
    inverse_root = _inverse_root(covariance_DD)
    best_OD = importance_O[:, None] * (weight_OD.float() @ cross_DD @ inverse_root)
    left, singular, right = torch.linalg.svd(best_OD, full_matrices=False)
    rank = min(rank, len(singular))
    scale = singular[:rank].sqrt()
    A_RD = scale[:, None] * (right[:rank] @ inverse_root)
    B_OR = left[:, :rank] * scale / importance_O[:, None]
    return A_RD, B_OR, bias_O.float() + weight_OD.float() @ mean_m - B_OR @ (A_RD @ mean_x)


CONTRIBUTION_PRICE = 0.3  # moves all scores alike; near the threshold's usual place, where float resolution is best


class _Scorer(nn.Module):
    """The trainable form of a predictor: of inputs less their mean, else every step of A moves all scores by its product with the mean."""

    def __init__(self, A_RD: Tensor, B_OR: Tensor, bias_O: Tensor, mean_D: Tensor) -> None:
        super().__init__()
        bias_O = bias_O + B_OR @ (A_RD @ mean_D)
        self.A_RD, self.B_OR, self.bias_O = (nn.Parameter(t.contiguous().clone()) for t in (A_RD, B_OR, bias_O))
        self.mean_D = mean_D

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.linear(F.linear(x_ND.float() - self.mean_D, self.A_RD), self.B_OR, self.bias_O)

    @torch.no_grad()
    def predictor(self, lookahead: int) -> Predictor:
        A_RD, B_OR, bias_O = (weight.detach() for weight in (self.A_RD, self.B_OR, self.bias_O))
        return Predictor(A_RD=A_RD, B_OR=B_OR, bias_O=bias_O - B_OR @ (A_RD @ self.mean_D), threshold=0.0, lookahead=lookahead)


def start_mlp(data: LayerData, block: Block, rank: int, lookahead: int, tokens: int) -> Predictor:
    """The closed-form MLP predictor of a layer, from its first `tokens` tokens; scores are in units of a logit."""
    module = block.activated
    weight_FD, bias = wide(module.matrix).float(), torch.zeros(module.out_features) if module.bias is None else module.bias.float()
    x_ND, m_ND = data.mlp_input(lookahead)[:tokens], data.mlp_ND[:tokens]
    A_RD, B_OR, bias_O = regression_start(x_ND, m_ND, weight_FD, bias, down_norms(block).clamp_min(1e-6), rank)
    with torch.no_grad():  # a common threshold should mean the same probability for every neuron: divide by what is left unexplained
        sample = slice(0, min(2048, tokens))
        predicted = F.linear(F.linear(x_ND[sample].float(), A_RD), B_OR, bias_O)
        spread_O = (F.linear(m_ND[sample].float(), weight_FD, bias) - predicted).std(0) + 1e-3
    return Predictor(A_RD=A_RD, B_OR=1.7 * B_OR / spread_O[:, None], bias_O=1.7 * bias_O / spread_O, threshold=0.0, lookahead=lookahead)


def contribution_loss(scores: Tensor, contribution: Tensor) -> Tensor:
    """c softplus(-s) + price softplus(s), averaged over tokens and neurons, from scores and contributions [N, F]."""
    share = contribution / (contribution.sum() / (contribution > 0).sum().clamp_min(1) + 1e-12)
    return (share * F.softplus(-scores) + CONTRIBUTION_PRICE * F.softplus(scores)).mean()


def bce_loss(scores: Tensor, contribution: Tensor) -> Tensor:
    """Plain binary cross entropy on "the neuron fires"."""
    return F.binary_cross_entropy_with_logits(scores, (contribution > 0).float())


LOSSES = {"contribution": contribution_loss, "bce": bce_loss}


def _batches(num_tokens: int, batch: int, generator: torch.Generator) -> list[list[int]]:
    """Starts of runs of BLOCK tokens, shuffled, grouped into batches."""
    starts = (torch.randperm(max(1, num_tokens // BLOCK), generator=generator) * BLOCK).tolist()
    per_batch = max(1, batch // BLOCK)
    return [starts[i : i + per_batch] for i in range(0, len(starts), per_batch)]


def train_mlp(
    data: LayerData,
    block: Block,
    start: Predictor,
    *,
    tokens: int,
    epochs: float,
    loss: str,
    learning_rate: float,
    generator: torch.Generator,
) -> Predictor:
    """Gradient descent on the first `tokens` tokens; `epochs` passes (a fraction stops early), learning rate falling to zero."""
    x_ND = data.mlp_input(start.lookahead)
    scorer = _Scorer(wide(start.A_RD), wide(start.B_OR), start.bias_O, mean_input(x_ND[:tokens]))
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    norms_F = down_norms(block)
    per_epoch = len(_batches(tokens, 2048, torch.Generator()))
    total, step = max(1, round(epochs * per_epoch)), 0
    while step < total:
        for starts in _batches(tokens, 2048, generator):
            if step >= total:
                break
            act_NF = torch.cat([data.active.dense(s, min(s + BLOCK, tokens)) for s in starts])
            x = torch.cat([x_ND[s : min(s + BLOCK, tokens)] for s in starts])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, (step + 1) / 20) * (1 - step / total)
            LOSSES[loss](scorer(x), act_NF.abs() * norms_F).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
    return scorer.predictor(start.lookahead)


def train_heads(data: LayerData, rank: int, lookahead: int, *, tokens: int, steps: int, generator: torch.Generator) -> Predictor:
    """A predictor of log(contribution norm) of every head group: linear regression in closed form, then a Huber loss."""
    x_ND, norms_NG = data.head_input(lookahead)[:tokens], data.group_norms_NG[:tokens]
    target_NG = (norms_NG + 1e-4 * norms_NG.mean()).log()
    mean_x, mean_y, covariance_DD, cross_GD = _moments(x_ND, target_NG)
    inverse_root = _inverse_root(covariance_DD)
    best_GD = cross_GD @ inverse_root @ inverse_root
    left, singular, right = torch.linalg.svd(best_GD, full_matrices=False)
    rank = min(rank, len(singular))
    A_RD, B_GR = right[:rank] * singular[:rank, None].sqrt(), left[:, :rank] * singular[:rank].sqrt()
    scorer = _Scorer(A_RD, B_GR, mean_y - B_GR @ (A_RD @ mean_x), mean_x)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(steps):
        rows = torch.randint(len(x_ND), (min(4096, len(x_ND)),), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps)
        F.huber_loss(scorer(x_ND[rows]), target_NG[rows]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return scorer.predictor(lookahead)
