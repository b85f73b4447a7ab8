"""`dejavu quantize`: a folder that loads as it is and errs less than rounding does, its card, its adapter, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Tiny, open_fp32
from dejavu.cli.main import run
from dejavu.kernels.quantized import QuantizedMatrix
from dejavu.loading import load
from dejavu.model.checkpoint import load_checkpoint
from dejavu.model.fingerprint import model_hash
from dejavu.model.transformer import Transformer
from dejavu.offline.quantize import QuantizeConfig, quantized
from helpers.adapters import make_adapter
from helpers.command_line import obj

FAMILIES = [
    ("opt", {}),
    ("opt", {"pre_norm": False, "final_norm": False, "embed_size": 16}),
    ("llama", {"qkv_bias": True}),
    ("llama", {"block_norms": True, "residual_scale": 0.5}),
    ("llama", {"parallel": True, "shared_norm": True, "tied_head": True}),
]


def divergence(model: Transformer, other: Transformer, ids: torch.Tensor) -> float:
    """KL in nats a token."""
    log_p, log_q = (each(ids).log_softmax(-1) for each in (model, other))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def grids(model: Transformer) -> dict[str, str]:
    """The grid of every matrix that is held in one."""
    return {name: held.grid for name, held in model.named_matrices() if isinstance(held, QuantizedMatrix)}


@pytest.mark.parametrize(
    ("family", "flags", "dtype"), [*((*each, "int4") for each in FAMILIES), *(("opt", {}, each) for each in ("q4_0", "q4_1"))], ids=str
)
def test_a_quantised_model_is_nearer_than_a_rounded_one(tiny: Tiny, family: str, flags: dict[str, Any], dtype: str) -> None:
    model = tiny(family, **flags)
    before = {name: values.clone() for name, values in model.named_weights()}
    ids = torch.randint(3, 96, (40, 32), generator=torch.Generator().manual_seed(0))
    made = quantized(model, ids[:32], QuantizeConfig(dtype=dtype, int8=()))
    assert divergence(model, made, ids[32:]) < 0.8 * divergence(model, model.rounded(dtype), ids[32:])
    assert {grid for name, grid in grids(made).items() if not name.startswith("position")} == {dtype}
    assert all(torch.equal(values, before[name]) for name, values in model.named_weights()), "the model stays as it is"


def test_the_command(call, work: Path) -> None:
    result = obj(call("quantize", "model", "--text", "text.txt", "-o", "few", "--json"))
    assert result["ppl_after"] / result["ppl_before"] - 1 == pytest.approx(result["rise"]) and abs(result["rise"]) < 0.1
    assert result["dtype"] == "int4" and result["int8"] == ["embed"] and result["bytes"] < 60_000 and result["adapter"] is False
    found = load_checkpoint(work / "few", dtype=None)
    held = grids(found.model)
    assert held.pop("embed.weight") == "int8" and set(held.values()) == {"int4"} and found.base_hash == model_hash(found.model)
    lm = load(work / "few", backend="torch")
    assert torch.equal(lm.logits([2, 5, 7]), found.model.widened()(torch.tensor([[2, 5, 7]]))[0])
    card = (work / "few" / "README.md").read_text()
    for part in (f"{result['ppl_before']:.4f}", f"{result['ppl_after']:.4f}", result["calibration_text_hash"], "base_model: model"):
        assert part in card
    shown = call("quantize", "model", "--text", "text.txt", "--eval-text", "other.txt", "-o", "few", "--int8", "o,down")
    assert "unseen tokens" in shown and "Matrices are int4, o, down int8" in (work / "few" / "README.md").read_text()
    assert {name.split(".")[-2] for name, grid in grids(load_checkpoint(work / "few", dtype=None).model).items() if grid == "int8"} == {
        "o",
        "down",
    }


def test_an_adapter_comes_along_where_the_model_is_nearly_the_same(call, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(work / "model", work / "own")
    base = open_fp32(work / "own")
    make_adapter(base.config, base.base_hash).save(work / "own" / "adapter")
    arguments = ("quantize", "own", "--text", "text.txt", "-o", "with", "--dtype", "int8", "--json")
    result = obj(call(*arguments))
    lm = load(work / "with", backend="torch")
    assert result["adapter"] is True and lm.adapter is not None and lm.adapter.config.base_hashes == (base.base_hash, lm.base_hash)
    monkeypatch.setattr("dejavu.cli.accept.TOLERANCE", 0.0)
    result = obj(call(*arguments))
    assert result["adapter"] is False and "the adapter is left out" in result["note"] and not (work / "with" / "adapter").exists()


def test_rows_that_are_no_whole_blocks_are_refused_before_anything_is_rounded(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="rows of 72 values are not cut into the blocks of 32 that q4_1 has; choose int8 or int4"):
        quantized(tiny("llama", intermediate_size=72), torch.zeros(2, 8, dtype=torch.long), QuantizeConfig(dtype="q4_1"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "bf16"), "dtype 'bf16' is no grid to quantise to; choose one of int4, int8, q4_0, q4_1, q8_0"),
        (("--int8", "down,norm"), "'norm' is no kind of matrix; choose of embed, qkv, o, up, down"),
        (("--max-tokens", "0"), "max_tokens must be at least 1, not 0"),
        (("--max-tokens", "70"), "training needs at least 3; give a longer text"),
    ],
)
def test_what_is_refused(work: Path, monkeypatch: pytest.MonkeyPatch, capsys, arguments: tuple[str, ...], message: str) -> None:
    monkeypatch.chdir(work)
    assert run(["quantize", "model", "--text", "text.txt", "-o", "no", *arguments]) == 2
    assert message in capsys.readouterr().err and not (work / "no").exists()
