"""The judge tells what a sparse model costs and writes: each figure against its definition, on a tiny model."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import dejavu
from conftest import Tiny
from dejavu.bench.rows import read_rows
from dejavu.model.bundle import export
from dejavu.model.fingerprint import model_hash
from dejavu.model.masked import MaskedSelection
from dejavu.model.tokenizer import Tokenizer
from dejavu.quality.tasks import Item, Score
from helpers.adapters import make_adapter
from helpers.texts import LONG_TEXT

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
ITEMS = {
    "cats": [{"context": "the cat", "choices": [" sat", " ran to the hat", " had"], "label": index % 3} for index in range(4)],
    "ends": [{"context": "the cat sat on the", "target": " mat"}],
}


@pytest.fixture(scope="module")
def judge() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES))
        yield importlib.import_module("judge")


@pytest.fixture(scope="module")
def work(tiny: Tiny, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its adapter, a text and tasks."""
    path, model = tmp_path_factory.mktemp("judge"), tiny("llama", num_layers=2)
    export(model, tokenizer, path / "model")
    make_adapter(model.config, model_hash(model)).save(path / "adapter")
    (path / "text.txt").write_text(LONG_TEXT)
    for name, items in ITEMS.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_all_parts_make_one_record_and_a_page(judge: ModuleType, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["judge.py", str(work / "model"), "--adapter", str(work / "adapter"), "--backend", "torch", "--text", str(work / "text.txt")]
    given += ["--tasks", str(work / "*.jsonl"), "--max-tokens", "90", "--prompts", "3", "--new-tokens", "8", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", [*given, "--page", str(work / "page.md"), "--results", str(work / "quality.jsonl")])
    judge.main()
    monkeypatch.setattr(sys, "argv", [*given, "--parts", "texts", "--results", str(work / "quality.jsonl")])
    judge.main()
    full, texts_alone = read_rows(work / "quality.jsonl", judge.Record)
    result = full.result
    assert full.kind == "judge" and result["texts"] == texts_alone.result["texts"] and set(judge.PARTS) <= set(result)
    assert set(result["texts"]["rises"]) == {"text"} and result["texts"]["rise"] == pytest.approx(result["texts"]["worst"])
    assert result["tasks"]["items"] == 5 and 0 <= result["tasks"]["flipped"] <= 1
    assert [each["temperature"] for each in result["written"]] == [0.0, 1.0]
    assert all(0 < each["variation"] < 1 and 0 < each["agreement"] < 1 and each["kl"] > 0 for each in result["written"])
    assert all(0 < each["mlp_density"] < 1 for each in result["written"])
    own = result["own"]
    assert own["samples"] == 6 and own["excess"] == pytest.approx(own["nll_sparse"] - own["nll_dense"])
    text = (work / "page.md").read_text()
    assert text.count("Dense:") == text.count("Sparse:") == text.count("\n## ") == 3 and max(map(len, text.splitlines())) < 139


def test_distributions_are_those_of_use(judge: ModuleType, work: Path) -> None:
    """The prompt dense, the answer sparse: greedy text of the sparse model is its own likeliest, token by token."""
    lm = dejavu.load(work / "model", adapter=work / "adapter", backend="torch")
    writer = judge.Writer(lm, prompts=2, new_tokens=8)
    layers = lm.layers()
    assert layers is not None
    for _, prompt_ids, new_ids in writer.texts(dense=False, temperature=0.0):
        ids, first = [*prompt_ids, *new_ids[:-1]], len(prompt_ids) - 1
        p, q = (judge.log_probs(lm, prompt_ids, new_ids, select) for select in (judge.dense_selection, judge.MaskedSelections(layers)))
        assert q.argmax(-1).tolist() == new_ids
        assert torch.equal(p, lm.logits(ids, dense=True)[first:].log_softmax(-1))
        everywhere = lm.model(torch.tensor([ids]), MaskedSelection(layers))[0, first:].log_softmax(-1)
        assert not torch.allclose(q, everywhere)


def test_answers_flips_and_the_bound_of_a_loss(judge: ModuleType) -> None:
    item = Item(form="choices", pairs=(("a", " bb"), ("a", " cccc")), label=1)
    assert judge.answer(item, [Score(-2.0, False), Score(-3.0, False)]) == 1  # a nat a character, and three quarters of one
    last = Item(form="target", pairs=(("a", "b"),), label=0)
    assert [judge.answer(last, [Score(-1.0, greedy)]) for greedy in (True, False)] == [0, 1]
    lost = [1] * 30 + [-1] * 20 + [0] * 950
    spread = math.sqrt((50 / 1000 - 0.01**2) / 1000)
    assert judge.loss_bound(lost) == pytest.approx(0.01 + 1.645 * spread, rel=0.05)
    assert judge.loss_bound([0] * 9) == 0.0
