"""A sparse model judged as it is used: what it costs on texts and tasks, and what it writes, beside the dense model.

    python recipes/judge.py smollm2-sparse --dtype fp32 --text 'text/valid/*.txt' --tasks 'tasks/*.jsonl' --page docs/side-by-side.md
    python recipes/judge.py smollm2-sparse --adapter runs/fourth --parts texts tasks --backend cuda --text ... --tasks ...

In: a model, its own adapter (or --adapter), held-out texts, task items. Out: a record of kind "judge" in results/quality.jsonl, and with
--page the answers to fifty prompts side by side. Its parts:

    texts     rise of perplexity on each text and on all, every token masked
    tasks     all items together: accuracy, the loss in points with the 95th percentile of its paired bootstrap, share of flipped answers
    written   on text that the dense model wrote, at temperatures 0 and 1: share of tokens after which both have the same likeliest one,
              total variation 1/2 sum |p - q| and KL(dense || sparse) at temperature 1
    own       the sparse model's samples at temperature 1 under the dense model: mean NLL in nats, less that of the dense model's own

Prompts run dense and what follows sparse, as in use; samples come from the engine, distributions from masked passes over them.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dejavu
from dejavu.bench.rows import append_rows, device_facts
from dejavu.files import write_text
from dejavu.language_model import LanguageModel
from dejavu.model.template import chat_ids
from dejavu.model.texts import named_files, named_texts
from dejavu.quality.evaluate import evaluate
from dejavu.quality.perplexity import MaskedSelections, SelectionFactory, dense_selection
from dejavu.quality.tasks import Item, Score, item_requests, parse_item, read_items, score_requests
from judged_prompts import BEGINNINGS, MESSAGES
from records import QUALITY, JudgedOwn, JudgedTasks, JudgedTexts, JudgedWritten, JudgeResult, Record

PARTS = ("texts", "tasks", "written", "own")
RESAMPLES = 10_000
WIDTH = 100  # characters of a line of the page


def judged_texts(lm: LanguageModel, texts: Mapping[str, str], max_tokens: int) -> JudgedTexts:
    """The start of each text."""
    found = evaluate(lm.model, lm.tokenizer, lm.layers(), texts=texts, tasks={}, max_tokens=max_tokens)
    dense, sparse, rise = found["dense"], found["sparse"], found["rise"]
    assert sparse is not None and rise is not None, "judged with an adapter"
    rises = {Path(name).stem: sparse["texts"][name]["ppl"] / value["ppl"] - 1 for name, value in dense["texts"].items()}
    return {"rise": rise, "worst": max(rises.values()), "rises": rises, "mlp_density": sparse["mlp_density"], "tokens": dense["tokens"]}


def answer(item: Item, scores: Sequence[Score]) -> int:
    """The option that is likeliest, a choice by its characters; of a last word 0 where it is the greedy one, else 1."""
    if item.form == "target":
        return 0 if scores[0].greedy else 1
    lengths = [max(1, len(text.removeprefix(" "))) if item.form == "choices" else 1 for _, text in item.pairs]
    values = [score.log_prob / length for score, length in zip(scores, lengths, strict=True)]
    return max(range(len(values)), key=values.__getitem__)


def loss_bound(lost: Sequence[int], seed: int = 0) -> float:
    """The 95th percentile of the mean of `lost` (1, 0, -1 for each item), items resampled: counts of three values are multinomial."""
    shares = [lost.count(value) / len(lost) for value in (1, 0, -1)]
    counts = np.random.default_rng(seed).multinomial(len(lost), shares, RESAMPLES)
    return float(np.percentile((counts[:, 0] - counts[:, 2]) / len(lost), 95))


def judged_tasks(lm: LanguageModel, tasks: Mapping[str, Sequence[Mapping[str, Any]]], batch_tokens: int) -> JudgedTasks:
    """Every item, paired: contexts run dense."""
    layers = lm.layers()
    assert layers is not None, "judged with an adapter"
    items, requests = [], []
    for name, records in tasks.items():
        for row, record in enumerate(records, start=1):
            items.append(parse_item(record, f"task {name!r}, row {row}"))
            requests.append(item_requests(lm.tokenizer, items[-1], lm.config.max_positions, f"task {name!r}, row {row}")[0])
    flat = [request for own in requests for request in own]
    dense, sparse = score_requests(lm.model, flat, masked=MaskedSelections(layers), batch_tokens=batch_tokens)
    assert sparse is not None
    starts = np.cumsum([0, *map(len, requests)]).tolist()
    placed = list(zip(items, starts, strict=False))
    answers = [[answer(item, side[start : start + len(item.pairs)]) for item, start in placed] for side in (dense, sparse)]
    hits = [[given == item.label for given, item in zip(side, items, strict=True)] for side in answers]
    lost = [int(a) - int(b) for a, b in zip(*hits, strict=True)]
    flipped = sum(a != b for a, b in zip(*answers, strict=True)) / len(items)
    accuracies = [sum(side) / len(items) for side in hits]
    return {
        "items": len(items), "dense": accuracies[0], "sparse": accuracies[1],
        "loss": sum(lost) / len(lost), "loss_upper95": loss_bound(lost), "flipped": flipped,
    }  # fmt: skip


class Writer:
    """Texts of both models on the fixed prompts, each with the ids of its prompt."""

    def __init__(self, lm: LanguageModel, *, prompts: int, new_tokens: int) -> None:
        self.lm, self.new_tokens = lm, new_tokens
        self.chats = lm.tokenizer.chat_template is not None
        self.prompts = (MESSAGES if self.chats else BEGINNINGS)[:prompts]

    def texts(self, *, dense: bool, temperature: float | None, seeds: int = 1) -> list[tuple[str, list[int], list[int]]]:
        """(text, ids of the prompt, new ids). temperature None: drawn as the adapter says, for both."""
        lm, found = self.lm, []
        sampling = lm.sampling
        drawn: dict[str, Any] = {"temperature": temperature, "top_k": lm.config.vocab_size, "top_p": 1.0}
        if temperature is None:
            drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k or lm.config.vocab_size, "top_p": sampling.top_p}
        for prompt in self.prompts:
            message = [{"role": "user", "content": prompt}] if self.chats else prompt
            prompt_ids = lm.tokenizer.encode(message) if isinstance(message, str) else chat_ids(lm.tokenizer, message)
            for seed in range(seeds):
                text = lm.generate(message, max_new_tokens=self.new_tokens, seed=seed, dense=dense, **drawn)
                if text.token_ids:
                    found.append((str(text), list(prompt_ids), list(text.token_ids)))
        return found


@torch.inference_mode()
def log_probs(lm: LanguageModel, prompt_ids: Sequence[int], new_ids: Sequence[int], select: SelectionFactory = dense_selection) -> Tensor:
    """Of the next token, before each new one [n, V]: the prompt runs dense, what follows as selected."""
    ids_BT = torch.tensor([[*prompt_ids, *new_ids[:-1]]], device=lm.model.device)
    sparse_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None] >= len(prompt_ids)
    return lm.model(ids_BT, select(sparse_BT))[0, len(prompt_ids) - 1 :].log_softmax(-1)


def judged_written(writer: Writer, temperature: float) -> JudgedWritten:
    """On what the dense model writes at a temperature."""
    layers = writer.lm.layers()
    assert layers is not None, "judged with an adapter"
    masked, agreed, variation, divergence, tokens = MaskedSelections(layers), 0, 0.0, 0.0, 0
    for _, prompt_ids, new_ids in writer.texts(dense=True, temperature=temperature):
        p, q = (log_probs(writer.lm, prompt_ids, new_ids, select) for select in (dense_selection, masked))
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        variation += float((p.exp() - q.exp()).abs().sum()) / 2
        divergence += float((p.exp() * (p - q)).sum())
        tokens += len(new_ids)
    return {
        "temperature": temperature, "agreement": agreed / tokens, "variation": variation / tokens, "kl": divergence / tokens,
        "mlp_density": masked.counter.mlp_density() or 0.0, "tokens": tokens,
    }  # fmt: skip


def judged_own(writer: Writer, seeds: int) -> JudgedOwn:
    """Mean NLL of each side's samples at temperature 1, under the dense model. stderr: of the excess, prompts being the units."""
    means = []
    for dense in (True, False):
        nlls: dict[tuple[int, ...], list[tuple[float, int]]] = {}
        for _, prompt_ids, new_ids in writer.texts(dense=dense, temperature=1.0, seeds=seeds):
            p = log_probs(writer.lm, prompt_ids, new_ids)
            nll = -float(p.gather(1, torch.tensor(new_ids, device=p.device)[:, None]).sum())
            nlls.setdefault(tuple(prompt_ids), []).append((nll, len(new_ids)))
        means.append({prompt: sum(n for n, _ in each) / sum(k for _, k in each) for prompt, each in nlls.items()})
    both = [prompt for prompt in means[0] if prompt in means[1]]
    dense, sparse = ([side[prompt] for prompt in both] for side in means)
    excess = [b - a for a, b in zip(dense, sparse, strict=True)]
    mean = sum(excess) / len(excess)
    spread = math.sqrt(sum((x - mean) ** 2 for x in excess) / max(1, len(excess) - 1) / len(excess))
    return {
        "nll_dense": sum(dense) / len(dense), "nll_sparse": sum(sparse) / len(sparse), "excess": mean, "stderr": spread,
        "samples": len(both) * seeds,
    }  # fmt: skip


def page(lm: LanguageModel, writer: Writer) -> str:
    """The answers of both side by side, as Markdown."""
    sides = [writer.texts(dense=dense, temperature=None) for dense in (True, False)]
    assert lm.adapter is not None
    head = f"""# Side by side: what {lm.name} writes, dense and sparse

Answers of at most {writer.new_tokens} tokens to {len(sides[0])} fixed prompts, none left out and none drawn twice: seed 0,
{lm.sampling.words}, {lm.dtype}, the adapter `{lm.adapter.digest}`. Made by `recipes/judge.py --page`.
"""
    parts = [textwrap.fill(line, WIDTH) if not line.startswith("#") else line for line in head.split("\n\n")]
    for prompt, (dense, *_), (sparse, *_) in zip(writer.prompts, *sides, strict=False):
        parts.append(f"## {prompt}")
        parts += [f"{name}:\n\n{fenced(text)}" for name, text in (("Dense", dense), ("Sparse", sparse))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def fenced(text: str) -> str:
    """A text as it is, lines folded, between fences that it does not hold."""
    lines = [fold for line in text.strip().splitlines() for fold in textwrap.wrap(line, WIDTH, replace_whitespace=False) or [""]]
    fence = "~" * max(3, 1 + max((len(line) - len(line.lstrip("~")) for line in lines), default=0))
    return "\n".join([f"{fence}text", *(line.rstrip() for line in lines), fence])


def judged(lm: LanguageModel, options: argparse.Namespace) -> JudgeResult:
    """All that is asked for."""
    writer = Writer(lm, prompts=options.prompts, new_tokens=options.new_tokens)
    assert lm.adapter is not None, "judged with an adapter"
    result: JudgeResult = {"model": lm.name, "adapter": lm.adapter.digest, "backend": lm.backend, "dtype": lm.dtype}
    if "texts" in options.parts:
        result["texts"] = judged_texts(lm, named_texts(options.text), options.max_tokens)
    if "tasks" in options.parts:
        tasks = {name: read_items(path)[: options.limit] for name, path in named_files(options.tasks).items()}
        result["tasks"] = judged_tasks(lm, tasks, options.batch_tokens)
    if "written" in options.parts:
        result["written"] = [judged_written(writer, temperature) for temperature in (0.0, 1.0)]
    if "own" in options.parts:
        result["own"] = judged_own(writer, options.seeds)
    if options.page is not None:
        write_text(options.page, page(lm, writer))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what dejavu.load takes")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--text", action="append", default=[], help="of part texts; may repeat")
    parser.add_argument("--tasks", action="append", default=[], help="of part tasks; may repeat")
    parser.add_argument("--page", type=Path, help="where the answers side by side are written")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-tokens", type=int, default=6000, help="of each text")
    parser.add_argument("--limit", type=int, help="items of each task")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="of a masked pass over task items")
    parser.add_argument("--prompts", type=int, default=len(MESSAGES), help="so many of the fixed ones")
    parser.add_argument("--new-tokens", type=int, default=96, help="of an answer at most")
    parser.add_argument("--seeds", type=int, default=1, help="samples of each prompt for part own")
    parser.add_argument("--results", type=Path, default=QUALITY, help="where the record is appended")
    options = parser.parse_args()
    asked = {"backend": options.backend, "dtype": options.dtype, "threads": options.threads}
    lm = dejavu.load(options.model, adapter=options.adapter or "bundled", **asked)
    facts = device_facts(cuda=lm.model.device.type == "cuda")
    (row,) = append_rows(options.results, [Record.from_dict({"kind": "judge", "model": lm.name, "result": judged(lm, options), **facts})])
    print(row.result)


if __name__ == "__main__":
    main()
