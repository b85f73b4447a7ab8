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

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dejavu.config import require
from dejavu.kernels.dtypes import DTYPE_NAMES
from dejavu.kernels.memory import give_back_pages
from dejavu.kernels.quantized import QuantizedMatrix, packed_blocks, packed_groups
from dejavu.model.quantization_config import PackedScheme
from dejavu.model.stored import StoredTensor, as_stored

FileTensor = tuple[str, Tensor, Path]  # name, values, file
Parts = Mapping[str, Tensor]
BY_GROUP = ("qweight", "qzeros", "scales")
COMPRESSED = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"
# What belongs to a packed matrix, by method. `weight` is int8 where it is packed.
PARTS = {"gptq": (*BY_GROUP, "g_idx"), "awq": BY_GROUP, "compressed-tensors": (*COMPRESSED, "weight")}
MIDDLE = {4: 8, 8: 0}  # the zero point of what is symmetric, by bits
AT_ONCE = 128  # outputs whose values are unpacked together: in the cache of a core, and whole words of outputs
GROUP = 32  # values of a row that share a scale in the grids that these become


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A packed matrix whose parts fit together, nothing but shapes read. bits: 4, whose integers are 0 .. 15, or 8: -128 .. 127.

    group: inputs that share a scale. integers: of some outputs, int8 [rows, I]. zeros: int8 [O, G].
    """

    bits: int
    shape: tuple[int, int]
    group: int
    integers: Callable[[slice], Tensor]
    scale_OG: Tensor
    zeros: Callable[[], Tensor]


def packed_tensors(tensors: Iterable[FileTensor], scheme: PackedScheme) -> Iterator[StoredTensor]:
    """The tensors of a folder, plain ones as they are. Raises ValueError for parts that are missing, misshapen, or in act-order."""
    plain, modules = _sorted_out(tensors, scheme)
    yield from (as_stored(*each) for each in plain)
    for module, (parts, where) in modules.items():
        matrix = _held(_packed(parts, scheme, where), where)
        for tensor in parts.values():
            give_back_pages(tensor)
        yield StoredTensor(f"{module}.weight", matrix, scheme.label)


def packed_sizes(tensors: Iterable[FileTensor], scheme: PackedScheme) -> Counter[str]:
    """How many values a folder stores as which type, packed ones by the grid that they are to become. Raises as `packed_tensors`, but for
    scales."""
    sizes: Counter[str] = Counter()
    plain, modules = _sorted_out(tensors, scheme)
    for _, tensor, _ in plain:
        sizes[DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))] += tensor.numel()
    for parts, where in modules.values():
        packed = _packed(parts, scheme, where)
        half = "bf16" if packed.scale_OG.dtype == torch.bfloat16 else "fp16"
        sizes[f"q{packed.bits}_0" if scheme.symmetric else f"w{packed.bits}_{half}"] += math.prod(packed.shape)
    return sizes


def _sorted_out(tensors: Iterable[FileTensor], scheme: PackedScheme) -> tuple[list[FileTensor], dict[str, tuple[dict[str, Tensor], str]]]:
    """Plain tensors, and by module the parts of a packed matrix and what messages call it."""
    plain: list[FileTensor] = []
    modules: dict[str, tuple[dict[str, Tensor], str]] = {}
    for name, tensor, file in tensors:
        module, _, part = name.rpartition(".")
        if part in PARTS[scheme.method] and (part != "weight" or tensor.dtype == torch.int8):
            modules.setdefault(module, ({}, f"{module!r} in {file}"))[0][part] = tensor
        else:
            plain.append((name, tensor, file))
    return plain, modules


def _packed(parts: Parts, scheme: PackedScheme, where: str) -> Packed:
    packed = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}[scheme.method](parts, scheme, where)
    outputs, inputs = packed.shape
    for what, size in (("inputs", inputs), ("inputs to a scale", packed.group)):
        require(
            size > 0 and size % GROUP == 0, f"{where} has {size} {what}, no multiple of {GROUP}, which packed weights are not read with"
        )
    good = outputs > 0 and packed.scale_OG.is_floating_point()
    require(good, f"{where} has {outputs} outputs and scales of {packed.scale_OG.dtype}; the checkpoint is damaged")
    return packed


def _gptq(parts: Parts, scheme: PackedScheme, where: str) -> Packed:
    words, zeros, scales = _by_group(parts, where)
    bits, fit = scheme.bits, 32 // scheme.bits
    outputs, inputs = words.shape[1], words.shape[0] * fit
    group = _group(inputs, scheme)
    _check_shapes(where, {"qzeros": zeros, "scales": scales}, inputs, group, (-(-outputs // fit), outputs))
    if "g_idx" in parts:
        _check_order(parts["g_idx"], inputs, group, where)

    def zero_points() -> Tensor:
        one = 0x11111111 if bits == 4 else 0x01010101  # of each value of a word, from which it was taken as one number, borrowing
        return _signed(_unpacked(zeros + scheme.zero_offset * one, bits)[:, :outputs], bits).T

    def integers(rows: slice) -> Tensor:
        return _signed(_unpacked(words[:, rows].T.contiguous(), bits), bits)

    return Packed(bits=bits, shape=(outputs, inputs), group=group, integers=integers, scale_OG=scales.T, zeros=zero_points)


def _awq(parts: Parts, scheme: PackedScheme, where: str) -> Packed:
    words, zeros, scales = _by_group(parts, where)
    inputs, outputs = words.shape[0], words.shape[1] * 8
    group = _group(inputs, scheme)
    _check_shapes(where, {"qzeros": zeros, "scales": scales}, inputs, group, (words.shape[1], outputs))

    def by_output(held: Tensor) -> Tensor:  # even outputs of a word come before odd ones
        return _unpacked(held, 4).unflatten(1, (-1, 2, 4)).permute(1, 3, 2, 0).flatten(0, 2).view(torch.int8)

    def integers(rows: slice) -> Tensor:
        return by_output(words[:, rows.start // 8 : -(-rows.stop // 8)].contiguous())

    return Packed(bits=4, shape=(outputs, inputs), group=group, integers=integers, scale_OG=scales.T, zeros=lambda: by_output(zeros))


def _compressed(parts: Parts, scheme: PackedScheme, where: str) -> Packed:
    held, scale, zero = parts.get("weight", parts.get("weight_packed")), parts.get("weight_scale"), parts.get("weight_zero_point")
    told = parts.get("weight_shape")
    shape = list(held.shape) if held is not None and "weight" in parts else [] if told is None else told.flatten().tolist()
    if held is None or scale is None or held.dim() != 2 or len(shape) != 2:
        raise ValueError(f"{where} has of a compressed matrix only {', '.join(sorted(parts))}; incomplete download?")
    outputs, inputs = shape
    bits = 8 if "weight" in parts else 32 * held.shape[1] // max(1, inputs)
    whole = "weight" in parts or (held.dtype == torch.int32 and bits in (4, 8) and held.shape == (outputs, -(-inputs * bits // 32)))
    require(whole, f"{where} is {list(held.shape)}, which does not hold {outputs} x {inputs} values of 4 or 8 bits; get it again")
    scale_OG = scale.reshape(1, 1).expand(outputs, 1) if scale.numel() == 1 else scale
    good = scale_OG.dim() == 2 and scale_OG.shape[0] == outputs and scale_OG.shape[1] > 0 and inputs % scale_OG.shape[1] == 0
    require(good, f"weight_scale of {where} has shape {list(scale.shape)}, which does not fit {outputs} x {inputs} values; get it again")
    groups = scale_OG.shape[1]
    if zero is not None:
        expected = {torch.int8: list(scale.shape), torch.int32: [-(-outputs * bits // 32), groups]}.get(zero.dtype)
        require(
            list(zero.shape) == expected, f"weight_zero_point of {where} is {zero.dtype} {list(zero.shape)}, which does not fit its scales"
        )

    def zero_points() -> Tensor:
        if zero is None:
            return torch.full((outputs, groups), MIDDLE[bits], dtype=torch.int8)
        if zero.dtype == torch.int32:
            return _signed(_unpacked(zero.T.contiguous(), bits)[:, :outputs].T, bits)
        return zero.reshape(1, 1).expand(outputs, 1) if zero.numel() == 1 else zero

    def integers(rows: slice) -> Tensor:
        return held[rows] if "weight" in parts else _signed(_unpacked(held[rows].contiguous(), bits)[:, :inputs], bits)

    return Packed(bits=bits, shape=(outputs, inputs), group=inputs // groups, integers=integers, scale_OG=scale_OG, zeros=zero_points)


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


def _check_shapes(where: str, tensors: Mapping[str, Tensor], inputs: int, group: int, columns: tuple[int, int]) -> None:
    groups = -(-inputs // max(1, group))
    for (part, tensor), width in zip(tensors.items(), columns, strict=True):
        expected = [groups, width]
        require(list(tensor.shape) == expected, f"{part} of {where} has shape {list(tensor.shape)}, expected {expected}; get it again")


def _check_order(group_I: Tensor, inputs: int, group: int, where: str) -> None:
    """Raise ValueError where inputs do not lie in their groups' order."""
    if not torch.equal(group_I.long(), torch.arange(inputs) // group):
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
    exact_OG = packed.scale_OG.float()
    require(bool(exact_OG.isfinite().all()), f"{where} has NaN or infinite scales; the checkpoint is damaged")
    half = next((each for each in (torch.float16, torch.bfloat16) if torch.equal(exact_OG.to(each).float(), exact_OG)), None)
    if half is None:
        raise ValueError(f"{where} has scales of {packed.scale_OG.dtype} that neither fp16 nor bf16 holds, which are not read")
    middle, zero_OG = MIDDLE[packed.bits], packed.zeros()
    plain = half == torch.float16 and bool((zero_OG == middle).all())
    group_B = torch.arange(0, inputs, GROUP) // packed.group  # of each block
    parts = []
    for first in range(0, outputs, AT_ONCE):
        rows = slice(first, min(first + AT_ONCE, outputs))
        q, scale, zero = packed.integers(rows), packed.scale_OG[rows].to(half)[:, group_B], zero_OG[rows][:, group_B]
        if plain:
            parts.append(packed_blocks(f"q{packed.bits}_0", q - middle, scale, scale).values)
        else:
            parts.append(packed_groups(q, scale, zero, packed.bits).values)
    grid = f"q{packed.bits}_0" if plain else f"w{packed.bits}_{DTYPE_NAMES[half]}"
    return QuantizedMatrix(grid, parts[0] if len(parts) == 1 else torch.cat(parts), None, inputs)
