"""dejavu inside transformers: `attach(model, adapter)` makes `model.generate(...)` of an existing model decode here.

In: a causal language model of transformers and an adapter for it. Out: the same model, whose `generate` runs prefill and decode on
our engine for greedy decoding and sampling with temperature, top_k and top_p, one sequence or several (padded on the left, or not),
with or without a streamer; whatever else is asked of it goes to transformers' own `generate`, and why is said once. `detach` takes it
away: the model's weights and its class were never touched.

The engine has copies of the weights, made by `attach`. Weights that change later do not reach it: detach, and attach again.

Letters: B sequences  T tokens
"""

from __future__ import annotations

import re
import types
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dejavu.config import MAX_NEW_TOKENS, SamplingConfig, require
from dejavu.engine.backends import CAPABILITIES, backends, make_engine, pick_backend
from dejavu.engine.interface import Engine
from dejavu.engine.options import PAGE_SIZE, EngineOptions
from dejavu.engine.sampling import Sampler
from dejavu.generation.engine_cache import EngineCache
from dejavu.generation.rows import Row, advance, draw, tokens_at_once
from dejavu.kernels.dtypes import DTYPE_NAMES
from dejavu.model.adapter import Adapter
from dejavu.model.checkpoint import assembled
from dejavu.model.download import Download
from dejavu.model.generation_config import OF_SAMPLING, TOP_K, changes_nothing
from dejavu.model.hub import adapter_folder
from dejavu.model.rounding import rounding_note
from dejavu.model.transformer import Transformer

NAME = "_dejavu"  # where a model keeps what is attached to it
# Fields of a generation config that we obey. Any other has to be at a value that changes nothing of what we do.
OBEYED = ("max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "eos_token_id", "pad_token_id")


class Streamer(Protocol):
    """What transformers' TextStreamer and the like have: put takes the prompt [B, T], then the new tokens [B] of each step."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


class Attached(NamedTuple):
    """What `attach` leaves at a model. reasons: why calls went to transformers, each said once."""

    model: Transformer
    adapter: Adapter | None
    options: EngineOptions
    reasons: set[str]
    engines: EngineCache


class GenerateCall(NamedTuple):
    """A call of generate that we can serve: prompts without padding, limits, what ends a sequence, how to draw."""

    prompts: list[list[int]]
    max_new_tokens: int
    stop_ids: frozenset[int]
    pad_id: int
    sampling: SamplingConfig


def attach(
    net: Any, adapter: Adapter | str | Path | None = None, *, backend: str = "auto", dtype: str | None = None, download: Download = False
) -> Any:
    """Let net.generate decode here, sparse by `adapter` (None: dense), and return net.

    net: of an architecture that dejavu reads, on the CPU or a GPU. backend, dtype: of the engine, as `dejavu.load` has them; by
    default the best for where net is, in fp32 on a CPU and in net's own dtype on a GPU. Raises ValueError for a model of another
    kind, an adapter of another base, and a model that has something attached already.

    How a text is drawn is what transformers is told, by net.generation_config and the call. One whose length nothing says has at most
    256 new tokens, wherever it is generated.
    """
    require(not hasattr(net, NAME), "this model has an adapter attached already; detach it first")
    require(hasattr(net, "config") and hasattr(net, "generate"), f"{type(net).__name__} is no model of transformers that generates text")
    weight = next(net.parameters())
    on_gpu = weight.device.type == "cuda"
    offered = [status.name for status in backends() if status.available and (status.name != "cuda" or on_gpu)]
    picked = offered[0] if backend == "auto" else pick_backend(backend, dtype=dtype or "fp32")
    kind = weight.dtype if on_gpu else torch.float32
    model, base_hash = assembled(net.config.to_dict(), net.state_dict(), dtype=kind, device=weight.device, where=type(net).__name__)
    if isinstance(adapter, str | Path):
        adapter = Adapter.load(adapter_folder(adapter, download=download), model=model.config, base_hash=base_hash)
    if adapter is not None:
        require(isinstance(adapter, Adapter), f"an adapter is an Adapter, a folder or a hub id, not {adapter!r}")
        known = adapter.config.base_hashes
        require(base_hash in known, f"the adapter's base has the hash {', '.join(known)}, this model {base_hash}; use its own adapter")
    lacking = CAPABILITIES[picked].beyond(model.config)
    require(backend == "auto" or not lacking, f"backend {picked!r} does not compute {', '.join(lacking)}; use backend='torch'")
    picked = "torch" if lacking else picked
    own = DTYPE_NAMES[kind]
    require(picked != "native" or not on_gpu, "backend 'native' is for models on the CPU, and this one is on a GPU")
    offered_dtypes = CAPABILITIES[picked].dtypes if CAPABILITIES[picked].packs else (own,)
    require(dtype is None or dtype in offered_dtypes, f"dtype {dtype!r} is not one of backend {picked!r} here: {', '.join(offered_dtypes)}")
    if dtype not in (None, own):
        model = model.rounded(str(dtype))
    digest = None if adapter is None else adapter.digest
    note = rounding_note(base_hash, dtype or own, stored_dtype=own, adapter=digest)
    if note is not None:
        warnings.warn(f"dejavu: {note}", stacklevel=2)
    screen = None if adapter is None else adapter.screen
    if screen is not None and not CAPABILITIES[picked].screened_head:
        warnings.warn(f"dejavu: {CAPABILITIES[picked].full_head_note()}", stacklevel=2)
        screen = None
    options = EngineOptions(backend=picked, dtype=dtype or "auto", screen=screen)
    setattr(net, NAME, Attached(model, adapter, options, set(), EngineCache()))
    net.generate = types.MethodType(_generate, net)
    return net


def detach(net: Any) -> Any:
    """Give net its own generate back, and return it; nothing happens where nothing is attached."""
    if hasattr(net, NAME):
        delattr(net, NAME)
        del net.generate
    return net


def _generate(net: Any, inputs: Tensor | None = None, generation_config: Any = None, **given: Any) -> Any:
    """What stands in for net.generate."""
    held: Attached = getattr(net, NAME)
    prompt = inputs  # or by the name that a tokenizer gives it
    ids = given.get("input_ids") if prompt is None else prompt
    given |= _default_length(net, ids, generation_config, given)
    call = _request(net, prompt, generation_config, given)
    if isinstance(call, str):
        kind = re.sub(r"\d+", "", call)
        if kind not in held.reasons:
            held.reasons.add(kind)
            warnings.warn(f"dejavu: {call}: generated by transformers, dense", stacklevel=2)
        return type(net).generate(net, inputs, generation_config=generation_config, **given)
    assert isinstance(ids, Tensor)
    streamer: Streamer | None = given.get("streamer")
    if streamer is not None:
        streamer.put(ids.cpu())
    rows = len(call.prompts)
    tokens = max(len(prompt) for prompt in call.prompts) + call.max_new_tokens
    if rows == 1:
        engine, give_back = held.engines.take(held.model, held.adapter, held.options, tokens=tokens)
        new = decode(engine, call, streamer)
        engine.free(0)
        give_back()
    else:
        room = rows * -(-tokens // PAGE_SIZE) * PAGE_SIZE
        model, layers = held.engines.attached(held.model, held.adapter, dtype=held.options.dtype)
        engine = make_engine(model, layers, replace(held.options, num_slots=rows, cache_tokens=room))
        new = decode(engine, call, streamer)
    if streamer is not None:
        streamer.end()
    longest = max(len(tokens) for tokens in new)
    padded = [tokens + [call.pad_id] * (longest - len(tokens)) for tokens in new]
    return torch.cat([ids, torch.tensor(padded, dtype=ids.dtype, device=ids.device)], 1)


@torch.inference_mode()
def decode(engine: Engine, call: GenerateCall, streamer: Streamer | None = None) -> list[list[int]]:
    """The new tokens of each prompt, what ended it included. streamer: gets them step by step, padding for a row that has ended."""
    rows = [Row(slot=slot, sampler=Sampler(call.sampling, index=slot)) for slot in range(len(call.prompts))]
    logits_BV = engine.prefill_batch([row.slot for row in rows], call.prompts)
    new = [[draw(row, logits_V).token_id] for row, logits_V in zip(rows, logits_BV, strict=True)]
    running = _running(rows, new, call, streamer)
    while running:
        tokens = len(new[running[0].slot])
        stepped = running
        for step in advance(engine, stepped, tokens_at_once(tokens - 1, call.max_new_tokens - tokens)):
            for row, found in zip(stepped, step.tokens_B, strict=True):
                if row in running:
                    if isinstance(found, ValueError):
                        raise found
                    new[row.slot].append(found.token_id)
            running = _running(running, new, call, streamer)
            if not running:
                break
    return new


def _running(rows: Sequence[Row], new: Sequence[Sequence[int]], call: GenerateCall, streamer: Streamer | None) -> list[Row]:
    """Which of these rows go on after their last token, which the streamer gets."""
    if streamer is not None:
        last = {row.slot: new[row.slot][-1] for row in rows}
        streamer.put(torch.tensor([last.get(slot, call.pad_id) for slot in range(len(new))]))
    return [row for row in rows if new[row.slot][-1] not in call.stop_ids and len(new[row.slot]) < call.max_new_tokens]


def _default_length(net: Any, ids: Any, generation_config: Any, given: Mapping[str, Any]) -> dict[str, int]:
    """max_new_tokens for a call where nothing says how long a text may be; empty where something does."""
    own, called = net.generation_config, generation_config
    names = ("max_new_tokens", "max_length")
    limits = [limit for name in names for limit in (given.get(name), getattr(own, name, None), getattr(called, name, None))]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or any(limit is not None for limit in limits):
        return {}
    return {"max_new_tokens": max(1, min(MAX_NEW_TOKENS, _context(net) - ids.shape[1]))}


def _context(net: Any) -> int:
    return min(net.config.max_position_embeddings, getattr(net, NAME).model.config.max_positions)


def _request(net: Any, prompt: Tensor | None, generation_config: Any, given: Mapping[str, Any]) -> GenerateCall | str:
    """What is asked for, or why we cannot serve it."""
    settings = _settings(net, generation_config, given)
    if isinstance(settings, str):
        return settings
    extra = {key: value for key, value in given.items() if key not in settings and value is not None}
    ids, mask = prompt if prompt is not None else extra.pop("input_ids", None), extra.pop("attention_mask", None)
    streamer = extra.get("streamer")
    if callable(getattr(streamer, "put", None)) and callable(getattr(streamer, "end", None)):
        del extra["streamer"]
    if extra:
        return f"generate was given {', '.join(sorted(extra))}"
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.numel() == 0:
        return "there are no input_ids [sequences, tokens]"
    stop, pad = settings["eos_token_id"], settings["pad_token_id"]
    stops = [] if stop is None else [int(each) for each in torch.as_tensor(stop).flatten().tolist()]
    pad = (stops or [0])[0] if pad is None else int(pad)
    if mask is None:  # as transformers takes it: padding is what has a token of its own
        padded = settings["pad_token_id"] is not None and pad not in stops
        mask = (ids != pad).long() if padded else torch.ones_like(ids)
    if mask.shape != ids.shape or not bool((mask.long().diff(dim=1) >= 0).all()) or not bool(mask[:, -1].all()):
        return "the attention mask is not one of padding on the left"
    prompts = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    if settings["do_sample"] and (settings["temperature"] == 0 or settings["top_p"] == 0):
        return "sampling has a temperature or top_p of 0"
    limit = _limit(net, settings, ids.shape[1])
    return limit if isinstance(limit, str) else GenerateCall(prompts, limit, frozenset(stops), pad, _sampling(settings))


def _settings(net: Any, generation_config: Any, given: Mapping[str, Any]) -> dict[str, Any] | str:
    """Fields of the generation config by name: of the call, else of the config that came with it, else of the model."""
    own = net.generation_config.to_dict()
    settings = own if generation_config is None else own | {k: v for k, v in generation_config.to_dict().items() if v is not None}
    settings |= {key: value for key, value in given.items() if key in settings}
    sampled = bool(settings["do_sample"])
    known = [*OBEYED, *([] if sampled else OF_SAMPLING)]
    beyond = [f"{key}={value!r}" for key, value in settings.items() if key not in known and not changes_nothing(key, value)]
    return f"generate was asked for {', '.join(beyond)}" if beyond else settings


def _limit(net: Any, settings: Mapping[str, Any], prompt: int) -> int | str:
    """New tokens at most: max_new_tokens, else max_length less the prompt."""
    longest, limit = settings["max_length"], settings["max_new_tokens"]
    if limit is None:
        limit = longest - prompt
    context = _context(net)
    if limit < 1 or prompt + limit > context:
        return f"{limit} new tokens behind {prompt} are none, or more than the context of {context}"
    return int(limit)


def _sampling(settings: Mapping[str, Any]) -> SamplingConfig:
    """Seeds come from torch's generator: torch.manual_seed makes a call repeatable."""
    if not settings["do_sample"]:
        return SamplingConfig()
    temperature, top_k, top_p = (settings[key] for key in ("temperature", "top_k", "top_p"))
    top_k = TOP_K if top_k is None else int(top_k)
    return SamplingConfig(
        temperature=1.0 if temperature is None else float(temperature),
        top_k=top_k or None,
        top_p=None if top_p is None or top_p >= 1 else float(top_p),
        seed=int(torch.randint(1 << 31, ())),
    )
