"""A model that writes what a test wrote: a tokenizer whose tokens are bytes, an engine that answers by script, and the model around them.

    model = StubModel(answer=" once upon")      # what follows every prompt, then EOS; or a function of the prompt's ids (so far)
    worker = Worker(model, ServeConfig(slots=2))
    engine = model.engines[-1]                  # the sparse one; [0] is dense
    engine.steps, engine.live_sequences, engine.free_kv_pages
    engine.hold(); ...; engine.allow(3)         # a step waits until it is allowed: nothing happens behind a test's back
    engine.before = function                    # is called as function("step", slots) before anything happens, and may raise

Letters: B rows of a step  V vocabulary  L layers  T tokens
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, pre_tokenizers
from torch import Tensor

from dejavu.config import ModelConfig, SamplingConfig
from dejavu.engine.interface import Decoded, EngineInfo, LayerSelection, StepResult
from dejavu.model.counts import Counts
from dejavu.model.slow_tokenizer import byte_level_bpe
from dejavu.model.tokenizer import Tokenizer, build_tokenizer

EOS = 256
VOCAB = 257
LAYERS, NEURONS, HEADS = 2, 128, 4
CERTAIN = 50.0  # the logit of the scripted token; the others have token id / -VOCAB, so that they differ
Answer = Callable[[tuple[int, ...]], Sequence[int]]


def byte_tokenizer(chat_template: str | None = None) -> Tokenizer:
    """Token i is the byte i; 256 is EOS, `</s>`. There is no BOS."""
    as_is = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in as_is]
    characters = {byte: chr(byte) for byte in as_is} | {byte: chr(256 + place) for place, byte in enumerate(moved)}
    backend = byte_level_bpe({characters[byte]: byte for byte in range(256)}, [], pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.add_special_tokens([AddedToken("</s>", normalized=False, special=True)])
    return build_tokenizer(backend, special_tokens={"eos_token": "</s>"}, adds_bos=False, chat_template=chat_template)


class StubPool:
    """Pages of a key/value pool, shared where prefixes were published, as engines share them: numbers without keys and values."""

    def __init__(self, *, slots: int, pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = pages, page_size
        self.lengths = [0] * slots
        self.tables: list[list[int]] = [[] for _ in range(slots)]
        self.known: dict[tuple[int, ...], int] = {}  # ids up to the end of a page -> the page; those given back longest ago first

    @property
    def free_pages(self) -> int:
        return self.num_pages - len({page for table in self.tables for page in table})

    def grow(self, slot: int, tokens: int) -> None:
        """Pages for that many more tokens. Raises ValueError, changing nothing, where there are too few."""
        missing = -(-(self.lengths[slot] + tokens) // self.page_size) - len(self.tables[slot])
        if missing > self.free_pages:
            raise ValueError(f"the key/value cache is full: {missing} pages are missing and {self.free_pages} free")
        for _ in range(missing):
            held = {page for table in self.tables for page in table}
            kept = {page: ids for ids, page in reversed(self.known.items())}
            blank = [page for page in range(self.num_pages) if page not in held and page not in kept]
            page = blank[0] if blank else next(page for page in self.known.values() if page not in held)
            self.known.pop(kept.get(page, ()), None)
            self.tables[slot].append(page)
        self.lengths[slot] += tokens

    def reuse(self, slot: int, token_ids: Sequence[int]) -> int:
        assert self.lengths[slot] == 0 and not self.tables[slot], "only an empty slot begins with a prefix"
        for end in range(self.page_size, len(token_ids), self.page_size):
            page = self.known.get(tuple(token_ids[:end]))
            if page is None:
                break
            self.tables[slot].append(page)
        self.lengths[slot] = len(self.tables[slot]) * self.page_size
        return self.lengths[slot]

    def publish(self, slot: int, token_ids: Sequence[int]) -> None:
        assert self.lengths[slot] >= len(token_ids)
        for place, end in enumerate(range(self.page_size, len(token_ids) + 1, self.page_size)):
            self.tables[slot][place] = self.known.setdefault(tuple(token_ids[:end]), self.tables[slot][place])

    def free(self, slot: int) -> None:
        given_back = set(self.tables[slot])
        self.tables[slot], self.lengths[slot] = [], 0
        for ids in [ids for ids, page in self.known.items() if page in given_back]:
            self.known[ids] = self.known.pop(ids)


class StubEngine:
    """An engine of which slot and step give the scripted token. A token's neurons: 32 of 128 in layer 0 from its id on, all in layer 1;
    its heads: 2 of 4 in layer 0, all in layer 1. A dense one selects nothing.

    steps, prefills: calls so far. calls: each as (what, slots, tokens). sequences: the ids that each slot holds.
    """

    def __init__(
        self,
        answer: str | Sequence[int] | Answer = " and so on",
        *,
        num_slots: int = 8,
        cache_tokens: int = 1024,
        max_positions: int = 256,
        page_size: int = 16,
        sparse: bool = True,
        record: bool = False,
    ) -> None:
        self._answer: Answer = answer if callable(answer) else lambda prompt: answer_ids
        answer_ids = answer.encode() if isinstance(answer, str) else () if callable(answer) else tuple(answer)
        self._pool = StubPool(slots=num_slots, pages=-(-cache_tokens // page_size), page_size=page_size)
        self.sequences: list[list[int]] = [[] for _ in range(num_slots)]
        self._prompts = [0] * num_slots  # tokens that came by prefill
        self._sparse, self.records = sparse, record
        self.steps = self.prefills = 0
        self.calls: list[tuple[str, tuple[int, ...], int]] = []
        self.before: Callable[[str, Sequence[int]], None] = lambda what, slots: None
        self._permits: threading.Semaphore | None = None
        self.waiting = threading.Event()  # set while a step waits to be allowed
        self.info = EngineInfo(
            backend="stub",
            dtype="fp32",
            cache_dtype="fp32",
            device="cpu",
            threads=1,
            sparse=sparse,
            vocab_size=VOCAB,
            num_layers=LAYERS,
            num_neurons=NEURONS,
            num_heads=HEADS,
            max_positions=max_positions,
            num_slots=num_slots,
            page_size=page_size,
            num_pages=self._pool.num_pages,
        )

    @property
    def free_pages(self) -> int:
        return self._pool.free_pages

    @property
    def free_kv_pages(self) -> int:
        return self._pool.free_pages

    @property
    def live_sequences(self) -> int:
        return sum(length > 0 for length in self._pool.lengths)

    def hold(self) -> None:
        """From now on every step waits until `allow` lets it."""
        self._permits = threading.Semaphore(0)

    def allow(self, steps: int = 1) -> None:
        assert self._permits is not None, "hold first"
        self._permits.release(steps)

    def release(self) -> None:
        """No step waits any more."""
        permits, self._permits = self._permits, None
        if permits is not None:
            permits.release(1_000_000)

    def length(self, slot: int) -> int:
        return self._pool.lengths[slot]

    def prefill(self, slot: int, token_ids: Sequence[int]) -> Tensor:
        return self.prefill_logits(slot, token_ids)[-1]

    def prefill_batch(self, slots_B: Sequence[int], token_ids_B: Sequence[Sequence[int]]) -> Tensor:
        return torch.stack([self.prefill(slot, token_ids) for slot, token_ids in zip(slots_B, token_ids_B, strict=True)])

    def prefill_logits(self, slot: int, token_ids: Sequence[int]) -> Tensor:
        """After each token of the prompt the logits are those of the answer's first."""
        if not token_ids:
            raise ValueError("there are no tokens to prefill; give at least one")
        self.prefills += 1
        self.calls.append(("prefill", (slot,), len(token_ids)))
        self.before("prefill", [slot])
        self._append(slot, token_ids)
        self._prompts[slot] = self.length(slot)
        return torch.stack([self._logits(slot)] * len(token_ids))

    def step(
        self,
        token_ids_B: Sequence[int],
        slots_B: Sequence[int],
        *,
        sparse: bool = True,
        record: bool | None = None,
        full_head: bool = False,
    ) -> StepResult:
        assert len(token_ids_B) == len(slots_B) == len(set(slots_B)) > 0
        permits = self._permits
        if permits is not None:
            self.waiting.set()
            permits.acquire()
            self.waiting.clear()
        self.steps += 1
        self.calls.append(("step", tuple(slots_B), len(slots_B)))
        self.before("step", slots_B)
        for token_id, slot in zip(token_ids_B, slots_B, strict=True):
            assert self.length(slot) > 0, "a step goes on with a sequence"
            self._append(slot, [token_id])
        rows, sparse = len(slots_B), sparse and self._sparse
        selections = tuple(self._selected(token_id, sparse=sparse) for token_id in token_ids_B)
        return StepResult(
            logits_BV=torch.stack([self._logits(slot) for slot in slots_B]),
            counts=Counts(
                neurons=torch.tensor([[NEURONS // 4 if sparse else NEURONS, NEURONS]] * rows),
                heads=torch.tensor([[HEADS // 2 if sparse else HEADS, HEADS]] * rows),
            ),
            selections=selections if (self.records if record is None else record) else None,
            union_L=torch.tensor([self._union([row[layer] for row in selections]) for layer in range(LAYERS)]),
            fallback_layers=0,
        )

    def _union(self, chosen: Sequence[LayerSelection]) -> int:
        rows = [row.neurons_A for row in chosen]
        return len({int(neuron) for neurons_A in rows for neuron in (range(NEURONS) if neurons_A is None else neurons_A)})

    def free(self, slot: int) -> None:
        self.before("free", [slot])
        self.sequences[slot], self._prompts[slot] = [], 0
        self._pool.free(slot)

    def reuse(self, slot: int, token_ids: Sequence[int]) -> int:
        self.before("reuse", [slot])
        count = self._pool.reuse(slot, token_ids)
        self.sequences[slot], self._prompts[slot] = list(token_ids[:count]), count
        return count

    def publish(self, slot: int, token_ids: Sequence[int]) -> None:
        self.before("publish", [slot])
        assert self.sequences[slot][: len(token_ids)] == list(token_ids), "a slot's tokens are those that it was given"
        self._pool.publish(slot, token_ids)

    def _append(self, slot: int, token_ids: Sequence[int]) -> None:
        if not all(0 <= token_id < VOCAB for token_id in token_ids):
            raise ValueError(f"token ids {token_ids} are outside the vocabulary of {VOCAB}")
        if self.length(slot) + len(token_ids) > self.info.max_positions:
            raise ValueError(f"the tokens exceed the model's context of {self.info.max_positions}")
        self._pool.grow(slot, len(token_ids))
        self.sequences[slot] += token_ids

    def _logits(self, slot: int) -> Tensor:
        prompt = self._prompts[slot]
        place, answer = self.length(slot) - prompt, self._answer(tuple(self.sequences[slot][:prompt]))
        logits_V = torch.arange(VOCAB) / -VOCAB
        logits_V[answer[place] if place < len(answer) else EOS] = CERTAIN
        return logits_V

    def _selected(self, token_id: int, *, sparse: bool) -> tuple[LayerSelection, ...]:
        if not sparse:
            return (LayerSelection(neurons_A=None, heads_A=None),) * LAYERS
        first = LayerSelection(neurons_A=(torch.arange(NEURONS // 4) + token_id).remainder(NEURONS).sort()[0], heads_A=torch.tensor([0, 2]))
        return first, LayerSelection(neurons_A=None, heads_A=None)


class DrawingEngine(StubEngine):
    """Draws by itself, what `step` would give; -1 after the token in `damaged`. requested: tokens and rows of each call."""

    damaged: int | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.drawn: list[tuple[tuple[int | None, int], ...]] = []
        self.requested: list[tuple[int, int]] = []

    def decode(
        self,
        token_ids_B: Sequence[int],
        slots_B: Sequence[int],
        count: int,
        sampling: Sequence[SamplingConfig] | None = None,
        choices: Sequence[int] | None = None,
        *,
        sparse: bool = True,
    ) -> Decoded:
        sampling, choices = sampling or [SamplingConfig()] * len(slots_B), choices or [0] * len(slots_B)
        self.drawn.append(tuple(zip((config.seed for config in sampling), choices, strict=True)))
        self.requested.append((count, len(slots_B)))
        found, last_B = [], list(token_ids_B)
        for _ in range(count):
            step = self.step([max(0, token_id) for token_id in last_B], slots_B, sparse=sparse)
            best_B = step.logits_BV.argmax(-1).tolist()
            last_B = [-1 if token_id == self.damaged else best for token_id, best in zip(last_B, best_B, strict=True)]
            found.append((torch.tensor(last_B), step.logits_BV.log_softmax(-1).amax(-1), step.counts, step.union_L))
        ids, logprobs, counts, unions = zip(*found, strict=True)
        return Decoded(
            token_NB=torch.stack(ids),
            logprob_NB=torch.stack(logprobs),
            counts=Counts.stack(counts),
            union_NL=torch.stack(unions),
            fallback_layers=1,
        )


class StubModel:
    """What a worker needs of a LanguageModel. engines: those made so far, in order; options go to each (page_size, say).

    adapter: None where there is no sparse engine. one_engine: whether dense texts run on it, too. fail: how many of the next engines
    cannot be made. engine: the class of the engines.
    """

    def __init__(
        self,
        answer: str | Sequence[int] | Answer = " and so on",
        *,
        sparse: bool = True,
        max_positions: int = 256,
        tokenizer: Tokenizer | None = None,
        engine: type[StubEngine] = StubEngine,
        one_engine: bool = False,
        **options: Any,
    ) -> None:
        self.name, self.backend, self.dtype = "stub", "stub", "fp32"
        self.tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
        self.adapter: Any = object() if sparse else None
        self.one_engine = one_engine
        self.config = ModelConfig(
            family="opt",
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=NEURONS,
            num_layers=LAYERS,
            num_heads=HEADS,
            num_kv_heads=HEADS,
            head_dim=8,
            max_positions=max_positions,
            activation="relu",
            eos_token_ids=(EOS,),
        )
        self.engines: list[StubEngine] = []
        self.fail = 0
        self._answer, self._class, self._options = answer, engine, options

    def engine(self, *, num_slots: int, cache_tokens: int, dense: bool = False) -> StubEngine:
        if self.fail > 0:
            self.fail -= 1
            raise RuntimeError("the engine cannot be made")
        made = self._class(
            self._answer,
            num_slots=num_slots,
            cache_tokens=cache_tokens,
            max_positions=self.config.max_positions,
            sparse=self.adapter is not None and not dense,
            **self._options,
        )
        self.engines.append(made)
        return made

    def count(self, of: str) -> Counter[int]:
        """How many calls of "step" or "prefill" had how many rows or tokens, over all engines."""
        return Counter(size for engine in self.engines for what, _, size in engine.calls if what == of)
