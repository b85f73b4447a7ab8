"""A model on disk before its weights are read. In: a folder or a GGUF file. Out: its architecture, and how many values of each type it has.

Only heads of files are read, so that what does not fit into memory, or is not supported, is known at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dejavu.config import ModelConfig, require, shown
from dejavu.files import read_object
from dejavu.kernels.dtypes import DTYPE_NAMES
from dejavu.model.families import config_from_hf, parameter_shapes
from dejavu.model.foreign_lora import refuse_peft
from dejavu.model.generation_config import read_generation_config
from dejavu.model.gguf import GGUFFile
from dejavu.model.mapped import mapped_safetensors
from dejavu.model.packed_tensors import packed_sizes
from dejavu.model.quantization_config import PackedScheme, packed_scheme
from dejavu.model.stored import FILE_DTYPES, in_our_format, our_sizes
from dejavu.model.tokenizer import Tokenizer, load_tokenizer

CONFIG_DTYPES = {"float16": "fp16", "bfloat16": "bf16"}  # of config.json; any other is taken for fp32


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """hf: its config.json, or what stands for it. sizes: values by the type that they are stored as (fp32, fp16, bf16, int8, int4, or
    GGUF's own word, such as q4_k), or that packed ones are held as (w4_fp16). stored_dtype: what most are, or the file's name for its
    mixture, such as q4_k_m or gptq-int4. gguf: the open file. scheme: of a folder of packed weights."""

    path: Path
    hf: Mapping[str, Any]
    config: ModelConfig
    sizes: Mapping[str, int]
    stored_dtype: str
    gguf: GGUFFile | None = None
    scheme: PackedScheme | None = None

    def tokenizer(self) -> Tokenizer:
        """Raises ValueError where there is none, or it is not supported."""
        if self.gguf is not None:
            return self.gguf.tokenizer()
        config = self.config
        return load_tokenizer(
            self.path, model_type=config.family, bos_token_id=config.bos_token_id, eos_token_ids=config.eos_token_ids,
            num_rows=config.vocab_size,
        )  # fmt: skip


def open_source(path: str | Path) -> ModelSource:
    """The model of a folder or a GGUF file. Raises ValueError for what is missing, damaged or not supported."""
    path = Path(path).expanduser().absolute()
    require(path.exists(), f"model directory not found: {path}")
    if path.suffix == ".gguf":
        file = GGUFFile(path)
        hf = file.hf_config()
        return ModelSource(path=path, hf=hf, config=_config(hf, path), sizes=file.sizes(), stored_dtype=file.stored_dtype(), gguf=file)
    hf = read_hf_config(path)
    config = _config(hf, path)
    scheme = packed_scheme(hf)
    sizes = _folder_sizes(path, hf, config, scheme)
    stored = sizes.most_common(1)[0][0] if scheme is None else scheme.label
    return ModelSource(path=path, hf=hf, config=config, sizes=sizes, stored_dtype=stored, scheme=scheme)


def read_config(path: Path) -> ModelConfig:
    """The architecture alone."""
    return _config(GGUFFile(path).hf_config() if path.suffix == ".gguf" else read_hf_config(path), path)


def _config(hf: Mapping[str, Any], path: Path) -> ModelConfig:
    try:
        return config_from_hf(hf)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_hf_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, with the BOS of generation_config.json where that file has its own. A text ends at the EOS ids of either."""
    file = folder / "config.json"
    refuse_peft(folder)
    require(file.is_file(), f"{folder} is no model folder: it has no config.json")
    hf = read_object(file)
    adapter = "base_hashes" in hf and "model_type" not in hf
    require(not adapter, f"{folder} is an adapter for {shown(hf.get('base_id'))}; give that as the model, and this with --adapter")
    stated = read_generation_config(folder).token_ids
    ends = [stated.get("eos_token_id"), hf.get("eos_token_id")]
    listed = [each for held in ends if held is not None for each in (held if isinstance(held, list) else [held])]
    return {**hf, **stated, "eos_token_id": listed or None}


def _folder_sizes(folder: Path, hf: Mapping[str, Any], config: ModelConfig, scheme: PackedScheme | None) -> Counter[str]:
    if in_our_format(hf, folder):
        return our_sizes(folder)
    tensors = [(name, tensor, file) for file in folder.glob("*.safetensors") for name, tensor in mapped_safetensors(file).items()]
    if scheme is not None:
        require(bool(tensors), f"{folder} has no *.safetensors, from which alone weights of {scheme.method} are read; incomplete download?")
        return packed_sizes(tensors, scheme)
    sizes: Counter[str] = Counter()
    for _, tensor, _ in tensors:
        kind = DTYPE_NAMES.get(tensor.dtype)
        if kind in FILE_DTYPES:  # any other is a buffer that is not read, or refused by its name when it is
            sizes[kind] += tensor.numel()
    if not sizes:  # .bin files tell nothing before they are read
        named = CONFIG_DTYPES.get(str(hf.get("dtype") or hf.get("torch_dtype")), "fp32")
        sizes[named] = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    return sizes
