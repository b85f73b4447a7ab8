"""generation_config.json: what a model and an adapter say of drawing is used, shown, overridden and kept; what is odd stops nothing."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from conftest import Tiny
from dejavu.cli.main import run
from dejavu.cli.serve import drawing_words
from dejavu.config import SamplingConfig
from dejavu.files import write_json
from dejavu.language_model import LanguageModel
from dejavu.loading import load
from dejavu.model.adapter import Adapter
from dejavu.model.bundle import MODELS_FOLDER, export
from dejavu.model.checkpoint import load_checkpoint
from dejavu.model.generation_config import generation_values, read_generation_config
from dejavu.model.tokenizer import Tokenizer
from dejavu.serve.api.requests import Served
from helpers.adapters import make_adapter

OWN, ADAPTERS = SamplingConfig(temperature=0.75, top_k=7, top_p=0.5), SamplingConfig(temperature=1.5, top_p=0.25)


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says how to draw, with an adapter that says so, too, in it, and next to it one that does not."""
    path, model = tmp_path_factory.mktemp("sampled"), tiny("opt")
    export(model, tokenizer, path / "model", sampling=OWN)
    adapter = make_adapter(load(path / "model").config, load(path / "model").base_hash)
    adapter.save(path / "silent")
    export(model, tokenizer, path / "model", sampling=OWN, adapter=dataclasses.replace(adapter, sampling=ADAPTERS))
    return path


def read(folder: Path, values: Any) -> Any:
    (folder / "generation_config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return read_generation_config(folder)


@pytest.mark.parametrize(
    ("values", "sampling"),
    [
        ({}, None),
        ({"eos_token_id": 3, "max_length": 200}, None),
        ({"do_sample": None}, None),
        ({"do_sample": False, "top_k": 5}, SamplingConfig()),
        ({"do_sample": True}, SamplingConfig(temperature=1.0, top_k=50)),
        ({"do_sample": True, "temperature": 0.6, "top_k": 0, "top_p": 0.9}, SamplingConfig(temperature=0.6, top_p=0.9)),
        ({"do_sample": True, "temperature": 2, "top_k": 20, "top_p": 1}, SamplingConfig(temperature=2.0, top_k=20)),
        ({"do_sample": True, "temperature": 0, "top_k": None}, SamplingConfig(top_k=50)),
        ({"do_sample": False, "repetition_penalty": 1.0, "num_beams": 1, "min_p": 0.1, "bad_words_ids": []}, SamplingConfig()),
        ({"do_sample": False, "guidance_scale": 1, "no_repeat_ngram_size": 0, "remove_invalid_values": False}, SamplingConfig()),
    ],
)  # fmt: skip
def test_the_rules_are_those_of_transformers(tmp_path: Path, values: dict[str, Any], sampling: SamplingConfig | None) -> None:
    found = read(tmp_path, values)
    assert found.sampling == sampling and found.notes == ()


@pytest.mark.parametrize("sampling", [OWN, ADAPTERS, SamplingConfig(), SamplingConfig(temperature=0.1, top_k=3)])
def test_what_is_written_is_what_is_read(tmp_path: Path, sampling: SamplingConfig) -> None:
    assert read(tmp_path, generation_values(sampling)).sampling == sampling


def test_transformers_reads_what_is_written_as_we_do(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    found = transformers.GenerationConfig.from_pretrained(folder / "model")
    assert (found.do_sample, found.temperature, found.top_k, found.top_p, found.eos_token_id) == (True, 0.75, 7, 0.5, 2)


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ("", "is not used: "),
        ("{", "is not used: "),
        ("[" * 100_000, "is not used: "),
        ("[1]", "is not used: it holds no JSON object"),
        ("\"x\"", "is not used: it holds no JSON object"),
        ({"do_sample": "yes", "top_k": 5}, "makes no sense: do_sample 'yes'"),
        ({"do_sample": True, "temperature": "hot"}, "makes no sense: temperature 'hot'"),
        ({"do_sample": True, "temperature": float("nan")}, "makes no sense: temperature nan"),
        ('{"do_sample": true, "temperature": 1' + "0" * 400 + "}", "makes no sense: temperature 1000"),
        ({"do_sample": True, "temperature": True, "top_p": -1, "top_k": 2.5}, "temperature True, top_k 2.5, top_p -1"),
        ({"do_sample": True, "top_p": [0.9]}, "makes no sense: top_p [0.9]"),
        ({"eos_token_id": "</s>"}, "makes no sense: eos_token_id '</s>'"),
        ({"eos_token_id": True}, "makes no sense: eos_token_id True"),
        ({"eos_token_id": [2, "x"], "bos_token_id": [1]}, "makes no sense: bos_token_id [1], eos_token_id [2, 'x']"),
        ({"temperature": 0.6, "top_p": 0.9, "min_p": 0.1}, "as do_sample is not true: temperature 0.6, top_p 0.9"),
        ({"do_sample": True, "repetition_penalty": 1.05, "min_p": 0.1, "top_k": 5}, "not applied: repetition_penalty 1.05, min_p 0.1"),
        ({"forced_eos_token_id": 0, "max_time": 0, "guidance_scale": 0}, "forced_eos_token_id 0, max_time 0, guidance_scale 0"),
        ({"repetition_penalty": 1.05, "chat_format": "x" * 90}, "not applied: repetition_penalty 1.05, chat_format 'xxx"),
    ],
)  # fmt: skip
def test_what_is_odd_or_not_computed_is_a_note_and_the_model_loads(
    tiny: Tiny, tokenizer: Tokenizer, tmp_path: Path, values: Any, note: str
) -> None:
    export(tiny("opt"), tokenizer, tmp_path / "model")
    read(tmp_path / "model", values)
    loaded = load_checkpoint(tmp_path / "model", dtype=torch.float32)
    assert len(loaded.notes) == 1 and note in loaded.notes[0] and len(loaded.notes[0]) < 400
    assert loaded.notes[0].startswith("generation_config.json") and loaded.config.eos_token_ids == (2,)


def drawn(lm: LanguageModel, **options: Any) -> SamplingConfig:
    running = lm.start("the cat", max_new_tokens=1, **options)
    running.close()
    return running._row.sampler.config


def test_a_text_is_drawn_as_the_adapter_says_else_the_model_and_as_asked(folder: Path) -> None:
    lm = load(folder / "model")
    assert lm.sampling == drawn(lm) == ADAPTERS and drawn(lm, dense=True) == lm.sampling_of(dense=True) == OWN
    silent = Adapter.load(folder / "silent", model=lm.config, base_hash=lm.base_hash)
    assert drawn(lm, adapter=silent) == OWN and load(folder / "model", adapter=None).sampling == OWN
    assert drawn(lm, temperature=0.5) == dataclasses.replace(ADAPTERS, temperature=0.5)
    assert drawn(lm, dense=True, top_p=1.0, top_k=0, seed=4) == SamplingConfig(temperature=0.75, seed=4)
    assert drawn(lm, temperature=0).temperature == 0
    with pytest.raises(ValueError, match=r"top_p must lie in \(0, 1\], not 1.5"):
        drawn(lm, top_p=1.5)
    greedy = lm.generate("the cat", max_new_tokens=6, temperature=0, ignore_eos=True)
    assert lm.generate("the cat", max_new_tokens=6, top_k=1, ignore_eos=True) == greedy


@pytest.mark.parametrize("place", ["opt-mini", "smollm2-sparse/adapter"])
def test_what_is_bundled_is_drawn_from_its_likelier_tokens(place: str) -> None:
    """Greedy, small models loop; at temperature 1 without a cut they break words."""
    found = read_generation_config(MODELS_FOLDER / place)
    assert found.sampling is not None and 0 < found.sampling.temperature < 1 and found.sampling.top_p == 0.9 and found.notes == ()


def test_greedy_is_what_a_model_without_a_word_on_it_does(tiny: Tiny, tokenizer: Tokenizer, tmp_path: Path) -> None:
    export(tiny("opt"), tokenizer, tmp_path / "model")
    assert load(tmp_path / "model").sampling == SamplingConfig()


def test_an_adapter_keeps_its_sampling_and_names_what_it_cannot(folder: Path, tmp_path: Path) -> None:
    lm = load(folder / "model")
    assert lm.adapter is not None
    lm.adapter.save(tmp_path / "copy")
    write_json(tmp_path / "copy" / "generation_config.json", generation_values(ADAPTERS) | {"repetition_penalty": 1.2})
    other = load(folder / "model", adapter=tmp_path / "copy")
    assert other.sampling == ADAPTERS and other.notes == ("generation_config.json of the adapter: not applied: repetition_penalty 1.2",)
    assert not (folder / "silent" / "generation_config.json").exists()


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(["generate", *map(str, arguments), "-p", "the cat", "-n", "2", "--ignore-eos"]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_generate_says_how_it_draws_and_whose_word_that_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = folder / "model"
    assert "temperature 1.5, top_p 0.25 (of the adapter)" in shown(capsys, model)
    assert "temperature 0.75, top_k 7, top_p 0.5 (of the model)" in shown(capsys, model, "--dense")
    assert "temperature 0.5, top_p 0.25 (temperature as asked, else of the adapter)" in shown(capsys, model, "--temperature", 0.5)
    assert "greedy (temperature as asked, else of the adapter)" in shown(capsys, model, "--temperature", 0)
    result = json.loads(shown(capsys, model, "--top-k", 3, "--seed", 5, "--json"))
    assert result["sampling"] == {
        "temperature": 1.5, "top_k": 3, "top_p": 0.25, "min_p": None, "seed": 5, "source": "adapter", "asked": ["top_k"]
    }  # fmt: skip


def test_export_keeps_what_the_model_and_the_adapter_say(folder: Path, tmp_path: Path) -> None:
    assert run(["export", str(folder / "model"), str(tmp_path / "copy")]) == 0
    lm = load(tmp_path / "copy")
    assert (lm.sampling, lm.sampling_of(dense=True)) == (ADAPTERS, OWN)


def test_chat_says_how_the_next_answers_are_drawn(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*options: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n/dense\nthe hat\n/sparse\n"))
        assert run(["chat", str(folder / "model"), "-n", "2", "--seed", "5", *options]) == 0
        return " ".join(capsys.readouterr().out.split())

    shown = said()
    assert "the next answers run dense, drawn: temperature 0.75, top_k 7, top_p 0.5 (of the model)" in shown
    assert "the next answers run sparse, drawn: temperature 1.5, top_p 0.25 (of the adapter)" in shown
    turns = json.loads(said("--top-k", "0", "--json"))["turns"]
    cut = dataclasses.replace(OWN, top_k=None, seed=6)
    assert [turn["sampling"] for turn in turns] == [dataclasses.replace(ADAPTERS, seed=5).to_dict(), cut.to_dict()]
    assert "top_p 0.5 (top_k as asked, else of the model)" in said("--top-k", "0")


def test_serve_says_how_each_name_draws() -> None:
    served = Served(
        name="m", tokenizer=cast(Any, None), vocabulary=cast(Any, None), sparse=True, vocab_size=9, num_layers=1, num_heads=1,
        num_neurons=1, backend="torch", dtype="fp32", threads=1, limit=9, sampling=ADAPTERS, dense_sampling=OWN,
    )  # fmt: skip
    assert drawing_words(served) == f"m: {ADAPTERS.words}; m:dense: {OWN.words}"
    assert drawing_words(dataclasses.replace(served, dense_sampling=ADAPTERS)) == ADAPTERS.words
