"""Dense prefill in plain torch: whole chunks of a prompt through the model, keys and values into the cache.

In: a slot's cache and token ids. Out: logits.

Letters: T tokens  D model  H query heads  G key/value heads  K head_dim  N pages of the slot
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dejavu.engine.cache import PagedCache
from dejavu.kernels.attention import attend_tokens
from dejavu.model.transformer import Transformer

PREFILL_CHUNK = 512


def prefill(model: Transformer, cache: PagedCache, slot: int, token_ids: Sequence[int]) -> Tensor:
    """Append tokens, for which there are pages, to the slot, in chunks; logits fp32 [V] after the last one."""
    last_D = [x_TD[-1] for x_TD in _chunks(model, cache, slot, token_ids)][-1]
    return _logits(model, last_D)


def prefill_logits(model: Transformer, cache: PagedCache, slot: int, token_ids: Sequence[int]) -> Tensor:
    """As `prefill`; logits fp32 [T, V] after each of the tokens."""
    return torch.cat([_logits(model, x_TD) for x_TD in _chunks(model, cache, slot, token_ids)])


def _logits(model: Transformer, x_TD: Tensor) -> Tensor:
    return model.logits(x_TD if model.final_norm is None else model.final_norm(x_TD))


def _chunks(model: Transformer, cache: PagedCache, slot: int, token_ids: Sequence[int]) -> Iterator[Tensor]:
    ids_T = torch.tensor(token_ids, dtype=torch.int64, device=model.device)
    return (_chunk(model, cache, slot, chunk_T) for chunk_T in ids_T.split(PREFILL_CHUNK))


def _chunk(model: Transformer, cache: PagedCache, slot: int, ids_T: Tensor) -> Tensor:
    """Residual stream [T, D] after the last layer; the chunk's keys and values are stored."""
    start, count = cache.lengths[slot], ids_T.shape[0]
    position_T = torch.arange(start, start + count, device=ids_T.device)
    page_N, places = cache.pages(slot, start + count), cache.places(slot, start, count)
    seen: dict[int | None, Tensor] = {}  # by window; made once, as launches are what a short prompt waits for on a GPU
    x_TD = model.embedded(ids_T, position_T)
    for index, block in enumerate(model.blocks):
        q_THK, k_TGK, v_TGK = block.query_key_value(block.attention_input(x_TD), position_T, model.frequencies(index))
        cache.write(index, places, k_TGK, v_TGK)
        k_GTK, v_GTK = (x_TGK.transpose(0, 1) for x_TGK in (k_TGK, v_TGK))
        if start > 0:  # else the chunk's own are all there are
            k_GTK, v_GTK = (
                pool[index].index_select(0, page_N).transpose(0, 1).flatten(1, 2)[:, : start + count]
                for pool in (cache.k_LPGSK, cache.v_LPGSK)
            )
        if block.scores.window not in seen:
            seen[block.scores.window] = block.scores.seen(position_T, start + count)
        mixed_HTK = attend_tokens(q_THK.transpose(0, 1)[None], k_GTK[None], v_GTK[None], seen[block.scores.window], block.scores)[0]
        x_TD, mlp_TD = block.after_attention(x_TD, block.o(mixed_HTK.transpose(0, 1).flatten(-2)))
        x_TD = block.after_mlp(x_TD, block.down(block.activations(mlp_TD)))
    cache.advance(slot, count)
    return x_TD
