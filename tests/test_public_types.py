"""What editors and readers see: signatures with every option and its default, typed results with the keys that come, short reprs."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Any

import pytest

import dejavu
from conftest import Tiny
from dejavu import figures
from dejavu.cli.generation import generate
from dejavu.config import MAX_NEW_TOKENS
from dejavu.figures import check
from dejavu.language_model import LanguageModel
from dejavu.loading import load
from dejavu.model.adapter import Adapter
from dejavu.model.bundle import export
from dejavu.model.tokenizer import Tokenizer
from dejavu.offline.train_config import TrainConfig
from dejavu.quality.tasks import read_items
from helpers.adapters import make_adapter, mlp_of
from helpers.texts import TEXT


@pytest.fixture(scope="module")
def lm(tiny: Tiny, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    path = tmp_path_factory.mktemp("typed") / "tiny"
    export(tiny("opt"), tokenizer, path)
    return load(path)


@pytest.mark.parametrize("method", [LanguageModel.train, LanguageModel.train_measured])
def test_training_has_the_options_and_defaults_of_its_config(method: Any) -> None:
    parameters = inspect.signature(method).parameters
    hints, known = typing.get_type_hints(method), typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        assert parameters[field.name].default == field.default and hints[field.name] == known[field.name], field.name
    assert set(parameters) - {field.name for field in dataclasses.fields(TrainConfig)} == {"self", "text", "work_folder", "progress"}


def test_what_is_trained_is_what_was_asked(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option reaches the config, each at a value that is not its default."""
    requested: dict[str, Any] = {
        "method": "gate", "budget": 0.25, "rank": 3, "loss": "bce", "epochs": 0.5, "learning_rate": 0.125, "max_tokens": 600,
        "lookahead": "1", "lookahead_tolerance": 0.5, "heads": False, "cached_tokens": 7, "seed": 5, "work_memory": 2.5,
    }  # fmt: skip
    seen: list[TrainConfig] = []

    def train_adapters(checkpoint: object, text: object, config: TrainConfig, **options: object) -> list[tuple[Adapter, dict[str, Any]]]:
        seen.append(config)
        return [(make_adapter(lm.config, lm.base_hash), {})]

    monkeypatch.setattr("dejavu.offline.train.train_adapters", train_adapters)
    lm.train(TEXT, **requested)
    assert seen == [TrainConfig(**requested)] and all(requested[field.name] != field.default for field in dataclasses.fields(TrainConfig))


def test_texts_have_one_length_by_default_everywhere() -> None:
    functions: tuple[Any, ...] = (LanguageModel.generate, LanguageModel.start, generate)
    assert {inspect.signature(function).parameters["max_new_tokens"].default for function in functions} == {MAX_NEW_TOKENS}


def test_a_wrong_key_or_type_would_be_seen() -> None:
    point = {"part": "mlp", "density": 0.5, "ppl": 3.0}
    check([point], list[figures.OraclePoint])
    for change in ({"part": "gate"}, {"ppl": None}, {"more": 1}):
        with pytest.raises(ValueError, match="is no"):
            check([point | change], list[figures.OraclePoint])


def test_results_are_of_their_types(lm: LanguageModel, tmp_path: Path) -> None:
    check(lm.profile(TEXT, max_tokens=100), dejavu.Profile)
    for method in ("auto", "predicted", "input"):
        check(lm.train_measured(TEXT, method=method, budget=0.2, rank=4, epochs=0.5, max_tokens=600)[1], dejavu.Training)
    (tmp_path / "quiz.jsonl").write_text('{"context": "the cat", "target": " sat on the"}\n')
    tasks = {"quiz": read_items(tmp_path / "quiz.jsonl")}
    check(lm.evaluate(texts={"a": TEXT}, tasks=tasks, max_tokens=120), dejavu.Evaluation)
    check(lm.evaluate(texts={"a": TEXT}, tasks=tasks, max_tokens=120, adapter=make_adapter(lm.config, lm.base_hash)), dejavu.Evaluation)


def test_no_repr_is_a_page_of_numbers(lm: LanguageModel) -> None:
    adapter = make_adapter(lm.config, lm.base_hash)
    assert repr(adapter) == "Adapter('predicted' of 'tiny', 2 layers, mlp_density=0.500, head_density=0.750, budget=0.005)"
    assert repr(mlp_of(adapter.layers[0])) == "Predictor(32 -> 4 -> 64, threshold=0, lookahead=0)"
    for thing in (lm, adapter, *adapter.layers, lm.checkpoint, lm.tokenizer):
        assert len(repr(thing)) < 400 and "tensor" not in repr(thing) and "\n" not in repr(thing)


def test_every_name_on_offer_is_there() -> None:
    assert all(getattr(dejavu, name) is not None for name in dejavu.__all__)
