"""What `quantization_config` of a Hugging Face config.json says, read or refused by name before any weight is.

In: the config as a dict. Out: a PackedScheme, None where the checkpoint is not quantised, or a ValueError that names the method, format or
setting that is not read. Which modules are quantised no scheme says: those are whose packed tensors the folder holds.

Sources: the fields that GPTQModel, AutoAWQ, compressed-tensors and transformers write and read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dejavu.config import require

METHODS = ("gptq", "awq", "compressed-tensors")
COMPRESSED_FORMATS = ("pack-quantized", "int-quantized")
INSTEAD = "use an unquantised checkpoint, or a GGUF file of it"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedScheme:
    """method: one of METHODS. bits: 4 or 8, of most modules. group_size: inputs that share a scale; -1: all of them; None: as the scales
    are shaped. symmetric: whether zero points are all in the middle. zero_offset: what is added to a stored one. notes: for the user."""

    method: str
    bits: int
    group_size: int | None
    symmetric: bool
    zero_offset: int = 0
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What the form is called: gptq-int4."""
        return f"{self.method}-int{self.bits}"


def packed_scheme(hf: Mapping[str, Any]) -> PackedScheme | None:
    """The scheme of a config.json; None without one. Raises ValueError for any that is not read."""
    found = hf.get("quantization_config")
    if not found:
        return None
    require(isinstance(found, Mapping), f"config.json: quantization_config must be an object, not {found!r}")
    method = found.get("quant_method")
    if method is None and any(str(key).startswith("load_in_") for key in found):
        method = "bitsandbytes"
    if method not in METHODS:
        raise ValueError(f"the checkpoint is quantised by {method!r} (quantization_config), which is not read; {INSTEAD}")
    return {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}[method](found)


def _refuse(method: str, setting: str) -> ValueError:
    return ValueError(f"the checkpoint is quantised by {method} with {setting}, which is not read; {INSTEAD}")


def _bits(method: str, found: Mapping[str, Any], key: str, allowed: tuple[int, ...]) -> int:
    bits = found.get(key)
    if not isinstance(bits, int) or bits not in allowed:
        raise _refuse(method, f"{key} {bits!r}")
    return bits


def _group_size(method: str, found: Mapping[str, Any]) -> int:
    size = found.get("group_size", 128)
    if not isinstance(size, int) or isinstance(size, bool) or (size != -1 and (size <= 0 or size % 32)):
        raise _refuse(method, f"group_size {size!r} (no multiple of 32)")
    return size


def _gptq(found: Mapping[str, Any]) -> PackedScheme:
    form = found.get("checkpoint_format") or found.get("format") or "gptq"
    if found.get("is_marlin_format"):
        form = "marlin"
    if form not in ("gptq", "gptq_v2"):
        raise _refuse("gptq", f"checkpoint_format {form!r}")
    if found.get("pack_dtype", "int32") != "int32":
        raise _refuse("gptq", f"pack_dtype {found['pack_dtype']!r}")
    dynamic = found.get("dynamic") or {}
    changed = [key for key in dynamic if not str(key).startswith("-:")] if isinstance(dynamic, Mapping) else [dynamic]
    if changed:  # what begins so only leaves modules out
        raise _refuse("gptq", f"settings by module (dynamic {changed[0]!r})")
    bits = _bits("gptq", found, "bits", (4, 8))
    symmetric = bool(found.get("sym", True))
    # The first format stores zero points less one.
    return PackedScheme(
        method="gptq", bits=bits, group_size=_group_size("gptq", found), symmetric=symmetric, zero_offset=1 if form == "gptq" else 0
    )


def _awq(found: Mapping[str, Any]) -> PackedScheme:
    version = str(found.get("version") or found.get("checkpoint_format") or found.get("format") or "gemm").lower()
    if version != "gemm":
        raise _refuse("awq", f"version {version!r}")
    if not found.get("zero_point", True):
        raise _refuse("awq", "zero_point false")
    return PackedScheme(method="awq", bits=_bits("awq", found, "bits", (4,)), group_size=_group_size("awq", found), symmetric=False)


def _compressed(found: Mapping[str, Any]) -> PackedScheme:
    name = "compressed-tensors"
    for key in ("sparsity_config", "transform_config"):
        inner = found.get(key) or {}
        if inner and (not isinstance(inner, Mapping) or inner.get("format") != "dense"):
            raise _refuse(name, key)
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(group, Mapping) for group in groups.values()):
        raise _refuse(name, "no config_groups")
    schemes, rounded = [], False
    for group in groups.values():
        form = group.get("format") or found.get("format")
        if form not in COMPRESSED_FORMATS:
            raise _refuse(name, f"format {form!r}")
        weights = group.get("weights")
        if not isinstance(weights, Mapping):
            raise _refuse(name, "a group without weights")
        if weights.get("type", "int") != "int":
            raise _refuse(name, f"weights of type {weights['type']!r}")
        if weights.get("strategy") not in ("tensor", "channel", "group"):
            raise _refuse(name, f"strategy {weights.get('strategy')!r}")
        if weights.get("actorder") in (True, "group", "dynamic"):
            raise _refuse(name, f"actorder {weights['actorder']!r}")
        rounded = rounded or bool(group.get("input_activations"))
        schemes.append((_bits(name, weights, "num_bits", (4, 8)), bool(weights.get("symmetric", True))))
    notes = ("the checkpoint's scheme rounds activations as well; here they are not",) if rounded else ()
    return PackedScheme(method=name, bits=schemes[0][0], group_size=None, symmetric=all(symmetric for _, symmetric in schemes), notes=notes)
