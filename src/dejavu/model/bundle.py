"""Models as the package ships them (int8 per row), in grids of few bits, and as other programs read them (plain Hugging Face folders).

A bundled model is a folder with Hugging Face's `config.json` plus `"dejavu_format": "int8-rows"`, the tokenizer, and a
`model.safetensors` with *our* tensor names in *our* layout (stored.py). So each scale belongs to one output of q, k, v, up and gate, to one
neuron of `down`, to one head dimension of `o`, to one token or position of the embeddings: a row that is skipped takes its scale with it.
`"grids"` is the same with int8, int4, blocks of GGUF or another grid for each matrix by itself, and the position table as the model has it.

A plain folder has transformers' names and layout in fp32 or bf16. Either has the adapter, where there is one, in `adapter/`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dejavu.config import SamplingConfig, require
from dejavu.files import new_folder, write_json, write_safetensors
from dejavu.kernels.quantize import quantize_rows
from dejavu.kernels.quantized import BLOCKS
from dejavu.model.adapter import Adapter, write_adapter
from dejavu.model.families import FAMILIES, config_to_hf
from dejavu.model.fingerprint import model_hash
from dejavu.model.generation_config import GENERATION_FILE, generation_values
from dejavu.model.stored import FORMAT_KEY, GRIDS, INT8_ROWS, WEIGHTS_FILE, as_our_tensors
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import Transformer

MODELS_FOLDER = Path(__file__).resolve().parents[1] / "models"
ADAPTER_FOLDER = "adapter"
PLAIN_DTYPES = {"fp32": ("float32", torch.float32), "bf16": ("bfloat16", torch.bfloat16)}
EXPORT_DTYPES = (*PLAIN_DTYPES, "int8", "int4", *BLOCKS)


def bundled_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in MODELS_FOLDER.glob("*/config.json"))


def bundled_folder(name: str) -> Path:
    """The folder of a bundled model."""
    return MODELS_FOLDER / name


def write_bundle(model: Transformer, tokenizer: Tokenizer, folder: str | Path, *, sampling: SamplingConfig | None = None) -> None:
    """Write an fp32 model as a bundled folder: matrices int8 per row, vectors fp32. Whole or not at all. sampling: see `export`."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_weights():
        values = parameter.detach().cpu()
        assert values.dtype == torch.float32, "quantise an fp32 model"
        if values.dim() == 2:
            tensors[name], tensors[f"{name}.scale"] = quantize_rows(values)
        else:
            tensors[name] = values.contiguous()
    with new_folder(folder) as partial:
        write_safetensors(partial / WEIGHTS_FILE, tensors)
        write_json(partial / "config.json", config_to_hf(model.config) | {"dtype": "float32", FORMAT_KEY: INT8_ROWS})
        _write_rest(model, tokenizer, partial, sampling)


def export(
    model: Transformer, tokenizer: Tokenizer, folder: str | Path, *, dtype: str = "fp32", adapter: Adapter | None = None,
    sampling: SamplingConfig | None = None,
) -> None:  # fmt: skip
    """Write a model as a folder: in fp32 or bf16 one that transformers loads with equal logits, in fewer bits one that `load` reads
    without rounding again; its adapter in `adapter/`.

    sampling: of the model itself, for its generation_config.json; an adapter has its own. The adapter's base_hashes gain the hash of
    this copy. Raises ValueError for another dtype or a folder in use.
    """
    require(dtype in EXPORT_DTYPES, f"dtype {dtype!r} cannot be exported; choose one of {', '.join(EXPORT_DTYPES)}")
    if dtype not in PLAIN_DTYPES:
        with new_folder(folder) as partial:
            write_grids(model.rounded(dtype), tokenizer, partial, adapter=adapter, sampling=sampling)
        return
    hf_dtype, stored_as = PLAIN_DTYPES[dtype]
    family = FAMILIES[model.config.family]
    assert model.dtype == torch.float32, "export an fp32 model"
    # Matrices are cast one by one: only these of a model that is held in fewer bits are ever fp32.
    weights = {name: values.detach().cpu().to(stored_as if values.dim() == 2 else values.dtype) for name, values in model.named_weights()}
    plain = family.stored(weights, model.config)
    tensors = {family.full_name(name): values.to(stored_as).contiguous() for name, values in plain.items()}
    with new_folder(folder) as partial:
        write_safetensors(partial / WEIGHTS_FILE, tensors, metadata={"format": "pt"})
        write_json(partial / "config.json", config_to_hf(model.config) | {"dtype": hf_dtype})
        _write_rest(model, tokenizer, partial, sampling)
        if adapter is not None:
            _write_adapter(adapter.with_base(model_hash(model, stored_as=stored_as)), partial)


def write_grids(
    model: Transformer, tokenizer: Tokenizer, folder: Path, *, adapter: Adapter | None = None, sampling: SamplingConfig | None = None
) -> None:
    """Fill an empty folder with a model whose matrices are held in grids of stored.py, each as it is. adapter, sampling: as of `export`."""
    tensors = {key: part for name, held in model.named_matrices() for key, part in as_our_tensors(name, held).items()}
    write_safetensors(folder / WEIGHTS_FILE, tensors)
    write_json(folder / "config.json", config_to_hf(model.config) | {"dtype": "float32", FORMAT_KEY: GRIDS})
    _write_rest(model, tokenizer, folder, sampling)
    if adapter is not None:
        _write_adapter(adapter.with_base(model_hash(model)), folder)


def _write_adapter(adapter: Adapter, folder: Path) -> None:
    (folder / ADAPTER_FOLDER).mkdir()
    write_adapter(adapter, folder / ADAPTER_FOLDER)


def _write_rest(model: Transformer, tokenizer: Tokenizer, folder: Path, sampling: SamplingConfig | None) -> None:
    tokenizer.save(folder)
    hf = config_to_hf(model.config)
    ids = {key: hf[key] for key in ("bos_token_id", "eos_token_id") if hf[key] is not None}
    write_json(folder / GENERATION_FILE, ids | generation_values(sampling))
