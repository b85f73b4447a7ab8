"""A causal language model of transformers as a `Peer`: one sequence, one token a step, whatever holds its weights.

In: a network of transformers, in eval mode, on any device. Out: its logits, step by step. Two ways to run it:

    eager     its own cache, which grows
    compiled  a cache of fixed size, kept from one sequence to the next (a compiled step may know its address), and torch.compile

Letters: B batch  T tokens  V vocabulary
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from dejavu.kernels.dtypes import DTYPE_NAMES

ROOM = 64  # positions of a cache of fixed size beyond the prompt, at first, and what its size is a multiple of


class TransformersDecoder:
    """See `dejavu.bench.variants.Peer`. model: what the network is called. compile_options: of torch.compile; None runs eager."""

    def __init__(self, net: Any, *, model: str, threads: int, compile_options: dict[str, Any] | None = None) -> None:
        weight = next(net.parameters())
        self.mode = "transformers" if compile_options is None else "transformers-compile"
        self.model, self.threads, self.version = model, threads, metadata.version("transformers")
        self.dtype, self.device = DTYPE_NAMES[weight.dtype], str(weight.device)
        self._place, self._dtype = weight.device, weight.dtype
        self._transformers = importlib.import_module("transformers")
        self._net, self._compiled, self._room = net, compile_options is not None, ROOM
        # Older versions know the cache by its older name; newer ones warn of that.
        self._cache_name = "cache" if "cache" in inspect.signature(net.forward).parameters else "past_key_values"
        self._forward = net.forward if compile_options is None else torch.compile(net.forward, **compile_options)
        self._ids: list[int] = []
        self._cache: Any = None
        self._limit = 0  # positions of a cache of fixed size
        self._mask: Tensor | None = None  # of the same size: 0 where there is a token, -inf elsewhere

    def use_threads(self, threads: int) -> None:
        self.threads = threads

    def prefill(self, ids: Sequence[int]) -> None:
        self._ids = []
        if self._compiled:
            # A step reads the whole cache: it should be little larger than what the sequence comes to.
            limit = -(-(len(ids) + self._room) // ROOM) * ROOM
            if limit == self._limit:
                self._cache.reset()
            else:
                self._limit, self._cache = limit, self._transformers.StaticCache(config=self._net.config, max_cache_len=limit)
        else:
            self._cache = self._transformers.DynamicCache(config=self._net.config)
        self._run(self._net.forward, ids, {})
        if self._compiled:
            # A ready mask: working one out from the cache's length would break the graph.
            self._mask = torch.full((1, 1, 1, self._limit), -torch.inf, device=self._place, dtype=self._dtype)
            self._mask[..., : len(ids)] = 0.0

    def step(self, token_id: int) -> Tensor:
        if self._compiled and len(self._ids) == self._limit:
            self._room *= 2
            self.prefill(list(self._ids))
        masks = {}
        if self._mask is not None:
            self._mask[..., len(self._ids)] = 0.0
            masks["attention_mask"] = self._mask
        return self._run(self._forward, [token_id], masks)[0, -1].clone()  # a compiled step may write over its logits in the next

    @torch.no_grad()
    def _run(self, forward: Callable[..., Any], ids: Sequence[int], masks: dict[str, Tensor]) -> Tensor:
        positions_BT = torch.arange(len(self._ids), len(self._ids) + len(ids), device=self._place)[None]
        self._ids += ids
        options = {"use_cache": True, "logits_to_keep": 1, self._cache_name: self._cache, **masks}
        with torch_threads(self.threads):
            return forward(input_ids=self._tokens(ids), position_ids=positions_BT, **options).logits

    def _tokens(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self._place)

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        with torch_threads(self.threads):
            return self._net(input_ids=self._tokens(ids), use_cache=False).logits[0].float().cpu()

    def close(self) -> None:
        self._net = self._forward = self._cache = self._mask = None


@contextmanager
def torch_threads(threads: int) -> Generator[None]:
    """torch computes with so many threads meanwhile."""
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet(transformers: Any) -> Generator[None]:
    """No progress bar of transformers meanwhile, and no word from it but errors."""
    logging = transformers.utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
