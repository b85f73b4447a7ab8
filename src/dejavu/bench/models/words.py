"""A tokenizer for a model that is made up: each token a made-up word, so that what the model writes is read back as the tokens it was.

In: a vocabulary's size. Out: a Tokenizer of byte-level BPE whose id 0 is END (beginning and end of a document), 1 to 256 the bytes, and
every other a word with a space before it. Nothing is merged: a word that is unknown is read byte by byte.
"""

from __future__ import annotations

from itertools import islice, product

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from dejavu.config import require
from dejavu.model.tokenizer import Tokenizer, build_tokenizer

END = "</s>"
FIRST_WORD = 257
SYLLABLES = ["".join(letters) for letters in product("bdfghklmnprstvz", "aeiou")]


def word_tokenizer(vocab_size: int) -> Tokenizer:
    """Raises ValueError for a vocabulary without room for a word beside the bytes."""
    require(vocab_size > FIRST_WORD, f"a vocabulary of {vocab_size} tokens has no room for words beside 256 bytes and the end of a text")
    lengths = (product(SYLLABLES, repeat=count) for count in (2, 3, 4))
    words = islice(("".join(parts) for length in lengths for parts in length), vocab_size - FIRST_WORD)
    names = [END, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"Ġ{word}" for word in words)]
    backend = tokenizers.Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyrefly: ignore[bad-assignment]
    backend.decoder = decoders.ByteLevel()  # pyrefly: ignore[bad-assignment]
    backend.add_special_tokens([END])
    template = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    backend.post_processor = template  # pyrefly: ignore[bad-assignment]
    return build_tokenizer(backend, special_tokens={"bos_token": END, "eos_token": END}, num_rows=vocab_size)
