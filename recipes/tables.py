"""Tables of README.md and docs/, generated from results/: nobody types a number.

    dejavu eval opt-mini --text ... --tasks ... --json | tail -1 | python recipes/tables.py record eval opt-mini
    python recipes/tables.py render

`record` appends the object that a command printed to results/quality.jsonl, with device, versions, commit and time.
`render` replaces what stands between `<!-- table: NAME -->` and `<!-- end -->` in the Markdown files by the newest figures.
Speeds come from results/bench.jsonl (rows of `dejavu bench`): those of a CPU and those of a GPU have tables of their own.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dejavu.measure.results import Row, commit, device_name, read_rows, versions
from dejavu.model.families import config_from_hf

ROOT = Path(__file__).resolve().parents[1]
QUALITY, BENCH = ROOT / "results" / "quality.jsonl", ROOT / "results" / "bench.jsonl"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "src" / "dejavu" / "models" / "opt-mini" / "README.md")
NOT_MEASURED = "Not measured yet.\n"
MARK = re.compile(r"(<!-- table: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def record(kind: str, model: str, result: dict[str, Any]) -> None:
    """Append one command's object to results/quality.jsonl; where it wrote files is nobody's business."""
    line = {
        "kind": kind,
        "model": model,
        "result": {key: value for key, value in result.items() if key not in ("adapter", "report", "run")},
        "device": device_name(),
        "versions": versions(),
        "commit": commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    QUALITY.parent.mkdir(exist_ok=True)
    with QUALITY.open("a") as file:
        file.write(json.dumps(line) + "\n")


def newest(kind: str, model: str) -> dict[str, Any]:
    """The last record of a kind and model."""
    lines = [json.loads(line) for line in QUALITY.read_text().splitlines()]
    return [line for line in lines if (line["kind"], line["model"]) == (kind, model)][-1]


def _table(header: list[str], rows: list[list[str]]) -> str:
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, align, *rows]) + "\n"


def _percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"


def _source(line: dict[str, Any]) -> str:
    return f"\n{line['device']}, torch {line['versions']['torch']}, commit {str(line['commit'])[:10]}, {line['time'][:10]}.\n"


def headline() -> str:
    """README: dense and sparse side by side, from one run of the demo."""
    line = newest("demo", "opt-mini")
    demo = line["result"]
    dense, sparse = demo["dense"], demo["sparse"]
    engine = f"tokens/s, {demo['backend']} backend, {demo['dtype']}"
    ahead = sum(1 for value in demo["lookahead"] if value == 1)
    rows = [
        ["MLP neurons read", "100 %", _percent(demo["mlp_density"])],
        ["attention heads read", "100 %", _percent(demo["head_density"])],
        ["perplexity", f"{dense['ppl']:.3f}", f"{sparse['ppl']:.3f} ({100 * (sparse['ppl'] / dense['ppl'] - 1):+.2f} %)"],
        [
            engine,
            f"{dense['tok_s']:.0f}",
            f"{sparse['tok_s']:.0f} ({demo['speedup']:.2f}x)",
        ],
        ["layers predicted one block ahead", "", f"{ahead} of {len(demo['lookahead'])}"],
    ]
    return _table(["opt-mini (21 M parameters)", "dense", "sparse"], rows) + _source(line)


def texts(model: str = "opt-mini") -> str:
    """Perplexity of every held-out text."""
    line = newest("eval", model)
    dense, sparse = line["result"]["dense"], line["result"]["sparse"]
    rows = []
    for name, value in dense["texts"].items():
        other = sparse["texts"][name]
        rise = _percent(other["ppl"] / value["ppl"] - 1, 2)
        rows.append(
            [Path(name).stem, f"{value['ppl']:.2f}", f"{other['ppl']:.2f}", rise, f"{value['bits_per_byte']:.3f}", f"{value['tokens']}"]
        )
    every = [f"all, at an MLP density of {_percent(sparse['mlp_density'])}", f"{dense['ppl']:.2f}", f"{sparse['ppl']:.2f}"]
    rows.append([*every, _percent(sparse["ppl"] / dense["ppl"] - 1, 2), "", str(dense["tokens"])])
    return _table(["text", "dense", "sparse", "rise", "bits per byte, dense", "tokens"], rows) + _source(line)


def tasks() -> str:
    """Accuracy on every task."""
    line = newest("eval", "opt-mini")
    dense, sparse = line["result"]["dense"]["tasks"], line["result"]["sparse"]["tasks"]
    rows = []
    for name, value in dense.items():
        difference = sparse[name]["acc"] - value["acc"]
        rows.append(
            [
                Path(name).stem,
                _percent(value["acc"]),
                _percent(sparse[name]["acc"]),
                f"{100 * difference:+.1f}",
                _percent(value["stderr"]),
                f"{value['n']}",
            ]
        )
    return _table(["task", "dense", "sparse", "difference, points", "standard error", "items"], rows) + _source(line)


def methods() -> str:
    """Every model and method that was measured: what it costs in quality, in fp32. The speeds of these rows are of int8: not shown."""
    found = {line["model"]: line for line in map(json.loads, QUALITY.read_text().splitlines()) if line["kind"] == "method"}
    if not found:
        return NOT_MEASURED
    table = []
    for line in found.values():
        result = line["result"]
        means = [sum(tasks.values()) / len(tasks) for tasks in result["accuracy"].values()]
        worst = max(result["text_rises"].values())
        table.append(
            [
                result["model"],
                result["method"],
                *(_percent(result[name]) for name in ("mlp_density", "head_density")),
                f"{100 * result['rise']:+.1f} %",
                f"{100 * worst:+.1f} %",
                *(_percent(mean) for mean in means),
            ]
        )
    header = ["model", "method", "MLP density", "heads", "perplexity", "worst text", "accuracy, dense", "sparse"]
    sources = "".join(dict.fromkeys(_source(line) for line in found.values()))
    return _table(header, table) + sources


def curve() -> str:
    """Quality against density of the bundled adapter, its thresholds moved together."""
    lines = [line for line in map(json.loads, QUALITY.read_text().splitlines()) if line["kind"] == "curve"]
    if not lines:
        return NOT_MEASURED
    points = sorted(lines[-1]["result"]["points"], key=lambda point: point["density"])
    table = [[_percent(p["density"]), f"{p['kl']:.3f}", f"{100 * p['rise']:+.1f} %", f"{p['shift']:+.2f}"] for p in points]
    return _table(["MLP density", "KL to dense, nats a token", "perplexity", "thresholds moved by"], table) + _source(lines[-1])


def layers() -> str:
    """Natural sparsity of every layer, and what its predictor does."""
    profile, train = newest("profile", "opt-mini"), newest("train", "opt-mini")
    rows = []
    for index, (natural, trained) in enumerate(zip(profile["result"]["layers"], train["result"]["layers"], strict=True)):
        ahead = "dense" if trained["lookahead"] is None else str(trained["lookahead"])
        rows.append(
            [
                str(index),
                _percent(natural["mlp_density"]),
                _percent(natural["dead"]),
                _percent(natural["always_on"]),
                f"{natural['cosine']:.2f}",
                ahead,
                _percent(trained["density"]),
                _percent(trained["recall"]),
                _percent(trained["mass"], 2),
            ]
        )
    header = ["layer", "fires", "dead", "always on", "cosine", "lookahead", "selected", "recall", "mass"]
    return _table(header, rows) + _source(train)


def on_gpu(row: Row) -> bool:
    """A CPU's name ends with the number of its cores."""
    return row.device is not None and not row.device.endswith(" cores")


def _dtypes_with_quality() -> set[tuple[str, str]]:
    """Models that exist, each with the dtypes in which `dejavu eval` measured it."""
    lines = map(json.loads, QUALITY.read_text().splitlines())
    return {(line["result"]["model"], line["result"]["dtype"]) for line in lines if line["kind"] == "eval" and "dtype" in line["result"]}


def bench_runs() -> list[list[Row]]:
    """The rows of the newest run of `dejavu bench` for each model, dtype, context and set of batches, on each CPU.

    A model that exists is left out in a dtype in which its perplexity was not measured: its speed would stand there without its cost.
    """
    measured = _dtypes_with_quality()
    runs: dict[tuple[object, ...], list[Row]] = {}
    for row in read_rows(BENCH):
        if on_gpu(row):
            continue
        runs.setdefault((row.time, row.context, row.device), []).append(row)
    newest: dict[tuple[object, ...], list[Row]] = {}
    for rows in runs.values():
        if any(row.backend != row.mode and not row.synthetic and (row.model, row.dtype) not in measured for row in rows):
            continue
        first, batches = rows[0], tuple(sorted({row.batch for row in rows if row.op == "decode"}))
        newest[first.model, first.synthetic, first.dtype, first.context, batches, first.device] = rows
    return list(newest.values())


def _bench_source(row: Row) -> str:
    return _source({"device": row.device, "versions": row.versions, "commit": row.commit, "time": row.time})


def _decodes(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Decode rows of a run: ours and those of peers."""
    decodes = [row for row in rows if row.op == "decode"]
    return [row for row in decodes if row.backend != row.mode], [row for row in decodes if row.backend == row.mode]


def _ratio(row: Row, other: Row) -> str:
    assert row.tok_s is not None and other.tok_s is not None
    return f"{row.tok_s / other.tok_s:.2f}"


def speed() -> str:
    """Decode speed dense and sparse of every model that was measured."""
    table, runs = [], bench_runs()
    for rows in runs:
        own, _ = _decodes(rows)
        for row in own:
            dense = next(other for other in own if other.mode == "dense" and other.batch == row.batch)
            name = f"{row.model}{', synthetic' if row.synthetic else ''}: {row.mode}"
            about = [row.backend, row.dtype, str(row.threads), str(row.batch), str(row.context), _percent(row.mlp_density)]
            speeds = [f"{row.tok_s:.1f}", "" if row.gbs is None else f"{row.gbs:.1f}"]
            share = "" if row.pct_ceiling is None else f"{row.pct_ceiling:.0f} %"
            table.append([name, *about, *speeds, share, _ratio(row, dense)])
    header = ["decode", "backend", "dtype", "threads", "batch", "context", "MLP density", "tokens/s", "useful GB/s", "of the read ceiling"]
    return _table([*header, "times dense"], table) + _bench_source(runs[-1][-1])


def _fastest(rows: list[Row]) -> Row:
    """Our fastest decode row of a run."""
    return max(_decodes(rows)[0], key=lambda row: row.tok_s or 0.0)


def peers() -> str:
    """Other programs beside ours, each run of `dejavu bench --against`."""
    return _beside([rows for rows in bench_runs() if _decodes(rows)[1]])


def peers_best() -> str:
    """README: of each model that is not synthetic the run in which ours was fastest."""
    found: dict[str, list[Row]] = {}
    for rows in bench_runs():
        known = found.get(rows[0].model)
        if _decodes(rows)[1] and not rows[0].synthetic and (known is None or (_fastest(rows).tok_s or 0) > (_fastest(known).tok_s or 0)):
            found[rows[0].model] = rows
    return _beside(list(found.values()))


def _beside(runs: list[list[Row]]) -> str:
    table, sources = [], []
    for rows in runs:
        own, others = _decodes(rows)
        for row in (*own, *others):
            density = _percent(row.mlp_density) if row in own else ""
            program = f"dejavu {row.mode}" if row in own else row.mode
            name = f"{row.model}{', synthetic' if row.synthetic else ''}"
            table.append([program, name, row.dtype, str(row.threads), density, f"{row.tok_s:.1f}", _ratio(_fastest(rows), row)])
        sources.append(own[0])
    header = ["program", "model", "dtype", "threads", "MLP density", "tokens/s", "our fastest / this"]
    return _table(header, table) + _sources(sources)


GPU_MODELS = ("opt-6.7b", "opt-30b")
PROGRAMS = {"transformers": "transformers, eager", "transformers-compile": "transformers, compiled"}


def gpu_points() -> list[list[Row]]:
    """Decode rows on a GPU by what was measured together: a command, model, dtype, context and batch. The oldest first."""
    points: dict[tuple[object, ...], list[Row]] = {}
    for row in read_rows(BENCH):
        if on_gpu(row) and row.op == "decode":
            points.setdefault((row.time, row.device, row.model, row.dtype, row.context, row.batch), []).append(row)
    return [rows for rows in points.values() if any(row.mode == "dense" for row in rows)]


def _ahead(rows: list[Row]) -> str:
    """How a point's sparse modes looked ahead: what their names end with (see Row)."""
    return next((row.mode.partition(" ")[2] for row in rows if " " in row.mode), "beside")


def _sources(rows: list[Row]) -> str:
    """A line for each machine, commit and day."""
    return "".join(dict.fromkeys(_bench_source(row) for row in rows))


def _gpu_cells(row: Row, dense: Row) -> list[str]:
    """MLP density, heads, time of a step, tokens/s, times dense: what both tables of decode end with."""
    assert row.p50_us is not None
    own = row.backend != row.mode
    return [
        _percent(row.mlp_density) if own else "",
        _percent(row.head_density) if own else "",
        f"{row.p50_us / 1e3:.2f}",
        f"{row.tok_s:.1f}",
        _ratio(row, dense),
    ]


def _short_name(device: str | None) -> str:
    """`H100` of `NVIDIA H100 80GB HBM3`."""
    words = (device or "").removeprefix("NVIDIA ").split()
    return words[0] if words else ""


def gpu_speed() -> str:
    """Decode of one sequence on a GPU: transformers on the same weights, ours dense and sparse, from one run for each model."""
    table, sources = [], []
    for model in GPU_MODELS:
        points = [rows for rows in gpu_points() if (rows[0].model, rows[0].batch, _ahead(rows)) == (model, 1, "beside")]
        if not points:
            continue
        with_peers = [rows for rows in points if _decodes(rows)[1]]
        own, others = _decodes(max(with_peers or points, key=lambda rows: (rows[0].time, -rows[0].context)))
        dense = next(row for row in own if row.mode == "dense")
        for row in (*sorted(others, key=lambda row: row.mode), *own):
            name = PROGRAMS.get(row.mode, row.mode) if row in others else f"dejavu {row.mode}"
            speed = ["" if row.nodes is None else str(row.nodes), "" if row.gbs is None else f"{row.gbs:.0f}"]
            share = "" if row.pct_ceiling is None else f"{row.pct_ceiling:.0f} %"
            about = [f"{row.model}{', synthetic' if row.synthetic else ''}", row.dtype, str(row.context)]
            table.append([name, *about, *_gpu_cells(row, dense), *speed, share])
        sources.append(dense)
    header = ["program", "model", "dtype", "context", "MLP density", "heads", "ms a token", "tokens/s", "times our dense"]
    header += ["graph nodes", "useful GB/s", "of the read ceiling"]
    return _table(header, table) + _sources(sources) if table else NOT_MEASURED


def gpu_batches() -> str:
    """Our decode on a GPU at every context and batch, the newest of each mode; times dense are of one run."""
    newest: dict[tuple[Any, ...], tuple[Row, Row]] = {}
    for rows in gpu_points():
        dense = next(row for row in rows if row.mode == "dense")
        for row in _decodes(rows)[0] if _ahead(rows) == "beside" else ():
            newest[row.model, row.dtype, row.device, row.context, row.batch, row.mode] = row, dense
    table, sources = [], []
    order = list(dict.fromkeys(key[:3] for key in newest))
    for key in sorted(newest, key=lambda key: (order.index(key[:3]), key[3:])):
        row, dense = newest[key]
        about = [f"{row.model}{', synthetic' if row.synthetic else ''}", _short_name(row.device), row.dtype]
        about += [str(row.context), str(row.batch)]
        table.append([f"dejavu {row.mode}", *about, _percent(row.union_density), *_gpu_cells(row, dense)])
        sources.append(dense)
    header = ["program", "model", "GPU", "dtype", "context", "batch", "union density", "MLP density", "heads", "ms a step", "tokens/s"]
    return _table([*header, "times our dense"], table) + _sources(sources) if table else NOT_MEASURED


def gpu_ahead() -> str:
    """Where the next selection is computed: the newest of each way, for what was measured in more than one."""
    ways: dict[tuple[object, ...], dict[str, list[Row]]] = {}
    for rows in gpu_points():
        first = rows[0]
        ways.setdefault((first.model, first.dtype, first.device, first.context, first.batch), {})[_ahead(rows)] = rows
    table, sources = [], []
    for found in ways.values():
        for ahead, rows in found.items() if len(found) > 1 else ():
            own, _ = _decodes(rows)
            dense = next(row for row in own if row.mode == "dense")
            for row in own:
                if row is not dense:
                    about = [
                        f"{row.model}{', synthetic' if row.synthetic else ''}",
                        row.dtype,
                        str(row.context),
                        row.mode.partition(" ")[0],
                    ]
                    table.append([ahead, *about, *_gpu_cells(row, dense), "" if row.nodes is None else str(row.nodes)])
            sources.append(dense)
    header = ["selected", "model", "dtype", "context", "mode", "MLP density", "heads", "ms a token", "tokens/s", "times our dense"]
    return _table([*header, "graph nodes"], table) + _sources(sources) if table else NOT_MEASURED


def gpu_ops() -> str:
    """Single kernels on a GPU, of the newest run of each model, batch and context: densities in rows, selections side by side."""
    runs: dict[tuple[object, ...], list[Row]] = {}
    for row in read_rows(BENCH):
        if on_gpu(row) and row.op not in ("decode", "prefill", "read"):
            runs.setdefault((row.time, row.model, row.dtype, row.device, row.batch, row.context), []).append(row)
    newest = {key[1:]: rows for key, rows in runs.items()}
    table, sources = [], []
    for rows in newest.values():
        points: dict[tuple[str, str, float | None], dict[str | None, Row]] = {}
        for row in rows:
            points.setdefault((row.op, row.mode, row.mlp_density), {})[row.selection] = row
        for (op, mode, density), found in points.items():
            first = next(iter(found.values()))
            cells = [_op_cell(found.get(None) or found.get("uniform")), *(_op_cell(found.get(name)) for name in ("clustered", "hot-set"))]
            table.append([f"{op}, {mode}", first.model, first.dtype, str(first.batch), _percent(density, 0), *cells])
        sources.append(rows[0])
    header = ["op", "model", "dtype", "batch", "density", "µs, GB/s, of the read ceiling", "clustered", "hot-set"]
    return _table(header, table) + _sources(sources) if table else NOT_MEASURED


def _op_cell(row: Row | None) -> str:
    return "" if row is None else f"{row.p50_us:.1f}, {row.gbs:.0f}, {row.pct_ceiling:.0f} %"


PLAIN = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 64}
PLAIN |= {"num_key_value_heads": 2, "intermediate_size": 48, "hidden_act": "silu", "head_dim": 16}
LONG_ROPE = {"rope_type": "longrope", "long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "original_max_position_embeddings": 16}
# model_type, models known to have such a config, and the fields that matter to the kernels.
KINDS: list[tuple[str, str, dict[str, object]]] = [
    ("opt", "OPT 125M to 66B but 350M, opt-mini", {"ffn_dim": 48, "head_dim": None, "word_embed_proj_dim": 64}),
    ("opt", "OPT 350M", {"ffn_dim": 48, "head_dim": None, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    ("llama", "Llama 2 and 3, SmolLM2, ReluLLaMA, ProSparse (`sparsellama`)", {}),
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
    ("gemma2", "Gemma 2", {"sliding_window": 8}),
    ("gemma3_text", "Gemma 3, text", {"sliding_window": 8}),
    ("falcon", "Falcon 7B, 40B, 180B", {"head_dim": None}),
    ("minicpm", "MiniCPM, MiniCPM-S", {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}),
]


def families() -> str:
    """Which architectures are read, and which backends compute them: what a config of that kind says of itself."""
    table = []
    for kind, models, fields in KINDS:
        config = config_from_hf(PLAIN | {"model_type": kind} | fields)
        lacking = list(config.beyond("cuda"))
        native = "yes" if not config.beyond("native") else "no"
        cuda = "yes" if not lacking else "no"
        table.append([f"`{kind}`", models, "yes", native, cuda, ", ".join(lacking)])
    return _table(["model_type", "models", "torch", "native", "cuda", "what cuda does not compute"], table)


TABLES: dict[str, Callable[[], str]] = {
    "families": families,
    "methods": methods,
    "smollm-texts": lambda: texts("smollm2-sparse"),
    "smollm-curve": curve,
    "headline": headline,
    "texts": texts,
    "tasks": tasks,
    "layers": layers,
    "speed": speed,
    "peers": peers,
    "peers-best": peers_best,
    "gpu-speed": gpu_speed,
    "gpu-batches": gpu_batches,
    "gpu-ahead": gpu_ahead,
    "gpu-ops": gpu_ops,
}


def rendered(page: str) -> str:
    """A page with its tables filled from results/."""
    return MARK.sub(lambda match: match.group(1) + TABLES[match.group("name")]() + match.group(3), page)


def main() -> None:
    match sys.argv[1:]:
        case ["record", kind, model]:
            record(kind, model, json.loads(sys.stdin.read().strip().splitlines()[-1]))
        case ["render"]:
            for page in PAGES:
                page.write_text(rendered(page.read_text()))
        case _:
            raise SystemExit("usage: tables.py record KIND MODEL < object | tables.py render")


if __name__ == "__main__":
    main()
