"""What a screened head leaves out: measured wherever one is on.

In: a model, its predictors, a text, options with a screen. Out: the share of its tokens after which the screened head and the full one give
the largest logit to the same token, and the mass that is missed: the probability, at temperature 1, that the full head gives to tokens
without a logit, in the mean. As kept tokens have exact logits, that mass is also the total variation between what the two draw.
Two engines decode the text side by side, each token as it stands in the text; they differ in the head alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from dejavu.config import Progress, require
from dejavu.engine.backends import make_engine
from dejavu.engine.options import EngineOptions
from dejavu.figures import HeadAgreement
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

    ids: a text, of which the first max_tokens are decoded, in windows as long as the context. options: with a screen.
    Raises ValueError for a text of fewer than 2 tokens.
    """
    require(len(ids) >= 2, f"a screened head is measured on a text of at least 2 tokens, not {len(ids)}; give a longer one (--text)")
    assert options.screen is not None, "a screened head"
    count, context = min(len(ids), max_tokens), min(model.config.max_positions, max_tokens)
    engines = [make_engine(model, layers, replace(options, cache_tokens=context, screen=screen)) for screen in (None, options.screen)]
    missed, same, kept = [], 0, 0
    for start in range(0, count, context):
        window = ids[start : min(start + context, count)]
        for engine in engines:
            engine.free(0)
            engine.prefill(0, window[:1])
        for token in window[1:]:
            full_V, screened_V = (engine.step([token], [0]).logits_BV[0].float() for engine in engines)
            left_out_V = screened_V == -torch.inf
            missed.append(float(full_V.softmax(0)[left_out_V].sum()))
            same, kept = same + (int(full_V.argmax()) == int(screened_V.argmax())), kept + int((~left_out_V).sum())
            if progress is not None:
                progress("screened head", len(missed), count)
    return HeadAgreement(
        screened_head=options.screen.threshold,
        shortlist=kept / len(missed),
        tokens=len(missed),
        agreement=same / len(missed),
        missed=math.fsum(missed) / len(missed),
    )
