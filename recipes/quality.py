"""Perplexity for the speeds of `dejavu bench`: our model in each dtype, dense and sparse, and other programs, on the same windows.

    python recipes/quality.py smollm2-sparse --dtype fp32 --dtype int8 --against llama.cpp --text 'text/valid/*.txt'

In: a model, its own adapter (or --adapter), held-out texts. Out: QualityRows, appended to results/perplexity.jsonl. Tables show the speed
of a model that exists only where they find such a row of the same adapter, dtype, cache dtype and backend.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from dejavu.bench.comparison import Passage, own_quality, peer_quality
from dejavu.bench.rows import QualityRow, append_rows
from dejavu.cli.against import opened_peers, peer_names
from dejavu.cli.output import Output
from dejavu.cli.subjects import Subject, loaded
from dejavu.engine.options import EngineOptions
from dejavu.language_model import LanguageModel
from dejavu.model.texts import named_texts

RESULTS = Path(__file__).resolve().parents[1] / "results" / "perplexity.jsonl"
OUT = Output(as_json=False)


def opened(options: argparse.Namespace, dtype: str) -> Subject:
    """The model in one dtype."""
    engine = EngineOptions(backend=options.backend, dtype=dtype, cache_dtype=options.cache_dtype)
    return loaded(
        options.model,
        OUT,
        engine,
        seed=0,
        texts=None,
        adapter=options.adapter,
        dense=False,
        accept_base=False,
        densities=(),
        download=False,
        offline=True,
    )


def model_of(subject: Subject) -> LanguageModel:
    assert subject.lm is not None, "a model that exists"
    return subject.lm


def passage_of(lm: LanguageModel, options: argparse.Namespace) -> Passage:
    """The start of each text."""
    texts = named_texts(options.text)
    return Passage.of_texts(texts, lm.tokenizer, max_tokens=options.max_tokens, positions=lm.config.max_positions)


def rows(options: argparse.Namespace) -> Iterator[QualityRow]:
    """Ours in every dtype, then those of the other programs, as they come."""
    for dtype in options.dtype or ["auto"]:
        lm = model_of(opened(options, dtype))
        passage, layers, adapter = passage_of(lm, options), lm.layers(), None if lm.adapter is None else lm.adapter.digest
        for chosen in (None, layers) if layers is not None else (None,):
            row = own_quality(
                lm.model, chosen, passage, name=lm.name, backend=lm.backend, dtype=lm.dtype, cache_dtype=lm.cache_dtype, adapter=adapter
            )
            OUT.say(f"{row.mode} {lm.dtype}: perplexity {row.ppl:.3f} of {row.tokens:,} tokens")
            yield row
    if options.against:
        notes: list[str] = []
        subject = opened(options, "auto")
        lm = model_of(subject)
        passage = passage_of(lm, options)
        with opened_peers(peer_names(options.against), subject, options.gguf, notes) as peers:
            for peer in peers:
                row = peer_quality(peer, passage, vocab_size=lm.config.vocab_size)
                told = "tells no logits of this vocabulary" if row is None else f"perplexity {row.ppl:.3f}"
                OUT.say(f"{peer.mode} {peer.dtype}: {told}")
                if row is not None:
                    yield row
        for note in notes:
            OUT.say(note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--dtype", action="append", help="of ours; may repeat")
    parser.add_argument("--cache-dtype", default="auto")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--against", action="append", help="other programs, as of `dejavu bench`; may repeat")
    parser.add_argument("--gguf", type=Path, help="the file that llama.cpp runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where rows are appended")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of each text")
    options = parser.parse_args()
    for row in rows(options):
        append_rows(options.results, [row])


if __name__ == "__main__":
    main()
