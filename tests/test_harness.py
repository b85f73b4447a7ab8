"""The same items through lm-evaluation-harness and through `dejavu eval`: the same numbers, dense and sparse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import dejavu
from dejavu.cli.main import run
from dejavu.harness import DejaVuLM, harness_results
from dejavu.language_model import LanguageModel
from dejavu.quality.evaluate import evaluate

ITEMS = [
    {"context": f"{who} went to the {place} to buy", "choices": [" bread", " a very old river", " the sky of"], "label": label}
    for label, (who, place) in enumerate([("Anna", "shop"), ("The king", "market"), ("A doctor", "town"), ("He", "baker")][:3])
] + [{"context": "Two and two are", "choices": [" four.", " a house and a horse", " eleven of them"], "label": 0}]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return dejavu.load("opt-mini", backend="torch", dtype="fp32")


class Instance:
    def __init__(self, *args: Any) -> None:
        self.args = args


def yaml_task(folder: Path) -> Path:
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    path = folder / "small.yaml"
    path.write_text(
        "task: small_choices\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{context}}'\ndoc_to_choice: choices\ndoc_to_target: label\n"
        'target_delimiter: ""\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n'
    )
    return path


def test_a_task_has_the_accuracies_of_our_evaluator(lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = harness_results(lm, [str(yaml_task(tmp_path))])
    ours = evaluate(lm.model, lm.tokenizer, lm.layers(), texts={}, tasks={"small": ITEMS})
    for part in ("dense", "sparse"):
        theirs, side = found[part], ours[part]
        assert theirs is not None and side is not None
        for metric in ("acc", "acc_norm"):
            assert theirs["small_choices"][metric] == pytest.approx(side["tasks"]["small"][metric]), (part, metric)


def test_scores_are_those_of_our_evaluator_and_sparse_is_not_dense(lm: LanguageModel) -> None:
    pairs = [(item["context"], choice) for item in ITEMS for choice in item["choices"]]
    dense = DejaVuLM(lm, dense=True).loglikelihood([Instance(*pair) for pair in pairs])
    model = DejaVuLM(lm)
    sparse = model.loglikelihood([Instance(*pair) for pair in pairs])
    assert model.counter is not None and 0 < (model.counter.mlp_density() or 0) < 0.3
    assert any(a != b for (a, _), (b, _) in zip(dense, sparse, strict=True))
    logits_TV = lm.logits(lm.tokenizer.encode("Two and two are four."), dense=True)
    ids = lm.tokenizer.encode("Two and two are four.")
    start = len(lm.tokenizer.encode("Two and two are"))
    by_hand = sum(float(logits_TV[t - 1].double().log_softmax(-1)[ids[t]]) for t in range(start, len(ids)))
    assert dense[pairs.index(("Two and two are", " four."))][0] == pytest.approx(by_hand, rel=1e-5)


def test_rolling_counts_every_token_once(lm: LanguageModel) -> None:
    text = "The lighthouse keeper had not seen a ship for three days. " * 30
    (total,) = DejaVuLM(lm, dense=True).loglikelihood_rolling([Instance(text)])
    count = len(lm.tokenizer.encode_plain(text))
    assert count > lm.config.max_positions or count > 200
    (half,) = DejaVuLM(lm, dense=True).loglikelihood_rolling([Instance(text[: len(text) // 2])])
    assert total < half < 0 and math.isfinite(total)


def test_text_ends_at_a_stop_string(lm: LanguageModel) -> None:
    model = DejaVuLM(lm)
    (free,) = model.generate_until([Instance("The lighthouse keeper", {"max_gen_toks": 16})])
    stop = free.strip().split(" ")[2]
    (cut,) = model.generate_until([Instance("The lighthouse keeper", {"max_gen_toks": 16, "until": [stop]})])
    assert free.startswith(cut) and stop not in cut
    assert isinstance(model.generate_until([Instance("The keeper", {"max_gen_toks": 4, "until": "\n"})])[0], str)
    with pytest.raises(ValueError, match="'top_q'"):
        model.generate_until([Instance("a", {"top_q": 3})])


def test_what_is_not_there_is_said(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model"):
        DejaVuLM()
    with pytest.raises(ValueError, match="no task file"):
        harness_results(lm, [str(tmp_path / "none.yaml")])
    (tmp_path / "empty.yaml").write_text("metric_list: []\n")
    with pytest.raises(ValueError, match="names no task"):
        harness_results(lm, [str(tmp_path / "empty.yaml")])


@pytest.mark.slow
def test_the_command_runs_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = ["eval", "opt-mini", "--backend", "torch", "--dtype", "fp32", "--harness", str(yaml_task(tmp_path))]
    assert run([*arguments, "--limit", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(found["harness"]) == {"dense", "sparse"} and 0 <= found["harness"]["sparse"]["small_choices"]["acc"] <= 1
    assert run([*arguments, "--limit", "3", "--dense"]) == 0
    assert "acc_norm" in capsys.readouterr().out
    assert run(["eval", "opt-mini", "--harness", str(tmp_path / "none.yaml")]) == 2
    assert "no task file" in capsys.readouterr().err


def test_a_long_context_keeps_its_end_and_leaves_room(lm: LanguageModel) -> None:
    made = []
    model = DejaVuLM(lm)
    original = lm.generate

    def watched(context: str, **options: Any) -> Any:
        made.append(original(context, **options))
        return made[-1]

    object.__setattr__(lm, "generate", watched)
    try:
        model.generate_until([Instance("the keeper " * 1500 + "end", {"max_gen_toks": count}) for count in (20, 1)])
    finally:
        del lm.generate  # pyrefly: ignore[missing-attribute]
    assert [text.prompt_tokens + count <= lm.config.max_positions for text, count in zip(made, (20, 1), strict=True)] == [True, True]
    assert all(text.prompt_tokens > lm.config.max_positions - 30 for text in made)


def test_files_of_the_harness_that_cannot_be_run_are_named(lm: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "group.yaml").write_text("task:\n  - a\n  - b\n")
    with pytest.raises(ValueError, match="a group of tasks"):
        harness_results(lm, [str(tmp_path / "group.yaml")])
    with pytest.raises(ValueError, match="--limit must be at least 1"):
        harness_results(lm, ["piqa"], limit=-3)
