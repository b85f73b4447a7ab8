"""A loaded model and everything one does with it: what `import dejavu` offers.

In: what the user calls a model. Out: a LanguageModel, which generates, gives logits and (offline_methods.py) profiles, trains an
adapter and evaluates, dense or sparse, always from one model object.

Letters: T tokens  V vocabulary
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from dejavu.config import MAX_NEW_TOKENS, SamplingConfig, require
from dejavu.engine.backends import CAPABILITIES, make_engine
from dejavu.engine.interface import Engine
from dejavu.engine.native.selectors import layout_of
from dejavu.engine.native.weights import hand_over
from dejavu.engine.options import EngineOptions
from dejavu.generation.engine_cache import EngineCache
from dejavu.generation.generation import GeneratedText, Generation, generate_tokens
from dejavu.kernels.dtypes import DTYPE_NAMES
from dejavu.kernels.processors import default_threads
from dejavu.kernels.screen import Screen
from dejavu.model.adapter import Adapter
from dejavu.model.checkpoint import Checkpoint
from dejavu.model.masked import MaskedSelection
from dejavu.model.selectors import LayerAdapter
from dejavu.model.template import Messages, chat_ids
from dejavu.model.transformer import DENSE
from dejavu.model.versions import weights_version
from dejavu.offline_methods import OfflineMethods


class LanguageModel(OfflineMethods):
    """A model with its tokenizer, its backend and, perhaps, the adapter that makes it sparse. Made by `load`.

    config, tokenizer, name, base_hash: of the checkpoint. options: of its engines, of which backend, cache_dtype, screened_head and threads
    are what was picked. dtype: of the weights that its engines compute with, in the file's own word (q4_k_m) where they are as stored.
    adapter: used by everything below unless told otherwise; may be set; None runs dense. notes: lines about the checkpoint and the adapter
    that came with it that a user should see.
    """

    def __init__(self, checkpoint: Checkpoint, options: EngineOptions, *, adapter: Adapter | None = None) -> None:
        """options: with a backend by name; dtype and cache_dtype may be auto."""
        self.checkpoint = checkpoint
        self.model, self.tokenizer, self.config = checkpoint.model, checkpoint.tokenizer, checkpoint.config
        self.name, self.base_hash, self.notes = checkpoint.name, checkpoint.base_hash, checkpoint.notes
        capabilities = CAPABILITIES[options.backend]
        own = checkpoint.model.stored_as if capabilities.packs else DTYPE_NAMES[checkpoint.model.dtype]
        as_held = options.dtype in ("auto", "stored")
        self.dtype = own if as_held else options.dtype
        cache_dtype = capabilities.cache_dtype(options.cache_dtype, dtype=self.dtype)
        capabilities.check_screened_head(options.screened_head)
        kind = options.dtype if not as_held else "stored" if capabilities.packs else own
        self.options = replace(options, dtype=kind, cache_dtype=cache_dtype)
        self.adapter = adapter
        self._engines = EngineCache()

    def __repr__(self) -> str:
        state = "dense" if self.adapter is None else f"sparse, mlp_density {self.adapter.config.mlp_density:.3f}"
        return f"LanguageModel({self.name!r}, backend={self.backend!r}, dtype={self.dtype!r}, {state}, {self.sampling.words})"

    @property
    def backend(self) -> str:
        return self.options.backend

    @property
    def cache_dtype(self) -> str:
        return self.options.cache_dtype

    @property
    def screened_head(self) -> float:
        """The threshold of the screened head that runs, see `screen`; 0 with the full head."""
        screen = self.screen()
        return 0.0 if screen is None else screen.threshold

    def screen(self, *, adapter: Adapter | None = None, dense: bool = False) -> Screen | None:
        """The screened head of `adapter`, else of the model's own, at the threshold that the options ask for; None: the full head.

        Raises ValueError where one is asked for that the adapter has not.
        """
        chosen, asked = None if dense else adapter or self.adapter, self.options.screened_head
        found = None if chosen is None else chosen.screen
        if dense or asked == 0 or (asked is None and not CAPABILITIES[self.backend].screened_head):
            return None
        require(
            asked is None or found is not None,
            f"--screened-head {asked} is the threshold of an adapter's screened head, and there is none here: train one "
            "(dejavu train --method head, or auto), or leave it out",
        )
        return found if found is None or asked is None else found.at(asked, found.tokens if asked == found.threshold else None)

    @property
    def threads(self) -> int | None:
        return self.options.threads

    @property
    def one_engine(self) -> bool:
        """Whether sparse and dense texts can run on one engine: `adapter` changes no weights, nor the order in which they lie in memory."""
        adapter = self.adapter
        return adapter is None or (adapter.lora is None and not any(layer.inputs.selects for layer in adapter.layers))

    @property
    def num_threads(self) -> int:
        """Threads that decoding runs on."""
        if self.backend != "native":
            return torch.get_num_threads()
        return default_threads() if self.threads is None else self.threads

    @property
    def num_parameters(self) -> int:
        """How many numbers the weights are."""
        return self.model.num_parameters

    @property
    def sampling(self) -> SamplingConfig:
        """How a text is drawn where nothing is asked, as generation_config.json says: see `sampling_of`."""
        return self.sampling_of()

    def sampling_of(self, *, adapter: Adapter | None = None, dense: bool = False) -> SamplingConfig:
        """What `adapter` (else the model's own) comes with; where that says nothing, or dense, what the base does; else greedy."""
        chosen = None if dense else adapter or self.adapter
        found = None if chosen is None else chosen.sampling
        return found or self.checkpoint.sampling or SamplingConfig()

    def layers(self, *, adapter: Adapter | None = None, dense: bool = False) -> tuple[LayerAdapter, ...] | None:
        """The predictors (and changed weights) of `adapter`, else of the model's own; None where it runs dense, as with a screened
        head alone.

        Raises ValueError for an adapter of another model.
        """
        chosen = self._chosen(adapter, dense=dense)
        if chosen is not None and chosen.config.method == "head":
            return None
        return self._engines.attached(self.model, chosen, dtype=self.options.dtype)[1]

    def _chosen(self, adapter: Adapter | None, *, dense: bool) -> Adapter | None:
        chosen = None if dense else adapter or self.adapter
        if chosen is not None and self.base_hash not in chosen.config.base_hashes:
            raise ValueError(
                f"the adapter belongs to {chosen.config.base_id} with base hash {', '.join(chosen.config.base_hashes)}, but the hash of "
                f"{self.name} is {self.base_hash}; use its own adapter or train one"
            )
        return chosen

    @overload
    def generate(
        self,
        prompt: str | Messages,
        *,
        max_new_tokens: int = ...,
        temperature: float | None = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
        stop: Sequence[str] = ...,
        ignore_eos: bool = ...,
        adapter: Adapter | None = ...,
        dense: bool = ...,
        chat_template_kwargs: Mapping[str, Any] | None = ...,
        sanitize_control_tokens: bool = ...,
        stream: Literal[False] = ...,
    ) -> GeneratedText: ...
    @overload
    def generate(
        self,
        prompt: str | Messages,
        *,
        max_new_tokens: int = ...,
        temperature: float | None = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
        stop: Sequence[str] = ...,
        ignore_eos: bool = ...,
        adapter: Adapter | None = ...,
        dense: bool = ...,
        chat_template_kwargs: Mapping[str, Any] | None = ...,
        sanitize_control_tokens: bool = ...,
        stream: Literal[True],
    ) -> Generator[str]: ...
    def generate(
        self,
        prompt: str | Messages,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        adapter: Adapter | None = None,
        dense: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        sanitize_control_tokens: bool = True,
        stream: bool = False,
    ) -> GeneratedText | Generator[str]:
        """Continue a prompt; the prompt runs dense, each new token sparse where there is an adapter (Deja Vu, section 4).

        prompt: a text, taken as it is, or messages such as [{"role": "user", "content": "..."}] for a model with a chat template.
        chat_template_kwargs: variables of the template, such as {"enable_thinking": False}, tools or documents. sanitize_control_tokens:
        control tokens that messages of users and tools spell out stay a text, so that nobody writes the turns of others.
        Returns the new text as a GeneratedText: a str with prompt_tokens, new_tokens, tok_s, prefill_tok_s (tokens a
        second), mlp_density, head_density, finish_reason. With `stream` an iterator over pieces of it, the joined pieces being the same
        text; its `close()` ends it early. temperature (0 is greedy), top_k, top_p: each that is None is `sampling`'s, that of the adapter
        or model; top_p 1 cuts nothing. seed None draws anew each time; else see SamplingConfig. Raises ValueError, at once, for a negative
        count, an empty prompt, one that fills the context, a sampling value out of range, an adapter of another model.
        """
        generation = self.start(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            ignore_eos=ignore_eos,
            adapter=adapter,
            dense=dense,
            chat_template_kwargs=chat_template_kwargs,
            sanitize_control_tokens=sanitize_control_tokens,
        )
        return generation.texts() if stream else generation.result()

    def start(
        self,
        prompt: str | Messages,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        adapter: Adapter | None = None,
        dense: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        sanitize_control_tokens: bool = True,
        record: bool = False,
        reuse_prefix: bool = False,
    ) -> Generation:
        """As `generate`, but returns the running Generation: iterate over its Pieces, then ask for `result()`.

        record: keep what every step selected, in the result's `trace`. reuse_prefix: do not read anew what the prompt has in common with
        one before that had reuse_prefix too; logits are then the same bit for bit on the native backend, on the others up to rounding.
        """
        if isinstance(prompt, str):
            require(not chat_template_kwargs, "chat_template_kwargs are for messages, and the prompt is a text; leave them out")
            prompt_ids = self.tokenizer.encode(prompt)
        else:
            options = {"chat_template_kwargs": chat_template_kwargs, "sanitize_control_tokens": sanitize_control_tokens}
            prompt_ids = chat_ids(self.tokenizer, prompt, **options)
        room = max(1, min(len(prompt_ids) + max(max_new_tokens, 0), self.config.max_positions))
        given = None if dense or self.options.screened_head is not None or adapter is None else adapter.screen
        if given is not None and not CAPABILITIES[self.backend].screened_head:
            warnings.warn(f"dejavu: {CAPABILITIES[self.backend].full_head_note()}", stacklevel=2)
        own = self.sampling_of(adapter=adapter, dense=dense)
        sampling = own.overridden(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        engine, give_back = self._engines.take(
            self.model,
            self._chosen(adapter, dense=dense),
            replace(self.options, record=record, screen=self.screen(adapter=adapter, dense=dense)),
            tokens=room,
        )
        try:
            return generate_tokens(
                engine, self.tokenizer, prompt_ids, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, ignore_eos=ignore_eos,
                on_end=give_back, reuse_prefix=reuse_prefix,
            )  # fmt: skip
        except ValueError:
            give_back()
            raise

    def hand_over(self, *, dense: bool = True) -> None:
        """Let the weights go that an engine packs for itself (backend native): this model then takes the memory of one copy, not two.

        What `generate`, `start` and `engine` run is packed now, with the adapter that the model has and, with dense, without it. Anything
        else (logits, evaluate, train, another adapter that changes weights) raises ValueError from then on. On the other backends, whose
        engines read the model's own weights, nothing happens.
        """
        if self.backend != "native":
            return
        model, layers = self._engines.attached(self.model, self._chosen(None, dense=False), dtype=self.options.dtype)
        needed = [] if layers is None else [(model, layout_of(layers))]
        if dense or layers is None:
            needed.append((self.model, layout_of(())))
        if None in (weights_version(each) for each, _ in needed):  # made in inference mode: an engine could not be told from a stale one
            return
        if all(each is not self.model for each, _ in needed):
            self.model.hand_over(self.model)
        for each in dict.fromkeys(each for each, _ in needed):
            layouts = list(dict.fromkeys(layout for owner, layout in needed if owner is each))
            hand_over(each, self.options.dtype, layouts)

    def engine(
        self, *, num_slots: int, cache_tokens: int, adapter: Adapter | None = None, dense: bool = False, record: bool = False
    ) -> Engine:
        """A new engine, the caller's alone, of so many slots with a cache for `cache_tokens` tokens of all of them together.

        It decodes as `generate` does. record: keep what every step selected. Raises ValueError for an adapter of another model.
        """
        with torch.inference_mode(False), torch.no_grad():
            screen = self.screen(adapter=adapter, dense=dense)
            options = replace(self.options, num_slots=num_slots, cache_tokens=cache_tokens, record=record, screen=screen)
            model, layers = self._engines.attached(self.model, self._chosen(adapter, dense=dense), dtype=self.options.dtype)
            return make_engine(model, layers, options)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], *, adapter: Adapter | None = None, dense: bool = False) -> Tensor:
        """Logits [T, V] fp32 of one forward pass over the ids, which are taken as they are (no BOS is added).

        With an adapter every token is masked: what decode would skip is zero. Raises ValueError for no ids, an id outside
        the vocabulary, more ids than the context holds.
        """
        require(len(token_ids) > 0, "no token ids; give at least one")
        vocab = self.config.vocab_size
        for token_id in (min(token_ids), max(token_ids)):
            require(0 <= token_id < vocab, f"token id {token_id} is outside the model's vocabulary of {vocab}")
        layers = self.layers(adapter=adapter, dense=dense)
        ids_BT = torch.tensor([list(token_ids)], device=self.model.device)
        return self.model(ids_BT, DENSE if layers is None else MaskedSelection(layers))[0]
