"""Tensors of folders that GPTQ, AutoAWQ or compressed-tensors quantised: each packed matrix becomes one in a grid, with nothing rounded.

In: the tensors of a folder, by name, and its PackedScheme. Out: StoredTensors under the names that the unquantised checkpoint has. A
value is scale * (q - zero), with one scale and zero for a group of inputs of an output. Of a matrix of O outputs and I inputs, G groups:

    gptq                qweight int32 [I/n, O], n values to a word from its lowest bits on; qzeros int32 [G, O/n], less one in the first
                        format; scales [G, O]; g_idx int32 [I], the group of each input, which has to be the one that it lies in
    awq                 qweight int32 [I, O/8], qzeros int32 [G, O/8], outputs of a word in the order 0 2 4 6 1 3 5 7; scales [G, O]
    compressed-tensors  weight_packed int32 [O, I/n] of q + 8 or q + 128, weight_shape (O, I); or weight int8 [O, I];
                        weight_scale [O, G], [O, 1] or [1]; weight_zero_point int32 [O/n, G] packed likewise, or int8 as the scales

What is symmetric, with scales that fp16 holds, becomes q4_0 or q8_0; the rest w4_fp16, w4_bf16, w8_fp16 or w8_bf16 (kernels/quantized.py).

Letters: O outputs  I inputs  G groups  n values in a word
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dejavu.config import require
from dejavu.kernels.dtypes import DTYPE_NAMES
from dejavu.kernels.memory import give_back_pages
from dejavu.kernels.quantized import QuantizedMatrix, blocks, packed_blocks, packed_groups
from dejavu.model.quantization_config import PackedScheme
from dejavu.model.stored import StoredTensor, as_stored

Parts = Mapping[str, Tensor]
BY_GROUP = ("qweight", "qzeros", "scales")
COMPRESSED = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"
# What belongs to a packed matrix, by method; the first one has its integers. `weight` is int8 where it is packed.
PARTS = {"gptq": (*BY_GROUP, "g_idx"), "awq": BY_GROUP, "compressed-tensors": (*COMPRESSED, "weight")}
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of each output's nibble in a word
GROUP = 32  # values of a row that share a scale in the grids that these become


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """bits: 4, whose integers are 0 .. 15, or 8: -128 .. 127. group: inputs that share a scale. integers: of some outputs, int8 [rows, I].
    scale_OG; zero_OG: int8."""

    bits: int
    shape: tuple[int, int]
    group: int
    integers: Callable[[slice], Tensor]
    scale_OG: Tensor
    zero_OG: Tensor


def packed_tensors(tensors: Iterable[tuple[str, Tensor, Path]], scheme: PackedScheme) -> Iterator[StoredTensor]:
    """The tensors of a folder, plain ones as they are. Raises ValueError for parts that are missing, misshapen, or in act-order."""
    modules: dict[str, dict[str, Tensor]] = {}
    files: dict[str, Path] = {}
    for name, tensor, file in tensors:
        module, part = _part_of(name, tensor, scheme)
        if part is None:
            yield as_stored(name, tensor, file)
        else:
            modules.setdefault(module, {})[part] = tensor
            files[module] = file
    for module in list(modules):
        parts, where = modules.pop(module), f"{module!r} in {files[module]}"
        matrix = _held(_packed(parts, scheme, where), where)
        for tensor in parts.values():
            give_back_pages(tensor)
        yield StoredTensor(f"{module}.weight", matrix, scheme.label)


def packed_sizes(tensors: Mapping[str, Tensor], scheme: PackedScheme) -> Counter[str]:
    """How many values a folder stores as which type, packed ones by the grid that they become. Raises ValueError for act-order."""
    sizes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        module, part = _part_of(name, tensor, scheme)
        if part is None:
            sizes[DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))] += tensor.numel()
        elif part == "g_idx":
            _check_order(tensor, scheme, name)
        elif part in ("weight", "qweight", "weight_packed"):
            bits = 8 if part == "weight" else scheme.bits
            shape = tensors.get(f"{module}.weight_shape")  # of a packed one of several schemes
            count = tensor.numel() * 32 // bits if part == "qweight" else tensor.numel() if shape is None else int(shape.prod())
            bits = bits if shape is None else 32 * tensor.shape[1] // int(shape[1])
            scales = tensors.get(f"{module}.{'scales' if part == 'qweight' else 'weight_scale'}")
            held = "bf16" if scales is not None and scales.dtype == torch.bfloat16 else "fp16"
            sizes[f"q{bits}_0" if scheme.symmetric else f"w{bits}_{held}"] += count
    return sizes


def _part_of(name: str, tensor: Tensor, scheme: PackedScheme) -> tuple[str, str | None]:
    """The module that a tensor belongs to, and what it is of a packed matrix; None of any other."""
    module, _, part = name.rpartition(".")
    packed = part in PARTS[scheme.method] and (part != "weight" or tensor.dtype == torch.int8)
    return module, part if packed else None


def _packed(parts: Parts, scheme: PackedScheme, where: str) -> Packed:
    return {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}[scheme.method](parts, scheme, where)


def _gptq(parts: Parts, scheme: PackedScheme, where: str) -> Packed:
    words, zeros, scales = _by_group(parts, where)
    bits, fit = scheme.bits, 32 // scheme.bits
    outputs, inputs = words.shape[1], words.shape[0] * fit
    group = _group(inputs, scheme)
    _check_shapes(where, {"qzeros": zeros, "scales": scales}, -(-inputs // group), (-(-outputs // fit), outputs))
    if "g_idx" in parts:
        _check_order(parts["g_idx"], scheme, where)
    stored_GO = _unpacked(zeros, bits)[:, :outputs]
    zero_GO = (stored_GO + scheme.zero_offset) & (1 << bits) - 1
    return Packed(
        bits=bits,
        shape=(outputs, inputs),
        group=group,
        integers=lambda rows: _signed(_unpacked(words[:, rows].T.contiguous(), bits), bits),
        scale_OG=scales.T,
        zero_OG=_signed(zero_GO, bits).T,
    )


def _awq(parts: Parts, scheme: PackedScheme, where: str) -> Packed:
    words, zeros, scales = _by_group(parts, where)
    inputs, outputs = words.shape[0], words.shape[1] * 8
    group = _group(inputs, scheme)
    _check_shapes(where, {"qzeros": zeros, "scales": scales}, -(-inputs // group), (words.shape[1], outputs))

    def in_order(held: Tensor) -> Tensor:
        return _unpacked(held, 4).unflatten(1, (-1, 8))[:, :, AWQ_PLACES].flatten(1)

    def integers(rows: slice) -> Tensor:
        assert rows.start % 8 == 0, "blocks of outputs are whole words"
        return in_order(words[:, rows.start // 8 : -(-rows.stop // 8)].contiguous()).T.contiguous().view(torch.int8)

    zero_OG = in_order(zeros).T.view(torch.int8)
    return Packed(bits=4, shape=(outputs, inputs), group=group, integers=integers, scale_OG=scales.T, zero_OG=zero_OG)


def _compressed(parts: Parts, scheme: PackedScheme, where: str) -> Packed:
    scale = parts.get("weight_scale")
    held = parts.get("weight", parts.get("weight_packed"))
    shape = held.shape if held is not None and "weight" in parts else parts.get("weight_shape")
    if held is None or scale is None or shape is None or held.dim() != 2 or len(shape) != 2:
        raise ValueError(f"{where} lacks a part of a compressed matrix: {', '.join(sorted(parts))}; incomplete download?")
    outputs, inputs = (int(size) for size in shape)
    bits = 8 if "weight" in parts else 32 * held.shape[1] // max(1, inputs)
    whole = "weight" in parts or (held.dtype == torch.int32 and bits in (4, 8) and held.shape == (outputs, -(-inputs * bits // 32)))
    require(whole, f"{where} is {list(held.shape)}, which does not hold {outputs} x {inputs} values of 4 or 8 bits; get it again")
    scale_OG = scale.reshape(1, 1).expand(outputs, 1) if scale.numel() == 1 else scale
    good = scale_OG.dim() == 2 and scale_OG.shape[0] == outputs and scale_OG.shape[1] > 0 and inputs % scale_OG.shape[1] == 0
    require(good, f"weight_scale of {where} has shape {list(scale.shape)}, which does not fit {outputs} x {inputs} values; get it again")
    zero = parts.get("weight_zero_point")
    if zero is None:
        zero_OG = torch.full(scale_OG.shape, 8 if bits == 4 else 0, dtype=torch.int8)
    elif zero.dtype == torch.int32:
        zero_OG = _signed(_unpacked(zero.T.contiguous(), bits)[:, :outputs].T, bits)
    else:
        zero_OG = (zero.reshape(1, 1).expand(outputs, 1) if zero.numel() == 1 else zero).to(torch.int8)
    require(zero_OG.shape == scale_OG.shape, f"weight_zero_point of {where} does not fit its scales, {list(scale.shape)}; get it again")

    def integers(rows: slice) -> Tensor:
        return held[rows] if "weight" in parts else _signed(_unpacked(held[rows].contiguous(), bits)[:, :inputs], bits)

    group = inputs // scale_OG.shape[1]
    return Packed(bits=bits, shape=(outputs, inputs), group=group, integers=integers, scale_OG=scale_OG, zero_OG=zero_OG)


def _by_group(parts: Parts, where: str) -> tuple[Tensor, Tensor, Tensor]:
    absent = [part for part in BY_GROUP if part not in parts]
    require(not absent, f"{where} lacks {', '.join(absent)}; incomplete download?")
    words, zeros, scales = (parts[part] for part in BY_GROUP)
    for part, tensor in (("qweight", words), ("qzeros", zeros)):
        require(
            tensor.dtype == torch.int32 and tensor.dim() == 2, f"{part} of {where} is {tensor.dtype} {list(tensor.shape)}, no packed matrix"
        )
    return words, zeros, scales


def _group(inputs: int, scheme: PackedScheme) -> int:
    return inputs if scheme.group_size in (-1, None) else scheme.group_size


def _check_shapes(where: str, tensors: Mapping[str, Tensor], groups: int, columns: tuple[int, int]) -> None:
    for (part, tensor), width in zip(tensors.items(), columns, strict=True):
        expected = [groups, width]
        require(list(tensor.shape) == expected, f"{part} of {where} has shape {list(tensor.shape)}, expected {expected}; get it again")


def _check_order(group_I: Tensor, scheme: PackedScheme, where: str) -> None:
    """Raise ValueError where inputs do not lie in their groups' order."""
    if not torch.equal(group_I.long(), torch.arange(len(group_I)) // _group(len(group_I), scheme)):
        raise ValueError(
            f"{where}: its inputs are quantised in act-order (desc_act), which is not read; use a checkpoint without it, or a GGUF file"
        )


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """uint8 [rows, values] of int32 [rows, words]: from the lowest bits of a word on."""
    held = words.view(torch.uint8)
    return held if bits == 8 else torch.stack([held & 15, held >> 4], dim=2).flatten(1)


def _signed(unsigned: Tensor, bits: int) -> Tensor:
    """int8: of 4 bits as they are, of 8 bits less 128."""
    return unsigned.view(torch.int8) if bits == 4 else (unsigned ^ 128).view(torch.int8)


def _held(packed: Packed, where: str) -> QuantizedMatrix:
    """The matrix in the grid of few bits that holds it exactly, made a block of outputs at a time."""
    outputs, inputs = packed.shape
    for what, size in (("inputs", inputs), ("inputs to a scale", packed.group)):
        require(size % GROUP == 0, f"{where} has {size} {what}, no multiple of {GROUP}, which packed weights are not read with")
    exact_OG = packed.scale_OG.float()
    require(bool(exact_OG.isfinite().all()), f"{where} has NaN or infinite scales; the checkpoint is damaged")
    half = next((each for each in (torch.float16, torch.bfloat16) if torch.equal(exact_OG.to(each).float(), exact_OG)), None)
    if half is None:
        raise ValueError(f"{where} has scales of {packed.scale_OG.dtype} that neither fp16 nor bf16 holds, which are not read")
    middle = 8 if packed.bits == 4 else 0
    plain = half == torch.float16 and bool((packed.zero_OG == middle).all())
    group_B = torch.arange(0, inputs, GROUP) // packed.group  # of each block
    parts = []
    for rows in blocks(outputs, inputs):
        q, scale, zero = packed.integers(rows), packed.scale_OG[rows].to(half)[:, group_B], packed.zero_OG[rows][:, group_B]
        if plain:
            parts.append(packed_blocks(f"q{packed.bits}_0", q - middle, scale, scale).values)
        else:
            parts.append(packed_groups(q, scale, zero, packed.bits).values)
    grid = f"q{packed.bits}_0" if plain else f"w{packed.bits}_{DTYPE_NAMES[half]}"
    return QuantizedMatrix(grid, parts[0] if len(parts) == 1 else torch.cat(parts), None, inputs)
