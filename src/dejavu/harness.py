"""dejavu in lm-evaluation-harness: `DejaVuLM`, one of its models, dense or sparse.

In: requests of the harness. Out: log-probabilities, and generated text. A continuation is scored as `dejavu eval` scores it
(quality/tasks.py): the context is prefill and runs dense, the continuation's tokens run sparse, so that a multiple choice task
says what sparsity costs. Of a rolling log-probability every token but a window's first runs sparse.

`harness_results` runs tasks by name, or by the path of a YAML file, twice: dense and sparse. Needs the extra `eval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dejavu.config import Progress, require
from dejavu.language_model import LanguageModel
from dejavu.loading import load
from dejavu.quality.perplexity import MaskedSelections
from dejavu.quality.tasks import Request, encode_pair, first_token, make_request, score_requests

MAX_NEW_TOKENS = 256  # where a task names no limit, as the harness's own models


@register_model("dejavu")
class DejaVuLM(LM):
    """lm: a LanguageModel, or what `dejavu.load` takes. dense: run dense though there is an adapter.

    In the harness's own words `--model dejavu --model_args pretrained=opt-mini` once this module is imported.
    """

    def __init__(
        self, lm: LanguageModel | str | None = None, *, pretrained: str | None = None, dense: bool = False,
        progress: Progress | None = None, batch_size: Any = None, device: Any = None, max_batch_size: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        name = pretrained if lm is None else lm
        require(name is not None, "no model: give pretrained=NAME")
        self.lm = name if isinstance(name, LanguageModel) else load(str(name), **options)
        self.dense, self.progress = dense, progress
        self.counter = None  # densities of the last call

    @property
    def tokenizer_name(self) -> str:
        return self.lm.name

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of each request's continuation given its context."""
        limit = self.lm.config.max_positions
        made = []
        for index, request in enumerate(requests):
            context, continuation = request.args
            where = f"request {index + 1}"
            made.append(make_request(*encode_pair(self.lm.tokenizer, context, continuation, where), limit, where))
        return self._scores(made)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of the model's context that do not overlap."""
        tokenizer, limit = self.lm.tokenizer, self.lm.config.max_positions
        prefix = first_token(tokenizer)
        made, owner = [], []
        for index, request in enumerate(requests):
            (text,) = request.args
            windows = get_rolling_token_windows(tokenizer.encode_plain(text), prefix_token=prefix, max_seq_len=limit, context_len=1)
            for context, continuation in map(make_disjoint_window, windows):
                made.append(make_request(context, continuation, limit, f"text {index + 1}"))
                owner.append(index)
        totals = [0.0] * len(requests)
        for index, (log_prob, _) in zip(owner, self._scores(made), strict=True):
            totals[index] += log_prob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text behind each context, up to a stop string; a context too long loses its start."""
        found = []
        for index, request in enumerate(requests):
            context, settings = request.args
            found.append(self._text(context, dict(settings)))
            if self.progress is not None:
                self.progress("texts", index + 1, len(requests))
        return found

    def _scores(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        layers = self.lm.layers(dense=self.dense)
        masked = None if layers is None else MaskedSelections(layers)

        def report(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress("requests", done, total)

        dense, sparse = score_requests(self.lm.model, requests, masked=masked, progress=report)
        self.counter = None if masked is None else masked.counter
        return [(score.log_prob, score.greedy) for score in (dense if sparse is None else sparse)]

    def _text(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.pop("until", None) or []
        count = int(settings.pop("max_gen_toks", MAX_NEW_TOKENS))
        sampled = settings.pop("do_sample", False)
        temperature = float(settings.pop("temperature", 0.0) or 0.0)
        require(not settings, f"generation settings {sorted(settings)} are not supported; until, max_gen_toks, do_sample, temperature are")
        room = self.lm.config.max_positions - count
        require(room > 0, f"max_gen_toks {count} leaves no room for a context in {self.lm.config.max_positions} tokens")
        ids = self.lm.tokenizer.encode_plain(context)
        kept = room - (len(self.lm.tokenizer.encode(context)) - len(ids))  # what is put before every text stays
        while kept > 0 and len(self.lm.tokenizer.encode(context)) > room:  # the same text may be cut into more tokens than before
            context, kept = self.lm.tokenizer.decode(ids[-kept:]), kept - 1
        stops = [until] if isinstance(until, str) else list(until)
        return str(
            self.lm.generate(
                context, max_new_tokens=count, stop=stops, temperature=temperature if sampled else 0.0, top_k=0, top_p=1.0, dense=self.dense
            )
        )  # fmt: skip


def harness_results(
    lm: LanguageModel, tasks: Sequence[str], *, limit: int | None = None, progress: Progress | None = None
) -> dict[str, dict[str, dict[str, float]] | None]:
    """The harness's metrics by task: `dense`, and `sparse` where the model has an adapter. A task is a name it knows or a YAML file."""
    require(limit is None or limit >= 1, f"--limit must be at least 1, not {limit}")
    names, folders = [], []
    for task in tasks:
        path = Path(task)
        if path.suffix in (".yaml", ".yml"):
            require(path.is_file(), f"no task file {path}")
            folders.append(str(path.parent))
            names.append(_task_name(path))
        else:
            names.append(task)
    # Its own tasks are read only where one is asked for: there are thousands.
    manager = TaskManager(include_path=folders or None, include_defaults=len(folders) < len(tasks))
    unknown = [name for name in names if name not in manager.all_tasks]
    require(not unknown, f"lm-evaluation-harness knows no task {', '.join(unknown)}; give a name it knows or a YAML file")
    found: dict[str, dict[str, dict[str, float]] | None] = {}
    for part, dense in (("dense", True), ("sparse", False)):
        if part == "sparse" and lm.layers() is None:
            found[part] = None
            continue
        result = simple_evaluate(
            model=DejaVuLM(lm, dense=dense, progress=progress), tasks=list(names), limit=limit, task_manager=manager, bootstrap_iters=0
        )  # fmt: skip
        assert result is not None, "one process has the results"
        found[part] = {task: _numbers(metrics) for task, metrics in result["results"].items()}
    return found


def _task_name(path: Path) -> str:
    """`task:` of a YAML file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("task:"):
            name = line.removeprefix("task:").partition(" #")[0].strip().strip("\"'")
            require(bool(name), f"{path} is of a group of tasks; give the file of one task, or the names of its tasks")
            return name
    raise ValueError(f"{path} names no task: it has no line 'task: NAME'")


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Metrics that are numbers, by name: `acc`, `acc_stderr`."""
    plain = {key.replace(",none", ""): value for key, value in metrics.items()}
    plain.pop("sample_len", None)
    return {key: float(value) for key, value in plain.items() if isinstance(value, int | float) and not isinstance(value, bool)}
