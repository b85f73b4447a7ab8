"""Training of a screened head: within the budget, alone or with a method, taken where it pays."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import dejavu
from conftest import Tiny
from dejavu.bench import fastest as fastest_module
from dejavu.bench.fastest import MARGIN, fastest
from dejavu.kernels.quantized import wide
from dejavu.kernels.screen import screened_logits
from dejavu.model.adapter import Adapter
from dejavu.model.bundle import export
from dejavu.model.tokenizer import Tokenizer
from dejavu.offline import head as head_module
from dejavu.offline.head import HeadFit
from dejavu.offline.split import Split
from dejavu.offline.training_text import TrainingText
from helpers.engines import ids_of
from helpers.native import needs_library
from helpers.texts import TEXT


def split_of(count: int, length: int) -> Split:
    windows = torch.tensor([ids_of(7 + index, length) for index in range(count)])
    return Split(windows[2:], windows[:1], windows[1:2])


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_what_is_measured_is_what_the_definition_gives(tiny: Tiny, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the check window, of the threshold that was taken; the one before it is over the budget on some window."""
    monkeypatch.setattr("dejavu.kernels.screen.CLUSTER_TOKENS", 4)
    model, split, budget = tiny(family), split_of(5, 40), 0.2
    text = TrainingText(model=model, given=200, ids_WT=torch.cat((split.calibrate, split.check, split.train)), split=split, measured=split)
    fit = HeadFit(text, seed=0)
    found = fit.within(budget)
    assert found is not None
    screen, config = found

    def measured(threshold: float, ids_WT: torch.Tensor) -> tuple[float, float, float]:
        with torch.inference_mode():
            states_TE = model.head_inputs(model.hidden(ids_WT))[0, :-1]
            full_TV = model.head_logits(states_TE)
            kept_TV = torch.stack([screened_logits(x_E, wide(model.head_matrix), screen.at(threshold)) for x_E in states_TE]).isfinite()
        same = kept_TV.gather(1, full_TV.argmax(1, keepdim=True)).float().mean()
        missed_T = full_TV.softmax(1).masked_fill(kept_TV, 0).sum(1)
        return float(kept_TV.float().sum(1).mean()), float(same), float(missed_T.mean())

    tokens, same, missed = measured(screen.threshold, split.check)
    assert (config.threshold, config.clusters) == (screen.threshold, len(screen.sizes_C))
    assert (config.tokens, config.agreement, config.missed) == pytest.approx((tokens, same, missed), abs=1e-5)
    assert 0 < missed + config.missed_stderr <= budget and tokens < model.config.vocab_size
    before = head_module.THRESHOLDS[head_module.THRESHOLDS.index(screen.threshold) - 1]
    assert max(measured(before, ids)[2] for ids in (split.calibrate, split.check)) > 0.6 * budget
    strict = fit.within(0.0)
    assert strict is None or measured(strict[0].threshold, split.check)[2] < 1e-6


def trained(speedup: float | None, without: float | None = None, *, within: bool = True) -> tuple[Any, dict[str, Any]]:
    result = {"within_budget": within, "speedup": speedup}
    return None, result if without is None else result | {"speedup_without": without}


def test_a_screened_head_is_taken_where_it_makes_a_method_faster_by_the_margin() -> None:
    alone, method = trained(1.2), trained(1.5)
    for speedup, best in ((1.5 * MARGIN + 1e-6, True), (1.51, False), (None, False)):
        both = trained(speedup, 1.5)
        assert (fastest([alone, method, both]) is both) == best
    assert fastest([trained(1.01, 1.0)]) is None and fastest([trained(1.3, 1.0, within=False)]) is None


@pytest.fixture
def lm(tiny: Tiny, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dejavu.LanguageModel:
    monkeypatch.setattr("dejavu.kernels.screen.CLUSTER_TOKENS", 4)
    export(tiny("llama"), tokenizer, tmp_path / "model")
    return dejavu.load(tmp_path / "model", backend="native", threads=1)


def timed(monkeypatch: pytest.MonkeyPatch, screened: float, other: float) -> None:
    """Speeds that are not the machine's."""

    def speeds(model: Any, layers: Any, ids: Any, options: Any, *, screen: Any = None, **_: Any) -> dict[str, Any]:
        speed = (other if any(layer.sparse for layer in layers) else 1.0) * (1.0 if screen is None else screened)
        return {"tok_s": 100 * speed, "tok_s_dense": 100.0, "speedup": speed}

    monkeypatch.setattr(fastest_module, "speeds", speeds)
    monkeypatch.setattr("dejavu.bench.fastest_head.speeds", speeds)


@needs_library
def test_the_head_alone_is_an_adapter(lm: dejavu.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored, loaded, used, and left out where that is asked for."""
    timed(monkeypatch, 1.5, 1.0)
    adapter, measured = lm.train_measured(TEXT, method="head", budget=0.3)
    assert (
        adapter is not None and measured["method"] == "head" and measured["rise"] == 0 and measured["ppl_dense"] == measured["ppl_sparse"]
    )
    screen, entry = adapter.screen, adapter.config.screened_head
    assert screen is not None and entry is not None and measured["screened_head"] == entry.to_dict() and entry.missed <= 0.3
    adapter.save(tmp_path / "adapter")
    loaded = Adapter.load(tmp_path / "adapter", model=lm.config, base_hash=lm.base_hash)
    assert loaded.config == adapter.config and loaded.digest == adapter.digest and loaded.screen is not None
    assert all(torch.equal(one, two) for one, two in zip(loaded.screen.tensors, screen.tensors, strict=True))
    assert "Screened head: of" in (tmp_path / "adapter/README.md").read_text()
    lm.adapter = loaded
    assert lm.screened_head == screen.threshold and lm.engine(num_slots=1, cache_tokens=16).info.screen == loaded.screen
    assert lm.engine(num_slots=1, cache_tokens=16, dense=True).info.screen is None
    assert lm.layers() is None and lm.evaluate(texts={"text": TEXT[:400]})["sparse"] is None, "its layers are the dense model's"
    for asked in (0.0, 0.25):
        other = dejavu.LanguageModel(lm.checkpoint, dataclasses.replace(lm.options, screened_head=asked), adapter=loaded)
        assert other.screened_head == asked
    torch_lm = dejavu.LanguageModel(
        lm.checkpoint, dataclasses.replace(lm.options, backend="torch", dtype="auto", cache_dtype="auto"), adapter=loaded
    )
    assert torch_lm.screened_head == 0
    with pytest.warns(UserWarning, match="backend torch has no screened head: the full one runs"):
        torch_lm.generate("a", max_new_tokens=1, adapter=loaded)
    bare = dejavu.LanguageModel(lm.checkpoint, dataclasses.replace(lm.options, screened_head=0.1))
    with pytest.raises(ValueError, match="threshold of an adapter's screened head, and there is none here"):
        bare.generate("a", max_new_tokens=1)


@needs_library
def test_its_dense_perplexity_is_of_the_tokens_that_others_check(lm: dejavu.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which --accept-base measures again: of a large model the beginnings of windows."""
    timed(monkeypatch, 1.5, 1.0)
    adapter, whole = lm.train_measured(TEXT, method="head", budget=0.3)
    monkeypatch.setattr("dejavu.offline.split.CHECKED", 1.0)
    monkeypatch.setattr("dejavu.offline.split.LEAST_CHECKED", 20)
    adapter, measured = lm.train_measured(TEXT, method="head", budget=0.3)
    assert adapter is not None and measured["ppl_dense"] != pytest.approx(whole["ppl_dense"])
    assert lm.calibration_perplexity([TEXT], adapter) == pytest.approx(measured["ppl_dense"])
    monkeypatch.setattr("dejavu.offline.train.methods_of", lambda config: ("gate",))
    adapter, measured = lm.train_measured(TEXT, method="auto", budget=0.3)
    assert adapter is not None and adapter.config.method == "head"
    assert lm.calibration_perplexity([TEXT], adapter) == pytest.approx(measured["ppl_dense"])


@needs_library
@pytest.mark.parametrize(
    ("screened", "other", "taken"), [(1.5, 1.3, "gate+head"), (1.5, 0.9, "head"), (1.0, 1.3, "gate"), (1.0, 0.9, None)]
)
def test_auto_takes_what_is_fastest(
    lm: dejavu.LanguageModel, screened: float, other: float, taken: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, screened, other)
    monkeypatch.setattr("dejavu.offline.train.methods_of", lambda config: ("gate",))
    adapter, measured = lm.train_measured(TEXT, method="auto", budget=0.3)
    assert measured["method"] == (taken or "dense")
    assert [each["method"] for each in measured["candidates"]] == ["gate", "head", *(["gate+head"] if other > 1 else [])]
    assert (adapter is None) == (taken is None)
    if adapter is not None and taken is not None:
        assert (adapter.screen is None) == (taken == "gate") and adapter.config.method == taken.split("+")[0]


@needs_library
def test_auto_says_why_no_candidate_has_a_screened_head(lm: dejavu.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 1.5, 1.3)
    monkeypatch.setattr("dejavu.offline.train.methods_of", lambda config: ("gate",))
    options = dataclasses.replace(lm.options, backend="torch", dtype="auto", cache_dtype="auto")
    elsewhere = dejavu.LanguageModel(lm.checkpoint, options)

    def said(model: dejavu.LanguageModel, **more: Any) -> str:
        return model.train_measured(TEXT, method="auto", **more)[1]["why"]

    assert said(elsewhere, budget=0.3).endswith("; no screened head: the backend torch has none")
    both = said(lm, budget=0.3)
    assert both.startswith("gate+head is fastest here: 1.95x dense, ") and both.endswith("of probability missed")
    monkeypatch.setattr("dejavu.bench.fastest.MARGIN", 100.0)
    share = lm.config.vocab_size * lm.config.embed_width / lm.model.num_parameters
    assert said(lm, budget=0.3).endswith(f"; no screened head: the head is {share:.1%} of the model")
    monkeypatch.setattr("dejavu.bench.fastest.MARGIN", MARGIN)
    monkeypatch.setattr(HeadFit, "within", lambda self, budget, layers=None: None)
    assert said(lm, budget=0.3).endswith("; no screened head: none misses at most 30.00% of the probability on this text")
    with pytest.raises(ValueError, match=r"none misses at most 30.00% of the probability on this text; allow more \(--budget\)"):
        lm.train(TEXT, method="head", budget=0.3)
