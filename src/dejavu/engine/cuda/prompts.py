"""Prompts on the GPU, dense: tokens of one or several sequences go through the layers together, in passes.

In: slots with pages for their tokens, and the tokens. Out: logits after the last token of each, or after every one. Keys and values are
in the cache afterwards. Products are those of cuBLAS; attention reads the cache in its pages, whatever the lengths are, and is torch's
where long sequences begin in the pass. The residual stream is fp32.

A short pass is one graph: its rows are filled up to a size of PADDED, with rows that write where no sequence is, and captured the second
time that size is asked for. In a long one a product takes longer than its launch.

Letters: T rows (tokens of a pass)  D model  H query heads  G key/value heads  K head_dim  V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.engine.cache import PagedCache
from dejavu.engine.cuda.weights import StepModel
from dejavu.kernels.cuda.attention import Places
from dejavu.kernels.cuda.embed import embed_rows
from dejavu.kernels.cuda.logits import finish_logits
from dejavu.kernels.cuda.mlp_rows import dense_mlp_rows
from dejavu.kernels.cuda.prompt import attend_blocks, attend_whole, attends_whole, block_shape, place_heads
from dejavu.kernels.cuda.rows import norm_rows

PASS = 2048  # tokens of a pass at most
PADDED = (16, 32, 64, 128, 256, 512)
WHOLE = 256  # tokens of a sequence, on average, from which on torch's attention, a call for each, is worth while


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Tokens of a sequence in a pass: those of `token_ids`, of which the first has `position` in the slot."""

    slot: int
    position: int
    token_ids: Sequence[int]


class Prompts:
    """Passes over a model's layers. padding: the slot that rows without a token write to."""

    def __init__(self, model: StepModel, cache: PagedCache, *, padding: int) -> None:
        self._model, self._cache, self._padding = model, cache, padding
        self._shape = block_shape(model.config.head_dim, cache.k_LPGSK.element_size())
        self._uses = dict.fromkeys(PADDED, 0)
        self._captured: dict[int, _Captured] = {}

    def run(self, slots_B: Sequence[int], token_ids_B: Sequence[Sequence[int]], *, every: bool) -> Tensor:
        """Store the tokens, for which there are pages, and count them: logits fp32 [B, V] after the last of each sequence, or [all, V]
        after every one, in order."""
        lasts, found = np.cumsum([len(token_ids) for token_ids in token_ids_B]) - 1, []
        for first, pieces in self._passes(slots_B, token_ids_B):
            stream_TD = self._pass(pieces)
            count = sum(len(piece.token_ids) for piece in pieces)
            wanted = range(first, first + count) if every else [last for last in lasts.tolist() if first <= last < first + count]
            if wanted:
                found.append(self._logits(*stream_TD, [row - first for row in wanted]))
            for piece in pieces:
                self._cache.advance(piece.slot, len(piece.token_ids))
        return torch.cat(found) if len(found) > 1 else found[0]

    def _passes(self, slots_B: Sequence[int], token_ids_B: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[Piece]]]:
        """The number of the first token of each pass, over all, and its pieces."""
        first, pieces, left = 0, [], PASS
        for slot, token_ids in zip(slots_B, token_ids_B, strict=True):
            at, start = 0, self._cache.lengths[slot]
            while at < len(token_ids):
                part = token_ids[at : at + left]
                pieces.append(Piece(slot=slot, position=start + at, token_ids=part))
                at, left = at + len(part), left - len(part)
                if left == 0:
                    yield first, pieces
                    first, pieces, left = first + PASS, [], PASS
        if pieces:
            yield first, pieces

    def _pass(self, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
        """The residual stream behind the last layer as y fp32 and delta [T, D]."""
        count = sum(len(piece.token_ids) for piece in pieces)
        rows = next((size for size in PADDED if count <= size), count)
        numbers = torch.from_numpy(self._numbers(pieces, rows)).to(self._cache.table.device)
        if rows not in self._uses or not numbers.is_cuda:
            return self.layers(numbers, rows, whole=() if rows in self._uses else _whole(pieces))
        captured = self._captured.get(rows)
        if captured is None:
            self._uses[rows] += 1
            if self._uses[rows] == 1:
                return self.layers(numbers, rows)
            captured = self._captured[rows] = self._capture(numbers, rows)
        captured.numbers.copy_(numbers)
        captured.graph.replay()
        return captured.stream_TD

    def _capture(self, numbers: Tensor, rows: int) -> _Captured:
        """A graph of a pass of so many rows, which one like it has run before."""
        graph, own = torch.cuda.CUDAGraph(), numbers.clone()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=next((other.graph.pool() for other in self._captured.values()), None)):
            stream_TD = self.layers(own, rows)
        return _Captured(graph=graph, numbers=own, stream_TD=stream_TD)

    def _numbers(self, pieces: Sequence[Piece], rows: int) -> np.ndarray:
        """What the kernels read of a pass, int32: token, slot and position of each row, then its blocks of queries, long ones first."""
        given = np.zeros((3, rows), np.int32)
        given[1] = self._padding
        blocks, first = [], 0
        for piece in pieces:
            count = len(piece.token_ids)
            given[:, first : first + count] = piece.token_ids, [piece.slot] * count, range(piece.position, piece.position + count)
            for at in range(0, count, self._shape.queries):
                blocks.append((first + at, min(self._shape.queries, count - at), piece.slot, piece.position + at))
            first += count
        blocks.sort(key=lambda block: -block[3])
        if rows in self._uses:  # a graph has room for pieces of every length
            blocks += [(0, 0, 0, 0)] * (rows - len(blocks))
        return np.concatenate([given.ravel(), np.array(blocks, np.int32).ravel()])

    def layers(self, numbers: Tensor, rows: int, *, whole: Sequence[tuple[int, int]] = ()) -> tuple[Tensor, Tensor]:
        """Start the kernels of a pass over so many rows, which `numbers` describe (see `_numbers`): its residual stream as of `_pass`.
        whole: its sequences, where they can be attended one after another (see `attend_whole`)."""
        model, cache, config = self._model, self._cache, self._model.config
        token_T, slot_T, position_T = numbers[: 3 * rows].view(3, rows).unbind(0)
        blocks = numbers[3 * rows :].view(-1, 4)
        places = Places(slot_B=slot_T, position_B=position_T, table=cache.table)
        device, dtype = model.head.device, model.head.dtype
        y_TD = torch.empty(rows, config.hidden_size, device=device)
        first_TD, x_TD = torch.empty_like(y_TD), torch.empty(y_TD.shape, device=device, dtype=dtype)
        q_THK = torch.empty(rows, config.num_heads, config.head_dim, device=device, dtype=dtype)
        k_TGK = q_THK.new_empty(rows if whole else 0, config.num_kv_heads, config.head_dim)
        mixed_THK = torch.zeros_like(q_THK)  # of rows without a token nothing is mixed
        embed_rows(token_T, position_T, model.embed, model.positions, config.position_offset, y_TD, first_TD, scale=model.embed_scale)
        delta_TD = first_TD
        for index, layer in enumerate(model.weights):
            k_PGSK, v_PGSK = cache.k_LPGSK[index], cache.v_LPGSK[index]
            norm_rows(y_TD, delta_TD, layer.norm1, x_TD, added=model.joined(index))
            qkv_TW = F.linear(x_TD, layer.qkv, layer.qkv_bias)
            if whole and attends_whole(layer.scores, config.head_dim, dtype) and k_PGSK.dtype == dtype:
                place_heads(qkv_TW, q_THK, k_PGSK, v_PGSK, places, layer.scores, k_TGK=k_TGK)
                v_TGK = qkv_TW[:, -config.num_kv_heads * config.head_dim :].unflatten(1, (config.num_kv_heads, config.head_dim))
                attend_whole(q_THK, k_TGK, v_TGK, whole, mixed_THK, layer.scores)
            else:
                place_heads(qkv_TW, q_THK, k_PGSK, v_PGSK, places, layer.scores)
                attend_blocks(q_THK, k_PGSK, v_PGSK, blocks, cache.table, mixed_THK, layer.scores, shape=self._shape)
            mixed_TQ = mixed_THK.flatten(1)
            out_TD = mixed_TQ @ layer.o if layer.o_bias is None else torch.addmm(layer.o_bias, mixed_TQ, layer.o)
            norm_rows(y_TD, out_TD, layer.norm2, x_TD, added=layer.attention_out)
            delta_TD = dense_mlp_rows(x_TD, layer.mlp)
        return y_TD, delta_TD

    def _logits(self, y_TD: Tensor, delta_TD: Tensor, rows: Sequence[int]) -> Tensor:
        """fp32, of these rows."""
        model, config = self._model, self._model.config
        if len(rows) < len(y_TD):
            chosen = torch.tensor(rows, device=y_TD.device)
            y_TD, delta_TD = y_TD[chosen], delta_TD[chosen]
        x_TD = torch.empty(y_TD.shape, device=y_TD.device, dtype=model.head.dtype)
        norm_rows(y_TD, delta_TD, model.final_norm, x_TD, added=model.joined(config.num_layers))
        logits_TV = F.linear(x_TD, model.head).float()
        finish_logits(logits_TV, scale=config.logit_scale, cap=config.logit_cap)
        return logits_TV


def _whole(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """First row and rows of each piece, where all begin their sequences and are long; nothing otherwise."""
    counts = [len(piece.token_ids) for piece in pieces]
    if any(piece.position for piece in pieces) or sum(counts) < WHOLE * len(counts):
        return []
    return list(zip(np.cumsum([0, *counts[:-1]]).tolist(), counts, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    """A graph of a pass, what it reads, and what it leaves."""

    graph: torch.cuda.CUDAGraph
    numbers: Tensor
    stream_TD: tuple[Tensor, Tensor]
