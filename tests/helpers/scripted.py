"""Engines and tokenizers whose texts a test writes itself: what a generation does with tokens is then known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dejavu.config import SamplingConfig
from dejavu.engine.interface import Decoded, EngineInfo, StepResult
from dejavu.generation.generation import GeneratedText, generate_tokens
from dejavu.generation.pieces import Piece
from dejavu.model.counts import Counts

VOCAB = 300
LETTERS = st.text(alphabet="abc", max_size=4)


class ScriptedEngine:
    """An engine that writes the given tokens, whatever it is given. Layer 0 selects 2 + step neurons of 8, layer 1 all."""

    def __init__(self, script: Sequence[int], *, max_positions: int = 64) -> None:
        self.script = list(script)
        self.steps = 0
        self.lengths = {0: 0, 1: 0}
        self.frees: list[int] = []
        self.info = EngineInfo(
            backend="scripted",
            dtype="fp32",
            cache_dtype="fp32",
            device="cpu",
            threads=1,
            sparse=True,
            vocab_size=VOCAB,
            num_layers=2,
            num_neurons=8,
            num_heads=4,
            max_positions=max_positions,
            num_slots=2,
            page_size=16,
            num_pages=100,
        )
        self.free_pages = 100

    def length(self, slot: int) -> int:
        return self.lengths[slot]

    def free(self, slot: int) -> None:
        self.lengths[slot] = 0
        self.frees.append(slot)

    def _logits(self, index: int) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(self.script[index]), VOCAB).float() * 9

    def prefill(self, slot: int, token_ids: Sequence[int]) -> Tensor:
        self.lengths[slot] += len(token_ids)
        return self._logits(0)

    def prefill_logits(self, slot: int, token_ids: Sequence[int]) -> Tensor:
        raise AssertionError("writing a text asks for the last logits alone")

    def prefill_batch(self, slots_B: Sequence[int], token_ids_B: Sequence[Sequence[int]]) -> Tensor:
        raise AssertionError("one text at a time")

    def reuse(self, slot: int, token_ids: Sequence[int]) -> int:
        raise AssertionError("one text at a time shares no pages")

    def publish(self, slot: int, token_ids: Sequence[int]) -> None:
        raise AssertionError("one text at a time shares no pages")

    def step(self, token_ids_B: Sequence[int], slots_B: Sequence[int], **options: Any) -> StepResult:
        assert list(token_ids_B) == [self.script[self.steps]], "the last token is fed back"
        self.steps += 1
        self.lengths[slots_B[0]] += 1
        assert self.lengths[slots_B[0]] <= self.info.max_positions
        return StepResult(
            logits_BV=self._logits(self.steps)[None],
            counts=Counts(neurons=torch.tensor([[1 + self.steps, 8]]), heads=torch.tensor([[4, 2]])),
        )


class DecodingEngine(ScriptedEngine):
    """A scripted engine that decodes by itself; `requested` says how many tokens at a time. A script that ends goes on with NaN."""

    def __init__(self, script: Sequence[int], *, max_positions: int = 64, records: bool = False) -> None:
        super().__init__(script, max_positions=max_positions)
        self.records = records
        self.requested: list[int] = []

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
        self.requested.append(count)
        steps: list[StepResult] = []
        ids, logprobs = list(token_ids_B), []
        for _ in range(count):
            if self.steps + 1 == len(self.script):
                ids.append(-1)
                logprobs.append(float("nan"))
                steps.append(steps[-1])
                continue
            steps.append(self.step(ids[-1:], slots_B))
            ids.append(self.script[self.steps])
            logprobs.append(float(steps[-1].logits_BV[0].log_softmax(0)[ids[-1]]))
        return Decoded(
            token_NB=torch.tensor(ids[1:])[:, None],
            logprob_NB=torch.tensor(logprobs)[:, None],
            counts=Counts.stack([step.counts for step in steps]),
        )


class WordTokenizer:
    """Token i is the i-th of the given strings; ids past them are EOS."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words
        self.eos_token_ids = (len(words),)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.words[i] for i in ids if i < len(self.words))

    def token_bytes(self, token_id: int) -> bytes:
        return self.decode([token_id]).encode()


class ByteTokenizer:
    """Token i is the byte i; 256 is EOS."""

    eos_token_ids = (256,)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id] if token_id < 256 else [])


def run(words: Sequence[str], *, stop: Sequence[str] = (), max_new_tokens: int | None = None) -> tuple[list[Piece], GeneratedText]:
    """Generate exactly the given words, one token each; an EOS would follow."""
    generation = generate_tokens(
        ScriptedEngine([*range(len(words)), len(words)]),
        WordTokenizer(words),
        [0],
        max_new_tokens=len(words) if max_new_tokens is None else max_new_tokens,
        stop=stop,
    )
    pieces = list(generation)
    return pieces, generation.result()
