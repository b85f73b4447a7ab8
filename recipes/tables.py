"""Tables of README.md and docs/, generated from results/: nobody types a number.

    dejavu eval opt-mini --text ... --tasks ... --json | tail -1 | python recipes/tables.py record eval opt-mini
    python recipes/tables.py render

`record` appends the object that a command printed to results/quality.jsonl, with device, versions, commit and time.
`render` replaces what stands between `<!-- table: NAME -->` and `<!-- end -->` in the Markdown files by the newest figures.
Speeds, and which of them may be shown, are in speeds.py (models that exist, on a CPU) and gpu_tables.py (planted ones, on a GPU).
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from automatic import OPS as AUTOMATIC_OPS
from dejavu.bench.rows import QualityRow, append_rows
from dejavu.engine.backends import CAPABILITIES
from dejavu.files import write_json
from dejavu.model.bundle import MODELS_FOLDER
from dejavu.model.families import config_from_hf
from dejavu.model.gguf.families import GGUF_FAMILIES
from dejavu.model.rounding import ROUNDING_FILE
from forms import RESULTS as FORMS
from forms import newest_runs
from gpu_tables import NOT_MEASURED, gpu_ahead, gpu_batches, gpu_kept, gpu_ops, gpu_prompts, gpu_serving, gpu_speed
from records import QUALITY, AutomaticResult, CurveResult, EvalResult, MethodResult, ProfileResult, Record, Result, TrainResult, records
from speeds import EXACT, Refused, headline, markdown, origins, percent, programs, qualities, second

NOT_COMPARED = "-"
ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "src" / "dejavu" / "models" / "opt-mini" / "README.md")
MARK = re.compile(r"(<!-- table: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def record(kind: str, model: str, result: dict[str, Any]) -> None:
    """Append one command's object to results/quality.jsonl; where it wrote files is nobody's business."""
    kept = {key: value for key, value in result.items() if key not in ("adapter", "report", "run")}
    append_rows(QUALITY, [Record.from_dict({"kind": kind, "model": model, "result": kept})])


def newest(kind: type[Result], model: str) -> Record[Result]:
    """The last record of a kind and model that may be shown."""
    found = [each for each in records(kind, QUALITY) if each.model == model]
    if not found:
        raise Refused(f"no {kind.__name__} of {model} in results/ may be shown: measure it on a clean commit")
    return found[-1]


def texts(model: str = "opt-mini") -> str:
    """Perplexity of every held-out text."""
    record = newest(EvalResult, model)
    dense, sparse = record.result["dense"], record.result["sparse"]
    assert sparse is not None, "the model has an adapter"
    assert dense["ppl"] is not None and sparse["ppl"] is not None, "texts were scored"
    rows = []
    for name, value in dense["texts"].items():
        other = sparse["texts"][name]
        rise = percent(other["ppl"] / value["ppl"] - 1, 2)
        rows.append(
            [Path(name).stem, f"{value['ppl']:.2f}", f"{other['ppl']:.2f}", rise, f"{value['bits_per_byte']:.3f}", f"{value['tokens']}"]
        )
    every = [f"all, at an MLP density of {percent(sparse['mlp_density'])}", f"{dense['ppl']:.2f}", f"{sparse['ppl']:.2f}"]
    rows.append([*every, percent(sparse["ppl"] / dense["ppl"] - 1, 2), "", str(dense["tokens"])])
    return markdown(["text", "dense", "sparse", "rise", "bits per byte, dense", "tokens"], rows) + origins([record])


def tasks() -> str:
    """Accuracy on every task."""
    record = newest(EvalResult, "opt-mini")
    assert record.result["sparse"] is not None, "the model has an adapter"
    dense, sparse = record.result["dense"]["tasks"], record.result["sparse"]["tasks"]
    rows = []
    for name, value in dense.items():
        difference = sparse[name]["acc"] - value["acc"]
        rows.append(
            [
                Path(name).stem,
                percent(value["acc"]),
                percent(sparse[name]["acc"]),
                f"{100 * difference:+.1f}",
                percent(value["stderr"]),
                f"{value['n']}",
            ]
        )
    return markdown(["task", "dense", "sparse", "difference, points", "standard error", "items"], rows) + origins([record])


def methods() -> str:
    """Every model and method that was measured: what it costs in quality, in fp32. The speeds of these rows are of int8: not shown."""
    found = {(each.result["model"], each.result["method"]): each for each in records(MethodResult, QUALITY)}
    if not found:
        return NOT_MEASURED
    table = []
    for result in (each.result for each in found.values()):
        means = [sum(tasks.values()) / len(tasks) for tasks in (result["accuracy"]["dense"], result["accuracy"]["sparse"])]
        worst = max(result["text_rises"].values())
        table.append(
            [
                result["model"],
                result["method"],
                percent(result["mlp_density"]),
                percent(result["head_density"]),
                f"{100 * result['rise']:+.1f} %",
                f"{100 * worst:+.1f} %",
                *(percent(mean) for mean in means),
            ]
        )
    header = ["model", "method", "MLP density", "heads", "perplexity", "worst text", "accuracy, dense", "sparse"]
    return markdown(header, table) + origins(found.values())


def automatic() -> str:
    """README: what `auto` takes of models as people have them, and the least that it gained over all processes."""
    found = {(each.model, each.result["budget"]): each for each in records(AutomaticResult, QUALITY)}
    if not found:
        return NOT_MEASURED
    table = []
    for (model, budget), result in ((key, each.result) for key, each in sorted(found.items())):
        least = {op: min(ratios) for op, ratios in result["ratios"].items()}
        pays = least.get("decode", 0.0) >= 1
        table.append(
            [
                model,
                percent(budget, 0),
                result["takes"] if pays else f"{result['takes']}: run it dense" if least else "nothing: run it dense",
                NOT_COMPARED if result["ppl"] is None else f"{result['ppl']:.2f}",
                NOT_COMPARED if result["ppl_rival"] is None else f"{result['rival']}, {result['ppl_rival']:.2f}",
                *(f"{least[op]:.2f}x" if op in least else NOT_COMPARED for op in AUTOMATIC_OPS),
            ]
        )
    header = ["model", "allowed loss", "`auto` takes", "perplexity", "beside", "decode", *(f"request {op}" for op in AUTOMATIC_OPS[1:])]
    return markdown(header, table) + origins(found.values())


def curve() -> str:
    """Quality against density of the bundled adapter, its thresholds moved together."""
    found = records(CurveResult, QUALITY)
    if not found:
        return NOT_MEASURED
    points = sorted(found[-1].result["points"], key=lambda point: point["density"])
    table = [[percent(p["density"]), f"{p['kl']:.3f}", f"{100 * p['rise']:+.1f} %", f"{p['shift']:+.2f}"] for p in points]
    return markdown(["MLP density", "KL to dense, nats a token", "perplexity", "thresholds moved by"], table) + origins(found[-1:])


def layers() -> str:
    """Natural sparsity of every layer, and what its predictor does."""
    profile, train = newest(ProfileResult, "opt-mini"), newest(TrainResult, "opt-mini")
    rows = []
    for index, (natural, trained) in enumerate(zip(profile.result["layers"], train.result["layers"], strict=True)):
        ahead = "dense" if trained["lookahead"] is None else str(trained["lookahead"])
        rows.append(
            [
                str(index),
                percent(natural["mlp_density"]),
                percent(natural["dead"]),
                percent(natural["always_on"]),
                f"{natural['cosine']:.2f}",
                ahead,
                percent(trained["density"]),
                percent(trained["recall"]),
                percent(trained["mass"], 2),
            ]
        )
    header = ["layer", "fires", "dead", "always on", "cosine", "lookahead", "selected", "recall", "mass"]
    return markdown(header, rows) + origins([train])


def few_bits(base: str) -> str:
    """Forms of a model: what each takes, costs and gains. All take turns in a run; speeds are medians over runs."""
    runs = newest_runs(base, FORMS)
    if not runs:
        raise Refused(f"no forms of {base} in results/ may be shown: run recipes/forms.py on a clean commit")
    last = runs[-1]
    speed = {(row.form, row.mode): statistics.median(run[index].tok_s for run in runs) for index, row in enumerate(last)}
    dense = {row.form: row for row in last if row.dense}
    sparse = {row.form: row for row in last if row.sparse}
    exact = dense["fp32"]
    table = []
    for form, row in dense.items():
        other = sparse.get(form)
        with_adapter = ["", "", ""]
        if other is not None:
            rise = f"{100 * (other.ppl / sparse['fp32'].ppl - 1):+.1f} %"
            faster, base_speed = speed[form, other.mode], speed[form, row.mode]
            with_adapter = [f"{other.ppl:.2f}", rise, f"{faster:.0f} ({faster / base_speed:.2f})"]
        cost = f"{100 * (row.ppl / exact.ppl - 1):+.2f} %"
        size = "" if row.weight_bytes is None else f"{row.weight_bytes / 1e6:.0f}"
        table.append([form, size, f"{row.ppl:.2f}", cost, f"{speed[form, row.mode]:.0f}", *with_adapter])
    for row in (row for row in last if row.peer):
        cost = f"{100 * (row.ppl / exact.ppl - 1):+.2f} %"
        table.append([f"{row.mode}, {row.form}", "", f"{row.ppl:.2f}", cost, f"{speed[row.form, row.mode]:.0f}", "", "", ""])
    header = [
        "form",
        "MB",
        "perplexity, dense",
        "beside fp32",
        "tokens/s",
        "perplexity, sparse",
        "beside fp32",
        "tokens/s (times its own dense)",
    ]
    return markdown(header, table) + origins([exact])


PLAIN = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 64}
PLAIN |= {"num_key_value_heads": 2, "intermediate_size": 48, "hidden_act": "silu", "head_dim": 16}
LONG_ROPE = {"rope_type": "longrope", "long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "original_max_position_embeddings": 16}
# model_type, models known to have such a config, and the fields that matter to the kernels.
KINDS: list[tuple[str, str, dict[str, object]]] = [
    ("opt", "OPT 125M to 66B but 350M, opt-mini", {"ffn_dim": 48, "head_dim": None, "word_embed_proj_dim": 64}),
    ("opt", "OPT 350M", {"ffn_dim": 48, "head_dim": None, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    ("llama", "Llama 2 and 3, SmolLM2", {}),
    ("llama", "ReluLLaMA, ProSparse (`sparsellama`)", {"hidden_act": "relu"}),
    ("llama", "Llama with yarn", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    ("mistral", "Mistral 7B from v0.2", {"sliding_window": None}),
    ("mistral", "Mistral 7B v0.1", {"sliding_window": 8}),
    ("mistral", "any with `drelu`", {"sliding_window": None, "hidden_act": "drelu"}),
    ("qwen2", "Qwen2, Qwen2.5", {}),
    ("qwen3", "Qwen3", {}),
    ("arcee", "Arcee AFM", {"hidden_act": "relu2", "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 20.0}}),
    ("nemotron", "Nemotron 4, Minitron", {"hidden_act": "relu2"}),
    ("phi3", "Phi-3 mini and medium, 4k (a window of 2047)", {"sliding_window": 8}),
    ("phi3", "Phi-3 and 3.5, 128k; Phi-4 mini", {"sliding_window": None, "rope_parameters": LONG_ROPE}),
    ("phi3", "Phi-4", {"sliding_window": None}),
    ("gemma", "Gemma 1", {"hidden_act": "gelu_pytorch_tanh"}),
    ("gemma2", "Gemma 2", {"sliding_window": 8}),
    ("gemma3_text", "Gemma 3, text", {"sliding_window": 8}),
    ("falcon", "Falcon 7B, 40B, 180B", {"head_dim": None}),
    ("minicpm", "MiniCPM", {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}),
    ("minicpm", "MiniCPM-S", {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16, "hidden_act": "relu"}),
    ("granite", "Granite 3, dense", {"embedding_multiplier": 12.0, "attention_multiplier": 0.1, "logits_scaling": 8.0}),
    ("starcoder2", "StarCoder2", {"hidden_act": "gelu_pytorch_tanh"}),
    ("stablelm", "StableLM 2 1.6B", {"use_qkv_bias": True, "head_dim": None}),
    ("stablelm", "StableLM, blocks side by side", {"use_parallel_residual": True, "head_dim": None}),
]
# Of these models: how GGUF has them where the family's map does not say it, or why it has them not.
GGUF_FORMS = {"Mistral 7B from v0.2": "`llama`, `mistral3`", "Mistral 7B v0.1": "`llama`, if the file states the window"}
NO_ACTIVATION = "GGUF names no activation, and llama.cpp takes another"
NO_GGUF = {
    "OPT 125M to 66B but 350M, opt-mini": "llama.cpp has no OPT",
    "OPT 350M": "llama.cpp has no OPT",
    "ReluLLaMA, ProSparse (`sparsellama`)": NO_ACTIVATION,
    "any with `drelu`": NO_ACTIVATION,
    "MiniCPM-S": NO_ACTIVATION,
}


def families() -> str:
    """Which architectures are read from which form, and which backends compute them: what a config of that kind says of itself. A model is
    the same from a folder and from a GGUF file, so a backend computes both or neither."""
    table = []
    for kind, models, fields in KINDS:
        config = config_from_hf(PLAIN | {"model_type": kind} | fields)
        names = ", ".join(f"`{name}`" for name, family in GGUF_FAMILIES.items() if family.model_type == kind)
        reasons = [f"GGUF: {NO_GGUF[models]}"] if models in NO_GGUF else []
        form = "no" if reasons else GGUF_FORMS.get(models, names)
        assert form, f"{models} are in no GGUF file: say why in NO_GGUF"
        cells = []
        for backend in ("torch", "native", "cuda"):
            lacking = CAPABILITIES[backend].beyond(config)
            cells.append("no" if lacking else "yes")
            reasons += [f"{backend}: {', '.join(lacking)}"] if lacking else []
        table.append([f"`{kind}`", models, "yes", form, *cells, "; ".join(reasons) or "nothing is lacking"])
    return markdown(["model_type", "models", "folder", "GGUF", "torch", "native", "cuda", "why not"], table)


SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
TABLES: dict[str, Callable[[], str]] = {
    "families": families,
    "methods": methods,
    "automatic": automatic,
    "smollm-texts": lambda: texts("smollm2-sparse"),
    "smollm-curve": curve,
    "headline": lambda: headline("opt-mini", "opt-mini, 21 M parameters"),
    "second": lambda: second(SMOLLM2, "SmolLM2-135M-Instruct (its Q4_1 file) with `smollm2-sparse`"),
    "programs-opt-mini": lambda: programs("opt-mini"),
    "programs-smollm": lambda: programs(SMOLLM2),
    "few-bits": lambda: few_bits("SmolLM2-135M-Instruct"),
    "few-bits-opt-mini": lambda: few_bits("opt-mini"),
    "texts": texts,
    "tasks": tasks,
    "layers": layers,
    "gpu-speed": gpu_speed,
    "gpu-batches": lambda: gpu_batches("H200"),
    "gpu-batches-h100": lambda: gpu_batches("H100"),
    "gpu-kept": lambda: gpu_kept("H200"),
    "gpu-prompts": gpu_prompts,
    "gpu-serving": gpu_serving,
    "gpu-ahead": gpu_ahead,
    "gpu-ops": gpu_ops,
}


def rendered(page: str) -> str:
    """A page with its tables filled from results/."""
    return MARK.sub(lambda match: match.group(1) + TABLES[match.group("name")]() + match.group(3), page)


def rounding() -> list[dict[str, Any]]:
    """What models/rounding.json holds: of each model whose adapter is bundled, the rise of perplexity that a dtype costs.

    Beside fp32 with a cache in fp32, on the same text: dense, and with each adapter that was measured, by its digest.
    """
    found = []
    for file in sorted(MODELS_FOLDER.glob("*/adapter/config.json")):
        base = json.loads(file.read_text())
        measured = [row for row in qualities() if row.repeatable and row.model == base["base_id"] and not row.peer]
        rises: dict[str, dict[str, float]] = {}
        for row in measured:
            exact = [each for each in measured if (each.dtype, each.cache_dtype) == EXACT and _same_but_dtype(each, row)]
            if row.dtype != "fp32" and exact:
                rises.setdefault(row.dtype, {})[row.adapter or "dense"] = round(row.ppl / exact[-1].ppl - 1, 4)
        found.append({"model": base["base_id"], "base_hashes": base["base_hashes"], "rises": rises})
    return found


def _same_but_dtype(one: QualityRow, other: QualityRow) -> bool:
    return (one.mode, one.adapter, one.texts_hash, one.backend) == (other.mode, other.adapter, other.texts_hash, other.backend)


def main() -> None:
    match sys.argv[1:]:
        case ["record", kind, model]:
            record(kind, model, json.loads(sys.stdin.read().strip().splitlines()[-1]))
        case ["render"]:
            pages = {page: rendered(page.read_text()) for page in PAGES}  # all, or none where a row is refused
            for page, text in pages.items():
                page.write_text(text)
            write_json(ROUNDING_FILE, rounding())
        case _:
            raise SystemExit("usage: tables.py record KIND MODEL < object | tables.py render")


if __name__ == "__main__":
    main()
