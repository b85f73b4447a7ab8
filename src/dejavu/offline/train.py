"""From a dense model and a text to an adapter: candidates of a method, thresholds to a loss budget, a check of the budget.

In: a loaded checkpoint, a TrainingText, a TrainConfig. Out: an Adapter and what was measured on the way, of every method that was asked
for: with method auto of each that the model can have. Which of those is fastest is for bench/fastest.py to find out.
Finished pieces are kept in `work_folder`, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from dejavu.config import EXACT_ZERO_ACTIVATIONS, ModelConfig, Progress, require
from dejavu.files import text_hash, working_in
from dejavu.model.adapter import Adapter
from dejavu.model.adapter_config import AdapterConfig
from dejavu.model.checkpoint import Checkpoint
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import Transformer
from dejavu.offline.budget import DenseRuns, Fitted, SearchSpace, fit, least_reads
from dejavu.offline.calibrate import Part, token_reads
from dejavu.offline.memory import CPU
from dejavu.offline.split import Split
from dejavu.offline.train_config import METHODS, TrainConfig
from dejavu.offline.train_plain import GateSearchSpace, InputSearchSpace, PlainPricing, exact_search_space
from dejavu.offline.train_predicted import predicted_search_space
from dejavu.offline.training_text import TrainingText


def methods_of(config: ModelConfig) -> tuple[str, ...]:
    """The methods that a model can have, whatever they buy."""
    exact = config.activation in EXACT_ZERO_ACTIVATIONS
    has = {"predicted": config.has_exact_zeros, "exact": exact, "gate": True, "input": True}
    return tuple(method for method in METHODS if has[method])


WORTH_TRYING = 0.98  # of what a dense token reads: a method that cannot come below is not faster


def least_share(config: ModelConfig, parts: Sequence[Part], budget: float) -> float:
    """What a token reads at least, of what it reads dense, the head included; 0 where there is nothing to choose."""
    if not parts:
        return 0.0
    own, head = sum(part.dense_reads for part in parts), config.vocab_size * config.embed_width
    all_L = [1.0] * config.num_layers
    total = token_reads(config, [LayerAdapter()] * config.num_layers, all_L, all_L, 0) + head
    return 1 - own * (1 - least_reads(parts, budget)) / total


Trained = tuple[Adapter, dict[str, Any]]
"""An adapter and the measurements that `dejavu train` prints."""


def train_adapters(
    checkpoint: Checkpoint,
    text: TrainingText,
    config: TrainConfig,
    *,
    text_hash: str,
    work_folder: Path | None = None,
    progress: Progress | None = None,
) -> list[Trained]:
    """Train, calibrate and check, each method on the same windows.

    Raises ValueError for a method that the model cannot have.
    """
    model, ids_WT = checkpoint.model, text.ids_WT
    methods = methods_of(model.config) if config.method == "auto" else (config.method,)
    check_method(model.config, config.method)
    dense = text.dense  # before the clock of any method runs
    found: list[Trained] = []
    with nullcontext() if work_folder is None else working_in(work_folder):
        asked = _run_key(f"{checkpoint.base_hash} {model.dtype}", config, ids_WT)
        pricing = PlainPricing(model=model, ids_WT=text.split.train, methods=methods, seed=config.seed, key=asked, work_folder=work_folder)
        for method in methods:
            one = TrainConfig.from_dict(config.to_dict() | {"method": method})
            key = _run_key(f"{checkpoint.base_hash} {model.dtype}", one, ids_WT)
            said = _named(progress, method) if len(methods) > 1 else progress
            several = len(methods) > 1
            adapter, result = _trained(checkpoint, text, dense, pricing, one, key, text_hash, work_folder, said, several=several)
            found.append((adapter, result | {"tokens": ids_WT.numel(), "tokens_given": text.given}))
    return found


def train_adapter(checkpoint: Checkpoint, document_ids: Sequence[Sequence[int]], config: TrainConfig, **options: Any) -> Trained:
    """As `train_adapters`, of one method and the token ids of documents. Raises ValueError for a text that is too short, too."""
    assert config.method != "auto", "auto has several"
    return train_adapters(checkpoint, TrainingText.of(checkpoint, document_ids), config, **options)[0]


def check_method(config: ModelConfig, method: str) -> None:
    """Raise ValueError for a method that the model cannot have."""
    require(
        method != "predicted" or config.has_exact_zeros,
        f"method predicted needs an activation with exact zeros (relu, relu2, fatrelu), and this model has {config.activation}; "
        "use --method auto, which tries gate and input, or `dejavu adapt`, which changes the weights",
    )


def _named(progress: Progress | None, method: str) -> Progress | None:
    """Progress that says which method it is of."""
    return None if progress is None else lambda what, done, total: progress(f"{method}: {what}", done, total)


def _search_space(
    model: Transformer,
    split: Split,
    pricing: PlainPricing,
    config: TrainConfig,
    key: str,
    work_folder: Path | None,
    progress: Progress | None,
) -> SearchSpace:
    match config.method:
        case "predicted":
            return predicted_search_space(model, split, config, key, work_folder, progress)
        case "exact":
            return exact_search_space(model)
        case "gate":
            return GateSearchSpace(model.config.num_layers, pricing.parts("gate", progress))
        case "input":
            return InputSearchSpace(model.config.num_layers, pricing.parts("input", progress))
        case "head" | "auto":
            raise AssertionError(f"{config.method} is no way to select in layers")


def _trained(
    checkpoint: Checkpoint,
    text: TrainingText,
    dense: DenseRuns,
    pricing: PlainPricing,
    config: TrainConfig,
    key: str,
    text_hash: str,
    work_folder: Path | None,
    progress: Progress | None,
    *,
    several: bool,
) -> Trained:
    """One method, with what was measured on the check windows. several: one of them, which is not tried where it cannot be faster."""
    model, started = checkpoint.model, time.perf_counter()
    space = _search_space(model, text.split, pricing, config, key, work_folder, progress)
    share = least_share(model.config, space.parts, config.budget)
    skipped = several and share > WORTH_TRYING
    if skipped:
        fitted = Fitted.nothing(len(space.parts), model.config.num_layers, dense)
    else:
        fitted = fit(model, text.measured, dense, space, config.budget, progress)
    checked, counter = fitted.checked, fitted.counter
    mlp_density, head_density = counter.mlp_density(), counter.head_density()
    assert mlp_density is not None and head_density is not None
    all_L = [1.0] * model.config.num_layers
    reads = token_reads(model.config, fitted.layers, counter.mlp_per_layer(), counter.heads_per_layer(), config.cached_tokens)
    reads_dense = token_reads(model.config, [LayerAdapter()] * len(all_L), all_L, all_L, config.cached_tokens)
    result: dict[str, Any] = {
        "method": config.method,
        "layers": space.rows(fitted.choice, counter),
        "ppl_dense": checked.ppl_dense,
        "ppl_sparse": checked.ppl_sparse,
        "rise": checked.rise,
        "rise_stderr": checked.stderr,
        "mlp_density": mlp_density,
        "head_density": head_density,
        "reads": reads,
        "read_share": reads / reads_dense,
        "budget": config.budget,
        "within_budget": fitted.held,
        "seconds": time.perf_counter() - started,
    }
    if skipped:
        result["speed_note"] = f"not tried, as no choice within the budget would read less than {share:.1%} of a dense token"
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
        layers=space.configs(fitted.choice, counter),
    )
    return Adapter(layers=tuple(layer.to(CPU) for layer in fitted.layers), config=adapter_config), result


def _run_key(base: str, config: TrainConfig, ids_WT: Tensor) -> str:
    """Names a training run: finished pieces are taken over only from a run with the same model, settings and text."""
    settings = {name: value for name, value in config.to_dict().items() if name not in ("budget", "work_memory")}
    ids = text_hash(" ".join(map(str, ids_WT.flatten().tolist())))
    return text_hash(f"{base} {sorted(settings.items())} {ids}")
