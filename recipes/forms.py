"""Forms of one model beside each other: what each costs in perplexity, what it takes, and how fast it decodes, dense and sparse.

    python recipes/forms.py --base SmolLM2-135M-Instruct --form fp32=smollm2-sparse --form stored=smollm2-sparse \
        --form "int4, dejavu quantize"=FOLDER --text 'text/valid/*.txt'

In: `NAME=MODEL` for each form, MODEL being in NAME (a dtype) or, where NAME is none, as it is stored. Out: two FormRows for each form that
has an adapter, else one, appended to results/forms.jsonl. Perplexity is by the rule of recipes/quality.py; decode of all forms takes turns
in one process, so that speeds of one run can be compared with one another.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dejavu.bench.bytes_read import formats_of, weight_bytes
from dejavu.bench.comparison import Passage, own_quality
from dejavu.bench.rows import QualityRow, append_rows
from dejavu.bench.timing import Work, percentiles, time_interleaved
from dejavu.cli.output import Output
from dejavu.config import DTYPES
from dejavu.engine.interface import Engine
from dejavu.language_model import LanguageModel
from dejavu.loading import load
from dejavu.model.texts import named_texts
from dejavu.quality.evaluate import scored_part

RESULTS = Path(__file__).resolve().parents[1] / "results" / "forms.jsonl"
CONTEXT, STEPS = 64, 24  # tokens of a prompt, and of a turn
OUT = Output(as_json=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class FormRow(QualityRow):
    """One form of the model `base`, dense or sparse. run: the same of all rows that were timed in turns. weight_bytes: of the model that
    ran (of an adapter that changes weights, with these). tok_s: at the median step, p20_us to p80_us of a step."""

    form: str
    base: str
    run: str
    threads: int
    weight_bytes: int
    tok_s: float
    p20_us: float
    p50_us: float
    p80_us: float


@dataclass(frozen=True, kw_only=True)
class Running:
    """One form, dense or sparse: its quality, and an engine with a prompt in slot 0."""

    form: str
    quality: QualityRow
    weight_bytes: int
    engine: Engine
    prompt: Sequence[int]

    def step(self, number: int) -> None:
        """One token of a turn; each turn begins behind the prompt."""
        if number % STEPS == 0:
            self.engine.free(0)
            self.engine.prefill(0, self.prompt[:CONTEXT])
        self.engine.step([self.prompt[CONTEXT + number % STEPS]], [0])

    def work(self) -> Work:
        return Work(run=self.step)


def opened(name: str, model: str, options: argparse.Namespace) -> LanguageModel:
    dtype = name if name in DTYPES else "auto"
    return load(model, adapter=options.adapter or "bundled", backend="native", dtype=dtype, cache_dtype=options.cache_dtype)


def running(form: str, lm: LanguageModel, options: argparse.Namespace) -> list[Running]:
    """The form dense, and sparse where it has an adapter."""
    texts = named_texts(options.text).items()
    ids = {name: scored_part(lm.tokenizer, text, options.max_tokens).ids for name, text in texts}
    passage, prompt = Passage.of(ids, bos=lm.tokenizer.document_bos), next(iter(ids.values()))[: CONTEXT + STEPS]
    found = []
    for dense in (True, False):
        layers = lm.layers(dense=dense)
        if layers is None and not dense:
            continue
        quality = own_quality(
            lm.model, layers, passage, name=lm.name, backend=lm.backend, dtype=lm.dtype, cache_dtype=lm.cache_dtype,
            adapter=None if lm.adapter is None else lm.adapter.digest,
        )  # fmt: skip
        OUT.say(f"{form}, {quality.mode}: perplexity {quality.ppl:.3f} of {quality.tokens:,} tokens")
        engine = lm.engine(num_slots=1, cache_tokens=2 * (CONTEXT + STEPS), dense=dense)
        taken = round(weight_bytes(lm.config, formats_of(engine.info)))
        found.append(Running(form=form, quality=quality, weight_bytes=taken, engine=engine, prompt=prompt))
    return found


def rows(options: argparse.Namespace) -> list[FormRow]:
    """Quality of every form, then the speeds of all."""
    found: list[Running] = []
    for given in options.form:
        name, _, model = given.partition("=")
        found += running(name, opened(name, model, options), options)
    works = {index: each.work() for index, each in enumerate(found)}
    with torch.inference_mode():
        seconds = time_interleaved(works, options.rounds, runs=STEPS, skipped=4)
    made, run = [], time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for index, each in enumerate(found):
        p20, p50, p80 = percentiles(seconds[index])
        OUT.say(f"{each.form}, {each.quality.mode}: {1e6 / p50:.1f} tokens/s")
        made.append(
            FormRow(
                **each.quality.to_dict(), form=each.form, base=options.base, run=run, threads=each.engine.info.threads,
                weight_bytes=each.weight_bytes, tok_s=1e6 / p50, p20_us=p20, p50_us=p50, p80_us=p80,
            )
        )  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="what all of them are forms of")
    parser.add_argument("--form", action="append", required=True, metavar="NAME=MODEL")
    parser.add_argument("--adapter", type=Path, help="of all of them, instead of their own")
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--max-tokens", type=int, default=2048, help="of each text")
    parser.add_argument("--cache-dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    append_rows(options.results, rows(options))


if __name__ == "__main__":
    main()
