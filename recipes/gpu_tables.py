"""Tables of docs/performance.md: speeds on a GPU, of planted models.

In: results/bench.jsonl. Out: Markdown. A planted model is called by whose shape it has, never by that model's name: its weights are random.
Rows of models that exist, and of a commit with changed files, are left out.
"""

from __future__ import annotations

from typing import Any

import speeds
from dejavu.bench.decode import USUAL_AHEAD
from dejavu.bench.rows import SpeedRow, read_rows
from dejavu.loadtest.rows import ServeRow
from speeds import markdown, origins, percent

NOT_MEASURED = "Not measured yet.\n"
SERVE = speeds.BENCH.with_name("serve.jsonl")


def rows_of_gpu() -> list[SpeedRow]:
    return [row for row in read_rows(speeds.BENCH) if row.device_kind == "gpu" and row.synthetic and row.repeatable]


def label(row: SpeedRow, method: str = "predicted") -> str:
    """`planted, OPT-6.7B's shape`; a slice says how much of it ran. Nothing is planted where gates or inputs select."""
    assert row.shape is not None, "a made-up model has a shape"
    name = row.shape.upper().replace("LLAMA", "Llama").replace("MINITRON", "Minitron").replace("-RELU", ", ReLU")
    part = "" if row.layers == row.shape_layers else f" ({row.layers} of {row.shape_layers} layers)"
    return f"{'planted' if method == 'predicted' else 'random'}, {name}'s shape{part}"


def decodes(rows: list[SpeedRow]) -> tuple[list[SpeedRow], list[SpeedRow]]:
    """Decode rows of a run: ours and those of peers."""
    found = [row for row in rows if row.op == "decode"]
    return [row for row in found if not row.peer], [row for row in found if row.peer]


def ratio(row: SpeedRow, other: SpeedRow) -> str:
    return f"{row.speed / other.speed:.2f}"


def share(row: SpeedRow, dense: SpeedRow) -> str:
    """What a step reads, of a dense one's bytes: predictors, gates and norms included."""
    if row.read_share is not None:
        return percent(row.read_share)
    useful = [each.gbs * each.p50_us if each.gbs is not None and each.p50_us is not None else None for each in (row, dense)]
    return "" if useful[0] is None or not useful[1] else percent(useful[0] / useful[1])


GPU_MODELS = ("opt-6.7b", "opt-30b")
PROGRAMS = {"transformers": "transformers, eager", "transformers-compile": "transformers, compiled"}


def gpu_points() -> list[list[SpeedRow]]:
    """Decode rows on a GPU by what was measured together: a command, model, dtype, context and batch. The oldest first."""
    points: dict[tuple[object, ...], list[SpeedRow]] = {}
    for row in rows_of_gpu():
        if row.op == "decode":
            points.setdefault((row.time, row.device, row.model, row.dtype, row.context, row.batch), []).append(row)
    return [rows for rows in points.values() if any(row.dense for row in rows)]


def _ahead(rows: list[SpeedRow]) -> str:
    """How a point's sparse modes looked ahead."""
    return next((row.ahead for row in rows if row.ahead is not None), USUAL_AHEAD)


def _method(rows: list[SpeedRow]) -> str:
    """What selects in a point's sparse modes."""
    return next((row.method for row in rows if row.method is not None), "predicted")


def _way(row: SpeedRow, method: str) -> str:
    """What is not usual about a sparse row."""
    if method != "predicted":
        return f", {method}"
    return "" if row.selection in (None, "uniform") else f", {row.selection}"


def _gpu_cells(row: SpeedRow, dense: SpeedRow) -> list[str]:
    """MLP density, heads, share read, time of a step, tokens/s, times dense: what both tables of decode end with."""
    assert row.p50_us is not None
    own = not row.peer
    return [
        percent(row.mlp_density) if own else "",
        percent(row.head_density) if own else "",
        share(row, dense) if own else "",
        f"{row.p50_us / 1e3:.2f}",
        f"{row.tok_s:.1f}",
        ratio(row, dense),
    ]


def gpu_speed() -> str:
    """Decode of one sequence on a GPU: ours dense and sparse, from the newest run of each model with peers, and each peer from its newest.

    Times our dense are of one run each, at the context of that run's shortest.
    """
    lines, dense_rows = [], []
    for model in GPU_MODELS:
        usual = (model, 1, USUAL_AHEAD, "predicted")
        points = [rows for rows in gpu_points() if (rows[0].model, rows[0].batch, _ahead(rows), _method(rows)) == usual]
        if not points:
            continue
        points.sort(key=lambda rows: (rows[0].time, -rows[0].context))
        own, _ = decodes(max([rows for rows in points if decodes(rows)[1]] or points, key=lambda rows: (rows[0].time, -rows[0].context)))
        dense = next(row for row in own if row.dense)
        others = {row.mode: (row, next(each for each in rows if each.dense)) for rows in points for row in decodes(rows)[1]}
        of_device = {mode: pair for mode, pair in others.items() if (pair[1].device, pair[1].context) == (dense.device, dense.context)}
        for row, beside in (*(of_device[mode] for mode in sorted(of_device)), *((row, dense) for row in own)):
            name = PROGRAMS.get(row.mode, row.mode) if row.peer else f"dejavu {row.mode}"
            speed = ["" if row.nodes is None else str(row.nodes), "" if row.gbs is None else f"{row.gbs:.0f}"]
            ceiling = "" if row.pct_ceiling is None else f"{row.pct_ceiling:.0f} %"
            about = [label(row), row.dtype, str(row.context)]
            lines.append([name, *about, *_gpu_cells(row, beside), *speed, ceiling])
            dense_rows.append(beside)
    header = ["program", "model", "dtype", "context", "MLP density", "heads", "reads", "ms a token", "tokens/s", "times our dense"]
    header += ["graph nodes", "useful GB/s", "of the read ceiling"]
    return markdown(header, lines) + origins(dense_rows) if lines else NOT_MEASURED


def newest_decodes(gpu: str) -> dict[tuple[Any, ...], tuple[SpeedRow, SpeedRow]]:
    """Our decode rows on GPUs of that name, each with the dense row of its run: by model, dtype, context, batch, mode and what is kept.

    The newest of each; of gates and inputs every density is one of its own. Runs that look ahead in another way are not among them.
    """
    newest: dict[tuple[Any, ...], tuple[SpeedRow, SpeedRow]] = {}
    for rows in gpu_points():
        dense, method = next(row for row in rows if row.dense), _method(rows)
        if gpu not in (dense.device or "") or _ahead(rows) != USUAL_AHEAD:
            continue
        for row in decodes(rows)[0]:
            kept = 0.0 if row.dense or method == "predicted" else -round(row.mlp_density or 0.0, 2)
            own = "dejavu dense" if row.dense else f"dejavu {row.mode}{_way(row, method)}"
            newest[label(row, method), row.dtype, row.context, row.batch, own, kept] = row, dense
    order = list(dict.fromkeys(key[:2] for key in newest))
    return {key: newest[key] for key in sorted(newest, key=lambda key: (order.index(key[:2]), key[2:]))}


def gpu_batches(gpu: str) -> str:
    """Decode of planted models on a GPU at every context and batch; times dense are of one run."""
    lines, dense_rows = [], []
    for (model, dtype, context, batch, own, _), (row, dense) in newest_decodes(gpu).items():
        if model.startswith("planted"):
            lines.append([own, model, dtype, str(context), str(batch), percent(row.union_density), *_gpu_cells(row, dense)])
            dense_rows.append(dense)
    header = ["program", "model", "dtype", "context", "batch", "union density", "MLP density", "heads", "reads", "ms a step", "tokens/s"]
    return markdown([*header, "times our dense"], lines) + origins(dense_rows) if lines else NOT_MEASURED


def gpu_kept(gpu: str) -> str:
    """Decode on a GPU where gates or inputs select, which needs no predictors, at each density; times dense are of one run."""
    lines, dense_rows = [], []
    for (model, dtype, context, batch, own, _), (row, dense) in newest_decodes(gpu).items():
        if model.startswith("random") and batch == 1:
            ceiling = "" if row.pct_ceiling is None else f"{row.pct_ceiling:.0f} %"
            kept = percent(row.mlp_density, 0)
            assert row.p50_us is not None
            speed = [f"{row.p50_us / 1e3:.2f}", f"{row.tok_s:.1f}", ratio(row, dense), ceiling]
            lines.append([own, model.removeprefix("random, "), dtype, str(context), kept, share(row, dense), *speed])
            dense_rows.append(dense)
    header = ["program", "shape", "dtype", "context", "keeps", "reads", "ms a token", "tokens/s", "times our dense", "of the read ceiling"]
    return markdown(header, lines) + origins(dense_rows) if lines else NOT_MEASURED


def gpu_prompts() -> str:
    """Prompts and whole requests on a GPU beside transformers, from the newest run of each model and way that transformers ran."""
    runs: dict[tuple[str, str], dict[tuple[str, int, int | None], dict[str, SpeedRow]]] = {}
    for row in rows_of_gpu():
        if row.op in ("prefill", "request") and row.batch == 1:
            runs.setdefault((row.model, row.time or ""), {}).setdefault((row.op, row.context, row.new_tokens), {})[row.mode] = row
    newest = {
        (model, peer): points
        for (model, _), points in sorted(runs.items())
        for peer in PROGRAMS
        if all(peer in modes for modes in points.values())
    }
    lines, dense_rows = [], []
    for (_, peer), points in newest.items():
        for (op, context, new_tokens), modes in points.items():
            what = f"prompt of {context}" if op == "prefill" else f"prompt of {context}, answer of {new_tokens}"
            for mode in (peer, "dense", *(("sparse", "sparse+heads") if op == "request" else ())):
                row = modes.get(mode)
                if row is None:
                    continue
                assert row.p50_us is not None
                name = PROGRAMS[mode] if row.peer else f"dejavu {mode}"
                speed = [f"{row.p50_us / 1e3:.1f}", f"{row.tok_s:.0f}", ratio(row, modes[peer])]
                lines.append([name, label(row), row.dtype, what, *speed])
                dense_rows.append(modes["dense"])
    header = ["program", "model", "dtype", "tokens", "ms", "tokens/s", "times transformers"]
    return markdown(header, lines) + origins(dense_rows) if lines else NOT_MEASURED


def gpu_serving() -> str:
    """What clients of `dejavu serve` on a GPU wait for, the newest run of each number of clients: results/serve.jsonl."""
    newest = {(row.model, row.concurrency or 0, row.mode): row for row in read_rows(SERVE, ServeRow) if row.device_kind == "gpu"}
    lines, shown = [], []
    for model, clients, mode in sorted(newest, key=lambda key: (key[0], key[1], key[2] != "dense")):
        row = newest[model, clients, mode]
        waits = [f"{value:.0f}" for value in (row.ttft_p50_ms, row.ttft_p99_ms) if value is not None]
        about = [f"dejavu {mode}", model, row.dtype, str(clients), f"{row.prompt_mix}, {row.output_mix}".replace(":1", "")]
        lines.append([*about, percent(row.union_density, 0), f"{row.tok_s:.0f}", *waits, f"{row.tpot_p50_ms:.1f}"])
        shown.append(row)
    header = ["program", "model", "dtype", "clients", "tokens of prompt, answer", "union density", "tokens/s"]
    header += ["first token, ms, median", "99th percentile", "ms a further token"]
    return markdown(header, lines) + origins(shown) if lines else NOT_MEASURED


def gpu_ahead() -> str:
    """Where the next selection is computed: the newest of each way, for what was measured in more than one."""
    ways: dict[tuple[object, ...], dict[str, list[SpeedRow]]] = {}
    for rows in gpu_points():
        first = rows[0]
        ways.setdefault((label(first, _method(rows)), first.dtype, first.device, first.context, first.batch), {})[_ahead(rows)] = rows
    lines, dense_rows = [], []
    for found in ways.values():
        for ahead, rows in found.items() if len(found) > 1 else ():
            own, _ = decodes(rows)
            dense = next(row for row in own if row.dense)
            for row in own:
                if row is not dense:
                    about = [label(row, _method(rows)), row.dtype, str(row.context), "sparse+heads" if row.sparse_heads else "sparse"]
                    lines.append([ahead, *about, *_gpu_cells(row, dense), "" if row.nodes is None else str(row.nodes)])
            dense_rows.append(dense)
    header = ["selected", "model", "dtype", "context", "mode", "MLP density", "heads", "reads", "ms a token", "tokens/s", "times our dense"]
    return markdown([*header, "graph nodes"], lines) + origins(dense_rows) if lines else NOT_MEASURED


def gpu_ops() -> str:
    """Single kernels on a GPU, of the newest run of each model, batch and context: densities in rows, selections side by side."""
    runs: dict[tuple[object, ...], list[SpeedRow]] = {}
    for row in rows_of_gpu():
        if row.op in ("mlp", "head"):
            runs.setdefault((row.time, row.model, row.dtype, row.device, row.batch, row.context), []).append(row)
    newest = {key[1:]: rows for key, rows in runs.items()}
    lines, dense_rows = [], []
    for rows in newest.values():
        points: dict[tuple[str, str, float | None], dict[str | None, SpeedRow]] = {}
        for row in rows:
            points.setdefault((row.op, row.mode, row.mlp_density), {})[row.selection] = row
        for (op, mode, density), found in points.items():
            first = next(iter(found.values()))
            cells = [_op_cell(found.get(None) or found.get("uniform")), *(_op_cell(found.get(name)) for name in ("clustered", "hot-set"))]
            lines.append([f"{op}, {mode}", label(first, _method(rows)), first.dtype, str(first.batch), percent(density, 0), *cells])
        dense_rows.append(rows[0])
    header = ["op", "model", "dtype", "batch", "density", "µs, GB/s, of the read ceiling", "clustered", "hot-set"]
    return markdown(header, lines) + origins(dense_rows) if lines else NOT_MEASURED


def _op_cell(row: SpeedRow | None) -> str:
    return "" if row is None else f"{row.p50_us:.1f}, {row.gbs:.0f}, {row.pct_ceiling:.0f} %"
