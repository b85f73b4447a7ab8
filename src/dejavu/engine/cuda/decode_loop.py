"""What a decode loop on the GPU adds to a step: how each row is sampled, and what it made so far: tokens, log-probabilities, counts.

After a step's kernels, two sample its logits and one makes the tokens the next step's input: step, sampling and feedback are one
graph, and the host only starts it again. Steps of short and of long sequences share the memory, so that one can take over from the
other between two tokens.

The random numbers of a token depend on its row's seed, on which choice of a request the row is and on its position alone: the same
seed draws the same numbers whatever the batch mates, and whether a text is decoded in one call or in several.

Letters: B rows  V vocabulary  N tokens of the ring  L layers
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dejavu.config import SamplingConfig
from dejavu.engine.interface import Decoded
from dejavu.engine.sampling import stream_digest
from dejavu.kernels.cuda.sample import Ring, SampleSettings, advance_rows, sample_rows, sample_scratch
from dejavu.model.counts import Counts

RING = 256  # steps whose tokens are kept before they are copied away
SETTING_ROWS = 6
COLDEST, HOTTEST = 1e-30, 1e30  # a temperature below is greedy in fp32, one above draws evenly


class DecodeRows:
    """The memory of the rows of one bucket. words int32 [6, B]: the settings, as `packed_settings` lays them out."""

    def __init__(self, rows: int, vocab: int, layers: int, padding: int, device: torch.device, *, counts: int = 2) -> None:
        """counts: kept of each row and layer, see `layer_predictors`."""
        self.words = torch.zeros(SETTING_ROWS, rows, dtype=torch.int32, device=device)
        self.ring = Ring(
            token_NB=torch.zeros(RING, rows, dtype=torch.int32, device=device),
            logprob_NB=torch.zeros(RING, rows, device=device),
            counts_NMBL=torch.zeros(RING, counts, rows, layers, dtype=torch.int32, device=device),
        )
        self._union_NL = torch.zeros(RING, layers, dtype=torch.int32, device=device)  # of steps of several rows
        self.made = torch.zeros(1, dtype=torch.int32, device=device)
        self._token_B = torch.zeros(rows, dtype=torch.int32, device=device)
        self._logprob_B = torch.zeros(rows, device=device)
        self._scratch = sample_scratch(rows, vocab, device)
        self._padding = padding
        self._settings = SampleSettings(
            seed_B=self.words[:2].view(-1).view(torch.int64),
            temperature_B=self.words[2].view(torch.float32),
            top_k_B=self.words[3],
            top_p_B=self.words[4].view(torch.float32),
            step_B=self.words[5],
        )

    def run(self, logits_BV: Tensor, counts_MBL: Tensor, inputs_3B: Tensor, union_L: Tensor | None) -> None:
        """Sample the logits, keep the tokens with the step's counts and union, and make them and the next positions the inputs."""
        if union_L is not None:
            self._union_NL.index_copy_(0, self.made.long(), union_L[None])
        sample_rows(logits_BV, self._settings, self._scratch, self._token_B, self._logprob_B)
        advance_rows(self._token_B, self._logprob_B, counts_MBL, inputs_3B, self.ring, self.made, padding=self._padding)

    def taken(self, tokens: int, rows: int, heads_per_group: int, *, alone: bool, fallback_layers: int) -> Decoded:
        """A copy of the ring's first tokens of the first rows; the ring is written from its start again. alone: a step of one row ran."""
        ring, counts = self.ring, self.ring.counts_NMBL.shape[1]
        union_NL = ring.counts_NMBL[:, 0, 0] if alone else self._union_NL
        found = Decoded(
            token_NB=ring.token_NB[:tokens, :rows].long(),
            logprob_NB=ring.logprob_NB[:tokens, :rows].clone(),
            counts=Counts(
                neurons=ring.counts_NMBL[:tokens, 0, :rows].long(),
                heads=ring.counts_NMBL[:tokens, 1, :rows].long() * heads_per_group,
                kept_inputs=None if counts == 2 else ring.counts_NMBL[:tokens, 2:, :rows].long().permute(0, 2, 3, 1),
            ),
            union_NL=union_NL[:tokens].long(),
            fallback_layers=fallback_layers,
        )
        self.made.zero_()
        return found


def joined(parts: Sequence[Decoded], dim: int) -> Decoded:
    """What was decoded, one after the other by token (dim 0) or by row (dim 1: no union is known then)."""
    if len(parts) == 1:
        return parts[0]
    unions = [part.union_NL for part in parts if part.union_NL is not None]
    return Decoded(
        token_NB=torch.cat([part.token_NB for part in parts], dim),
        logprob_NB=torch.cat([part.logprob_NB for part in parts], dim),
        counts=Counts.cat([part.counts for part in parts], dim),
        union_NL=torch.cat(unions) if dim == 0 and unions else None,
        fallback_layers=max(part.fallback_layers or 0 for part in parts),
    )


def packed_settings(
    sampling: Sequence[SamplingConfig], positions: Sequence[int], rows: int, choices: Sequence[int] | None = None
) -> NDArray[np.int32]:
    """int32 [6, rows]: seeds (int64, over two rows), temperature and top_p (bits of fp32), top_k, step. Rows left over are greedy.

    choices: which choice of a request each row is, 0 without."""
    words = np.zeros((SETTING_ROWS, rows), dtype=np.int32)
    given = len(sampling)
    seeds = np.zeros(rows, dtype=np.uint64)
    seeds[:given] = [stream_seed(config.seed, choice) for config, choice in zip(sampling, choices or (0,) * given, strict=True)]
    words[:2] = seeds.view(np.int32).reshape(2, rows)
    heats = [0.0 if config.temperature < COLDEST else min(config.temperature, HOTTEST) for config in sampling]
    words[2, :given] = np.array(heats, dtype=np.float32).view(np.int32)
    words[3, :given] = [min(config.top_k or 0, 2**31 - 1) for config in sampling]
    shares = [1.0 if config.top_p is None else config.top_p for config in sampling]
    words[4, :given] = np.maximum(np.array(shares, dtype=np.float32), np.finfo(np.float32).tiny).view(np.int32)
    words[5, :given] = positions
    return words


def stream_seed(seed: int | None, choice: int) -> int:
    """The 64 bits of a seed's stream, as `Sampler` makes its own; fresh ones without a seed."""
    if seed is None:
        return secrets.randbits(64)
    return int.from_bytes(stream_digest(seed, choice)[:8], "big")
