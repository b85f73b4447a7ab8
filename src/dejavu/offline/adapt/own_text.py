"""Text that a model writes itself, as a share of what it is adapted on: a chat model is then distilled where it will be used.

In: a model, prompts cut from the lines of a text. Out: ids of prompts with their answers, sampled at a temperature. All prompts of a
batch have one length, so that a batch is a plain tensor: no padding, no pages. With predictors the model writes as it would decode:
the prompt runs dense, and of each further token the neurons that are not selected are zero.

Letters: B rows  P tokens of a prompt  S tokens of the cache  H query heads  G key/value heads  K head_dim  T tokens  D model  V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dejavu.config import Progress, require
from dejavu.kernels.attention import attend_tokens
from dejavu.kernels.memory import free_gpu_bytes
from dejavu.model.template import rendered
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import Block, Transformer

LINE_TOKENS = (12, 24, 48)  # a prompt is that many first tokens of a line that has at least so many
SLOT = "@@LINE@@"
FRAME_TOKENS = 64  # about what a chat template adds
MOST_LINES = 60_000
MOST_ROWS, MOST_ROWS_CPU = 2048, 64
# Not cuDNN's attention, which makes a plan for each length of the cache: a step then takes six times as long.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Scorer(Protocol):
    """A predictor of neurons: scores [.., F] of the attention's input (lookahead 1) or the MLP's (0); above zero they are selected."""

    lookahead: int

    def __call__(self, x: Tensor, /) -> Tensor: ...


def frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids before and after the user's text: by the chat template, where there is one, else BOS and nothing."""
    if not tokenizer.has_template:
        return ([] if tokenizer.document_bos is None else [tokenizer.document_bos]), []
    try:
        text = rendered(tokenizer, [{"role": "user", "content": SLOT}])
    except ValueError as error:
        raise ValueError(f"{error}; leave --chat-share and --own-share out") from error
    require(
        text.count(SLOT) == 1,
        "the tokenizer's chat template does not show the user's text once; leave --chat-share and --own-share out",
    )
    before, after = text.split(SLOT)
    return tokenizer.encode_plain(before), tokenizer.encode_plain(after)


class Prompts:
    """Prompts of a text: the starts of lines, as a user's message or as they are. Batches [B, P] by number, drawn with the seed.

    Raises ValueError for a text without lines to take prompts from.
    """

    def __init__(self, tokenizer: Tokenizer, documents: Sequence[str], *, seed: int) -> None:
        lines = [line for document in documents for line in document.splitlines() if len(line) > 40]
        if len(lines) > MOST_LINES:
            lines = [lines[index] for index in np.random.default_rng((seed, 2)).choice(len(lines), MOST_LINES, replace=False)]
        ids = tokenizer.encode_batch([line[: 12 * max(LINE_TOKENS)] for line in lines])
        require(
            any(len(each) >= LINE_TOKENS[0] for each in ids),
            f"the text has no line of over 40 characters and {LINE_TOKENS[0]} tokens to take prompts from; "
            "leave --chat-share and --own-share out",
        )
        # Every length that some line has, and for each the beginnings that long.
        found = (np.array([each[:length] for each in ids if len(each) >= length]) for length in LINE_TOKENS)
        self.starts = [starts for starts in found if len(starts)]
        self.frames = [frame(tokenizer)]
        if tokenizer.has_template:  # else messages are texts
            self.frames.append(([] if tokenizer.document_bos is None else [tokenizer.document_bos], []))
        self.seed = seed

    def batch(self, number: int, rows: int, *, chat: bool = False) -> Tensor:
        """Batch `number`: messages and texts in turns, or with chat messages alone."""
        starts = self.starts[(number // len(self.frames)) % len(self.starts)]
        before, after = self.frames[0 if chat else number % len(self.frames)]
        chosen = starts[np.random.default_rng((self.seed, 3, number)).integers(len(starts), size=rows)]
        parts = (np.tile(np.array(ids, dtype=np.int64), (rows, 1)) for ids in (before, after))
        first, last = parts
        return torch.from_numpy(np.concatenate([first, chosen, last], axis=1))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return self.starts[-1].shape[1] + max(len(before) + len(after) for before, after in self.frames)


def _opened(block: Block, x_BTD: Tensor, position_T: Tensor, inv_freq: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention input, and q [B, H, T, K], k and v [B, G, T, K] of new tokens."""
    attention_in = block.attention_input(x_BTD)
    q, k, v = (t.transpose(1, 2) for t in block.query_key_value(attention_in, position_T, inv_freq))
    return attention_in, q, k, v


def _closed(block: Block, scorer: Scorer | None, x_BTD: Tensor, attention_in: Tensor, mixed_BTHK: Tensor) -> Tensor:
    """The residual stream after a layer, of whose neurons those that are scored zero or less are left out."""
    x_BTD, mlp_in = block.after_attention(x_BTD, block.o(mixed_BTHK.flatten(-2)))
    act_BTF = block.activations(mlp_in)
    if scorer is not None:
        act_BTF = act_BTF * (scorer(attention_in if scorer.lookahead else mlp_in) > 0).to(act_BTF.dtype)
    return block.after_mlp(x_BTD, block.down(act_BTF))


@cache
def _compiled() -> tuple[Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]], Callable[..., Tensor]]:
    """Both halves of a layer for steps of one shape: a step is then a few launches."""
    return torch.compile(_opened, dynamic=False), torch.compile(_closed, dynamic=False)


def _mixed(block: Block, q_BHTK: Tensor, keys: Tensor, values: Tensor, position_T: Tensor) -> Tensor:
    """Head outputs [B, T, H, K] of new tokens over a cache that ends with them."""
    heads, tokens = q_BHTK.shape[1:3]
    groups, total = keys.shape[1:3]
    if block.scores.cap != 0 or block.scores.window is not None:
        return attend_tokens(q_BHTK, keys, values, block.scores.seen(position_T, total), block.scores).transpose(1, 2)
    if tokens == total:
        mixed = F.scaled_dot_product_attention(q_BHTK, keys, values, is_causal=True, scale=block.scores.scale, enable_gqa=groups < heads)
        return mixed.transpose(1, 2)
    # One token sees all, so that the heads of a group are as good as tokens, and no key is copied for them.
    grouped_BGHK = q_BHTK[:, :, 0].unflatten(1, (groups, -1))
    return F.scaled_dot_product_attention(grouped_BGHK, keys, values, scale=block.scores.scale).flatten(1, 2)[:, None]


@torch.no_grad()
@sdpa_kernel(ATTENTION)
def continued(
    model: Transformer,
    prompt_BP: Tensor,
    *,
    new_tokens: int,
    generator: torch.Generator,
    temperature_B: Tensor | None = None,
    scorers: Sequence[Scorer | None] | None = None,
    compiled: bool = True,
) -> Tensor:
    """The rows with `new_tokens` sampled tokens [B, P + new_tokens]. Nothing ends a row: see `cut`.

    temperature_B: of each row (default: 1). scorers: of each layer, by which new tokens run sparse (default: dense).
    compiled: on a GPU, steps are; wide rows are as fast without, and compiling takes half a minute.
    """
    config, weight = model.config, model.embed.weight
    device, ids = weight.device, prompt_BP.to(weight.device)
    rows, start = ids.shape
    total = start + new_tokens
    require(total <= config.max_positions, f"{total} tokens exceed the model's context of {config.max_positions}; write less")
    shape = (rows, config.num_kv_heads, total, config.head_dim)
    caches = [tuple(torch.empty(shape, dtype=weight.dtype, device=device) for _ in "kv") for _ in model.blocks]
    heat_B1 = torch.ones(rows, 1, device=device) if temperature_B is None else temperature_B.to(device)[:, None]
    chosen: Sequence[Scorer | None] = [None] * len(model.blocks) if scorers is None else scorers
    new, written = ids, [ids]
    for places in [range(start), *(range(p, p + 1) for p in range(start, total - 1))]:
        prompt = places.start == 0
        opened, closed = (_opened, _closed) if prompt or device.type != "cuda" or not compiled else _compiled()
        position_T = torch.arange(places.start, places.stop, device=device)
        x = model.embedded(new, position_T)
        for index, (block, scorer, cached) in enumerate(zip(model.blocks, chosen, caches, strict=True)):
            attention_in, q, *new_kv = opened(block, x, position_T, model.frequencies(index))
            for pool, values in zip(cached, new_kv, strict=True):
                pool[:, :, places.start : places.stop] = values
            keys, values = (pool[:, :, : places.stop] for pool in cached)
            x = closed(block, None if prompt else scorer, x, attention_in, _mixed(block, q, keys, values, position_T))
        last = x[:, -1]
        logits_BV = model.logits(last if model.final_norm is None else model.final_norm(last))
        new = torch.multinomial((logits_BV / heat_B1).softmax(-1), 1, generator=generator)
        written.append(new)
    return torch.cat(written, dim=1)


def rows_at_once(model: Transformer, length: int, prompt: int) -> int:
    """Rows of a batch of sequences of `length` tokens of which the first `prompt` are computed at once: on a GPU as many as half of its
    free memory holds the cache, the prompts' activations and the logits of, up to MOST_ROWS."""
    config, weight = model.config, model.embed.weight
    free = free_gpu_bytes(str(weight.device))
    if free is None:
        return MOST_ROWS_CPU
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * length
    row_bytes = weight.element_size() * (cache + 4 * prompt * (config.intermediate_size + config.hidden_size)) + 16 * config.vocab_size
    return max(1, min(MOST_ROWS, free // 2 // row_bytes))


def cut(row: Sequence[int], prompt_tokens: int, eos: Sequence[int]) -> list[int]:
    """A row up to the first end-of-text token of its answer, which stays."""
    ends = [i for i in range(prompt_tokens, len(row)) if row[i] in eos]
    return list(row[: ends[0] + 1]) if ends else list(row)


def written(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Sequence[str],
    *,
    tokens: int,
    seed: int,
    new_tokens: int = 256,
    progress: Progress | None = None,
) -> np.ndarray:
    """At least `tokens` ids of prompts with answers, laid end to end, as the model (on its device, in its dtype) writes them, dense.

    A step is bound by what it starts, not by its rows: on a GPU there are many, see `rows_at_once`.
    """
    prompts = Prompts(tokenizer, documents, seed=seed)
    longest = max(LINE_TOKENS) + FRAME_TOKENS
    rows = rows_at_once(model, longest + new_tokens, longest)
    generator = torch.Generator(model.device).manual_seed(seed)
    found: list[int] = []
    number = 0
    while len(found) < tokens:
        prompt_BP = prompts.batch(number, rows, chat=True)
        number += 1
        count = min(new_tokens, model.config.max_positions - prompt_BP.shape[1])
        require(count > 0, f"a prompt of {prompt_BP.shape[1]} tokens fills the model's context; leave --chat-share out")
        for row in continued(model, prompt_BP, new_tokens=count, generator=generator).tolist():
            found += cut(row, prompt_BP.shape[1], tokenizer.eos_token_ids)
        if progress is not None:
            progress("writing text of its own", min(len(found), tokens), tokens)
    return np.array(found, dtype=np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
