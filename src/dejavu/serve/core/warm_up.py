"""What an engine does the first time that so many rows or so long a text come, done before there is a client to wait for it.

In: an engine, its model's tokenizer. Out: the engine, empty as before. One that captures its steps compiles, measures (which layers run
dense for so many rows) and captures each size when it first comes; here real text comes, so that what is measured is what texts select.
Other engines have nothing to prepare.
"""

from __future__ import annotations

from collections.abc import Sequence

from dejavu.engine.interface import CapturesSteps, Engine
from dejavu.files import read_text
from dejavu.generation.rows import draws
from dejavu.model.texts import DATA
from dejavu.model.tokenizer import Tokenizer

TEXT, CHARACTERS = DATA / "calibration.txt", 16_384
PROMPT = 16  # tokens of a row
LONG = 528  # and of one row, once more: beyond 512 the cuda engine attends in more parts


def warm_up(engine: Engine, tokenizer: Tokenizer, *, longest: int, both: bool = False) -> None:
    """Decode a few tokens with 1, 2, 4 and so on rows, up to all slots, short and, where texts may be so long, long.

    longest: tokens of a text that may come. both: dense calls too, of an engine that has predictors. The slots must be empty, and are
    afterwards.
    """
    if not isinstance(engine, CapturesSteps):
        return
    info, text_ids = engine.info, tokenizer.encode(read_text(TEXT)[:CHARACTERS])
    sizes = sorted({info.num_slots, *(2**power for power in range(info.num_slots.bit_length()))})
    spare = 2 * len(sizes)  # tokens that a row gets here after its prompt
    room = min(info.max_tokens, longest, len(text_ids)) - spare
    usual = max(0, min(PROMPT, room))
    for first in (usual, LONG) if room >= LONG else (usual,):
        prompts = [text_ids[:first], *(text_ids[slot * PROMPT :][:usual] for slot in range(1, info.num_slots))]
        rows, pages = 0, engine.free_pages
        try:
            for prompt in prompts:
                pages -= -(-(len(prompt) + spare) // info.page_size)
                if pages < 0 or not prompt:
                    break
                rows += 1
                engine.prefill(rows - 1, prompt)
            for size in sizes:
                if size <= rows:
                    _decode(engine, range(size), text_ids[:size], both=both)
        finally:
            for slot in range(rows):
                engine.free(slot)


def _decode(engine: Engine, slots: Sequence[int], token_ids: Sequence[int], *, both: bool) -> None:
    """A step, and one that the engine draws from, where it does: each is captured for itself."""
    for sparse in (True, False) if both else (True,):
        engine.step(token_ids, slots, sparse=sparse)
        if draws(engine):
            engine.decode(token_ids, slots, 1, sparse=sparse).cpu()
