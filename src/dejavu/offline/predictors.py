"""How one predictor is made: a closed-form start, then a few passes of gradient descent, then rounding to what is stored.

In: LayerData of a layer (collect.py). Out: a Predictor whose scores rank neurons (or head groups) by how surely they matter.
Start: reduced-rank regression of the pre-activations z = W m + b on the predictor's input x. With the covariances
C = E[x x'] and S = E[m x'], the best linear map is W S C^-1; its best rank-R approximation comes from the SVD of
M = diag(w) W S C^-1/2 (w weighs a neuron by its contribution), whose right vectors are the eigenvectors of M'M. It needs no labels, only
D x D matrices. All of it is computed on the device of the layer, a chunk of tokens at a time, wherever the tokens are kept.
Loss, from a score s: "contribution" is  c softplus(-s) + price softplus(s)  with c = |activation| x |down row| over its mean
where active. Its minimum is s = log(E[c | x] / price), so a threshold on s ranks neurons by the contribution to expect, which
is what a selection buys. "bce" is plain binary cross entropy on "the neuron fires", where every active neuron counts alike.

Letters: N tokens  D model  R predictor rank  F neurons  G head groups  O outputs
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dejavu.kernels.quantized import wide
from dejavu.model.predictor import Predictor
from dejavu.model.transformer import Block
from dejavu.offline.collect import BLOCK, MOMENT_CHUNK, LayerData, down_norms, mean_input


def _inverse_root(covariance_DD: Tensor) -> Tensor:
    """C^-1/2 of a covariance, with a ridge that keeps unused directions out."""
    values, vectors = torch.linalg.eigh(covariance_DD.double())
    values = values.clamp_min(0) + 1e-5 * values.mean()
    return ((vectors * values.rsqrt()) @ vectors.T).float()


def _cross_covariance(m_NO: Tensor, x_ND: Tensor, mean_O: Tensor, mean_D: Tensor) -> Tensor:
    """E[(m - mean m) (x - mean x)'] fp32 [O, D]."""
    cross_OD = torch.zeros(len(mean_O), len(mean_D), device=mean_D.device)
    for m_chunk, x_chunk in zip(m_NO.split(MOMENT_CHUNK), x_ND.split(MOMENT_CHUNK), strict=True):
        m, x = (chunk.to(mean_D.device).float() - mean for chunk, mean in ((m_chunk, mean_O), (x_chunk, mean_D)))
        cross_OD += m.T @ x
    return cross_OD / len(x_ND)


_whitenings = WeakTensorKeyDictionary()  # of inputs that are alive, by how many tokens: predictors of a layer and the next share them


def _whitening(x_ND: Tensor, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and C^-1/2 of the first tokens of an input."""
    found = _whitenings.setdefault(x_ND, {})
    if tokens not in found:
        mean_D = mean_input(x_ND[:tokens], device)
        found[tokens] = mean_D, _inverse_root(_cross_covariance(x_ND[:tokens], x_ND[:tokens], mean_D, mean_D))
    return found[tokens]


def best_of_rank(M_OD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [O, R] and A [R, D] whose product is nearest to M, both with the roots of its singular values; from the smaller Gram matrix."""
    if len(M_OD) < M_OD.shape[1]:
        B_DR, A_RO = best_of_rank(M_OD.T, rank)
        return A_RO.T, B_DR.T
    gram_DD = torch.zeros(M_OD.shape[1], M_OD.shape[1], dtype=torch.float64, device=M_OD.device)
    for rows in M_OD.split(MOMENT_CHUNK):
        gram_DD.addmm_(rows.double().T, rows.double())
    squared, vectors_DD = torch.linalg.eigh(gram_DD)
    least = 1e-12 * squared[-1] + 1e-30  # below it a direction is rounding, which a division would blow up
    root_R = squared.flip(0)[:rank].clamp_min(least).pow(0.25).float()
    right_DR = vectors_DD.flip(1)[:, :rank].float()
    return M_OD @ right_DR / root_R, (right_DR * root_R).T


def regression_start(
    x_ND: Tensor, target_ND: Tensor, tokens: int, weight_OD: Tensor, bias_O: Tensor, importance_O: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A [R, D], B [O, R], bias [O] of the best rank-R prediction of weight @ target + bias from x, rows weighed by importance.

    From the first tokens of x and target, computed where the weight is.
    """
    mean_x, inverse_root = _whitening(x_ND, tokens, weight_OD.device)
    mean_m = mean_input(target_ND[:tokens], weight_OD.device)
    cross_DD = _cross_covariance(target_ND[:tokens], x_ND[:tokens], mean_m, mean_x)
    B_OR, A_RD = best_of_rank(importance_O[:, None] * (weight_OD.float() @ cross_DD @ inverse_root), rank)
    A_RD, B_OR = A_RD @ inverse_root, B_OR / importance_O[:, None]
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
    weight_FD = wide(module.matrix).float()
    bias = weight_FD.new_zeros(module.out_features) if module.bias is None else module.bias.float()
    x_ND, m_ND = data.mlp_input(lookahead), data.mlp_ND
    A_RD, B_OR, bias_O = regression_start(x_ND, m_ND, tokens, weight_FD, bias, down_norms(block).clamp_min(1e-6), rank)
    with torch.no_grad():  # a common threshold should mean the same probability for every neuron: divide by what is left unexplained
        x, m = (inputs_ND[: min(2048, tokens)].to(data.device).float() for inputs_ND in (x_ND, m_ND))
        predicted = F.linear(F.linear(x, A_RD), B_OR, bias_O)
        spread_O = (F.linear(m, weight_FD, bias) - predicted).std(0) + 1e-3
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
    scorer = _Scorer(wide(start.A_RD), wide(start.B_OR), start.bias_O, mean_input(x_ND[:tokens], data.device))
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    norms_F = down_norms(block)
    per_epoch = len(_batches(tokens, 2048, torch.Generator()))
    total, step = max(1, round(epochs * per_epoch)), 0
    while step < total:
        for starts in _batches(tokens, 2048, generator):
            if step >= total:
                break
            act_NF = torch.cat([data.active.dense(s, min(s + BLOCK, tokens), data.device) for s in starts])
            x = torch.cat([x_ND[s : min(s + BLOCK, tokens)].to(data.device) for s in starts])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, (step + 1) / 20) * (1 - step / total)
            LOSSES[loss](scorer(x), act_NF.abs() * norms_F).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
    return scorer.predictor(start.lookahead)


def train_heads(data: LayerData, rank: int, lookahead: int, *, tokens: int, steps: int, generator: torch.Generator) -> Predictor:
    """A predictor of log(contribution norm) of every head group: linear regression in closed form, then a Huber loss."""
    x_ND, norms_NG = data.head_input(lookahead), data.group_norms_NG[:tokens]
    target_NG = (norms_NG + 1e-4 * norms_NG.mean()).log()
    mean_x, inverse_root = _whitening(x_ND, tokens, data.device)
    mean_y = mean_input(target_NG, data.device)
    cross_GD = _cross_covariance(target_NG, x_ND[:tokens], mean_y, mean_x)
    B_GR, A_RD = best_of_rank(cross_GD @ inverse_root @ inverse_root, rank)
    scorer = _Scorer(A_RD, B_GR, mean_y - B_GR @ (A_RD @ mean_x), mean_x)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(steps):
        rows = torch.randint(tokens, (min(4096, tokens),), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps)
        F.huber_loss(scorer(x_ND[rows].to(data.device)), target_NG[rows]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return scorer.predictor(lookahead)
