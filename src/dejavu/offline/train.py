"""From a dense model and a text to an adapter: train predictors, choose thresholds to a loss budget, check the budget.

In: a loaded checkpoint, token ids of documents, a TrainConfig. Out: an Adapter and what was measured on the way.
The text is cut into windows of the context and split: most of it trains, a part calibrates, and a last part, which neither
has seen, checks the budget. Finished layers are kept in `work_folder`, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from dejavu.config import Config, ModelConfig, Progress, require
from dejavu.files import make_folder, read_json, read_safetensors, text_hash, write_json
from dejavu.model.adapter import Adapter, AdapterConfig, LayerConfig, PartConfig, part_config, quantized
from dejavu.model.checkpoint import Checkpoint
from dejavu.model.predictor import LayerAdapter, MaskedSelection, Predictor
from dejavu.model.transformer import Transformer
from dejavu.offline.calibrate import Candidate, Part, head_reads, interpolate_divergence, meet_budget, mlp_reads
from dejavu.offline.collect import LayerData, mean_input, pack_windows, sweep_layers
from dejavu.offline.fidelity import compare_runs, divergences, token_nll
from dejavu.offline.predictors import start_mlp, train_heads, train_mlp
from dejavu.offline.thresholds import Quality, Scored, score_heads, score_mlp

# From keeping little to keeping nearly all: a layer that everything else builds on may need five nines.
MASS_LEVELS = (
    *(0.8, 0.85, 0.88, 0.9, 0.92, 0.935, 0.95, 0.96, 0.97, 0.975, 0.98, 0.985),
    *(0.99, 0.993, 0.995, 0.997, 0.998, 0.999, 0.9995, 0.9998, 0.9999, 0.99997),
)
HEAD_DENSITIES = (0.5, 0.58, 0.66, 0.75, 0.8, 0.85, 0.9, 0.95)
MEASURED_EVERY = 3  # divergence is measured at every third candidate and interpolated between
HELD_OUT_SCORES = 10_000_000  # held-out scores of one layer that are sorted at a time
HELD_OUT_TOKENS = 3072
CHECKS = 5  # times the goal is lowered when the check text asks for it; an adapter still over budget says so
MEMORY_LIMIT = 2e9  # bytes that the activations of one layer may take
CONFIDENCE = 1.0  # standard errors added to a measured rise before it is held against the budget


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Config):
    """How predictors are trained. budget: allowed relative rise of perplexity. epochs: passes over the training tokens.

    lookahead "auto" takes 1 (the predictor runs beside attention) where that selects at most (1 + lookahead_tolerance) times the
    neurons that lookahead 0 selects for the same mass (for heads: loses at most that many times the mass at the same density).
    cached_tokens: context at which the heads' reads are counted.
    """

    method: Literal["predicted"] = "predicted"
    budget: float = 0.005
    rank: int = 64
    loss: Literal["contribution", "bce"] = "contribution"
    epochs: float = 4.0
    learning_rate: float = 5e-3
    max_tokens: int = 200_000
    lookahead: Literal["auto", "0", "1"] = "auto"
    lookahead_tolerance: float = 0.2
    heads: bool = True
    cached_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.method == "predicted", f"method {self.method!r} is not supported; supported: predicted")
        require(0 <= self.budget < 1, f"budget must lie in [0, 1), e.g. 0.005 for +0.5 % perplexity, not {self.budget}")
        require(self.rank >= 1, f"rank must be at least 1, not {self.rank}")
        require(self.loss in ("contribution", "bce"), f"loss {self.loss!r} is not supported; choose contribution or bce")
        require(self.epochs > 0, f"epochs must be positive, not {self.epochs}")
        require(self.max_tokens >= 1, f"max_tokens must be at least 1, not {self.max_tokens}")
        require(self.lookahead in ("auto", "0", "1"), f"lookahead {self.lookahead!r} is not supported; choose auto, 0 or 1")


@dataclass(slots=True)
class TrainedLayer:
    """The predictors of one layer before thresholds are chosen, with what thresholds would do (held-out text)."""

    predictors: dict[str, Predictor]
    options: dict[str, list[tuple[float, Quality]]]


@dataclass(frozen=True, slots=True)
class Split:
    """Windows [W, T] for each use."""

    train: Tensor
    calibrate: Tensor
    check: Tensor


def fitting_windows(ids_WT: Tensor, config: ModelConfig) -> Tensor:
    """As many windows as the activations of one layer fit MEMORY_LIMIT, evenly spread over the text.

    A token takes 4 bytes x D of residual stream, three fp16 inputs of width D, and 4 bytes for each active neuron, of which
    a tenth of the layer is reserved.
    """
    per_token = 10 * config.hidden_size + 0.4 * config.intermediate_size
    fitting = max(3, int(MEMORY_LIMIT / (per_token * ids_WT.shape[1])))
    return ids_WT if len(ids_WT) <= fitting else ids_WT[torch.linspace(0, len(ids_WT) - 1, fitting).long()]


def split_windows(ids_WT: Tensor) -> Split:
    """About 82 % to train, 11 % to calibrate, 7 % to check; windows are interleaved so that each part sees the whole text."""
    count = len(ids_WT)
    require(count >= 3, f"the text gives {count} windows of {ids_WT.shape[1]} tokens, and training needs at least 3; give a longer text")
    check = torch.arange(count) % max(3, min(14, count)) == 0
    calibrate = torch.arange(count) % max(3, min(9, count)) == 1
    return Split(ids_WT[~check & ~calibrate], ids_WT[calibrate & ~check], ids_WT[check])


def held_out_tokens(config: ModelConfig) -> int:
    """Tokens on which predictors are judged: fewer for wide layers, whose scores are sorted all at once."""
    return min(HELD_OUT_TOKENS, max(256, HELD_OUT_SCORES // config.intermediate_size))


def _options(scored: Scored, kind: str) -> list[tuple[float, Quality]]:
    """Distinct thresholds with what they select, from few to many."""
    if kind == "mlp":
        thresholds = {scored.threshold_for_mass(mass) for mass in MASS_LEVELS}
    else:
        thresholds = {scored.threshold_for_density(density) for density in HEAD_DENSITIES}
    return [(threshold, scored.quality(threshold)) for threshold in sorted(thresholds, reverse=True)]


def choose_lookahead(data: LayerData, model: Transformer, config: TrainConfig, train: int) -> Predictor:
    """The closed-form predictor of the lookahead that the budget prefers: the cheap test before full training."""
    block = model.blocks[data.layer]
    if config.lookahead != "auto":
        return start_mlp(data, block, config.rank, int(config.lookahead), train)
    held_out = slice(train, train + held_out_tokens(model.config) // 2)
    starts, density = [], []
    for lookahead in (0, 1):
        start = start_mlp(data, block, config.rank, lookahead, train)
        scored = score_mlp(start, data, block, held_out)
        starts.append(start)
        density.append(scored.quality(scored.threshold_for_mass(0.97)).density)
    return starts[1] if density[1] <= (1 + config.lookahead_tolerance) * density[0] else starts[0]


def choose_head_lookahead(data: LayerData, groups: int, config: TrainConfig, train: int) -> int:
    """The same cheap test for the heads: 1 where its closed-form predictor loses at most (1 + lookahead_tolerance) times the mass
    that lookahead 0 loses at the same density. Layer 0 has no layer before it to read."""
    if data.previous_mlp_ND is None:
        return 0
    if config.lookahead != "auto":
        return int(config.lookahead)
    held_out, lost = slice(train, train + HELD_OUT_TOKENS // 2), []
    for lookahead in (0, 1):
        start = train_heads(data, groups, lookahead, tokens=train, steps=0, generator=torch.Generator())
        scored = score_heads(start, data, held_out)
        lost.append(1 - scored.quality(scored.threshold_for_density(0.75)).mass)
    return int(lost[1] <= (1 + config.lookahead_tolerance) * lost[0])


def train_layer(data: LayerData, model: Transformer, config: TrainConfig, train: int) -> TrainedLayer:
    """Both predictors of a layer, rounded to what an adapter stores, from the first `train` tokens; judged on the rest."""
    block = model.blocks[data.layer]
    generator = torch.Generator().manual_seed(config.seed * 1009 + data.layer)
    held_out = slice(train, train + held_out_tokens(model.config))
    start = choose_lookahead(data, model, config, train)
    settings = {"epochs": config.epochs, "loss": config.loss, "learning_rate": config.learning_rate}
    mlp = train_mlp(data, block, start, tokens=train, generator=generator, **settings)
    mlp = quantized(mlp, mean_input(data.mlp_input(mlp.lookahead)[:train]))
    predictors, options = {"mlp": mlp}, {"mlp": _options(score_mlp(mlp, data, block, held_out), "mlp")}
    if config.heads and model.config.num_kv_heads > 1:
        groups = model.config.num_kv_heads
        lookahead = choose_head_lookahead(data, groups, config, train)
        heads = train_heads(data, groups, lookahead, tokens=train, steps=100, generator=generator)
        heads = quantized(heads, mean_input(data.head_input(lookahead)[:train]))
        predictors["heads"], options["heads"] = heads, _options(score_heads(heads, data, held_out), "heads")
    return TrainedLayer(predictors, options)


def _save_layer(folder: Path, layer: int, key: str, trained: TrainedLayer) -> None:
    tensors, parts = {}, {}
    for kind, predictor in trained.predictors.items():
        tensors |= {f"{kind}.A": predictor.A_RD, f"{kind}.B": predictor.B_OR, f"{kind}.bias": predictor.bias_O}
        options = [[threshold, *dataclasses.astuple(quality)] for threshold, quality in trained.options[kind]]
        parts[kind] = {"lookahead": predictor.lookahead, "options": options}
    make_folder(folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"layer_{layer}.safetensors")
    write_json(folder / f"layer_{layer}.json", {"key": key, "parts": parts})


def _load_layer(folder: Path, layer: int, key: str) -> TrainedLayer | None:
    """A layer finished by an earlier, interrupted run of the same training; None where there is none."""
    path = folder / f"layer_{layer}.json"
    if not path.exists() or (stored := read_json(path))["key"] != key:
        return None
    tensors = read_safetensors(folder / f"layer_{layer}.safetensors")
    predictors, options = {}, {}
    for kind, part in stored["parts"].items():
        A, B, bias = (tensors[f"{kind}.{name}"] for name in ("A", "B", "bias"))
        predictors[kind] = Predictor(A_RD=A, B_OR=B, bias_O=bias, threshold=0.0, lookahead=part["lookahead"])
        options[kind] = [(row[0], Quality(*row[1:])) for row in part["options"]]
    return TrainedLayer(predictors, options)


def _with_threshold(trained: TrainedLayer, kind: str, threshold: float) -> LayerAdapter:
    predictor = dataclasses.replace(trained.predictors[kind], threshold=threshold)
    return LayerAdapter(mlp=predictor) if kind == "mlp" else LayerAdapter(heads=predictor)


def priced_parts(
    model: Transformer, layers: Sequence[TrainedLayer], ids_WT: Tensor, config: TrainConfig, progress: Progress | None
) -> list[Part]:
    """Every part of every layer with its candidates: reads counted, divergence measured or interpolated."""
    measured = {
        (layer, kind): sorted({0, len(options) - 1, *range(1, len(options), MEASURED_EVERY)})
        for layer, trained in enumerate(layers)
        for kind, options in trained.options.items()
    }
    variants = [
        [_with_threshold(trained, kind, options[i][0]) for kind, options in trained.options.items() for i in measured[layer, kind]]
        for layer, trained in enumerate(layers)
    ]
    costs = divergences(model, ids_WT, variants, progress)
    parts = []
    for layer, trained in enumerate(layers):
        first = 0
        for kind, options in trained.options.items():
            points = measured[layer, kind]
            divergence = costs[layer][first : first + len(points)]
            first += len(points)
            rank = trained.predictors[kind].A_RD.shape[0]
            masses = [options[i][1].mass for i in points]
            candidates = []
            for threshold, quality in options:
                if kind == "mlp":
                    reads = mlp_reads(model.config, quality.density, rank)
                else:
                    reads = head_reads(model.config, quality.density, rank, config.cached_tokens)
                cost = interpolate_divergence(masses, divergence, quality.mass)
                candidates.append(Candidate(threshold=threshold, quality=quality, reads=reads, divergence=cost))
            dense = mlp_reads(model.config, 1.0, None) if kind == "mlp" else head_reads(model.config, 1.0, None, config.cached_tokens)
            parts.append(Part(layer=layer, kind=kind, dense_reads=dense, candidates=tuple(candidates)))
    return parts


def _layer_adapters(parts: Sequence[Part], choice: Sequence[Candidate | None], layers: Sequence[TrainedLayer]) -> tuple[LayerAdapter, ...]:
    chosen: list[dict[str, Predictor]] = [{} for _ in layers]
    for part, candidate in zip(parts, choice, strict=True):
        if candidate is not None:
            predictor = layers[part.layer].predictors[part.kind]
            chosen[part.layer][part.kind] = dataclasses.replace(predictor, threshold=candidate.threshold)
    return tuple(LayerAdapter(mlp=kinds.get("mlp"), heads=kinds.get("heads")) for kinds in chosen)


def _layer_configs(parts: Sequence[Part], choice: Sequence[Candidate | None], layers: Sequence[TrainedLayer]) -> tuple[LayerConfig, ...]:
    chosen: list[dict[str, PartConfig]] = [{} for _ in layers]
    for part, candidate in zip(parts, choice, strict=True):
        if candidate is not None:
            predictor = layers[part.layer].predictors[part.kind]
            predictor = dataclasses.replace(predictor, threshold=candidate.threshold)
            chosen[part.layer][part.kind] = part_config(predictor, **dataclasses.asdict(candidate.quality))
    return tuple(LayerConfig(layer=layer, **kinds) for layer, kinds in enumerate(chosen))


def train_adapter(
    checkpoint: Checkpoint,
    document_ids: Sequence[Sequence[int]],
    config: TrainConfig,
    *,
    text_hash: str,
    work_folder: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Adapter, dict[str, Any]]:
    """Train, calibrate and check. Returns the adapter and the measurements that `dejavu train` prints.

    Raises ValueError where the model's activation has no exact zeros (nothing is "active" then) or the text is too short.
    """
    model, started = checkpoint.model, time.perf_counter()
    require(
        model.config.has_exact_zeros,
        f"method predicted needs an activation with exact zeros (relu, relu2, fatrelu), and this model has {model.config.activation}",
    )
    ids_WT = pack_windows(document_ids, context=model.config.max_positions, bos=checkpoint.tokenizer.document_bos)
    given = ids_WT.numel()
    ids_WT = fitting_windows(ids_WT, model.config)
    split = split_windows(ids_WT)
    key = _run_key(f"{checkpoint.base_hash} {model.embed.weight.dtype}", config, ids_WT)
    layers = _trained_layers(model, split, config, key, work_folder, progress)
    sample = split.calibrate[: max(1, 4096 // split.calibrate.shape[1])]
    parts = priced_parts(model, layers, sample, config, progress)

    dense_nll = token_nll(model, split.calibrate)
    check_nll = token_nll(model, split.check)
    trials = 0

    def measured_rise(choice: list[Candidate | None]) -> float:
        """Rise of perplexity on the calibration windows, with its standard error to spare."""
        nonlocal trials
        trials += 1
        if progress is not None:
            progress("meeting the budget", trials, max(trials, 6))
        rise = compare_runs(dense_nll, token_nll(model, split.calibrate, MaskedSelection(_layer_adapters(parts, choice, layers))))
        return rise.rise + CONFIDENCE * rise.stderr

    goal, check = config.budget, 0
    while True:
        check += 1
        choice = meet_budget(parts, goal, measured_rise)
        adapters = _layer_adapters(parts, choice, layers)
        selection = MaskedSelection(adapters)
        checked = compare_runs(check_nll, token_nll(model, split.check, selection))
        cautious = checked.rise + CONFIDENCE * checked.stderr
        if cautious <= config.budget or all(candidate is None for candidate in choice) or check == CHECKS:
            break
        goal *= 0.9 * config.budget / cautious  # the text that calibration did not see is harder: aim lower
    counter = selection.counter
    mlp_density, head_density = counter.mlp_density(), counter.head_density()
    assert mlp_density is not None and head_density is not None
    result = {
        "layers": _layer_rows(parts, choice, layers),
        "ppl_dense": checked.ppl_dense,
        "ppl_sparse": checked.ppl_sparse,
        "rise": checked.rise,
        "rise_stderr": checked.stderr,
        "mlp_density": mlp_density,
        "head_density": head_density,
        "budget": config.budget,
        "within_budget": checked.rise <= config.budget,
        "tokens": ids_WT.numel(),
        "tokens_given": given,
        "seconds": time.perf_counter() - started,
    }
    quality = {name: float(result[name]) for name in ("ppl_dense", "ppl_sparse", "rise", "rise_stderr")}
    adapter_config = AdapterConfig(
        base_id=checkpoint.name,
        base_hashes=(checkpoint.base_hash,),
        method=config.method,
        budget=config.budget,
        calibration_text_hash=text_hash,
        quality=quality,
        mlp_density=mlp_density,
        head_density=head_density,
        seed=config.seed,
        layers=_layer_configs(parts, choice, layers),
    )
    return Adapter(layers=adapters, config=adapter_config), result


def _run_key(base: str, config: TrainConfig, ids_WT: Tensor) -> str:
    """Names a training run: finished layers are taken over only from a run with the same model, settings and text."""
    settings = {name: value for name, value in config.to_dict().items() if name != "budget"}
    ids = text_hash(" ".join(map(str, ids_WT.flatten().tolist())))
    return text_hash(f"{base} {sorted(settings.items())} {ids}")


def _trained_layers(
    model: Transformer, split: Split, config: TrainConfig, key: str, work_folder: Path | None, progress: Progress | None
) -> list[TrainedLayer]:
    """Every layer's predictors: taken from the work folder where finished, trained otherwise."""
    num_layers = model.config.num_layers
    layers = [None if work_folder is None else _load_layer(work_folder, layer, key) for layer in range(num_layers)]
    if all(trained is not None for trained in layers):
        return [trained for trained in layers if trained is not None]
    train = split.train.numel()
    held_out = split.calibrate[: max(1, -(-held_out_tokens(model.config) // split.calibrate.shape[1]))]
    finished: list[TrainedLayer] = []
    for data in sweep_layers(model, torch.cat([split.train, held_out]), progress=progress):
        trained = layers[data.layer]
        if trained is None:
            if progress is not None:
                progress("training predictors", data.layer, num_layers)
            trained = train_layer(data, model, config, train)
            if work_folder is not None:
                _save_layer(work_folder, data.layer, key, trained)
        finished.append(trained)
        if progress is not None:
            progress("training predictors", data.layer + 1, num_layers)
        del data
    return finished


def _layer_rows(parts: Sequence[Part], choice: Sequence[Candidate | None], layers: Sequence[TrainedLayer]) -> list[dict[str, Any]]:
    """What was measured per layer on held-out text; a dense MLP has density 1, recall 1, mass 1 and no lookahead."""
    dense = {"recall": 1.0, "mass": 1.0, "density": 1.0, "lookahead": None}
    rows: list[dict[str, Any]] = [{**dense, "heads": None, "curve": []} for _ in layers]
    for part, candidate in zip(parts, choice, strict=True):
        row = rows[part.layer]
        if part.kind == "mlp":
            row["curve"] = [[c.quality.density, c.quality.recall, c.quality.mass] for c in part.candidates]
        if candidate is None:
            continue
        measured = dataclasses.asdict(candidate.quality) | {"lookahead": layers[part.layer].predictors[part.kind].lookahead}
        if part.kind == "mlp":
            row |= measured
        else:
            row["heads"] = measured
    return rows
