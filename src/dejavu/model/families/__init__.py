"""Families of models, each a mapping in a file of its own: config fields and tensor names, Hugging Face's and ours.

In: a Hugging Face `config.json` as a dict, or a ModelConfig. Out: the other one, and the names of the tensors both ways.
Adding a family adds an entry to FAMILIES (and the two functions of its config fields), no model code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dejavu.config import ModelConfig, require
from dejavu.model.families.falcon import FALCON
from dejavu.model.families.family import Family, Fused, TensorTarget, is_norm_weight, is_transposed
from dejavu.model.families.fields import checked
from dejavu.model.families.gemma import GEMMA, GEMMA2, GEMMA3
from dejavu.model.families.granite import GRANITE
from dejavu.model.families.llama import ARCEE, LLAMA, MINICPM, MISTRAL, QWEN2, QWEN3
from dejavu.model.families.nemotron import NEMOTRON
from dejavu.model.families.opt import OPT
from dejavu.model.families.phi3 import PHI3
from dejavu.model.families.stablelm import STABLELM
from dejavu.model.families.starcoder2 import STARCODER2
from dejavu.model.quantization_config import packed_scheme
from dejavu.model.transformer import Transformer

__all__ = [
    "FAMILIES",
    "Family",
    "Fused",
    "TensorTarget",
    "config_from_hf",
    "config_to_hf",
    "empty_model",
    "find_family",
    "foreign_targets",
    "is_norm_weight",
    "is_transposed",
    "parameter_shapes",
]

FAMILIES: dict[str, Family] = {
    "arcee": ARCEE,
    "falcon": FALCON,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "granite": GRANITE,
    "llama": LLAMA,
    "minicpm": MINICPM,
    "mistral": MISTRAL,
    "nemotron": NEMOTRON,
    "opt": OPT,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "stablelm": STABLELM,
    "starcoder2": STARCODER2,
}


class _NoInitialisation(TorchFunctionMode):
    """Skips the random initialisation of modules: on the meta device it does nothing but load torch's compiler (a second or two)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def empty_model(config: ModelConfig) -> Transformer:
    """Transformer(config) on the meta device: shapes without memory, for `load_state_dict(..., assign=True)`."""
    with torch.device("meta"), _NoInitialisation():
        return Transformer(config)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of Transformer(config) as files have it, without allocating one."""
    return {name: tuple(parameter.shape) for name, parameter in empty_model(config).named_weights()}


def foreign_targets(config: ModelConfig) -> dict[str, TensorTarget]:
    """For every parameter: plain Hugging Face tensor name -> where it goes."""
    family = FAMILIES[config.family]
    return {family.foreign_name(ours, config): TensorTarget(ours, is_transposed(ours)) for ours in parameter_shapes(config)}


# Names that checkpoints with code of their own give to a family, or their architecture where they have no model_type.
ALIASES = {"sparsellama": "llama"}
ARCHITECTURES = {"MiniCPMForCausalLM": "minicpm"}


def find_family(model_type: object) -> Family:
    """The family of a config's model_type; ValueError with the supported ones where there is none."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a Hugging Face config dict. ValueError names a missing field, an unsupported type or activation."""
    hf = checked(hf)
    architecture = next(iter(hf.get("architectures") or ()), None)
    kind = hf.get("model_type") or ARCHITECTURES.get(str(architecture))
    kind = ALIASES.get(kind, kind) if isinstance(kind, str) else kind
    require(kind != "gemma3", "model_type 'gemma3' holds a vision model; give the text model in it (text_config, model_type 'gemma3_text')")
    family, hf = find_family(kind), hf | {"model_type": kind}
    packed_scheme(hf)  # refused by name, where it is none that is read
    return family.read_config(hf)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The Hugging Face config dict of a ModelConfig, as transformers would write it (without dtype)."""
    family = FAMILIES[config.family]
    eos = config.eos_token_ids
    return {
        "architectures": [family.architecture],
        "model_type": config.family,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": None,
        "tie_word_embeddings": config.tied_head,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
    } | family.write_config(config)
