"""`dejavu adapt`: distil a model into itself with predictors in the loop, so that it becomes contextually sparse."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dejavu.cli.options import AsJson, Download, Model, Offline, Seed, Texts, Threads, open_model
from dejavu.cli.output import Output, new_table, number, percent, plain, progress_bars, resumable
from dejavu.engine.options import EngineOptions

if TYPE_CHECKING:
    from dejavu.offline.adapt.training import StepReport

DEFAULT_MINUTES = 20.0
RATE_AFTER_START = 5e-4  # a trained adapter loses more to a rate of 1.5e-3 than 26 M tokens give back (docs/log.md)
MEASURED_FILE = "adapt.json"


def adapt(
    model: Model,
    text: Texts,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The adapter folder to write.")],
    density: Annotated[float, typer.Option("--density", metavar="X", help="Mean share of the neurons selected.")] = 0.15,
    minutes: Annotated[
        float | None, typer.Option("--minutes", metavar="X", help="How long to train (20 where --steps is not given either).")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", help="How many steps to train.")] = None,
    pause: Annotated[
        float | None, typer.Option("--pause", metavar="X", help="Stop after X minutes of this run; the same command goes on.")
    ] = None,
    activation: Annotated[
        str | None, typer.Option("--activation", metavar="NAME", help="Give the MLPs relu or relu2 and select by its zeros.")
    ] = None,
    rank: Annotated[int, typer.Option("--rank", metavar="N", help="Rank of the predictors.")] = 64,
    lora_rank: Annotated[int, typer.Option("--lora-rank", metavar="N", help="Rank of the changes of weights.")] = 32,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", metavar="X", help="Peak learning rate (default: 0.0016; with --start 0.0005).")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Windows of a step, over all processes.")] = 64,
    micro_batch: Annotated[
        int | None, typer.Option("--micro-batch", metavar="N", help="Windows that a process computes at a time (default: by memory).")
    ] = None,
    checkpoint_layers: Annotated[
        str, typer.Option("--checkpoint-layers", metavar="NAME", help="Compute layers again in backward: on, off or auto (by memory).")
    ] = "auto",
    length: Annotated[int | None, typer.Option("--length", metavar="N", help="Tokens of a window (default: 1024, or the context).")] = None,
    lookahead_cosine: Annotated[
        float, typer.Option("--lookahead-cosine", metavar="X", help="Look ahead where attention keeps this cosine of the stream.")
    ] = 0.9,
    prompt_share: Annotated[
        float, typer.Option("--prompt-share", metavar="X", help="Share of windows whose first part runs dense, as a prompt.")
    ] = 0.25,
    chat_share: Annotated[
        float, typer.Option("--chat-share", metavar="X", help="Share of windows that the dense model writes itself.")
    ] = 0.0,
    chat_tokens: Annotated[int, typer.Option("--chat-tokens", metavar="N", help="Tokens that it writes.")] = 2_000_000,
    start: Annotated[
        Path | None, typer.Option("--start", metavar="DIR", help="An adapter that adapt wrote, to go on from; the density is then held.")
    ] = None,
    own_share: Annotated[
        float, typer.Option("--own-share", metavar="X", help="Share of windows that the sparse model writes itself while it trains.")
    ] = 0.0,
    own_rows: Annotated[int, typer.Option("--own-rows", metavar="N", help="Answers that it writes at a time.")] = 1024,
    own_tokens: Annotated[int, typer.Option("--own-tokens", metavar="N", help="Tokens of an answer at most.")] = 256,
    short_length: Annotated[
        int | None, typer.Option("--short-length", metavar="N", help="Tokens of the windows that it writes, each from a prompt on.")
    ] = None,
    short_share: Annotated[
        float, typer.Option("--short-share", metavar="X", help="Share of the other windows that are cut into such short ones.")
    ] = 0.0,
    price: Annotated[
        float, typer.Option("--price", metavar="X", help="Of density, in nats, to begin with; a run that goes on had settled at more.")
    ] = 0.02,
    rounded: Annotated[
        str | None, typer.Option("--rounded", metavar="NAME", help="Train with weights rounded as an engine's of int8 or int4 are.")
    ] = None,
    divergence: Annotated[
        str, typer.Option("--divergence", metavar="NAME", help="What is minimised on its own text: js, forward or reverse.")
    ] = "js",
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", metavar="NAME", help="auto (bf16 on cuda, else fp32), fp32 or bf16.")] = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    download: Download = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Distil a model into itself with predictors in the loop; writes an adapter. Resumes; runs under torchrun on several GPUs."""
    from dejavu.config import require
    from dejavu.files import absolute, check_replaceable, new_folder, write_json
    from dejavu.model.adapter import Adapter, write_adapter
    from dejavu.model.texts import corpus_hash, documents, named_texts
    from dejavu.offline.adapt.ranks import joined_ranks
    from dejavu.offline.adapt.run import LOG_FILE
    from dejavu.offline.adapt.run import adapt as run_adapt
    from dejavu.offline.adapt.training import AdaptConfig

    device = _device(device)
    options: dict[str, Any] = {"density": density, "rank": rank, "lora_rank": lora_rank, "lookahead_cosine": lookahead_cosine}
    options |= {"steps": steps, "minutes": DEFAULT_MINUTES if steps is None and minutes is None else minutes, "batch": batch, "seed": seed}
    rate = RATE_AFTER_START if learning_rate is None and start is not None else learning_rate
    options |= {"micro_batch": micro_batch} | ({} if rate is None else {"learning_rate": rate})
    known = {"auto": None, "on": True, "off": False}
    require(checkpoint_layers in known, f"--checkpoint-layers takes auto, on or off, not {checkpoint_layers!r}")
    options |= {"checkpoint_layers": known[checkpoint_layers], "prompt_share": prompt_share, "chat_share": chat_share}
    options |= {"own_share": own_share, "own_rows": own_rows, "own_tokens": own_tokens, "divergence": divergence}
    options |= {"short_length": short_length, "short_share": short_share, "price": price, "rounded": rounded}
    options["activation"] = activation
    if start is not None:
        options["first_density"] = density
    options["dtype"] = ("bf16" if device == "cuda" else "fp32") if dtype == "auto" else dtype
    AdaptConfig.from_dict({**options, "length": length or 1024})  # an impossible value is said before a model is loaded
    require(pause is None or pause > 0, f"--pause takes a positive number of minutes, not {pause}")
    require(chat_tokens >= 1, f"--chat-tokens must be at least 1, not {chat_tokens}")
    target = absolute(output)
    work = target.with_name(f"{target.name}.partial")
    check_replaceable(target)
    check_replaceable(work)
    with joined_ranks(device) as place:
        out = Output(as_json) if place == 0 else _Silent()
        texts = list(named_texts(text).values())
        lm = open_model(
            model, out, EngineOptions(backend="torch", dtype="stored", threads=threads), seed=seed, needs_adapter=False,
            download=download, offline=offline,
        )  # fmt: skip
        begun = None if start is None else Adapter.load(start, model=lm.config, base_hash=lm.base_hash)
        config = AdaptConfig.from_dict({**options, "length": length or min(1024, lm.config.max_positions)})
        kept = f"the state is kept in {work}; run the same command again to go on, with another --micro-batch if need be"
        with resumable(kept), _stopping(pause) as stop, progress_bars(place == 0) as progress:
            found = run_adapt(
                lm.checkpoint, [part for whole in texts for part in documents(whole)], config, text_hash=corpus_hash(texts), folder=work,
                device=device, chat_tokens=chat_tokens, start=begun, stop=stop, progress=progress,
                report=None if progress is None else lambda made: progress(f"training\t{line(made)}", round(100 * made.fraction), 100),
            )  # fmt: skip
            if found is None and stop.interrupted:
                raise KeyboardInterrupt
        if place != 0:
            return
        if found is None:
            out.say(f"Paused; {kept}")
            out.finish({"paused": True, "model": lm.name})
            return
        adapter, measured = found
        with new_folder(target) as folder:
            write_adapter(adapter, folder)
            write_json(folder / MEASURED_FILE, plain(measured))
            if (work / LOG_FILE).exists():
                shutil.copyfile(work / LOG_FILE, folder / LOG_FILE)
        shutil.rmtree(work, ignore_errors=True)
        show(out, measured)
        out.say(f"Adapter: {target}\nUse it:  dejavu generate {model} --adapter {output} --prompt ...")
        out.finish(
            measured | {"paused": False, "adapter": str(target), "model": lm.name, "dtype": options["dtype"], "notes": list(lm.notes)}
        )


class _Silent(Output):
    """The output of a process that is not the first: none."""

    def __init__(self) -> None:
        super().__init__(as_json=True)

    def finish(self, result: dict[str, Any]) -> None:
        pass


def _device(name: str) -> str:
    import torch

    from dejavu.config import require

    require(name in ("auto", "cpu", "cuda"), f"device {name!r} is not known; choose auto, cpu or cuda")
    available = torch.cuda.is_available()
    require(name != "cuda" or available, "device 'cuda' is not available: PyTorch sees no NVIDIA GPU; choose cpu")
    return "cuda" if available and name == "auto" else "cpu" if name == "auto" else name


class _Stop:
    """Whether to stop after the step at hand: ^C came, or the time of this run is over."""

    def __init__(self, pause: float | None) -> None:
        self.interrupted = False
        self.end = None if pause is None else time.monotonic() + 60 * pause

    def __call__(self) -> bool:
        return self.interrupted or (self.end is not None and time.monotonic() > self.end)


@contextmanager
def _stopping(pause: float | None) -> Generator[_Stop]:
    """Within, the first ^C ends training after the step at hand, so that what is saved is whole; a second one ends at once."""
    stop = _Stop(pause)
    usual = signal.getsignal(signal.SIGINT)

    def interrupt(number: int, frame: Any) -> None:
        if stop.interrupted:
            raise KeyboardInterrupt
        stop.interrupted = True

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, usual)


def line(made: StepReport) -> str:
    """One step in words."""
    left = "" if made.seconds_left is None else f" · {made.seconds_left / 60:,.1f} min left"
    densities = f"density {made.density:.3f} (target {made.target:.3f})"
    own = "" if made.own is None else f" · its own {made.own:.4f}"
    speed = f"{made.tokens_per_second:,.0f} tokens/s{_memory(made.gpu_bytes)} · {_sizes(made.micro_batch, made.checkpoint_layers)}"
    return f"step {made.step:,} · KL {made.kl:.4f}{own} · {densities} · {speed}{left}"


def _memory(gpu_bytes: int | None) -> str:
    return "" if gpu_bytes is None else f" · {gpu_bytes / 1e9:.1f} GB of GPU memory"


def _sizes(micro_batch: int, checkpoint_layers: bool) -> str:
    return f"{micro_batch} windows at a time{', layers checkpointed' if checkpoint_layers else ''}"


def show(out: Output, measured: dict[str, Any]) -> None:
    """The table of layers and the summary."""
    table = new_table("Adapted layers on held-out text", "layer", "MLP density", "mass", "lookahead", "cosine")
    for index, layer in enumerate(measured["layers"]):
        lookahead = "" if layer["lookahead"] is None else str(layer["lookahead"])
        row = (number(layer["density"]), percent(layer["mass"]), lookahead, number(layer["cosine"]))
        table.add_row(str(index), *row)
    out.show(table)
    rise = f"[bold]{measured['rise']:+.2%}[/bold], KL [bold]{measured['kl']:.4f}[/bold]"
    out.show(f"perplexity {measured['ppl_dense']:.3f} dense, {measured['ppl_sparse']:.3f} sparse: {rise}")
    out.show(f"perplexity with all neurons of the changed weights: {measured['ppl_unmasked']:.3f}")
    trained = f"{measured['steps']:,} steps · {measured['tokens']:,} tokens · {measured['training_seconds']:,.0f} s"
    trained += f" · {_sizes(measured['micro_batch'], measured['checkpoint_layers'])}{_memory(measured['gpu_bytes'])}"
    out.show(f"MLP density [bold]{measured['mlp_density']:.3f}[/bold] over all layers · {trained}")
