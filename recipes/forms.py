"""Forms of one model and other programs beside each other: what each costs in perplexity, what it takes, and how fast it decodes.

    python recipes/forms.py --base SmolLM2-135M-Instruct --form fp32=smollm2-sparse --form stored=smollm2-sparse \
        --form "int4, dejavu quantize"=FOLDER --form "int8, gate"=MODEL=ADAPTER --against --gguf FILE --text 'text/valid/*.txt'

In: `NAME=MODEL` or `NAME=MODEL=ADAPTER` for each form, MODEL being in NAME (a dtype) or, where NAME is none, as it is stored; with
--against llama.cpp on each --gguf, or on its own files of SmolLM2. Out: two FormRows for each form that has an adapter, else one, and
one for each program, appended to results/forms.jsonl. Perplexity is by the rule of recipes/quality.py; decode of all takes turns in one
process, so that speeds of one run can be compared with one another. --again measures speeds alone, in another process: perplexities
are the last run's.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from dejavu.bench.bytes_read import formats_of, weight_bytes
from dejavu.bench.comparison import Passage, own_quality, peer_quality
from dejavu.bench.peers.cpu import open_peers
from dejavu.bench.rows import QualityRow, append_rows, read_rows
from dejavu.bench.timing import Work, percentiles, time_interleaved
from dejavu.bench.variants import Layers, Peer
from dejavu.cli.output import Output
from dejavu.config import DTYPES, require
from dejavu.engine.interface import Engine
from dejavu.language_model import LanguageModel
from dejavu.loading import load
from dejavu.model.texts import named_texts

RESULTS = Path(__file__).resolve().parents[1] / "results" / "forms.jsonl"
CONTEXT, STEPS = 64, 24  # tokens of a prompt, and of a turn
OUT = Output(as_json=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class FormRow(QualityRow):
    """One form of the model `base`, dense or sparse, or another program. run: the same of all rows that were timed in turns. weight_bytes:
    of the model that ran (of an adapter that changes weights, with these); null for a program. tok_s: at the median step, p20_us to
    p80_us of a step."""

    form: str
    base: str
    run: str
    threads: int
    weight_bytes: int | None
    tok_s: float
    p20_us: float
    p50_us: float
    p80_us: float


class Decodes(Protocol):
    """Our engine or another program, of one sequence."""

    def prefill(self, ids: Sequence[int]) -> None: ...
    def step(self, token_id: int) -> object: ...


@dataclass(frozen=True, kw_only=True)
class OurEngine:
    """Slot 0 of an engine."""

    engine: Engine

    def prefill(self, ids: Sequence[int]) -> None:
        self.engine.free(0)
        self.engine.prefill(0, ids)

    def step(self, token_id: int) -> None:
        self.engine.step([token_id], [0])


@dataclass(frozen=True, kw_only=True)
class Running:
    """One form, dense or sparse, or a program: its quality, and what decodes."""

    form: str
    quality: QualityRow
    weight_bytes: int | None
    threads: int
    decodes: Decodes
    prompt: Sequence[int]

    def step(self, number: int) -> None:
        """One token of a turn; each turn begins behind the prompt."""
        if number % STEPS == 0:
            self.decodes.prefill(self.prompt[:CONTEXT])
        self.decodes.step(self.prompt[CONTEXT + number % STEPS])

    def work(self) -> Work:
        return Work(run=self.step)


class Scoring:
    """What is scored and timed, and the perplexities that are known already: of the last run, by form and mode."""

    def __init__(self, lm: LanguageModel, options: argparse.Namespace) -> None:
        texts = named_texts(options.text)
        self.passage = Passage.of_texts(texts, lm.tokenizer, max_tokens=options.max_tokens, positions=lm.config.max_positions)
        self.prompt = lm.tokenizer.encode(next(iter(texts.values())))[: CONTEXT + STEPS]
        runs = newest_runs(options.base, options.results) if options.again else [[]]
        self.known = {(row.form, row.mode): row for row in runs[-1] if row.texts_hash == self.passage.texts_hash}
        self.again = options.again

    def quality(self, form: str, mode: str, measure: Callable[[], QualityRow]) -> QualityRow:
        if not self.again:
            found = measure()
            OUT.say(f"{form}, {mode}: perplexity {found.ppl:.3f} of {found.tokens:,} tokens")
            return found
        row = self.known.get((form, mode))
        require(row is not None, f"--again: the last run has no {form}, {mode} on these texts; leave --again out")
        assert row is not None
        # What ran, when and on which commit is that of the speed; append_rows fills it in.
        values = {field.name: getattr(row, field.name) for field in dataclasses.fields(QualityRow)}
        return QualityRow(**values | {"commit": None, "dirty": False, "time": None, "versions": None})


def opened(name: str, model: str, adapter: Path | None, options: argparse.Namespace) -> LanguageModel:
    dtype = name if name in DTYPES else "auto"
    return load(model, adapter=adapter or options.adapter or "bundled", backend="native", dtype=dtype, cache_dtype=options.cache_dtype)


def running(form: str, lm: LanguageModel, scoring: Scoring) -> list[Running]:
    """The form dense, and sparse where it has an adapter."""
    found = []
    for dense in (True, False):
        layers = lm.layers(dense=dense)
        if layers is None and not dense:
            continue

        def measure(layers: Layers | None = layers) -> QualityRow:
            return own_quality(
                lm.model, layers, scoring.passage, name=lm.name, backend=lm.backend, dtype=lm.dtype, cache_dtype=lm.cache_dtype,
                adapter=None if lm.adapter is None else lm.adapter.digest,
            )  # fmt: skip

        quality = scoring.quality(form, "dense" if layers is None else "sparse", measure)
        engine = lm.engine(num_slots=1, cache_tokens=2 * (CONTEXT + STEPS), dense=dense)
        taken = round(weight_bytes(lm.config, formats_of(engine.info)))
        found.append(
            Running(
                form=form, quality=quality, weight_bytes=taken, threads=engine.info.threads, decodes=OurEngine(engine=engine),
                prompt=scoring.prompt,
            )
        )  # fmt: skip
    return found


def programs(lm: LanguageModel, scoring: Scoring, files: Sequence[Path | None]) -> list[Running]:
    """llama.cpp on each file."""
    found = []
    for file in files:
        peers, notes = open_peers(["llama.cpp"], export_folder=None, gguf=file, threads=lm.num_threads)
        for note in notes:
            OUT.say(note)
        for peer in peers:

            def measure(peer: Peer = peer) -> QualityRow:
                row = peer_quality(peer, scoring.passage, vocab_size=lm.config.vocab_size)
                require(row is not None, f"{peer.mode} {peer.model} has another vocabulary than {lm.name}")
                assert row is not None
                return row

            quality = scoring.quality(peer.dtype, peer.mode, measure)
            found.append(
                Running(
                    form=peer.dtype, quality=quality, weight_bytes=None, threads=peer.threads, decodes=peer, prompt=scoring.prompt
                )
            )  # fmt: skip
    return found


def rows(options: argparse.Namespace) -> list[FormRow]:
    """Quality of every form and program, then the speeds of all."""
    found: list[Running] = []
    lm = scoring = None
    for given in options.form:
        name, model, *adapter = given.split("=")
        require(bool(model) and len(adapter) < 2, f"--form {given} is no NAME=MODEL or NAME=MODEL=ADAPTER")
        lm = opened(name, model, Path(adapter[0]) if adapter else None, options)
        scoring = scoring or Scoring(lm, options)
        found += running(name, lm, scoring)
    assert lm is not None and scoring is not None, "there is a form"
    if options.against:
        found += programs(lm, scoring, options.gguf or [None])
    works = {index: each.work() for index, each in enumerate(found)}
    with torch.inference_mode():
        seconds = time_interleaved(works, options.rounds, runs=STEPS, skipped=4)
    made, run = [], time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for index, each in enumerate(found):
        p20, p50, p80 = percentiles(seconds[index])
        OUT.say(f"{each.form}, {each.quality.mode}: {1e6 / p50:.1f} tokens/s")
        made.append(
            FormRow(
                **each.quality.to_dict(), form=each.form, base=options.base, run=run, threads=each.threads,
                weight_bytes=each.weight_bytes, tok_s=1e6 / p50, p20_us=p20, p50_us=p50, p80_us=p80,
            )
        )  # fmt: skip
    return made


def newest_runs(base: str, path: Path) -> list[list[FormRow]]:
    """The runs of the newest commit that somebody can measure again, the newest last: those of the forms that the newest has."""
    runs: dict[str, list[FormRow]] = {}
    for row in read_rows(path, FormRow):
        if row.base == base and row.repeatable:
            runs.setdefault(row.run, []).append(row)
    if not runs:
        return []

    def what(run: list[FormRow]) -> object:
        return run[0].commit, [(row.form, row.mode, row.texts_hash, row.adapter) for row in run]

    newest = list(runs.values())[-1]
    return [run for run in runs.values() if what(run) == what(newest)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="what all of them are forms of")
    parser.add_argument("--form", action="append", required=True, metavar="NAME=MODEL[=ADAPTER]")
    parser.add_argument("--adapter", type=Path, help="of all of them, instead of their own")
    parser.add_argument("--against", action="store_true", help="llama.cpp too")
    parser.add_argument("--gguf", action="append", type=Path, help="what it runs; may repeat")
    parser.add_argument("--again", action="store_true", help="speeds alone: perplexities are those of the last run")
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--max-tokens", type=int, default=2048, help="of each text")
    parser.add_argument("--cache-dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    append_rows(options.results, rows(options))


if __name__ == "__main__":
    main()
