"""The screened head: clusters of the vocabulary, of which likely ones alone get exact logits. The plain definition.

In: the matrix of the head, the second moment of what meets its rows, hidden states. Out: a Screen, and logits with

    mass_C = softmax(M x + b)      kept: clusters with mass_c >= threshold * size_c, and the one whose mass_c / size_c is largest
    logits_v = head_v x for tokens of kept clusters, else -inf

Row c of M is the mean row of cluster c's tokens and b_c = log size_c + half the variance of their logits, so that mass_c estimates the
probability of all of them (of logits that are normally distributed within a cluster), and a cluster is kept where its tokens' mean
probability is at least the threshold. Clusters are those of k-means with the distance that logits have: |x (w - w')| in the mean over x,
which is Euclid's of rows times the root of the second moment S of x; of these DIRECTIONS principal ones count.
Tokens left out have -inf and no estimate: an estimate among exact logits would let a token be drawn for the estimate's error.

Letters: V vocabulary  E width of the head  C clusters  R directions
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.config import require
from dejavu.kernels.quantized import Matrix, QuantizedMatrix, blocks, wide

CLUSTER_TOKENS = 64  # in the mean: few enough to leave most of the head out, and enough that there are few centroids to read
DIRECTIONS = 96
ROUNDS = 8
SAMPLED = 1 << 14  # rows that the directions are worked out of
LEAST = 1e-6  # of the largest eigenvalue of S: smaller ones are noise


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Screen:
    """centroids [C, E] int8 per row, bias_C fp32. members_V: int32, the tokens of one cluster after the other; sizes_C: int32, how many.

    threshold: see above. tokens: of a shortlist, in the mean of what it was measured on; None: not measured.
    """

    centroids: QuantizedMatrix
    bias_C: Tensor
    members_V: Tensor
    sizes_C: Tensor
    threshold: float
    tokens: float | None = None

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        clusters, vocab = len(self.sizes_C), len(self.members_V)
        require(
            self.centroids.shape[0] == len(self.bias_C) == clusters > 0 and bool((self.sizes_C > 0).all()),
            f"a screened head's {clusters} clusters need a centroid, a bias and a token each",
        )
        every = torch.equal(self.members_V.sort().values.long(), torch.arange(vocab))
        require(every and int(self.sizes_C.sum()) == vocab, f"a screened head's clusters must hold each of {vocab} tokens once")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Screen) and self.centroids is other.centroids and self.threshold == other.threshold

    def __hash__(self) -> int:
        return hash((id(self.centroids), self.threshold))

    def at(self, threshold: float, tokens: float | None = None) -> Screen:
        """The same clusters with another threshold."""
        return dataclasses.replace(self, threshold=threshold, tokens=tokens)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.centroids.tensors, self.bias_C, self.members_V, self.sizes_C)


def check_threshold(threshold: float) -> None:
    """Raise ValueError for what is no probability that a token can be left out below."""
    require(0 < threshold < 1, f"a screened head leaves tokens out below a probability between 0 and 1, such as 1e-6, not {threshold:g}")


def ratios(x_BE: Tensor, screen: Screen) -> Tensor:
    """log(mass / size) [B, C] of each cluster for states [B, E]: at which threshold it is left out."""
    scores_BC = x_BE @ wide(screen.centroids).T.to(x_BE.dtype) + screen.bias_C
    return scores_BC.log_softmax(1) - screen.sizes_C.log()


def screened_logits(x_E: Tensor, head_VE: Tensor, screen: Screen) -> Tensor:
    """Logits [V] of one hidden state."""
    ratio_C = ratios(x_E[None], screen)[0]
    kept_C = ratio_C >= torch.tensor(screen.threshold).log()
    kept_C[ratio_C.argmax()] = True
    logits_V, kept_V = head_VE @ x_E, torch.zeros(len(head_VE), dtype=torch.bool)
    kept_V[screen.members_V.long()] = kept_C.repeat_interleave(screen.sizes_C)
    return logits_V.masked_fill(~kept_V, -torch.inf)


@torch.no_grad()
def fit_screen(head: Matrix, second_moment_EE: Tensor, *, threshold: float, clusters: int | None = None, seed: int = 0) -> Screen:
    """Clusters of a head [V, E] by k-means, worked out on the CPU: the same for the same input and seed. clusters: None for one in
    CLUSTER_TOKENS tokens.

    second_moment_EE: the mean of x x^T over hidden states, fp64.
    """
    vocab, width = head.shape
    count = max(1, vocab // CLUSTER_TOKENS) if clusters is None else clusters
    values, vectors_EE = torch.linalg.eigh(second_moment_EE.double())
    root_EE = (vectors_EE * values.clamp(min=float(values[-1]) * LEAST).sqrt() @ vectors_EE.T).float()
    sample = torch.arange(0, vocab, max(1, vocab // SAMPLED))
    rows_SE = _rows(head, sample)
    centred_SE = (rows_SE - rows_SE.mean(0)) @ root_EE
    directions_ER = torch.linalg.eigh((centred_SE.T @ centred_SE).double()).eigenvectors[:, -min(DIRECTIONS, width) :].float()
    parts, root_ER = list(blocks(vocab, width)), root_EE @ directions_ER
    points_VR = torch.cat([_rows(head, part) @ root_ER for part in parts])
    cluster_V = _clusters(points_VR, count, seed)
    present = cluster_V.unique()
    cluster_V = torch.searchsorted(present, cluster_V)
    sizes_C = torch.bincount(cluster_V)
    means_CE, spread_C = torch.zeros(len(present), width), torch.zeros(len(present))
    for part in parts:
        means_CE.index_add_(0, cluster_V[part], _rows(head, part))
    means_CE /= sizes_C[:, None]
    for part in parts:
        spread_C.index_add_(0, cluster_V[part], ((_rows(head, part) - means_CE[cluster_V[part]]) @ root_EE).square().sum(1))
    return Screen(
        centroids=QuantizedMatrix.of(means_CE, "int8"),
        bias_C=sizes_C.log() + spread_C / sizes_C / 2,
        members_V=cluster_V.sort(stable=True).indices.int(),
        sizes_C=sizes_C.int(),
        threshold=threshold,
    )


def _rows(matrix: Matrix, rows: slice | Tensor) -> Tensor:
    return (matrix[rows] if isinstance(matrix, Tensor) else matrix.dequantize(rows)).to("cpu", torch.float32)


def _clusters(points_VR: Tensor, count: int, seed: int) -> Tensor:
    """The cluster of each point, after ROUNDS of k-means that begin with points drawn at random."""
    start = torch.randperm(len(points_VR), generator=torch.Generator().manual_seed(seed))[:count]
    centres_CR, found_V = points_VR[start].clone(), torch.zeros(0, dtype=torch.long)
    for _ in range(ROUNDS):
        half_C = centres_CR.square().sum(1) / 2
        found_V = torch.cat([(part @ centres_CR.T - half_C).argmax(1) for part in points_VR.split(1 << 12)])
        sizes_C = torch.bincount(found_V, minlength=count)
        sums_CR = torch.zeros_like(centres_CR).index_add_(0, found_V, points_VR)
        filled = sizes_C > 0  # a cluster that lost all of its points stays where it was
        centres_CR[filled] = sums_CR[filled] / sizes_C[filled, None]
    return found_V
