"""A model in lm-evaluation-harness's own Hugging Face model and in `dejavu eval`, on the same items: both columns, and their difference.

    python recipes/harness.py opt-mini --text 'texts/*.txt' --tasks tasks/arc_easy.jsonl --limit 100

In: a model, texts, task files with choices. Out: a table. The harness gets the model as `dejavu export --dtype fp32` writes it, and items
as files of its own. Both add a BOS before a context where the tokenizer does; before a text the harness puts one by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from glob import glob
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the harness is imported, which reads it once

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import dejavu
from dejavu.model.bundle import export
from dejavu.quality.evaluate import evaluate
from dejavu.quality.tasks import read_items

TEXTS = ("word_perplexity", "bits_per_byte")
TASKS = ("acc", "acc_norm", "acc_bytes")


def written(folder: Path, name: str, rows: list[dict[str, Any]], kind: str, fields: dict[str, str], metrics: tuple[str, ...]) -> None:
    """A task of the harness: its items, and the file that describes it."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test", "output_type": kind, "metric_list": [{"metric": metric} for metric in metrics], **fields,
    }  # fmt: skip
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in task.items())
    (folder / f"{name}.yaml").write_text(lines, encoding="utf-8")


def theirs(folder: Path, names: list[str], *, bos: bool) -> dict[str, dict[str, float]]:
    model = HFLM(pretrained=str(folder / "model"), dtype="float32", device="cpu", batch_size=8, add_bos_token=bos)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model=model, tasks=list(names), task_manager=manager, bootstrap_iters=0)
    assert found is not None, "one process has the results"
    return {name: {key.split(",")[0]: value for key, value in found["results"][name].items()} for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", default=[], action="append")
    parser.add_argument("--tasks", default=[], action="append")
    parser.add_argument("--limit", type=int, default=100)
    options = parser.parse_args()
    lm = dejavu.load(options.model, backend="torch", dtype="fp32", adapter=None)
    # White space around a document counts as words there, and none around a choice: its delimiter is a space.
    texts = {Path(path).stem: Path(path).read_text("utf-8").strip() for part in options.text for path in sorted(glob(part))}
    tasks = {Path(path).stem: read_items(Path(path))[: options.limit] for path in options.tasks}
    for items in tasks.values():
        for item in items:
            item["choices"] = [" " + choice.strip() for choice in item["choices"]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        export(lm.model, lm.tokenizer, folder / "model")
        choices = {"doc_to_text": "{{context}}", "doc_to_choice": "choices", "doc_to_target": "label"}
        for task, items in tasks.items():
            rows = [{**item, "choices": [choice[1:] for choice in item["choices"]]} for item in items]
            written(folder, task, rows, "multiple_choice", choices, TASKS)
        for text, content in texts.items():
            written(folder, text, [{"page": content}], "loglikelihood_rolling", {"doc_to_text": "", "doc_to_target": "{{page}}"}, TEXTS)
        other = theirs(folder, list(texts), bos=False) if texts else {}
        other |= theirs(folder, list(tasks), bos=lm.tokenizer.adds_bos) if tasks else {}
    dense = evaluate(lm.model, lm.tokenizer, None, texts=texts, tasks=tasks, max_tokens=10**9, limit=options.limit)["dense"]
    for text, score in dense["texts"].items():
        for metric, own in zip(TEXTS, (score["word_ppl"], score["bits_per_byte"]), strict=True):
            print(f"{text:20} {metric:16} {own:14.6f} {other[text][metric]:14.6f} {abs(own / other[text][metric] - 1):9.1e}")
    for task, result in dense["tasks"].items():
        for metric in TASKS:
            own: Any = result[metric]
            same = "same" if math.isclose(own, other[task][metric], abs_tol=1e-9) else "DIFFERENT"
            print(f"{task:20} {metric:16} {own:14.6f} {other[task][metric]:14.6f} {same:>9} {result['truncated']} of {result['n']} cut")


if __name__ == "__main__":
    main()
