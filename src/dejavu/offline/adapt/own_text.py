"""Text that the dense model writes itself, as a share of what it is adapted on: a chat model is then distilled where it will be used.

In: a model, prompts cut from the lines of a text. Out: ids of prompts with their answers, sampled at temperature 1, end to end. All
prompts of a batch have one length, so that a batch is a plain tensor: no padding, no pages.

Letters: B rows  P tokens of a prompt  S tokens of the cache  G key/value heads  K head_dim  V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.config import Progress, require
from dejavu.kernels.attention import attend_tokens
from dejavu.model.template import rendered
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import Block, Transformer

LINE_TOKENS = (12, 24, 48)  # a prompt is that many first tokens of a line that has at least so many
SLOT = "@@LINE@@"
FRAME_TOKENS = 64  # about what a chat template adds
MOST_ROWS, MOST_ROWS_CPU = 2048, 64


def frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids before and after the user's text: by the chat template, where there is one, else BOS and nothing."""
    if not tokenizer.has_template:
        return ([] if tokenizer.document_bos is None else [tokenizer.document_bos]), []
    try:
        text = rendered(tokenizer, [{"role": "user", "content": SLOT}])
    except ValueError as error:
        raise ValueError(f"{error}; leave --chat-share out") from error
    require(text.count(SLOT) == 1, "the tokenizer's chat template does not show the user's text once; leave --chat-share out")
    before, after = text.split(SLOT)
    return tokenizer.encode_plain(before), tokenizer.encode_plain(after)


def prompts(tokenizer: Tokenizer, documents: Sequence[str], *, rows: int, seed: int) -> Iterator[Tensor]:
    """Batches [B, P] of prompts without end: the starts of lines in an order drawn with the seed."""
    lines = [line for document in documents for line in document.splitlines() if len(line) > 40]
    require(len(lines) > 0, "the text has no line of over 40 characters to take prompts from; leave --chat-share out")
    before, after = frame(tokenizer)
    drawn = np.random.default_rng((seed, 2))
    batch = fruitless = 0
    while True:
        length, found = LINE_TOKENS[batch % len(LINE_TOKENS)], []
        for index in drawn.integers(len(lines), size=4 * rows):
            ids = tokenizer.encode_plain(lines[index])[:length]
            if len(ids) == length and len(found) < rows:
                found.append([*before, *ids, *after])
        batch += 1
        fruitless = 0 if found else fruitless + 1
        require(fruitless < len(LINE_TOKENS), f"the lines of the text have fewer than {LINE_TOKENS[0]} tokens; leave --chat-share out")
        if found:
            yield torch.tensor(found)


def _attend(
    block: Block, x_BTD: Tensor, places: range, position_T: Tensor, inv_freq: Tensor | None, cache: tuple[Tensor, Tensor]
) -> Tensor:
    """Head outputs [B, T, H, K] of new tokens at `places` (position_T: on the device). Keys and values go into the cache [B, G, S, K]."""
    q, k, v = (t.transpose(1, 2) for t in block.query_key_value(x_BTD, position_T, inv_freq))
    for pool, new in zip(cache, (k, v), strict=True):
        pool[:, :, places.start : places.stop] = new
    keys, values = (pool[:, :, : places.stop] for pool in cache)
    if len(places) == 1 and block.scores.cap == 0 and block.scores.window is None:  # one token sees all: a step is a few launches
        mixed = F.scaled_dot_product_attention(q, keys, values, scale=block.scores.scale, enable_gqa=keys.shape[1] < q.shape[1])
    else:
        mixed = attend_tokens(q, keys, values, block.scores.seen(position_T, places.stop), block.scores)
    return mixed.transpose(1, 2)


@torch.inference_mode()
def continued(model: Transformer, prompt_BP: Tensor, *, new_tokens: int, generator: torch.Generator) -> Tensor:
    """The rows with `new_tokens` sampled tokens [B, P + new_tokens], at temperature 1. Nothing ends a row: see `cut`."""
    config, weight = model.config, model.embed.weight
    ids = prompt_BP.to(weight.device)
    rows, start = ids.shape
    total = start + new_tokens
    require(total <= config.max_positions, f"{total} tokens exceed the model's context of {config.max_positions}; write less")
    shape = (rows, config.num_kv_heads, total, config.head_dim)
    caches = [tuple(torch.empty(shape, dtype=weight.dtype, device=weight.device) for _ in "kv") for _ in model.blocks]
    new, written = ids, [ids]
    for places in [range(start), *(range(p, p + 1) for p in range(start, total - 1))]:
        position_T = torch.arange(places.start, places.stop, device=weight.device)
        x = model.embedded(new, position_T)
        for index, (block, (keys, values)) in enumerate(zip(model.blocks, caches, strict=True)):
            mixed = _attend(block, block.attention_input(x), places, position_T, model.frequencies(index), (keys, values))
            x, mlp_in = block.after_attention(x, block.o(mixed.flatten(-2)))
            x = block.after_mlp(x, block.down(block.activations(mlp_in)))
        last = x[:, -1]
        probabilities_BV = model.logits(last if model.final_norm is None else model.final_norm(last)).softmax(-1)
        new = torch.multinomial(probabilities_BV, 1, generator=generator)
        written.append(new)
    return torch.cat(written, dim=1)


def rows_at_once(model: Transformer, length: int) -> int:
    """Rows of a batch of sequences of that many tokens; on a GPU as many as half of its free memory holds the cache of, up to MOST_ROWS."""
    config, weight = model.config, model.embed.weight
    row_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * length * weight.element_size()
    if weight.device.type != "cuda":
        return MOST_ROWS_CPU
    free, _ = torch.cuda.mem_get_info(weight.device)
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
    """At least `tokens` ids of prompts with answers, as the model (on its device, in its dtype) writes them.

    A step is bound by what it starts, not by its rows: on a GPU there are many, see `rows_at_once`.
    """
    rows = rows_at_once(model, max(LINE_TOKENS) + FRAME_TOKENS + new_tokens)
    generator = torch.Generator(model.device).manual_seed(seed)
    found: list[int] = []
    for prompt_BP in prompts(tokenizer, documents, rows=rows, seed=seed):
        count = min(new_tokens, model.config.max_positions - prompt_BP.shape[1])
        require(count > 0, f"a prompt of {prompt_BP.shape[1]} tokens fills the model's context; leave --chat-share out")
        for row in continued(model, prompt_BP, new_tokens=count, generator=generator).tolist():
            found += cut(row, prompt_BP.shape[1], tokenizer.eos_token_ids)
        if progress is not None:
            progress("writing text of its own", min(len(found), tokens), tokens)
        if len(found) >= tokens:
            break
    return np.array(found, dtype=np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
