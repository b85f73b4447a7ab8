"""Folders as GPTQ, AutoAWQ and compressed-tensors write them, made of a plain folder: random integers, scales and zero points, packed
value by value as the formats are described. And the plain folder of what they stand for."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class Form:
    """config: the quantization_config. group: 0: all inputs. symmetric: zero points in the middle. zero_offset: taken from stored ones."""

    config: dict[str, Any]
    bits: int = 4
    group: int = 0
    symmetric: bool = False
    scales: torch.dtype = torch.float16
    zero_offset: int = 0


def gptq(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True} | changes


def awq(**changes: Any) -> dict[str, Any]:
    found = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    return found | {"modules_to_not_convert": None} | changes


def compressed(form: str = "pack-quantized", top: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    found = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, "actorder": None} | weights
    found["group_size"] = found["group_size"] if found["strategy"] == "group" else None
    group = {"targets": ["Linear"], "weights": found, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"], "config_groups": {"group_0": group}} | (top or {})


def words(values: Tensor, bits: int, axis: int) -> Tensor:
    """int32 of integers 0 .. 2^bits - 1, the first one of a word in its lowest bits."""
    fit = 32 // bits
    held = values.long().movedim(axis, 0).unflatten(0, (-1, fit))
    total = sum(held[:, place] << bits * place for place in range(fit))
    assert isinstance(total, Tensor)
    return (total - (total >= 2**31) * 2**32).int().movedim(0, axis).contiguous()


def packed_folder(plain: Path, folder: Path, form: Form, *, skip: tuple[str, ...] = ()) -> Path:
    """`folder`, packed, and `folder`-plain, the same values fp32. plain: an fp32 folder. skip: parts of names of modules that stay."""
    generator = torch.Generator().manual_seed(5)
    beside = folder.with_name(f"{folder.name}-plain")
    for target in (folder, beside):
        shutil.copytree(plain, target)
        (target / ".dejavu").unlink()
    packed, wide = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module == name or "_proj" not in name or any(part in name for part in skip):
            packed[name] = wide[name] = tensor
            continue
        (outputs, inputs), middle = tensor.shape, 1 << form.bits - 1
        groups = inputs // (form.group or inputs)
        q_OI = torch.randint(0, 2 * middle, (outputs, inputs), generator=generator)
        zero_OG = torch.full((outputs, groups), middle)
        if not form.symmetric:
            zero_OG = torch.randint(0, 2 * middle, (outputs, groups), generator=generator)
        scale_OG = (torch.rand(outputs, groups, generator=generator) + 0.5) / (8 * middle)
        scale_OG[0] *= 2**-20 if form.scales == torch.bfloat16 else 1  # which fp16 does not hold
        scale_OG = scale_OG.to(form.scales)
        group_I = torch.arange(inputs) // (form.group or inputs)
        wide[name] = (q_OI - zero_OG[:, group_I]).float() * scale_OG.float()[:, group_I]
        packed |= {f"{module}.{part}": values for part, values in _parts(form, q_OI, zero_OG, scale_OG, group_I).items()}
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(wide, beside / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": form.config}), encoding="utf-8")
    return folder


def _parts(form: Form, q_OI: Tensor, zero_OG: Tensor, scale_OG: Tensor, group_I: Tensor) -> dict[str, Tensor]:
    middle = 1 << form.bits - 1
    match form.config["quant_method"]:
        case "gptq":
            less = form.zero_offset * (0x11111111 if form.bits == 4 else 0x01010101)  # one of each value of a word
            return {
                "qweight": words(q_OI.T, form.bits, 0),
                "qzeros": words(zero_OG.T, form.bits, 1) - less,
                "scales": scale_OG.T.contiguous(),
                "g_idx": group_I.int(),
                "bias": torch.zeros(len(q_OI), dtype=torch.float16),
            }
        case "awq":
            q_IO, zero_GO = (each.T.unflatten(1, (-1, 8))[:, :, AWQ_ORDER].flatten(1) for each in (q_OI, zero_OG))
            return {"qweight": words(q_IO, 4, 1), "qzeros": words(zero_GO, 4, 1), "scales": scale_OG.T.contiguous()}
    found = {"weight_scale": scale_OG}
    if form.config["format"] == "int-quantized":
        zero = {} if form.symmetric else {"weight_zero_point": (zero_OG - middle).to(torch.int8)}
        return found | zero | {"weight": (q_OI - middle).to(torch.int8)}
    zero = {} if form.symmetric else {"weight_zero_point": words(zero_OG, form.bits, 0)}
    return found | zero | {"weight_packed": words(q_OI, form.bits, 1), "weight_shape": torch.tensor(q_OI.shape)}
