"""Opening a model: a Hugging Face folder, a bundled folder or a GGUF file becomes a Transformer with its tokenizer.

In: what the user calls the model. Out: a Checkpoint. Each parameter is assigned exactly once, from one tensor, which is
read, checked for NaN and hashed by its fp32 values (fingerprint.py), and cast or kept as the file has it; nothing is left at random.
For a GPU all of that is done there, tensor by tensor as the file holds them: the host never has a copy of the whole, nor a wider one.
What is kept is a view of the mapped file, of which no page stays in memory until an engine packs it.
What is odd but harmless is a line in `Checkpoint.notes`, for the command line to show; everything else is a ValueError.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dejavu.config import ModelConfig, SamplingConfig, require
from dejavu.damage import foreign_reader, misplaced
from dejavu.files import read_object, safe_member
from dejavu.kernels.memory import give_back_freed, give_back_pages, take_pages
from dejavu.kernels.quantized import AnyMatrix, Matrix, QuantizedMatrix, Stacked, cast, joined, same_values, wide
from dejavu.model.bundle import ADAPTER_FOLDER, bundled_folder, bundled_models
from dejavu.model.download import CheckConfig, Download
from dejavu.model.families import FAMILIES, TensorTarget, config_from_hf, empty_model, foreign_targets, is_norm_weight, parameter_shapes
from dejavu.model.fingerprint import base_hash, tensor_digest
from dejavu.model.generation_config import read_generation_config
from dejavu.model.hub import from_hub, in_cache, packaged_file
from dejavu.model.hub_name import hub_name
from dejavu.model.layers import Held
from dejavu.model.mapped import mapped_safetensors
from dejavu.model.packed_tensors import packed_tensors
from dejavu.model.source import ModelSource, open_source
from dejavu.model.stored import StoredTensor, as_stored, in_our_format, our_tensors
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import Transformer

FORMS = "a folder with config.json, a .gguf file, or a hub id (ORG/NAME, ORG/NAME@REVISION or ORG/NAME:FILE.gguf)"
HEAD, EMBED = "head.weight", "embed.weight"
QKV = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A loaded model. stored_dtype: of most weights on disk (fp32, fp16, bf16, int8; a GGUF's own word, e.g. q4_1).

    base_hash: see fingerprint.py. notes: lines for the user. path: the folder or file it came from. sampling: that of its
    generation_config.json; None where there is none.
    """

    model: Transformer = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    config: ModelConfig = dataclasses.field(repr=False)
    name: str
    base_hash: str
    stored_dtype: str
    notes: tuple[str, ...]
    path: Path
    sampling: SamplingConfig | None = None

    @property
    def adapter_folder(self) -> Path | None:
        """The adapter that came with the checkpoint, if one did."""
        folder = self.path / ADAPTER_FOLDER
        return folder if (folder / "config.json").is_file() else None


def resolve_model(name: str, *, revision: str | None = None, download: Download = False, check: CheckConfig | None = None) -> Path:
    """The folder or GGUF file that the user's word for a model stands for. revision: of a hub id. check: as of `fetch`.

    Tried in this order: a bundled model; an existing folder or .gguf file; a hub id in the local cache, in an installed package, or, where
    `download` allows it, fetched (see `from_hub`). ValueError says what was looked for; what looks like a path is never taken for a hub id.
    """
    require(bool(name.strip()), f"an empty name is no model; a model is {FORMS}")
    path = Path(name).expanduser().absolute()
    here = path.is_dir() or (path.is_file() and path.suffix == ".gguf")
    hub = None if here or name in bundled_models() else hub_name(name, revision)
    require(revision is None or hub is not None, f"revision {revision!r} is of a hub id, which {name!r} is not; leave it out")
    if name in bundled_models():
        return bundled_folder(name)
    if here:
        return path
    require(not path.is_file(), f"{path} is a file, but no .gguf file; a model is {FORMS}")
    bundled = ", ".join(bundled_models()) or "none"
    if hub is not None:
        packaged = packaged_file(hub.repo) if hub.revision is None and hub.file is None else None
        if packaged is not None and not in_cache(hub.repo):
            return packaged
        return from_hub(hub, download=download, check=check, otherwise=f"a bundled model ({bundled}), a folder or a .gguf file")
    if re.search(r"[/\\~]|\.gguf$", name) or name in (".", ".."):
        raise ValueError(f"model {'file' if path.suffix == '.gguf' else 'directory'} not found: {path}")
    raise ValueError(f"unknown model {name!r}: no bundled model ({bundled}) and no folder of that name; a model can also be {FORMS}")


def load_checkpoint(
    source: ModelSource | str | Path, *, dtype: torch.dtype | None, device: str | torch.device = "cpu", name: str | None = None
) -> Checkpoint:
    """Load a folder or a GGUF file. The model is in eval mode, its weights in `dtype` on `device`, without gradients.

    dtype None: matrices stay as they are stored (fp16, bf16, an int8 bundle's, a GGUF file's), and the rest is fp32.
    fp16 on the CPU is computed in fp32, with a note. Raises ValueError (naming file, tensor and numbers) for anything
    missing, truncated, unsupported, misshapen or not finite.
    """
    source = source if isinstance(source, ModelSource) else open_source(source)
    path, config, file = source.path, source.config, source.gguf
    notes: list[str] = []
    if dtype == torch.float16 and torch.device(device).type == "cpu":
        notes.append("fp16 on the CPU is computed in fp32")
        dtype = torch.float32
    bundle, sampling = False, None
    if file is not None:
        stored = (StoredTensor(tensor_name, values, source.stored_dtype) for tensor_name, values in file.tensors())
        targets = foreign_targets(config)
        notes += file.notes
    else:
        generation = read_generation_config(path)
        sampling = generation.sampling
        notes += generation.notes
        bundle = in_our_format(source.hf, path)
        if bundle:
            stored = our_tensors(path)
        elif source.scheme is not None:
            stored = packed_tensors(_folder_tensors(path, notes), source.scheme)
            notes += source.scheme.notes
        else:
            stored = (as_stored(*each) for each in _folder_tensors(path, notes))
        targets = {own: TensorTarget(own, False) for own in parameter_shapes(config)} if bundle else foreign_targets(config)
    assembler = Assembler(config, targets, dtype=dtype, device=device, where=path, foreign=not bundle)
    for tensor in stored:
        assembler.add(tensor)
    model, digests = assembler.finish()
    model.label = source.stored_dtype if dtype is None else None
    return Checkpoint(
        model=model,
        tokenizer=source.tokenizer(),
        config=model.config,
        name=name or (path.stem if file is not None else path.name),
        base_hash=base_hash(model.config, digests),
        stored_dtype=source.stored_dtype,
        notes=(*notes, *assembler.notes),
        path=path,
        sampling=sampling,
    )


def assembled(
    hf: Mapping[str, Any], tensors: Mapping[str, Tensor], *, dtype: torch.dtype, device: str | torch.device, where: str
) -> tuple[Transformer, str]:
    """A model and its base_hash from a config and named tensors in memory, copied: as `load_checkpoint` from files."""
    require(not hf.get("quantization_config"), f"{where} is quantised (quantization_config): load its folder with dejavu.load instead")
    config = config_from_hf(hf)
    assembler = Assembler(config, foreign_targets(config), dtype=dtype, device=device, where=Path(where))
    for name, values in tensors.items():
        assembler.add(as_stored(name, values.detach(), Path(where)))
    model, digests = assembler.finish()
    return model, base_hash(model.config, digests)


class Assembler:
    """Takes stored tensors in any order and puts each where it belongs; `finish` returns the model once all are there."""

    def __init__(
        self,
        config: ModelConfig,
        targets: Mapping[str, TensorTarget],
        *,
        dtype: torch.dtype | None,
        device: str | torch.device,
        where: Path,
        foreign: bool = True,
    ) -> None:
        self.config, self.targets, self.dtype, self.device, self.where = config, dict(targets), dtype, torch.device(device), where
        self.family = FAMILIES[config.family]
        self.shifted = self.family.norm_shift if foreign else 0.0
        self.shapes = parameter_shapes(config)
        self.values: dict[str, AnyMatrix] = {}
        self.parts: dict[str, dict[str, Matrix]] = {}  # of q, k and v, until all three are there
        self.digests: dict[str, bytes] = {}
        self.unused: list[str] = []
        self.notes: list[str] = []
        if config.tied_head:  # such a file may hold a head all the same: equal to the embedding, or meant to be used
            self.targets.setdefault("lm_head.weight", TensorTarget(HEAD, False))
            self.shapes[HEAD] = self.shapes[EMBED]

    def add(self, stored: StoredTensor) -> None:
        plain = self.family.plain_name(stored.name)
        for name, part in self.family.unfused(plain, stored.values, self.config).items():
            self._add(name, stored._replace(values=part))

    def _add(self, plain: str, stored: StoredTensor) -> None:
        target = self.targets.get(plain)
        if target is None:
            empty = plain.endswith(".bias") and isinstance(stored.values, Tensor) and not stored.values.any()  # GPTQ's, of maps without one
            if not empty and not self.family.is_ignored(plain):
                self.unused.append(stored.name)
            return
        require(target.name not in self.digests, f"{self.where} holds tensor {plain!r} twice (second: {stored.name!r}); remove one")
        values, expected = stored.values, self.shapes[target.name]
        expected = expected[::-1] if target.transposed else expected
        if tuple(values.shape) != expected:
            shapes = f"shape {list(values.shape)}, config.json makes it {list(expected)}"
            raise ValueError(f"tensor {stored.name!r} in {self.where} has {shapes}")
        if self.device.type != "cpu":
            for read in _tensors(values):
                take_pages(read)
            values = values.to(self.device)
        if isinstance(values, QuantizedMatrix):
            values = values.swapped() if target.transposed else values
        elif self.shifted and is_norm_weight(target.name):
            values = values + self.shifted
        elif target.transposed:
            values = values.T.contiguous()
        if not _is_finite(values):
            bad = int((~wide(values).isfinite()).sum())
            raise ValueError(f"tensor {stored.name!r} in {self.where} has {bad} NaN or infinite values; the checkpoint is damaged")
        self.digests[target.name] = tensor_digest(values)
        if self.dtype is None and isinstance(values, QuantizedMatrix):
            self._place(target.name, values)
        else:
            copied = self.device.type == "cpu"  # of what the file is mapped to
            self._place(target.name, cast(values, self.dtype or torch.float32, copy=copied))
        for read in _tensors(stored.values):
            give_back_pages(read)

    def _place(self, name: str, values: Matrix) -> None:
        """Keep the values; those of q, k and v of a layer as one."""
        owner, _, kind = name.rpartition(".")
        layer, _, part = owner.rpartition(".")
        if part not in QKV:
            self.values[name] = values
            return
        joint = f"{layer}.qkv.{kind}"
        parts = self.parts.setdefault(joint, {})
        parts[part] = values
        if len(parts) == len(QKV):
            del self.parts[joint]
            self.values[joint] = joined([parts[each] for each in QKV])

    def finish(self) -> tuple[Transformer, dict[str, bytes]]:
        self._settle_head()
        missing = [plain for plain, target in self.targets.items() if target.name not in self.digests]
        if missing:
            listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ValueError(f"{self.where} lacks {len(missing)} of {len(self.targets)} tensors: {listed}; incomplete download?")
        biases = [name for name in self.unused if name.endswith("bias")]
        require(not biases, f"{self.where} has {len(biases)} bias tensors that the model has no place for: {', '.join(biases[:5])}")
        if self.unused:
            self.notes.append(f"{len(self.unused)} tensors of the checkpoint are not used: {', '.join(self.unused[:5])}")
        model = empty_model(self.config)
        for name, values in self.values.items():
            owner, _, kind = name.rpartition(".")
            module = model.get_submodule(owner)
            if isinstance(module, Held) and kind == "weight":
                module.hold(values)
            else:
                setattr(module, kind, nn.Parameter(wide(values)))
        model.fill_frequencies(self.device)
        give_back_freed()
        return model.eval().requires_grad_(False), self.digests

    def _settle_head(self) -> None:
        """Decide between a tied head and one of its own from what the file holds (the rule of transformers)."""
        held, embed = self.values.get(HEAD), self.values.get(EMBED)
        assert not isinstance(held, Stacked) and not isinstance(embed, Stacked), "they are stored in one piece"
        alike = self.digests.get(HEAD) == self.digests.get(EMBED)  # cheaper than all of the values
        tied = held is not None and embed is not None and alike and same_values(held, embed)
        if self.config.tied_head and held is not None and not tied:
            self.notes.append("config.json ties the head to the embedding, but lm_head.weight differs from it: the stored head is used")
            self.config = dataclasses.replace(self.config, tied_head=False)
        elif self.config.tied_head or (held is None and self.family.ties_absent_head):
            self.config = dataclasses.replace(self.config, tied_head=True)
            for table in (self.values, self.digests):
                table.pop(HEAD, None)
            self.targets = {plain: target for plain, target in self.targets.items() if target.name != HEAD}


def _tensors(values: Matrix) -> tuple[Tensor, ...]:
    """What a matrix lies in."""
    return (values,) if isinstance(values, Tensor) else values.tensors


def _is_finite(values: Matrix) -> bool:
    if isinstance(values, QuantizedMatrix):
        return values.is_finite()
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())  # one pass without temporaries: weights are large


def _folder_tensors(folder: Path, notes: list[str]) -> Iterator[tuple[str, Tensor, Path]]:
    """(name, tensor, file) of all tensors of a Hugging Face folder: safetensors (sharded or not), else .bin files."""
    for index, pattern in (("model.safetensors.index.json", "*.safetensors"), ("pytorch_model.bin.index.json", "pytorch_model*.bin")):
        files = sorted(folder.glob(pattern))
        if (folder / index).is_file():
            promised = _read_index(folder, index)
            extra = [path.name for path in files if path.name not in promised]
            if extra:
                notes.append(f"{len(extra)} files that {index} does not name are not used: {', '.join(extra[:5])}")
            return _indexed_tensors(folder, index, promised)
        if files:
            return _unindexed_tensors(files)
    raise ValueError(f"{folder} has no weights: no *.safetensors and no pytorch_model.bin; incomplete download?")


def _read_index(folder: Path, index: str) -> dict[str, set[str]]:
    """Shard -> tensor names, all shards present and inside the folder."""
    weight_map = read_object(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()) or not weight_map:
        raise ValueError(f"{folder / index} has no weight_map of tensor names to files; download it again")
    promised: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        promised.setdefault(shard, set()).add(tensor)
    absent = [shard for shard in sorted(promised) if not safe_member(folder, shard).is_file()]
    require(not absent, f"{folder} lacks {len(absent)} files that {index} names: {', '.join(absent)}; incomplete download?")
    return promised


def _indexed_tensors(folder: Path, index: str, promised: Mapping[str, set[str]]) -> Iterator[tuple[str, Tensor, Path]]:
    for shard in sorted(promised):
        tensors = _read_weights(safe_member(folder, shard))
        lacking = sorted(promised[shard] - set(tensors))
        require(
            not lacking, f"{folder / index} promises {', '.join(map(repr, lacking[:5]))} in {shard!r}, which lacks it; download both again"
        )
        for tensor in sorted(promised[shard]):
            yield tensor, tensors[tensor], folder / shard


def _unindexed_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor, Path]]:
    seen: dict[str, str] = {}
    for path in files:
        for tensor, values in _read_weights(path).items():
            require(
                tensor not in seen, f"tensor {tensor!r} is in {seen.get(tensor)!r} and in {path.name!r} of {path.parent}; remove one file"
            )
            seen[tensor] = path.name
            yield tensor, values, path


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return mapped_safetensors(path)
    try:
        with foreign_reader(path):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except ValueError as error:
        if isinstance(error.__cause__, pickle.UnpicklingError) and misplaced(path) is None:
            raise ValueError(f"{path} holds more than weights, or is damaged: it is not opened; convert it to safetensors") from error
        raise
    if not isinstance(held, dict) or not all(isinstance(name, str) and _is_whole(values) for name, values in held.items()):
        raise ValueError(f"{path} is no state dict: it holds other things than named tensors")
    return held


def _is_whole(values: object) -> bool:
    """Whether it is a tensor that has memory for every value: a view may say that it has more values than its file has bytes."""
    if not isinstance(values, Tensor) or values.layout != torch.strided or values.device.type != "cpu" or values.is_quantized:
        return False
    return values.untyped_storage().nbytes() >= values.numel() * values.element_size()
