"""`dejavu plant`: the folder is the planted model, in shards that its index names, with a tokenizer that reads back what it writes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dejavu.bench.models import folder as folders
from dejavu.bench.models.folder import plan, write_planted
from dejavu.bench.models.made_up import made_up, made_up_checkpoint
from dejavu.bench.models.planted import planted_model
from dejavu.bench.models.random import SHAPES, shape_of
from dejavu.bench.models.words import FIRST_WORD, word_tokenizer
from dejavu.cli.main import run
from dejavu.files import read_json, read_safetensors
from dejavu.model.checkpoint import load_checkpoint
from helpers.command_line import obj

SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 48,
    "intermediate_size": 160,
    "num_layers": 3,
    "num_heads": 6,
    "head_dim": 8,
    "max_positions": 64,
}
RANK = 8


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, like, groups in (("relu", "opt-6.7b", 6), ("qwen3-tiny", "qwen3-8b", 2), ("nemotron-tiny", "minitron-4b", 2)):
        config = dataclasses.replace(shape_of(like), **(SIZES | {"num_kv_heads": groups}))
        monkeypatch.setitem(SHAPES, name, lambda config=config: config)


def test_the_folder_is_the_planted_model_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "SHARD_BYTES", 120_000)
    about = write_planted(made_up("relu", dtype="fp32", density=0.1, rank=RANK), tmp_path / "model", seed=3)
    index, files = read_json(tmp_path / "model" / "model.safetensors.index.json"), sorted((tmp_path / "model").glob("*.safetensors"))
    held = {name: path.name for path in files for name in read_safetensors(path)}
    assert len(files) > 2 and index["weight_map"] == held and about["bytes"] == index["metadata"]["total_size"]
    made = planted_model("relu", device="cpu", dtype="fp32", density=0.1, rank=RANK, seed=3)
    loaded = load_checkpoint(tmp_path / "model", dtype=torch.float32)
    assert about["parameters"] == made.num_parameters and loaded.notes == ()
    weights = dict(loaded.model.named_weights())
    assert all(torch.equal(weights[name], values) for name, values in made.model.named_weights())
    same = made_up_checkpoint(made_up("relu", dtype="fp32", density=0.1, rank=RANK), device="cpu", seed=3)
    assert same.base_hash == loaded.base_hash and same.tokenizer.encode("a b") == loaded.tokenizer.encode("a b")
    assert loaded.config == same.config == dataclasses.replace(made.config, bos_token_id=0, eos_token_ids=(0,))


@pytest.mark.parametrize(("name", "density"), [("qwen3-tiny", None), ("nemotron-tiny", 0.05)])
def test_without_biases_weights_keep_their_scale(tmp_path: Path, name: str, density: float | None) -> None:
    """Random ones, where nothing can be planted; where the norm before an MLP can have a bias, it is planted."""
    about = write_planted(made_up(name, dtype="bf16", rank=RANK), tmp_path / "model")
    assert about["density"] == density
    model = load_checkpoint(tmp_path / "model", dtype=torch.float32).model
    logits = model(torch.arange(60)[None])
    assert 2 < float(logits.std()) < 8, "LOGIT_SPREAD is 4"


def test_a_slice_is_the_beginning_of_the_whole_and_an_index_needs_no_weights(tmp_path: Path) -> None:
    part, whole = tmp_path / "part", tmp_path / "whole"
    write_planted(made_up("relu", rank=RANK, num_layers=2), part)
    write_planted(made_up("relu", rank=RANK), whole)
    mine, full = (read_safetensors(next(path.glob("*.safetensors"))) for path in (part, whole))
    assert set(mine) < set(full) and all(torch.equal(value, full[name]) for name, value in mine.items())


def test_the_index_of_a_large_shape() -> None:
    shards = plan(shape_of("opt-30b"), "fp16")
    assert shards.total_bytes == pytest.approx(2 * 29974.5e6, rel=1e-4) and len(shards.parts) == 48
    assert shards.weight_map["model.decoder.layers.47.fc1.weight"] == "model-00048-of-00048.safetensors"
    assert [part for parts in shards.parts for part in parts] == list(range(-1, 48))


def test_words_are_read_back_as_they_were_written() -> None:
    tokenizer = word_tokenizer(400)
    ids = [*range(FIRST_WORD, 400), 300, 257]
    assert tokenizer.encode_plain(tokenizer.decode(ids)) == ids
    assert tokenizer.encode("")[0] == 0 and tokenizer.decode(tokenizer.encode_plain("Größe, 你好\n")) == "Größe, 你好\n"
    assert len(set(tokenizer.backend.get_vocab())) == tokenizer.vocab_size == 400


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plant", "relu", str(tmp_path / "model"), "--layers", "1", "--device", "cpu", "--json"]) == 0
    about = obj(capsys.readouterr().out)
    assert (about["shape"], about["layers"], about["dtype"], about["density"]) == ("relu", 1, "fp16", 0.05)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_hidden_layers"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "qwen3-tiny", "density": 0.1}, "qwen3-tiny has activation silu.*leave --density out for random weights"),
        ({"density": 1.0}, "density must lie between 0 and 1, not 1"),
        ({"dtype": "int8"}, "dtype 'int8' is not available for a made-up model; choose one of fp32, fp16, bf16"),
        ({"num_layers": 4}, r"layers must lie between 1 and 3 \(those of relu\), not 4"),
        ({"name": "opt-7b"}, "no shape is called 'opt-7b'"),
    ],
)
def test_what_cannot_be_made(options: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"name": "relu", "rank": RANK} | options
    with pytest.raises(ValueError, match=message):
        made_up(**values)


def test_the_disk_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=70_000_000_000))
    with pytest.raises(
        ValueError, match=r"opt-66b in fp16 takes 131\.5 GB and the disk of .*model has 70\.0 GB free; .* --layers 33 at most"
    ) as error:
        write_planted(made_up("opt-66b"), tmp_path / "new" / "model")
    assert "\n" not in str(error.value) and not any(tmp_path.iterdir())
    config = dataclasses.replace(shape_of("opt-66b"), num_layers=33)
    assert plan(config, "fp16").total_bytes < 70e9 < plan(dataclasses.replace(config, num_layers=34), "fp16").total_bytes
