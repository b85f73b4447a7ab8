"""Folders of few bits: what is written is held again bit for bit, in whatever grids, and runs as the model that was rounded here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import Tiny
from dejavu.files import new_folder
from dejavu.kernels.quantized import QuantizedMatrix, wide
from dejavu.loading import load
from dejavu.model.bundle import export, write_bundle, write_grids
from dejavu.model.checkpoint import load_checkpoint, open_source
from dejavu.model.fingerprint import model_hash
from dejavu.model.stored import as_our_tensors
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import Transformer, sharing
from helpers.adapters import varied_adapter
from helpers.command_line import obj
from helpers.matrices import random_matrix

IDS = torch.tensor([[2, 5, 7, 11, 13, 17, 19, 23, 29]])


def same_matrices(one: Transformer, other: Transformer) -> bool:
    """Whether two models hold the same numbers in the same grids."""
    pairs = zip(one.named_matrices(), other.named_matrices(), strict=True)
    return all(
        name == also
        and getattr(held, "grid", None) == getattr(again, "grid", None)
        and torch.equal(wide(held), wide(again))
        and all(map(torch.equal, as_our_tensors(name, held).values(), as_our_tensors(name, again).values()))
        for (name, held), (also, again) in pairs
    )


@pytest.mark.parametrize("dtype", ["int8", "int4", "q8_0", "q4_1"])
@pytest.mark.parametrize(("family", "flags"), [("opt", {"tied_head": False}), ("llama", {})])
def test_an_export_of_few_bits_loads_as_what_was_rounded(
    tmp_path: Path, tiny: Tiny, tokenizer: Tokenizer, dtype: str, family: str, flags: dict[str, Any]
) -> None:
    model = tiny(family, **flags)
    export(model, tokenizer, tmp_path / "plain")
    export(model, tokenizer, tmp_path / "few", dtype=dtype, adapter=varied_adapter(model.config, model_hash(model)))
    found, rounded = load_checkpoint(tmp_path / "few", dtype=None), model.rounded(dtype)
    assert same_matrices(found.model, rounded) and found.stored_dtype == open_source(tmp_path / "few").stored_dtype == dtype
    assert found.base_hash == model_hash(rounded) and found.config == model.config and found.notes == ()
    size = (tmp_path / "few" / "model.safetensors").stat().st_size / (tmp_path / "plain" / "model.safetensors").stat().st_size
    assert size < (0.4 if dtype in ("int8", "q8_0") else 0.3)
    lm = load(tmp_path / "few", backend="torch")
    assert lm.adapter is not None and lm.adapter.config.base_hashes == (model_hash(model), found.base_hash)
    assert torch.equal(lm.logits(IDS[0].tolist(), dense=True), rounded.widened()(IDS)[0])


def test_a_folder_may_hold_a_grid_for_each_matrix(tmp_path: Path, tiny: Tiny, tokenizer: Tokenizer) -> None:
    grids = iter(["int8", "int4", "bf16", "fp16", "int4"] * 9)
    model = sharing(tiny("opt"), lambda module: QuantizedMatrix.of(wide(module.held), next(grids)))
    held = {matrix.grid for _, matrix in model.named_matrices() if isinstance(matrix, QuantizedMatrix)}
    assert held == {"int8", "int4", "bf16", "fp16"}
    with new_folder(tmp_path / "a") as folder:
        write_grids(model, tokenizer, folder)
    found = load_checkpoint(tmp_path / "a", dtype=None)
    assert same_matrices(found.model, model) and found.base_hash == model_hash(model) and torch.equal(found.model(IDS), model(IDS))
    with new_folder(tmp_path / "b") as folder:
        write_grids(found.model, found.tokenizer, folder)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_columns_are_told_where_they_are_odd() -> None:
    held = QuantizedMatrix.of(random_matrix(3, 33, 0), "int4")
    written = as_our_tensors("x", held)
    assert {name: part.shape for name, part in written.items()} == {"x": (3, 17), "x.scale": (3, 2), "x.columns": (1,)}
    assert as_our_tensors("x", QuantizedMatrix.of(random_matrix(3, 34, 0), "int4")).keys() == {"x", "x.scale"}


def test_an_older_bundle_exports_to_the_same_integers(tmp_path: Path, tiny: Tiny, tokenizer: Tokenizer) -> None:
    write_bundle(tiny("opt"), tokenizer, tmp_path / "bundle")
    bundle = load_checkpoint(tmp_path / "bundle", dtype=None)
    export(bundle.model, bundle.tokenizer, tmp_path / "again", dtype="int8")
    again = load_checkpoint(tmp_path / "again", dtype=None)
    assert same_matrices(again.model, bundle.model) and again.base_hash == bundle.base_hash


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("layers.0.up.weight.scale", None, r"'layers\.0\.up\.weight' is int4 \[64, 16\] without a scale for each 32 values of a row"),
        ("layers.0.up.weight.scale", torch.float32, "without a scale for each 32 values"),
        ("layers.0.up.weight", None, r"scales without their tensor: layers\.0\.up\.weight"),
    ],
)
def test_a_damaged_folder(tmp_path: Path, tiny: Tiny, tokenizer: Tokenizer, name: str, change: torch.dtype | None, message: str) -> None:
    export(tiny("opt"), tokenizer, tmp_path / "few", dtype="int4")
    file = tmp_path / "few" / "model.safetensors"
    tensors = load_file(file)
    held = tensors.pop(name)
    save_file(tensors if change is None else tensors | {name: held.to(change)}, file)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "few", dtype=None)


def test_the_command_says_what_rounding_costs(call, work: Path) -> None:
    result = obj(call("export", "model", "few", "--dtype", "int4", "--adapter", "adapter", "--json"))
    assert result["adapter"] is True and result["dtype"] == "int4" and "is not known" in result["note"]
    assert load(work / "few", backend="torch").adapter is not None
    assert "dejavu quantize rounds with activations in view" in " ".join(call("export", "model", "few", "--dtype", "int4").split())
    assert obj(call("export", "model", "few8", "--dtype", "int8", "--json"))["note"] is None
