"""An open GGUF file, split or not: its config, its tensors under plain Hugging Face names, its tokenizer.

Tensors are views of the mapped file, quantised ones in their own grid. Where a converter stored the rows of q and k so that the halves of
a rotated pair are neighbours, row (h, s, j) of ours, s the half, is row (h, j, s) of the file: the order is kept beside the rows.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dejavu.config import ModelConfig, require
from dejavu.damage import foreign_reader
from dejavu.kernels.quantized import Matrix, QuantizedMatrix, wide
from dejavu.model.families import FAMILIES, config_from_hf, is_norm_weight
from dejavu.model.gguf.families import IGNORED_MODULE, LAYER_MODULES, MODULES, ROPE_TENSORS, Source, gguf_family
from dejavu.model.gguf.header import Header, TensorInfo, require_readable
from dejavu.model.gguf.tokenizer import Vocabulary, read_tokenizer
from dejavu.model.hub_name import PART
from dejavu.model.tokenizer import Tokenizer

FLOATS = {"F32": "fp32", "F16": "fp16"}  # other types by their names in lower case


class GGUFFile:
    """A file, or all parts of a split one, of which any may be named.

    Raises ValueError where it cannot be read or is of an architecture, or has types of tensors, that are not supported; before weights are
    read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts = _parts(path)
        self.owner = {name: part for part in self.parts for name in part.tensors}
        held = sum(len(part.tensors) for part in self.parts)
        require(len(self.owner) == held, f"{path}: {held - len(self.owner)} tensors are in several parts of it")
        tensors = {name: part.tensors[name] for name, part in self.owner.items()}
        self.source = Source(path, self.parts[0].metadata, tensors, lambda name: self._plain(tensors[name]).tolist())
        self.family = gguf_family(self.source)
        for info in {info.type: info for info in tensors.values()}.values():
            require_readable(path, info)

    @functools.cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.source.metadata, str(self.path))

    def hf_config(self) -> dict[str, Any]:
        """The Hugging Face config that the metadata stand for."""
        return self.family.config(self.source) | {
            "bos_token_id": self._vocabulary.special_id("bos"),
            "eos_token_id": list(self._vocabulary.ends) or None,
        }

    def sizes(self) -> Counter[str]:
        """How many values are stored as which type, by its name in lower case; fp32 and fp16 as everywhere here."""
        sizes: Counter[str] = Counter()
        for info in self.source.tensors.values():
            sizes[FLOATS.get(info.type, info.type.lower())] += info.count
        return sizes

    def stored_dtype(self) -> str:
        """The file's own name for a mixture of types (q4_k_m), else what most values are stored as."""
        import gguf

        try:
            named = gguf.LlamaFileType(self.source.metadata.get("general.file_type", -1)).name.removeprefix("MOSTLY_").lower()
        except ValueError:
            named = ""
        return named if named.endswith(("_s", "_m", "_l", "_xl")) else self.sizes().most_common(1)[0][0]

    @functools.cached_property
    def _tokenizer(self) -> tuple[Tokenizer, list[str]]:
        embedding = self.source.tensors.get("token_embd.weight")
        with foreign_reader(self.path):
            return read_tokenizer(self._vocabulary, num_rows=None if embedding is None else embedding.shape[0])

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the metadata. ValueError for a kind that is not supported."""
        return self._tokenizer[0]

    @property
    def notes(self) -> list[str]:
        """Lines for the user: what was taken for granted."""
        return self._tokenizer[1]

    def tensors(self) -> Iterator[tuple[str, Matrix]]:
        """(plain Hugging Face name, values) of every tensor of the file: fp32, or a matrix in its own grid. One that holds several of ours
        comes as these."""
        config = config_from_hf(self.hf_config())
        renamed = LAYER_MODULES | dict(self.family.modules(self.source))
        for name, info in self.source.tensors.items():
            parts = name.split(".")
            if name in ROPE_TENSORS or (len(parts) == 4 and parts[2] == IGNORED_MODULE):
                continue
            if len(parts) <= 2:
                prefix, modules = "", (MODULES.get(parts[0]) if len(parts) == 2 else None,)
            else:
                module = parts[2] if len(parts) == 4 else ""
                prefix, modules = f"layers.{parts[1]}.", self.family.fused.get(module) or (renamed.get(module),)
            first = 0
            for own in modules:
                plain = None if own is None else _plain_name(f"{prefix}{own}.{parts[-1]}", config)
                require(plain is not None, f"{self.path}: tensor {name!r} is not supported for architecture {self.source.architecture!r}")
                assert own is not None and plain is not None
                last = first + _num_rows(own, config) if len(modules) > 1 else info.shape[0]
                yield plain, self._matrix(f"{prefix}{own}.{parts[-1]}", own, info, slice(first, last), config)
                first = last

    def _matrix(self, name: str, own: str, info: TensorInfo, rows: slice, config: ModelConfig) -> Matrix:
        """Some rows of a tensor: those of one module."""
        order = _halves_apart(own, config) if self.family.pairs else None
        whole = rows.stop <= info.shape[0] and (order is None or len(order) == rows.stop - rows.start) and len(info.shape) <= 2
        require(whole, f"{self.path}: tensor {info.name!r} is {list(info.shape)}, which does not fit the sizes in the metadata")
        if len(info.shape) == 1 or info.type == "F32":
            values = self._plain(info)[rows]
            values = values if order is None else values[order]
            return values - self.family.norm_shift if self.family.norm_shift and is_norm_weight(name) else values
        matrix = self._quantized(info).rows(rows)
        return matrix if order is None else matrix.rows(order)

    def _quantized(self, info: TensorInfo) -> QuantizedMatrix:
        held = self._view(info)
        return QuantizedMatrix(FLOATS.get(info.type, info.type.lower()), held.view(-1, held.shape[-1]), None, info.shape[-1])

    def _plain(self, info: TensorInfo) -> Tensor:
        """Its values fp32: a view where they are stored so."""
        return self._view(info) if info.type == "F32" else wide(self._quantized(info)).view(info.shape)

    def _view(self, info: TensorInfo) -> Tensor:
        return self.owner[info.name].view(info)


def _plain_name(ours: str, config: ModelConfig) -> str | None:
    """The plain Hugging Face name of a parameter; None where the family has no such one."""
    try:
        return FAMILIES[config.family].foreign_name(ours, config)
    except KeyError:
        return None


def _num_rows(module: str, config: ModelConfig) -> int:
    """Of a module that may be stored within another: its outputs."""
    match module:
        case "q":
            return config.num_heads * config.head_dim
        case "k" | "v":
            return config.num_kv_heads * config.head_dim
    return config.intermediate_size


def _halves_apart(module: str, config: ModelConfig) -> Tensor | None:
    """The stored row that each row of q or k is, where the file has the halves of a pair side by side."""
    heads = {"q": config.num_heads, "k": config.num_kv_heads}.get(module)
    if heads is None:
        return None
    return torch.arange(heads * config.head_dim).view(heads, -1, 2).transpose(1, 2).flatten()


def _parts(path: Path) -> list[Header]:
    """The file, or all parts of which it is one, in their order."""
    named = Header(path)
    count = named.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return [named]
    number = named.metadata.get("split.no", 0) + 1
    match = PART.fullmatch(path.name)
    told = f"{path} is part {number} of {count}"
    fits = match is not None and int(match["count"]) == count and path.name.endswith(f"-{number:05}-of-{count:05}.gguf")
    require(fits, f"{told}; its name has to end in -{number:05}-of-{count:05}.gguf, so that the others are found beside it")
    assert match is not None
    paths = [path.with_name(f"{match['stem']}-{index:05}-of-{count:05}.gguf") for index in range(1, count + 1)]
    absent = [each.name for each in paths if not each.is_file()]
    require(not absent, f"{told}, and {', '.join(absent[:5])} {'is' if len(absent) == 1 else 'are'} not beside it; get every part")
    headers = [named if each == path else Header(each) for each in paths]
    for index, header in enumerate(headers):
        said = header.metadata.get("split.no"), header.metadata.get("split.count")
        require(said == (index, count), f"{header.path} says that it is part {said[0]} of {said[1]}, counted from 0; get it again")
    total = headers[0].metadata.get("split.tensors.count")
    held = sum(len(header.tensors) for header in headers)
    require(total in (None, held), f"the {count} parts of {path} have {held} tensors and not {total}; get them again")
    return headers
