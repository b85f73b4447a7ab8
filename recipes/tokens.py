"""Text to tokens for the recipes: a byte-level BPE tokenizer and one flat array of token ids.

In: .txt or .xz files whose documents are separated by lines of <|endoftext|>. Out: `tokenizer.json` (vocabulary of
`vocab_size`, `</s>` with id 0 as beginning and end of a document, put in front of every text) and uint16 ids in which
each document starts with `</s>`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dejavu.files import read_text
from dejavu.model.texts import documents

END = "</s>"
CHUNK = 20_000  # characters; long enough that cuts are rare, short enough to spread over cores


def pieces(document: str) -> Iterator[str]:
    """The document cut at line ends, so that the tokenizer's threads share a long one."""
    start = 0
    while start < len(document):
        stop = start + CHUNK
        line = document.find("\n", stop)
        stop = len(document) if line < 0 or stop >= len(document) else line
        yield document[start:stop]
        start = stop


def train_tokenizer(paths: Sequence[Path], vocab_size: int, characters_per_file: int = 12_000_000) -> Tokenizer:
    """A byte-level BPE tokenizer learned from the first characters of each file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    sample = (
        piece for path in paths for document in documents(read_text(path)[:characters_per_file]) for piece in pieces(document.strip())
    )
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return tokenizer


def tokenize(tokenizer: Tokenizer, paths: Sequence[Path]) -> np.ndarray:
    """Ids of all documents of all files, uint16, each document behind one END."""
    parts: list[np.ndarray] = []
    for path in paths:
        cuts, starts = [], []
        for document in documents(read_text(path)):
            starts.append(len(cuts))
            cuts.extend(pieces(document.strip()))
        encoded = tokenizer.encode_batch_fast(cuts, add_special_tokens=False)
        heads = set(starts)
        for index, encoding in enumerate(encoded):
            ids = [0, *encoding.ids] if index in heads else encoding.ids
            parts.append(np.array(ids, dtype=np.uint16))
    return np.concatenate(parts)
