"""Opening a model: from what the user calls it, and options, to a LanguageModel with its backend, dtype and adapter."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from dejavu.config import DTYPES, ModelConfig, require
from dejavu.engine.backends import CAPABILITIES, pick_backend
from dejavu.engine.footprint import check_fits, free_bytes, native_sizes
from dejavu.engine.options import EngineOptions
from dejavu.files import read_json
from dejavu.kernels.dtypes import TORCH_DTYPES
from dejavu.kernels.native import DTYPE_CODES, missing_reason
from dejavu.kernels.processors import limit_torch, threads_note
from dejavu.language_model import LanguageModel
from dejavu.model.adapter import Adapter
from dejavu.model.bundle import ADAPTER_FOLDER, MODELS_FOLDER, bundled_models
from dejavu.model.checkpoint import load_checkpoint, resolve_model
from dejavu.model.download import Download
from dejavu.model.families import parameter_shapes
from dejavu.model.hub import adapter_folder, packaged_file
from dejavu.model.hub_name import hub_name
from dejavu.model.lora import adapted_model
from dejavu.model.rounding import rounding_note
from dejavu.model.source import ModelSource, open_source

BeforeWeights = Callable[[ModelConfig, str, str, Mapping[str, int]], object]


def load(
    name: str | Path,
    *,
    backend: str = "auto",
    dtype: str = "auto",
    cache_dtype: str = "auto",
    screened_head: float | None = None,
    adapter: Adapter | str | Path | None = "bundled",
    threads: int | None = None,
    revision: str | None = None,
    before_weights: BeforeWeights | None = None,
    download: Download = False,
) -> LanguageModel:
    """Load a model by the name of a bundled model or bundled adapter, a folder, a GGUF file, or a hub id.

    A hub id is `ORG/NAME`, with a branch, tag or commit `ORG/NAME@REVISION` (or revision=, but not another), `ORG/NAME:FILE.gguf` for a
    GGUF file of it, or its address. What is not whole in the local cache is an error, unless download is True, which fetches it, or a
    function that is told what would be fetched (an Offer, see model/download.py) and says whether to. The network is asked for nothing
    else, and HF_HUB_OFFLINE of huggingface_hub is obeyed.

    adapter: "bundled" takes the one that came with the model, if any; else an adapter's folder or hub id, an Adapter,
    or None to run dense. dtype: auto (what the file stores, see held_dtype), fp32, fp16, bf16, and on the native backend int8 and int4;
    there the matrices are rounded to what the dtype holds, for evaluation too; stored keeps each as it is on backend torch, too, and
    computes in fp32: little memory, slowly. cache_dtype: of keys and values, likewise: auto (on the native backend fp32 with fp32
    weights, else fp16), fp32, fp16, int8. screened_head: of the native backend, below which probability the adapter's screened head
    leaves tokens out (0: the full head; None: what it was trained to), see kernels/screen.py; evaluation has the full head.
    threads: of torch, for the whole process, and of the native engine; None: as many as the process has processors, by its affinity and
    the quota of its control group, and for torch no more than it has. backend: auto takes native or else torch for an architecture that
    the other one does not compute, and torch for such an adapter's method, with a note. before_weights: called with the architecture, the
    backend, the dtype (or "stored") and how many values the file stores as which type, before any weight is read, and also before any is
    fetched (but of a GGUF file); what it raises ends the loading. Raises ValueError for what is not found, not fetched, damaged,
    unavailable or of another model.
    """
    requested = pick_backend(backend, dtype="fp32" if dtype in ("auto", "stored") else dtype)
    _check_dtype(dtype, requested)
    if threads is None:
        limit_torch()
    else:
        set_threads(threads)

    def settle(config: ModelConfig, source: ModelSource | None = None) -> tuple[str, tuple[str, ...]]:
        """The backend, and what keeps it from being the one requested. What is wrong is said here, before weights."""
        lacking = CAPABILITIES[requested].beyond(config)
        require(backend == "auto" or not lacking, f"backend {requested!r} does not compute {', '.join(lacking)}; use --backend torch")
        settled = _instead_of(requested, config) if lacking else requested
        _check_dtype(dtype, settled)
        if before_weights is not None:
            stored = "fp32" if source is None else source.stored_dtype  # of what is not fetched yet nothing is known
            sizes = {stored: sum(map(math.prod, parameter_shapes(config).values()))} if source is None else source.sizes
            before_weights(config, settled, held_dtype(dtype, stored, settled), sizes)
        return settled, lacking

    name = str(name)
    named: Path | None = None
    if name in bundled_adapters():
        named = MODELS_FOLDER / name / ADAPTER_FOLDER
        name = read_json(named / "config.json")["base_id"]
    # A bundled adapter was made for the form of its base that a package carries: that one, where it is installed.
    path = (packaged_file(name) if named is not None else None) or resolve_model(name, revision=revision, download=download, check=settle)
    if isinstance(adapter, str | Path) and adapter != "bundled":
        adapter = adapter_folder(adapter, download=download)  # found before the weights are read
    source = open_source(path)
    stored = source.stored_dtype
    backend, lacking = settle(source.config, source)
    capabilities = CAPABILITIES[backend]
    device = "cuda" if backend == "cuda" else "cpu"
    a_path = name not in bundled_models() and Path(name).expanduser().exists()  # else it is what bundles and the hub call it
    hub = None if a_path else hub_name(name)
    called = None if a_path else name if hub is None else hub.model
    held = held_dtype(dtype, stored, backend)
    sizes = native_sizes(source.sizes) if capabilities.packs and held == "stored" else source.sizes
    smaller = [
        each
        for each in (*capabilities.dtypes, "stored")
        if held_dtype(each, stored, backend) == each and (backend, each) != ("torch", "fp16")
    ]
    check_fits(called or path.name, sizes, dtypes=smaller, dtype=held, free=free_bytes(backend))
    computed = None if held == "stored" or capabilities.packs else TORCH_DTYPES[held]
    checkpoint = load_checkpoint(source, dtype=computed, device=device, name=called)
    if adapter == "bundled":
        adapter = named or checkpoint.adapter_folder
    if isinstance(adapter, str | Path):
        adapter = Adapter.load(adapter, model=checkpoint.config, base_hash=checkpoint.base_hash)
    options = EngineOptions(
        backend=backend,
        dtype=dtype if capabilities.packs and dtype != "stored" else "auto",
        cache_dtype=cache_dtype,
        screened_head=screened_head,
        threads=threads,
    )
    if capabilities.packs:  # what is evaluated has the values that the engine computes with
        cached = capabilities.cache_dtype(cache_dtype, dtype=checkpoint.model.stored_as if held == "stored" else dtype)
        model = checkpoint.model.rounded(held, cache_dtype=cached)
        checkpoint = dataclasses.replace(checkpoint, model=model)
    lm = LanguageModel(checkpoint, options, adapter=adapter)
    crowded = threads_note(threads)
    lm.notes = lm.notes if crowded is None else (*lm.notes, crowded)
    if lm.adapter is not None:
        lm.notes = (*lm.notes, *lm.adapter.notes)
    digest = None if adapter is None else adapter.digest
    note = rounding_note(checkpoint.base_hash, dtype, stored_dtype=stored, adapter=digest)
    lm.notes = lm.notes if note is None else (*lm.notes, note)
    widened = wider_note(source.sizes) if capabilities.packs and held == "stored" else None
    lm.notes = lm.notes if widened is None else (*lm.notes, widened)
    if lacking:
        lm.notes = (*lm.notes, f"backend {backend} on the CPU: {requested} does not compute {', '.join(lacking)}")
    if lm.adapter is not None and lm.adapter.screen is not None and screened_head is None and not capabilities.screened_head:
        lm.notes = (*lm.notes, capabilities.full_head_note())
    layers = lm.layers()
    running = lm.model if layers is None else adapted_model(lm.model, layers)
    others = sorted(set(running.sizes()) - set(lm.model.sizes()))
    if held == "stored" and others:
        lm.notes = (*lm.notes, f"what the adapter changes is held in {', '.join(others)}: in {lm.model.stored_as} a sum has no place")
    return lm


def _instead_of(backend: str, config: ModelConfig) -> str:
    """What runs an architecture that this backend does not compute: torch does all of them."""
    native = backend != "native" and missing_reason() is None and not CAPABILITIES["native"].beyond(config)
    return "native" if native else "torch"


def bundled_adapters() -> list[str]:
    """Names of the adapters that come with the package without their base."""
    named = {path.parent.parent.name for path in MODELS_FOLDER.glob(f"*/{ADAPTER_FOLDER}/config.json")}
    return sorted(named - set(bundled_models()))


def bundled_adapter_of(base_hash: str) -> str | None:
    """The name of the bundled adapter that was made for this base; None where there is none."""
    configs = {name: read_json(MODELS_FOLDER / name / ADAPTER_FOLDER / "config.json") for name in bundled_adapters()}
    return next((name for name, config in configs.items() if base_hash in config["base_hashes"]), None)


def set_threads(threads: int) -> None:
    """Threads that torch computes with. Raises ValueError outside 1 .. the cores of this machine."""
    cores = os.cpu_count() or 1
    require(1 <= threads <= cores, f"threads must lie between 1 and {cores} (the cores of this machine), not {threads}")
    torch.set_num_threads(threads)


def held_dtype(dtype: str, stored: str, backend: str) -> str:
    """In what the weights are held there, for a value of --dtype: one of DTYPES, or stored: each matrix as the file has it.

    auto is stored where the engine packs its own. On a GPU it is fp16, and bf16 of what bf16, or the few bits of a GGUF file or a packed
    folder, was made of, whose range fp16 has not; for torch on the CPU bf16 of bf16, else fp32. stored: what most matrices of the file are.
    """
    if dtype not in ("auto", "stored"):
        return dtype
    if CAPABILITIES[backend].packs or (dtype == "stored" and backend == "torch"):
        return "stored"
    if backend == "cuda":
        return "fp16" if stored in ("fp32", "fp16", "int8", "int4") else "bf16"
    return "bf16" if stored == "bf16" else "fp32"


def wider_note(sizes: Mapping[str, int]) -> str | None:
    """A sentence where the native engine holds types of a file in fp16, having no kernels for them."""
    unknown = [kind for kind in sizes if kind not in DTYPE_CODES]
    if not unknown:
        return None
    share = sum(sizes[kind] for kind in unknown) / sum(sizes.values())
    return f"{share:.0%} of the weights ({', '.join(unknown)}) are held in fp16: the native engine has no kernels for them"


def _check_dtype(dtype: str, backend: str) -> None:
    if dtype in ("auto", "stored"):
        return
    require(dtype in DTYPES, f"unknown dtype {dtype!r}; choose one of auto, stored, {', '.join(DTYPES)}")
    offered = ["auto", "stored", *(name for name in CAPABILITIES[backend].dtypes if name in DTYPES)]
    require(dtype in offered, f"dtype {dtype!r} is not available on backend {backend!r}; choose one of {', '.join(offered)}")
