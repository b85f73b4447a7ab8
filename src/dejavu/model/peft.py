"""The changed weights of an adapter as PEFT reads them: a LoRA over transformers' names. The predictors are not in it.

In: an Adapter of method "adapted". Out: a folder with `adapter_config.json` and `adapter_model.safetensors`, in which the factors of
layer 0's q are `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` [R, in] and `.lora_B.weight` [out, R], and norms are
`base_model.model.model.layers.0.input_layernorm.weight`. Such a model runs every neuron: it is what a prompt sees.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dejavu.config import ModelConfig, require
from dejavu.files import new_folder, write_json, write_safetensors
from dejavu.kernels.quantized import wide
from dejavu.model.adapter import Adapter
from dejavu.model.families import FAMILIES

PREFIX = "base_model.model."


def write_peft(adapter: Adapter, model: ModelConfig, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write the two files, whole or not at all. Raises ValueError where the adapter changes no weights."""
    lora = adapter.config.lora
    require(
        lora is None or lora.activation is None,
        "this adapter changes the activation, which a LoRA of PEFT cannot; write the merged model with export --merge",
    )
    if lora is None or adapter.lora is None:
        raise ValueError(f"an adapter of method {adapter.config.method!r} changes no weights, so there is nothing for PEFT to read")
    family = FAMILIES[model.family]
    plain = not family.fused and not family.norm_shift and family.prefix.startswith("model.")
    require(plain, f"model_type {model.family!r} stores fused or shifted weights, for which changes cannot be written as a LoRA")
    tensors: dict[str, Tensor] = {}
    targets, norms = set(), set()
    for index, layer in enumerate(adapter.lora):
        for name, factors in layer.factors.items():
            full = family.full_name(family.foreign_name(f"layers.{index}.{name}.weight", model)).removesuffix(".weight")
            targets.add(full.rpartition(".")[2])
            for letter, matrix in zip("AB", factors, strict=True):
                tensors[f"{PREFIX}{full}.lora_{letter}.weight"] = wide(matrix).to(dtype).contiguous()
        for name, weight_D in layer.norms.items():
            full = family.full_name(family.foreign_name(f"layers.{index}.{name}.weight", model))
            norms.add(full.removesuffix(".weight").rpartition(".")[2])
            tensors[f"{PREFIX}{full}"] = weight_D.to(dtype).contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.config.base_id,
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(targets),
        "modules_to_save": sorted(norms) or None,
    }
    with new_folder(folder) as partial:
        write_safetensors(partial / "adapter_model.safetensors", tensors, metadata={"format": "pt"})
        write_json(partial / "adapter_config.json", config)
