"""The demo: one model, dense and sparse, from the first profile to a report, on text that comes with the package.

In: a checkpoint and its adapter (or `retrain`: predictors are trained here). Out: a folder with report.html and
results.json, and the headline numbers as a dict. The steps, each of them a part of the package that has its own command:

    profile  ->  (train)  ->  generate dense and sparse  ->  evaluate both  ->  curves  ->  report

Speed is fair to both: the same prompt and number of tokens, a warm-up of each, then runs in turn; medians are compared.
Curves and recall are measured on the evaluation text, which neither model nor predictors have seen.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dejavu.bench.bytes_read import text_read_share
from dejavu.bench.rows import about
from dejavu.config import Config, ModelConfig, Progress, SamplingConfig, require
from dejavu.engine.backends import make_engine
from dejavu.engine.interface import Engine
from dejavu.engine.options import EngineOptions
from dejavu.files import absolute, new_folder, read_text, text_hash, write_json
from dejavu.generation.generation import GeneratedText, generate_tokens
from dejavu.model.adapter import Adapter
from dejavu.model.adapter_config import LayerConfig
from dejavu.model.checkpoint import Checkpoint
from dejavu.model.selectors import SELECTORS, STATED_DENSE, LayerAdapter
from dejavu.model.texts import DATA, documents
from dejavu.model.tokenizer import Tokenizer
from dejavu.offline.curves import perplexity_curves, recall_curves
from dejavu.offline.profile import profile
from dejavu.offline.train import train_adapter
from dejavu.offline.train_config import TrainConfig
from dejavu.quality.evaluate import evaluate
from dejavu.report.activation_map import activation_map
from dejavu.report.report import REPORT_FILE, RESULTS_FILE, write_report

PROMPT = "It was late in the autumn when the old lighthouse keeper"
# A small model repeats itself when greedy. Dense and sparse draw with the same random numbers.
TEMPERATURE, TOP_P = 0.7, 0.9
WARM_UP_TOKENS = 16
RETRAIN_EPOCHS = 2.0  # minutes, where `dejavu train` takes its time

Say = Callable[[str], None]
"""say(text): a line or paragraph for the user"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSizes(Config):
    """How much each step reads or writes, in tokens; runs: timed generations of each kind.

    oracle_tokens: of the profile's own oracle curve, which the report leaves to the curves and their curve_tokens.
    """

    profile_tokens: int = 4096
    train_tokens: int = 200_000
    evaluation_tokens: int = 100_000
    oracle_tokens: int = 512
    recall_tokens: int = 2048
    curve_tokens: int = 2048
    new_tokens: int = 96
    runs: int = 15

    def __post_init__(self) -> None:
        require(self.new_tokens >= 2, f"new_tokens must be at least 2, not {self.new_tokens}")
        require(self.runs >= 1, f"runs must be at least 1, not {self.runs}")


def demo_texts(name: str) -> dict[str, str]:
    """Excerpts of data/calibration.txt or data/evaluation.txt, by title; "(2)" marks the second of one work."""
    excerpts: dict[str, str] = {}
    for part in documents(read_text(DATA / f"{name}.txt")):
        text = part.strip() + "\n"
        title = text.splitlines()[0].removeprefix("Title: ")
        same = sum(known.split(" (")[0] == title for known in excerpts)
        excerpts[title if same == 0 else f"{title} ({same + 1})"] = text
    return excerpts


def _starts(documents: dict[str, list[int]], tokens: int) -> dict[str, list[int]]:
    """The start of each document, of equal length, at most `tokens` in all but at least two each."""
    part = max(2, tokens // len(documents))
    return {name: ids[:part] for name, ids in documents.items()}


class _Clock:
    """Seconds of each step, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Generator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)


def run_demo(
    checkpoint: Checkpoint,
    adapter: Adapter | None,
    *,
    retrain: bool,
    output: Path,
    options: EngineOptions,
    seed: int,
    progress: Progress | None = None,
    say: Say | None = None,
    sizes: DemoSizes = DemoSizes(),
    training: TrainConfig | None = None,
) -> dict[str, Any]:
    """Run every step and write the report; returns

    dense, sparse (each tok_s, ppl, text), speedup (sparse / dense), mlp_density, head_density (of the evaluation), read_share
    (of the sparse text), backend, dtype (of the engine), lookahead (per layer the MLP predictor's, None where the MLP runs
    dense), report (path of the page).

    options: of the engines; threads of torch, too. training: how `retrain` trains,
    instead of with the defaults and `seed`.

    Raises ValueError without an adapter and `retrain`, for an unavailable backend, or an output folder in use; all before
    the work begins.
    """
    require(
        adapter is not None or retrain, f"{checkpoint.name} comes without an adapter; train one with --retrain, or name one with --adapter"
    )
    tell: Say = say if say is not None else lambda text: None
    if options.threads is not None:
        require(options.threads >= 1, f"threads must be at least 1, not {options.threads}")
        torch.set_num_threads(options.threads)
    model, tokenizer, clock = checkpoint.model, checkpoint.tokenizer, _Clock()
    widened = model.widened()  # what is not decoded reads every weight many times
    bos = tokenizer.document_bos
    calibration = {name: tokenizer.encode_plain(text) for name, text in demo_texts("calibration").items()}
    evaluation_texts = demo_texts("evaluation")
    unseen = tokenizer.encode_plain(next(iter(evaluation_texts.values())))
    dense_engine = make_engine(model, None, options)
    ran = dense_engine.info
    output = absolute(output)
    with new_folder(output) as folder:
        with clock.step("profile"):
            profiled = profile(
                widened, _starts(calibration, sizes.profile_tokens), bos=bos, oracle_tokens=sizes.oracle_tokens, progress=progress
            )
        natural = statistics.fmean(layer["mlp_density"] for layer in profiled["layers"])
        tell(f"profile: {natural:.1%} of the MLP neurons are active for a token")
        if retrain:
            with clock.step("train"):
                text = read_text(DATA / "calibration.txt")
                trained = train_adapter(
                    replace(checkpoint, model=widened),
                    list(_starts(calibration, sizes.train_tokens).values()),
                    TrainConfig(seed=seed, epochs=RETRAIN_EPOCHS) if training is None else training,
                    text_hash=text_hash(text),
                    work_folder=None,
                    progress=progress,
                )
                adapter, predictors = trained[0], {"source": "trained in this run, on the packaged text", **trained[1]}
            found = any(layer.sparse for layer in adapter.layers)
            require(found, f"no selection pays within the loss budget in {checkpoint.name}: there is nothing sparse to show")
            tell(f"trained in {clock.seconds['train']:.0f} s")
        else:
            assert adapter is not None
            predictors = stated_quality(adapter, model.config)
        layers = adapter.attached(model, dtype=options.dtype)
        with clock.step("generate"):
            generation, recorded = _generate(model, tokenizer, options, layers, sizes, seed, progress)
        speeds = [generation[name]["tok_s"] for name in ("dense", "sparse")]
        tell(f"speed: {speeds[0]:.1f} tokens per second dense, {speeds[1]:.1f} sparse")
        with clock.step("evaluate"):
            quality = evaluate(
                model,
                tokenizer,
                layers,
                texts=evaluation_texts,
                tasks={},
                max_tokens=sizes.evaluation_tokens,
                batch_tokens=model.config.max_positions,
                progress=progress,
            )
        assert quality["sparse"] is not None, "its layers select"
        tell(f"perplexity: {quality['dense']['ppl']:.3f} dense, {quality['sparse']['ppl']:.3f} sparse")
        with clock.step("curves"):
            curves = perplexity_curves(widened, layers, unseen[: sizes.curve_tokens], bos=bos, progress=progress)
            recall = recall_curves(widened, layers, unseen[: sizes.recall_tokens], bos=bos)
        prompt_ids = tokenizer.encode(PROMPT)
        facts = about(checkpoint, backend=ran.backend, dtype=ran.dtype, threads=ran.threads, cuda=ran.device.startswith("cuda"))
        facts["environment"]["cache_dtype"] = ran.cache_dtype
        results = {
            **facts,
            "generation": generation,
            "evaluation": quality,
            "profile": profiled,
            "train": predictors,
            "curves": curves,
            "recall": recall,
            "firing": activation_map(widened, tokenizer, layers, prompt_ids, recorded),
            "seconds": clock.seconds,
        }
        write_json(folder / RESULTS_FILE, results)
        write_report(results, folder / REPORT_FILE)
    return _summary(results, adapter, output / REPORT_FILE)


def _generate(
    model: Any,
    tokenizer: Tokenizer,
    options: EngineOptions,
    layers: tuple[LayerAdapter, ...],
    sizes: DemoSizes,
    seed: int,
    progress: Progress | None,
) -> tuple[dict[str, Any], GeneratedText]:
    """The `generation` section of the results, and the sparse text once more with its record of what ran."""
    engines = {"dense": make_engine(model, None, options), "sparse": make_engine(model, layers, options)}
    prompt_ids = tokenizer.encode(PROMPT)
    room = model.config.max_positions - len(prompt_ids)
    require(room >= 2, f"the demo's prompt has {len(prompt_ids)} tokens: a context of {model.config.max_positions} has no room for a text")
    count = min(sizes.new_tokens, room)

    sampling = SamplingConfig(temperature=TEMPERATURE, top_p=TOP_P, seed=seed)

    def run(engine: Engine, tokens: int) -> GeneratedText:
        return generate_tokens(engine, tokenizer, prompt_ids, max_new_tokens=tokens, sampling=sampling, ignore_eos=True).result()

    for engine in engines.values():
        run(engine, min(WARM_UP_TOKENS, count))
    texts: dict[str, list[GeneratedText]] = {"dense": [], "sparse": []}
    for repeat in range(sizes.runs):
        for name in ("dense", "sparse") if repeat % 2 == 0 else ("sparse", "dense"):
            texts[name].append(run(engines[name], count))
            if progress is not None:
                progress("generate", sum(map(len, texts.values())), 2 * sizes.runs)
    sides = {name: _side(runs) for name, runs in texts.items()}
    sparse = texts["sparse"][0]
    generation = {
        "prompt": PROMPT,
        "sampling": sampling.to_dict(),
        "new_tokens": count,
        "runs": sizes.runs,
        **sides,
        "speedup": sides["sparse"]["tok_s"] / sides["dense"]["tok_s"],
        "mlp_density": sparse.mlp_density,
        "head_density": sparse.head_density,
        "read_share": text_read_share(model.config, sparse, layers),
    }
    return generation, run(make_engine(model, layers, replace(options, record=True)), count)


def _side(runs: Sequence[GeneratedText]) -> dict[str, Any]:
    speeds = [text.tok_s for text in runs if text.tok_s is not None]
    return {"tok_s": statistics.median(speeds), "tok_s_runs": speeds, "text": str(runs[0])}


def stated_quality(adapter: Adapter, model: ModelConfig) -> dict[str, Any]:
    """What an adapter's own config says of what it selects in that model, in the shape of train_adapter's report."""

    def layer(config: LayerConfig) -> dict[str, Any]:
        stated = dict(STATED_DENSE)
        for key, entry in config.entries.items():
            stated |= SELECTORS[key].stated(entry, model)
        return stated

    config = adapter.config
    return {
        "source": "those of the adapter, as measured when it was made",
        "method": config.method,
        "budget": config.budget,
        "mlp_density": config.mlp_density,
        "head_density": config.head_density,
        "layers": [layer(entry) for entry in config.layers],
    }


def _summary(results: dict[str, Any], adapter: Adapter, report: Path) -> dict[str, Any]:
    generation, quality = results["generation"], results["evaluation"]
    sides = {
        name: {"tok_s": generation[name]["tok_s"], "ppl": quality[name]["ppl"], "text": generation[name]["text"]}
        for name in ("dense", "sparse")
    }
    return {
        **sides,
        "speedup": generation["speedup"],
        "mlp_density": quality["mlp_density"],
        "head_density": quality["head_density"],
        "read_share": generation["read_share"],
        "backend": results["environment"]["backend"],
        "dtype": results["environment"]["dtype"],
        "lookahead": [layer.neurons.lookahead for layer in adapter.layers],
        "report": str(report),
    }
