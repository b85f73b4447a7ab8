"""Damaged files of every kind, seeded, and what becomes of them: a refusal in one line that names the file, or a text.

In: a folder of samples (`write_samples`), a kind and a seed. Out: "refused" or "loaded"; anything else is an exception, and in a child
process (`Child`) also a panic, a signal, more than 20 seconds or more than 2 GB of memory.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import multiprocessing
import random
import shutil
import struct
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend

from dejavu.damage import LFS
from dejavu.files import write_json
from dejavu.loading import load
from dejavu.model.bundle import export
from dejavu.model.checkpoint import load_checkpoint
from dejavu.model.families import FAMILIES, parameter_shapes
from dejavu.model.fingerprint import model_hash
from dejavu.model.gguf import header
from dejavu.model.lora import LoraConfig, linear_shapes, quantized_lora
from dejavu.model.source import read_config
from dejavu.model.tokenizer import Tokenizer
from dejavu.model.transformer import Transformer
from dejavu.offline.adapt.run import adapt
from dejavu.offline.adapt.training import AdaptConfig
from helpers.adapters import changing_weights, make_adapter, without_predictors
from helpers.gguf_files import write_gguf

KINDS = ("safetensors", "configs", "adapters", "gguf", "tokenizers", "bin", "state")
SECONDS, MEMORY = 20, 2 << 30  # of one case
HANDLED = (ValueError, OSError, MemoryError)  # what the command line turns into exit status 2 and one line
TEXT = "the cat sat on the mat and the dog lay on the log. " * 60
STATE = AdaptConfig(density=0.3, rank=4, lora_rank=2, steps=4, batch=2, micro_batch=2, length=32, warmup=1, lookahead_cosine=0.0)
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 1 << 31, 1 << 63, 1 << 64, -(1 << 63), 10**400, 0.5, -0.5, 1e308, 1e-320, math.nan, math.inf,
    -math.inf, "", "x", "\ud800", "../x", "/dev/zero", "silu", "a" * 5000, [], [1], [[]], [None], ["x"], [-1], {}, {"a": 1},
    {"type": "yarn", "factor": 0}, 20_000, 1e30, "1", "true", [0] * 5000,
)  # fmt: skip
ODD_BYTES = (
    b"", b"\0", LFS + b"v1\nsize 99\n", b"<html>", b"[" * 10_000, b'{"a":' * 10_000, b"\xff\xfe{\0}\0", b"null", b"3", b"[]", b'""',
    b"PK\x03\x04",
)  # fmt: skip
ODD_METADATA: tuple[Any, ...] = (
    True, False, 0, 1, 2, 95, 96, (1 << 32) - 1, (1 << 64) - 1, -1, 0.5, math.nan, math.inf, 1e30, "", "x", "yarn", "llama", "t5", "gpt2",
    "qwen2", np.array([], np.float32), np.array([1, 2, 3], np.int32), np.array([math.nan] * 96, np.float32), np.full(96, 6, np.int32),
)  # fmt: skip
ODD_COUNTS = (0, 1, 255, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
MORE_KEYS = (
    "rope_scaling", "rope_parameters", "rope_theta", "sliding_window", "layer_types", "head_dim", "num_key_value_heads",
    "tie_word_embeddings", "attention_bias", "architectures", "quantization_config", "dejavu_format", "eos_token_id", "bos_token_id",
    "dtype", "torch_dtype", "type", "chat_template", "added_tokens_decoder", "lora", "inputs", "gate", "normalizer", "post_processor",
    "decoder", "pre_tokenizer", "vocab",
)  # fmt: skip


OTHER_FAMILIES = sorted(set(FAMILIES) - {"opt", "llama"})
# Of a config.json, whatever the family.
FIELDS: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "hidden_act": "relu", "rope_theta": 1e4, "eos_token_id": [2],
    "bos_token_id": 2, "sliding_window": 16,
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, "tie_word_embeddings": True,
    "attention_bias": False, "layer_types": ["full_attention", "full_attention"], "initializer_range": 0.02,
}  # fmt: skip


# Samples ---------------------------------------------------------------------------------------------------------------------------------


def write_samples(folder: Path, opt: Transformer, llama: Transformer, tokenizer: Tokenizer, tok96: Backend) -> None:
    """A whole file, or folder, of every kind, small enough that a case takes a fraction of a second."""
    for name, model in (("opt", opt), ("llama", llama)):
        export(model, tokenizer, folder / name)
    export(llama, tokenizer, folder / "bf16", dtype="bf16")
    export(opt, tokenizer, folder / "int4", dtype="int4")
    export(llama, tokenizer, folder / "q8_0", dtype="q8_0")
    _write_shards(folder / "opt", folder / "shards")
    _write_adapters(folder, opt, llama)
    for family in OTHER_FAMILIES:
        (folder / "families" / family).mkdir(parents=True)
        write_json(folder / "families" / family / "config.json", FIELDS | {"model_type": family})
    write_gguf(llama, tok96, folder / "llama.gguf")
    for name, zipped in (("bin", True), ("legacy", False)):
        tensors = load_file(folder / "opt" / "model.safetensors")
        shutil.copytree(folder / "opt", folder / name)
        (folder / name / "model.safetensors").unlink()
        torch.save(tensors, folder / name / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    shutil.copytree(folder / "opt", folder / "gpt2")
    vocabulary = json.loads(tok96.to_str())["model"]
    (folder / "gpt2" / "tokenizer.json").unlink()
    write_json(folder / "gpt2" / "vocab.json", vocabulary["vocab"])
    (folder / "gpt2" / "merges.txt").write_text("\n".join(" ".join(merge) for merge in vocabulary["merges"]), encoding="utf-8")
    shutil.copytree(folder / "opt", folder / "state" / "model")
    _run_state(folder / "state")


def _write_shards(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, folder / shard)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _write_adapters(folder: Path, opt: Transformer, llama: Transformer) -> None:
    def keep(name: str, model: Transformer, adapter: Any) -> None:
        shutil.copytree(folder / model.config.family, folder / "adapters" / name)
        adapter.save(folder / "adapters" / name / "adapter")

    predicted = make_adapter(opt.config, model_hash(opt))
    keep("predicted", opt, predicted)
    changed = changing_weights(make_adapter(llama.config, model_hash(llama)), llama.config)
    assert changed.lora is not None
    whole = linear_shapes(llama.config)
    lora = tuple(
        quantized_lora(
            dataclasses.replace(
                layer,
                factors={name: (torch.ones(2, inputs), torch.ones(outputs, 2)) for name, (outputs, inputs) in whole.items()},
                norms={name: torch.ones(llama.config.hidden_size) for name in ("norm1", "norm2")},
            )
        )
        for layer in changed.lora
    )
    config = dataclasses.replace(changed.config, lora=LoraConfig(rank=2, scale=0.01))
    keep("adapted", llama, dataclasses.replace(changed, lora=lora, config=config))
    for method in ("gate", "input"):
        keep(method, llama, without_predictors(method, llama.config, model_hash(llama)))


def _run_state(folder: Path) -> None:
    """A run of adapt, begun in the folder, or gone on with; it stops before a step."""
    checkpoint = load_checkpoint(folder / "model", dtype=torch.float32)
    steps = iter((False, True)) if not (folder / "run").exists() else iter((True,))
    assert adapt(checkpoint, [TEXT], STATE, text_hash="c" * 64, folder=folder / "run", stop=lambda: next(steps)) is None


# Mutations -------------------------------------------------------------------------------------------------------------------------------


def damage_json(content: bytes, draw: random.Random) -> bytes:
    """Values of a JSON file replaced by others, removed, added or put elsewhere."""
    tree = json.loads(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        holders: list[Any] = []
        _collect(tree, holders)
        if not holders:
            break
        holder = draw.choice(holders)
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        value = copy.deepcopy(draw.choice(ODD_VALUES))
        match draw.randrange(5):
            case 0 if keys:
                del holder[draw.choice(keys)]
            case 1 if isinstance(holder, dict):
                holder[draw.choice(MORE_KEYS)] = value
            case 2 if keys:
                key = draw.choice(keys)
                holder[key] = draw.choice(([holder[key]], {"a": holder[key]}, str(holder[key]), [holder[key]] * 3))
            case _ if keys:
                holder[draw.choice(keys)] = value
    return json.dumps(tree).encode()


def _collect(tree: Any, holders: list[Any]) -> None:
    if isinstance(tree, dict | list):
        if len(holders) < 400:  # of a vocabulary some will do
            holders.append(tree)
        for each in list(tree.values() if isinstance(tree, dict) else tree)[:200]:
            _collect(each, holders)


def damage_bytes(content: bytes, draw: random.Random, first: int = 0, last: int | None = None) -> bytes:
    """Bytes between two places changed, cut off or doubled, or the whole file another one."""
    last = len(content) if last is None else min(last, len(content))
    changed = bytearray(content)
    match draw.randrange(8):
        case 0:
            return draw.choice(ODD_BYTES)
        case 1:
            return content[: draw.randrange(len(content))]
        case 2:
            return content + draw.randbytes(draw.choice((1, 8, 5000)))
        case 3:
            place = draw.randrange(first, max(first + 1, last - 8))
            changed[place : place + 8] = struct.pack(
                "<Q", draw.choice((0, 1, 255, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1))
            )
        case 4:
            place = draw.randrange(first, last)
            del changed[place : place + draw.choice((1, 4, 8, 100))]
        case _:
            for _ in range(draw.choice((1, 2, 8, 64))):
                changed[draw.randrange(first, last)] = draw.randrange(256)
    return bytes(changed)


def damage_header(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header, or whose bytes, are changed."""
    size = int.from_bytes(content[:8], "little")
    if draw.random() < 0.4:
        return damage_bytes(content, draw, 0, draw.choice((8, 8 + size, len(content))))
    header = damage_json(content[8 : 8 + size], draw)
    if draw.random() < 0.5:
        header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def damage_pickle(content: bytes, draw: random.Random) -> bytes:
    """A file of PyTorch whose pickled description is changed; one of before zip files as bytes."""
    if not content.startswith(b"PK") or draw.random() < 0.3:
        return damage_bytes(content, draw)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        victim = "data.pkl" if draw.random() < 0.8 else draw.choice(old.namelist()).rpartition("/")[2]
        for name in old.namelist():
            held = old.read(name)
            new.writestr(name, damage_bytes(held, draw) if name.endswith(victim) and held else held)
    return out.getvalue()


def damage_text(content: bytes, draw: random.Random) -> bytes:
    return damage_bytes(content, draw) if draw.random() < 0.2 else damage_json(content, draw)


def damage_metadata(found: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Values of a GGUF file replaced by those of other keys, or by odd ones of the types that such a file has; or left out."""
    kept = dict(found)
    for _ in range(draw.choice((1, 1, 2, 4))):
        key = draw.choice(list(kept))
        match draw.randrange(4):
            case 0:
                del kept[key]
            case 1:
                kept[key] = kept[draw.choice(list(kept))]
            case _:
                kept[key] = draw.choice(ODD_METADATA)
    return kept


Damage = Callable[[bytes, random.Random], bytes]
# By kind: samples, and the files of each that are damaged, and how.
VICTIMS: dict[str, tuple[tuple[str, ...], dict[str, Damage]]] = {
    "safetensors": (
        ("opt", "llama", "bf16", "int4", "q8_0", "shards"),
        {"model.safetensors": damage_header, "model-0.safetensors": damage_header, "model.safetensors.index.json": damage_text},
    ),
    "configs": (
        ("opt", "llama", "int4", *(f"families/{family}" for family in OTHER_FAMILIES)),
        {"config.json": damage_text, "generation_config.json": damage_text, "tokenizer_config.json": damage_text},
    ),
    "adapters": (
        tuple(f"adapters/{name}" for name in ("predicted", "adapted", "gate", "input")),
        {"adapter/config.json": damage_text, "adapter/adapter.safetensors": damage_header},
    ),
    "gguf": (("llama.gguf",), {"": lambda content, draw: damage_bytes(content, draw, 0, draw.choice((64, 4000, 12_000)))}),
    "tokenizers": (("opt", "gpt2"), {"tokenizer.json": damage_text, "vocab.json": damage_text, "merges.txt": damage_bytes}),
    "bin": (("bin", "legacy"), {"pytorch_model.bin": damage_pickle}),
    "state": (
        ("state",),
        {
            "run/run.json": damage_text, "run/lookahead.json": damage_text,
            "run/tokens.npy": lambda content, draw: damage_bytes(content, draw, 0, 160), "run/state.safetensors": damage_header,
        },
    ),
}  # fmt: skip


# Cases -----------------------------------------------------------------------------------------------------------------------------------


def run_case(samples: Path, kind: str, seed: int, place: Path) -> str:
    """Damage a copy in the folder `place` and use it: "refused" or "loaded"; an exception is a failure."""
    draw = random.Random(f"{kind} {seed}")
    names, files = VICTIMS[kind]
    sample = samples / draw.choice(names)
    made = place / sample.name
    (shutil.copyfile if sample.is_file() else shutil.copytree)(sample, made)
    there = [(made / name if name else made, damage) for name, damage in files.items() if (made / name if name else made).is_file()]
    victim, damage = draw.choice(there)
    content = victim.read_bytes()
    by_value = kind == "gguf" and draw.random() < 0.6
    victim.write_bytes(content if by_value else damage(content, draw))
    read = header._metadata  # a damaged value in the place of each that is read, where no byte is damaged
    changed = mock.patch.object(header, "_metadata", lambda *of: damage_metadata(read(*of), draw)) if by_value else nullcontext()
    try:
        if kind == "state":
            _run_state(made)
        elif sample.parent.name == "families":
            parameter_shapes(read_config(made))
        else:
            with changed:
                lm = load(made, backend="torch" if draw.random() < 0.5 else "auto", download=False)
            text = lm.generate("the cat sat", max_new_tokens=3)
            assert isinstance(text, str)
    except HANDLED as error:
        message = str(error)
        if isinstance(error, MemoryError) and "memory" not in message:
            raise RuntimeError("memory ran out") from error
        if str(place) not in message and "logits" not in message:  # those of weights that are too large are no file's
            raise AssertionError(f"the message names no file: {message}") from error
        return "refused"
    return "loaded"


class Child:
    """A process that runs cases and can be ended. One after another: a case that ends the process ends that one alone."""

    def __init__(self, samples: Path) -> None:
        self.samples = samples
        self.process: Any = None

    def run(self, kind: str, seed: int) -> str:
        """ "refused", "loaded", or what went wrong, with the traceback."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, end = context.Pipe()
            self.process = context.Process(target=_serve, args=(end, self.samples), daemon=True)
            self.process.start()
            end.close()
            assert self.pipe.recv() == "ready"
        self.pipe.send((kind, seed))
        try:
            if self.pipe.poll(SECONDS):
                return self.pipe.recv()
            found = f"it takes more than {SECONDS} seconds"
        except EOFError:
            found = "the process is gone"
        self.process.kill()
        self.process.join()
        status, self.process = self.process.exitcode, None
        return f"{found} (exit status {status})"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()


def _serve(pipe: Connection, samples: Path) -> None:
    torch.set_num_threads(1)
    _limit_memory()
    pipe.send("ready")
    while True:
        kind, seed = pipe.recv()
        with tempfile.TemporaryDirectory() as place:
            try:
                found = run_case(samples, kind, seed, Path(place).resolve())
            except BaseException:  # a panic of a library in Rust is no Exception
                found = traceback.format_exc()
        pipe.send(found)


def _limit_memory() -> None:
    """MEMORY bytes of addresses more than the process has with everything imported."""
    if sys.platform == "linux":
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
