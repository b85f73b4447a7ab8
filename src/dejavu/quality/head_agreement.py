"""How often a screened head and the full head choose the same token: measured wherever a screened head is on.

In: a model, its predictors, a text. Out: the share of its tokens after which both give the largest logit to the same token. Two
engines decode the text side by side, each token as it stands in the text; they differ in the head alone. As a shortlist has exact
logits, this is the share of tokens whose best next token is on the shortlist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dejavu.config import Progress, require
from dejavu.engine.backends import make_engine
from dejavu.engine.options import EngineOptions
from dejavu.figures import HeadAgreement
from dejavu.kernels.screen import screen_rank
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import Transformer

MAX_TOKENS = 512


def head_agreement(
    model: Transformer,
    layers: Sequence[LayerAdapter] | None,
    ids: Sequence[int],
    options: EngineOptions,
    *,
    max_tokens: int = MAX_TOKENS,
    progress: Progress | None = None,
) -> HeadAgreement:
    """Of the two heads, on a text.

    ids: a text, of which the first max_tokens are decoded, in windows as long as the context. options: with a screened head.
    Raises ValueError for a text of fewer than 2 tokens.
    """
    require(len(ids) >= 2, f"a screened head is measured on a text of at least 2 tokens, not {len(ids)}; give a longer one (--text)")
    count, context = min(len(ids), max_tokens), min(model.config.max_positions, max_tokens)
    screened_head = options.screened_head
    engines = [make_engine(model, layers, replace(options, cache_tokens=context, screened_head=size)) for size in (0, screened_head)]
    same = compared = 0
    for start in range(0, count, context):
        window = ids[start : min(start + context, count)]
        for engine in engines:
            engine.free(0)
            engine.prefill(0, window[:1])
        for token in window[1:]:
            full, screened = (int(engine.step([token], [0]).logits_BV.argmax()) for engine in engines)
            same, compared = same + (full == screened), compared + 1
            if progress is not None:
                progress("screened head", compared, count)
    rank = screen_rank(model.config.embed_width)
    return HeadAgreement(screened_head=screened_head, rank=rank, tokens=compared, agreement=same / compared)
