"""The paper's whole road on one model: load, profile, train, eval, its tasks, generate, a request to a server; time and memory of each.

    python recipes/gpu_road.py facebook/opt-6.7b -o runs/road --text 'train/*.txt' --eval-text wikitext.txt
    python recipes/gpu_road.py planted-folder -o runs/road
    python recipes/gpu_road.py opt-30b -o runs/road

In: a hub id that is on this machine, a folder, or the name of a shape (`bench --synthetic`), which is made up on the device. Without --text
the model is trained and judged on what it writes itself at temperature 1. Out: in the run folder the adapter, what each step measured, and
MODEL-DEVICE.json, the row for results/community/ (road_rows.py), with the paper's claims beside what was measured.

It needs nobody: a step that fails is reported and the next one runs; the same command again goes on after what is done, in the middle of a
training too, and tries again what failed. Exit status 1 where a step failed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import re
import shutil
import statistics
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import dejavu
from dejavu.bench.models.folder import MADE_UP_KEY
from dejavu.bench.models.made_up import made_up, made_up_checkpoint
from dejavu.bench.models.random import SHAPES
from dejavu.bench.rows import completed, device_facts
from dejavu.config import require
from dejavu.engine.backends import pick_backend
from dejavu.engine.options import EngineOptions
from dejavu.files import make_folder, read_object, read_text, write_json, write_text
from dejavu.language_model import LanguageModel
from dejavu.model.adapter import Adapter
from dejavu.model.texts import named_texts
from dejavu.offline.adapt.own_text import continued, rows_at_once
from road_rows import Claim, RoadRow, Step, read_road, without_folders

PAPER_TASKS = ("cb", "copa", "lambada_openai", "openbookqa", "piqa", "rte", "winogrande")  # of its section 5
WARM_UP, TURNS = 16, 3
PROMPT_TOKENS, PROMPT_CHARACTERS = 32, 400
BROKEN = "\ufffd"  # where a model wrote bytes that are no character


class NotHereError(Exception):
    """What a step needs is not here."""


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--text", action="append", help="to train on: a file or a quoted glob; may repeat")
    parser.add_argument("--eval-text", action="append", help="to judge on, of --text")
    parser.add_argument("--harness", nargs="*", default=None, help="tasks of lm-evaluation-harness, or none (default: the paper's)")
    parser.add_argument("--limit", type=int, help="items of a task (default: all)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", default="auto", help="of a made-up model fp16 where nothing is said")
    parser.add_argument("--density", type=float, help="that is planted in a shape")
    parser.add_argument("--layers", type=int, help="of a shape the first ones alone")
    parser.add_argument("--method", help="of `dejavu train` (default: predicted where activations are zero, else auto)")
    parser.add_argument("--budget", type=float, default=0.005)
    parser.add_argument("--rank", type=int, help="of the predictors (default: of `dejavu train`)")
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--work-memory", type=float, help="GB of a layer's activations that the GPU holds at most")
    parser.add_argument("--profile-tokens", type=int, default=60_000)
    parser.add_argument("--train-tokens", type=int, default=200_000)
    parser.add_argument("--eval-tokens", type=int, default=100_000)
    parser.add_argument("--piece", type=int, default=128, help="tokens of a text that the model writes; they are laid end to end")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    require((given.text is None) == (given.eval_text is None), "--text and --eval-text belong together: give both, or neither")
    return given


def host_peak() -> float | None:
    """The most memory in 1e9 bytes that the process has held since `forget_peaks`; None where the system does not tell."""
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return None if match is None else int(match[1]) * 1024 / 1e9


def forget_peaks() -> None:
    """Peaks are of what comes now. Where the system does not let its own go, that of the host is of the process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


class Road:
    """One run: its folder, its model once loaded, and what the steps found."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.folder = given, given.output
        self.made_up = given.model in SHAPES and not Path(given.model).exists()
        self.found: dict[str, dict[str, Any]] = {}
        self.steps: dict[str, Step] = {}
        self.lm: LanguageModel | None = None
        make_folder(self.folder)
        settings = {name: value if isinstance(value, int | float | list | None) else str(value) for name, value in vars(given).items()}
        settings.pop("output")
        kept = self.folder / "settings.json"
        require(not kept.exists() or read_object(kept) == settings, f"{self.folder} is of a run with other options; choose another folder")
        write_json(kept, settings)

    @property
    def model(self) -> LanguageModel:
        if self.lm is None:
            raise NotHereError("the model is not loaded")
        return self.lm

    @property
    def method(self) -> Any:  # one of train_config.METHODS, or auto, which training checks
        return self.given.method or ("predicted" if self.model.config.has_exact_zeros else "auto")

    @property
    def adapter_folder(self) -> Path:
        return self.folder / "adapter"

    def adapter(self) -> Adapter:
        if not (self.adapter_folder / "config.json").exists():
            raise NotHereError("there is no adapter")
        adapter = Adapter.load(self.adapter_folder, model=self.model.config, base_hash=self.model.base_hash)
        if not any(layer.sparse for layer in adapter.layers):
            raise NotHereError("the adapter selects in no layer: nothing kept the budget")
        return adapter

    def step(self, name: str, work: Callable[[], dict[str, Any]], *, again: bool = False) -> None:
        """Do it, unless an earlier run has; keep what it found. again: each run needs it."""
        kept = self.folder / f"{name}.json"
        if kept.exists() and not again:
            held = read_object(kept)
            self.steps[name], self.found[name] = held["step"], held["found"]
            print(f"{name}: done before, {self.steps[name]['seconds']:.1f} s", flush=True)
            return
        begun = self.folder / f"{name}.begun"  # a line for each run that began it
        runs = 1
        if not again:
            with begun.open("a", encoding="utf-8") as file:
                file.write("begun\n")
            runs = len(begun.read_text(encoding="utf-8").splitlines())
        forget_peaks()
        started, found, state, why = time.perf_counter(), {}, "done", None
        try:
            found = work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except NotHereError as error:
            state, why = "left out", str(error)
        except Exception as error:  # whatever it is, the other steps are worth having
            state, why = "failed", f"{type(error).__name__}: {error}"
            with (self.folder / "errors.txt").open("a", encoding="utf-8") as file:
                file.write(f"{name}\n{traceback.format_exc()}\n")
            gc.collect()  # what its frames held
        done = state == "done"
        gpu = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
        step: dict[str, Any] = {"state": state, "seconds": time.perf_counter() - started if done else None}
        step |= {"gpu_gb": gpu if done else None, "host_gb": host_peak() if done else None}
        step |= {} if why is None else {"why": without_folders(why)}
        step |= {"runs": runs} if done and runs > 1 else {}
        if state != "done":
            begun.unlink(missing_ok=True)  # it starts anew
        self.steps[name], self.found[name] = step, found  # pyrefly: ignore[unsupported-operation]
        if done:
            write_json(kept, {"step": step, "found": found})
        print(line_of(name, self.steps[name]), flush=True)

    # Steps

    def load(self) -> dict[str, Any]:
        given = self.given
        if self.made_up:
            backend = pick_backend(given.backend, dtype="fp32" if given.dtype == "auto" else given.dtype)
            require(backend != "native", "a made-up model runs on backend cuda or torch; give one with --backend")
            dtype = ("fp16" if backend == "cuda" else "fp32") if given.dtype == "auto" else given.dtype
            asked = made_up(given.model, dtype=dtype, density=given.density, num_layers=given.layers)
            device = "cuda" if backend == "cuda" else "cpu"
            checkpoint = made_up_checkpoint(asked, device=device, seed=given.seed)
            lm = LanguageModel(checkpoint, EngineOptions(backend=backend))
        else:
            lm = dejavu.load(given.model, backend=given.backend, dtype=given.dtype, adapter=None)
        self.lm = lm
        return {
            "model": lm.name, "base_hash": lm.base_hash, "layers": lm.config.num_layers, "parameters": lm.model.num_parameters,
            "backend": lm.backend, "dtype": lm.dtype, "notes": list(lm.notes),
        }  # fmt: skip

    def text(self) -> dict[str, Any]:
        """What the model writes itself, where no text is given."""
        if self.given.text is not None:
            raise NotHereError("files are given")
        for part, tokens, seed in (("train", self.given.train_tokens, 1), ("eval", self.given.eval_tokens, 2)):
            write_text(self.folder / f"{part}.txt", self._written(round(1.02 * tokens), self.given.seed * 1009 + seed))
        return {}

    def _written(self, tokens: int, seed: int) -> str:
        lm, piece = self.model, min(self.given.piece, self.model.config.max_positions - 1)
        starts = [token for token in (lm.tokenizer.bos_token_id, *lm.tokenizer.eos_token_ids) if token is not None]
        require(bool(starts), "the tokenizer has no token that a text begins with; give files with --text and --eval-text")
        generator = torch.Generator(lm.model.device).manual_seed(seed)
        texts: list[str] = []
        while len(texts) * piece < tokens:
            rows = min(rows_at_once(lm.model, piece + 1, 1), -(-tokens // piece) - len(texts))
            prompt_BP = torch.full((rows, 1), starts[0])
            ids = continued(lm.model, prompt_BP, new_tokens=piece, generator=generator, compiled=False)
            texts += [lm.tokenizer.decode(row[1:]) for row in ids.tolist()]
        return "".join(letter for letter in "".join(texts) if letter.isprintable() and letter != BROKEN)

    def texts(self) -> tuple[dict[str, str], dict[str, str]]:
        """To train on, and to judge on."""
        if self.given.text is not None:
            return named_texts(self.given.text), named_texts(self.given.eval_text)
        paths = self.folder / "train.txt", self.folder / "eval.txt"
        if not all(path.exists() for path in paths):
            raise NotHereError("there is no text")
        train, held_out = map(read_text, paths)
        return {"its own": train}, {"its own": held_out}

    def profile(self) -> dict[str, Any]:
        texts, _ = self.texts()
        found = self.model.profile(texts, max_tokens=max(1, self.given.profile_tokens // len(texts)))
        layers = found["layers"]
        means = {key: statistics.fmean(layer[key] for layer in layers) for key in ("mlp_density", "cosine", "heads90")}
        return {
            "natural_density": means["mlp_density"],
            "cosine": means["cosine"],
            "heads90": means["heads90"],
            "profile_tokens": found["tokens"],
        }

    def train(self) -> dict[str, Any]:
        given, (texts, _) = self.given, self.texts()
        adapter, measured = self.model.train_measured(
            list(texts.values()), method=self.method, budget=given.budget, rank=given.rank, epochs=given.epochs,
            max_tokens=given.train_tokens, seed=given.seed, work_folder=self.folder / "adapter.partial", work_memory=given.work_memory,
            progress=said(),
        )  # fmt: skip
        if adapter is None:
            raise NotHereError(measured.get("why", "no method keeps the budget"))
        adapter.save(self.adapter_folder)
        shutil.rmtree(self.folder / "adapter.partial", ignore_errors=True)
        recalls = [layer["recall"] for layer in measured["layers"] if layer["recall"] is not None]
        return {
            "train_tokens": measured["tokens"], "train_rise": measured["rise"], "within_budget": measured["within_budget"],
            "recall": statistics.fmean(recalls) if recalls else None,
        }  # fmt: skip

    def evaluate(self) -> dict[str, Any]:
        _, texts = self.texts()
        found: Any = self.model.evaluate(texts=texts, max_tokens=self.given.eval_tokens, adapter=self.adapter())
        tokens = sum(score["tokens"] for score in found["dense"]["texts"].values())
        densities = {key: found["sparse"][key] for key in ("mlp_density", "head_density")}
        ppl = {f"ppl_{side}": found[side]["ppl"] for side in ("dense", "sparse")}
        return {"eval_tokens": tokens, "rise": found["rise"]} | densities | ppl

    def tasks(self) -> dict[str, Any]:
        given = self.given
        if given.harness is None and self.made_up:
            raise NotHereError("weights are made up")
        if given.harness == []:
            raise NotHereError("none was asked for")
        if importlib.util.find_spec("lm_eval") is None:
            raise NotHereError("lm-evaluation-harness is not here: pip install 'dejavu-llm[eval]'")
        os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"  # before they are imported: what is on disk, and no network
        from dejavu.harness import harness_results

        lm, found, absent = self.model, {}, []
        lm.adapter = self.adapter()
        for task in PAPER_TASKS if given.harness is None else given.harness:
            try:
                sides = harness_results(lm, [task], limit=given.limit)
            except (OSError, ValueError) as error:
                absent.append(task)
                print(f"tasks: {task} is not here: {without_folders(str(error))[:120]}")
                continue
            for side, tables in sides.items():
                for name, metrics in (tables or {}).items():
                    found[f"{name} {side}"] = metrics
        if not found:
            raise NotHereError(f"not on this machine: {', '.join(absent)}")
        return {"tasks": found}

    def generate(self) -> dict[str, Any]:
        """Tokens a second, dense and sparse in turns."""
        lm, adapter, prompt = self.model, self.adapter(), self._prompt()
        speeds: dict[str, list[float]] = {"dense": [], "sparse": []}
        for turn in range(TURNS + 1):
            for side, kept in speeds.items():
                text = lm.generate(
                    prompt, max_new_tokens=self.given.new_tokens if turn else WARM_UP, temperature=0.0, ignore_eos=True,
                    adapter=adapter, dense=side == "dense",
                )  # fmt: skip
                if turn and text.tok_s is not None:
                    kept.append(text.tok_s)
        return {f"tok_s_{side}": statistics.median(kept) for side, kept in speeds.items()}

    def _prompt(self) -> str:
        _, texts = self.texts()
        tokenizer = self.model.tokenizer
        return tokenizer.decode(tokenizer.encode_plain(next(iter(texts.values()))[:PROMPT_CHARACTERS])[:PROMPT_TOKENS])

    def serve(self) -> dict[str, Any]:
        """One request, from a client's side."""
        for name in ("fastapi", "uvicorn"):
            if importlib.util.find_spec(name) is None:
                raise NotHereError(f"{name} is not here: pip install 'dejavu-llm[serve]'")
        lm, prompt = self.model, self._prompt()
        lm.adapter = self.adapter()
        with serving(lm) as (url, model):
            body = {"model": model, "prompt": prompt, "max_tokens": self.given.new_tokens, "temperature": 0}
            asked = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
            started = time.perf_counter()
            with urllib.request.urlopen(asked, timeout=600) as answer:
                found = json.loads(answer.read())
            seconds = time.perf_counter() - started
        require(bool(found["choices"][0]["text"]), "the server answered with no text")
        return {"request_s": seconds}

    # All of it

    def run(self) -> int:
        self.step("load", self.load, again=True)
        for name, work in (
            ("text", self.text), ("profile", self.profile), ("train", self.train), ("eval", self.evaluate), ("tasks", self.tasks),
            ("generate", self.generate), ("serve", self.serve),
        ):  # fmt: skip
            self.step(name, work)
        failed = [name for name, step in self.steps.items() if step["state"] == "failed"]
        if self.lm is not None:
            path = self._write_row()
            print(f"Row: {path}; for results/community/, if the model or the machine is new there")
        if failed:
            print(f"Failed: {', '.join(failed)}; see {self.folder / 'errors.txt'}, and run the same command again to try them again")
        return int(bool(failed))

    def _shape(self) -> str | None:
        """Of made-up weights, whose folder says so where `dejavu plant` wrote it."""
        config = Path(self.given.model) / "config.json"
        return self.given.model if self.made_up else read_object(config).get(MADE_UP_KEY) if config.exists() else None

    def _write_row(self) -> Path:
        about = self.found["load"]
        found = {key: value for name, part in self.found.items() if name != "load" for key, value in part.items()}
        listed = claims(found)
        text = "its own, written at temperature 1" if self.given.text is None else ", ".join(Path(name).name for name in self.texts()[1])
        result = {
            "shape": self._shape(), "layers": about["layers"], "parameters": about["parameters"],
            "backend": about["backend"], "dtype": about["dtype"], "method": self.method, "budget": self.given.budget, "text": text,
            "steps": self.steps, "found": found, "claims": listed,
        }  # fmt: skip
        [row] = completed([RoadRow(**device_facts(cuda=about["backend"] == "cuda"), model=about["model"], result=result)])
        path = self.folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', f'{row.model} {row.device}').strip('-').lower()}.json"
        write_json(path, row.to_dict())
        read_road(path)
        print()
        for claim in listed:
            print(f"{claim['what']}\n    paper: {claim['paper']}\n    here:  {claim['measured'] or 'not measured'}")
        return path


def line_of(name: str, step: Mapping[str, Any]) -> str:
    """A step in a line."""
    if step["state"] != "done":
        return f"{name}: {step['state']}: {step.get('why', '')}"
    memory = [f"{step[key]:.1f} GB {where}" for key, where in (("gpu_gb", "GPU"), ("host_gb", "host")) if step[key] is not None]
    last = f" (the last of {step['runs']} runs)" if "runs" in step else ""
    return f"{name}: {step['seconds']:.1f} s{last}, at most {', '.join(memory) or 'memory unknown'}"


def said() -> Callable[[str, int, int], None]:
    """Progress as a line whenever a stage begins."""
    begun: set[str] = set()

    def progress(what: str, done: int, total: int) -> None:
        if what not in begun:
            begun.add(what)
            print(f"  {what}", flush=True)

    return progress


def claims(found: Mapping[str, Any]) -> list[Claim]:
    """The paper's claims beside what was measured."""

    def of(words: str, *keys: str) -> str | None:
        return words.format(**found) if all(found.get(key) is not None for key in keys) else None

    speedup = found["tok_s_sparse"] / found["tok_s_dense"] if {"tok_s_sparse", "tok_s_dense"} <= set(found) else None
    rows = (
        ("Neurons that fire for a token", "up to 95 % of OPT-175B's are left out", of("{natural_density:.1%} fire", "natural_density")),
        ("Neurons that are selected", "5 % of OPT-175B's", of("{mlp_density:.1%}, all layers counted", "mlp_density")),
        ("Heads that are selected", "20 % of OPT-175B's", of("{head_density:.1%}, all layers counted", "head_density")),
        ("Cosine of the residual stream before and after a layer", "above 0.95", of("{cosine:.3f}", "cosine")),
        ("Quality", "no loss", of("perplexity {ppl_dense:.3f} dense, {ppl_sparse:.3f} sparse ({rise:+.2%})", "rise", "ppl_dense")),
        (
            "Time of decoding",
            "2 times FasterTransformer, 6 times Hugging Face (OPT-175B, 8 A100)",
            None if speedup is None else f"{speedup:.2f} times our own dense engine, at {found['tok_s_sparse']:.1f} tokens/s",
        ),
    )
    return [{"what": what, "paper": paper, "measured": measured} for what, paper, measured in rows]


@contextmanager
def serving(lm: LanguageModel) -> Generator[tuple[str, str]]:
    """A server of the model in a thread: its address, and the model's name there."""
    from dejavu.serve.api.app import create_app
    from dejavu.serve.api.requests import served_by
    from dejavu.serve.api.server import bound_socket, new_server, url_of
    from dejavu.serve.config import ServeConfig
    from dejavu.serve.core.worker import Worker

    config = ServeConfig(slots=1)
    worker = Worker(lm, config)
    worker.start()
    begun = threading.Event()
    try:
        served = served_by(lm.tokenizer, worker.state(), queue=config.queue, threads=lm.num_threads)
        with bound_socket("127.0.0.1", 0) as bound:
            server = new_server(create_app(served, worker), on_start=begun.set)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
            thread.start()
            require(begun.wait(60), "the server did not begin within a minute")
            try:
                yield url_of(bound), served.name
            finally:
                server.should_exit = True
                thread.join(30)
    finally:
        worker.close()


def main() -> int:
    road = Road(options())
    try:
        return road.run()
    except KeyboardInterrupt:
        print(f"Interrupted: what is finished is kept in {road.folder}; run the same command again to go on")
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
