"""Perplexity of ours and of other programs: the same windows, by llama.cpp's rule, for every program; what an adapter's digest names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import Brute, Tiny, random_predictor
from dejavu.bench import comparison
from dejavu.bench.comparison import Passage, own_quality, peer_quality
from dejavu.model.adapter import Adapter
from dejavu.model.adapter_config import AdapterConfig, LayerConfig
from dejavu.model.selectors import AllNeurons, PredictedNeurons
from dejavu.model.transformer import Transformer
from dejavu.quality import perplexity
from dejavu.quality.perplexity import half_windows
from helpers.adapters import mlp_of, predicted, varied_adapter

VOCAB, BOS, CONTEXT = 23, 2, 12
ABOUT = {"name": "tiny", "backend": "torch", "dtype": "fp32", "cache_dtype": "fp32", "adapter": "0123"}


@pytest.fixture
def passage(monkeypatch: pytest.MonkeyPatch) -> Passage:
    monkeypatch.setattr(comparison, "half_windows", lambda ids, *, bos: half_windows(ids, bos=bos, context=CONTEXT))
    generator = torch.Generator().manual_seed(0)
    return Passage.of({name: torch.randint(VOCAB, (size,), generator=generator).tolist() for name, size in (("a", 25), ("b", 12))}, bos=BOS)


def test_the_second_half_of_each_piece_is_predicted() -> None:
    assert [(w.inputs, w.targets) for w in half_windows(list(range(17)), bos=None, context=8)] == [
        ([0, 1, 2, 3, 4, 5, 6], [5, 6, 7]),
        ([8, 9, 10, 11, 12, 13, 14], [13, 14, 15]),
    ]
    assert [(w.inputs, w.targets) for w in half_windows(list(range(15)), bos=99, context=8)] == [
        ([99, 0, 1, 2, 3, 4, 5], [4, 5, 6]),
        ([99, 8, 9, 10, 11, 12, 13], [12, 13, 14]),
    ]
    with pytest.raises(ValueError, match="the text has 7 tokens, and a window takes 8"):
        half_windows(list(range(7)), bos=None, context=8)
    assert len(half_windows(list(range(1000)), bos=None)[0].targets) == perplexity.HALF_CONTEXT // 2 - 1


def test_ours_is_that_of_brute_force(tiny: Tiny, brute: Brute, passage: Passage) -> None:
    model = tiny("opt", vocab_size=VOCAB, max_positions=16)
    total = 0.0
    for window in passage.windows:
        scores = brute(model, window.inputs).double().log_softmax(-1)[-len(window.targets) :]
        total -= float(scores.gather(-1, torch.tensor(window.targets)[:, None]).sum())
    row = own_quality(model, None, passage, **ABOUT)
    assert row.tokens == 3 * (CONTEXT // 2 - 1) and row.ppl == pytest.approx(math.exp(total / row.tokens), rel=1e-5)
    assert (row.mode, row.adapter, row.texts, row.mlp_density) == ("dense", None, ("a", "b"), 1.0)


def test_sparse_masks_and_says_so(tiny: Tiny, passage: Passage) -> None:
    model = tiny("opt", vocab_size=VOCAB, max_positions=16)
    size, neurons = model.config.hidden_size, model.config.intermediate_size
    none = random_predictor(size, neurons, torch.Generator().manual_seed(0), threshold=math.inf)
    row = own_quality(model, (predicted(mlp=none),) * model.config.num_layers, passage, **ABOUT)
    assert (row.mode, row.adapter, row.mlp_density, row.sparse, row.sparse_heads) == ("sparse", "0123", 0.0, True, False)
    heads = random_predictor(size, model.config.num_heads, torch.Generator().manual_seed(0), threshold=-math.inf)
    assert own_quality(model, (predicted(heads=heads),) * model.config.num_layers, passage, **ABOUT).sparse_heads
    assert row.ppl != pytest.approx(own_quality(model, None, passage, **ABOUT).ppl, rel=1e-3)


class Ours:
    """A program that happens to be our model."""

    mode, version, dtype, model, threads, device = "other", "1", "q8_0", "tiny.q8_0", 1, "cpu"

    def __init__(self, net: Transformer, *, tells: bool = True) -> None:
        self.net, self.tells = net, tells

    def prefill(self, ids: Sequence[int]) -> None: ...
    def step(self, token_id: int) -> None: ...
    def close(self) -> None: ...

    def logits(self, ids: Sequence[int]) -> Tensor | None:
        with torch.inference_mode():
            return self.net(torch.tensor([list(ids)]))[0] if self.tells else None


def test_another_program_is_measured_alike(tiny: Tiny, passage: Passage) -> None:
    model = tiny("llama", vocab_size=VOCAB, max_positions=16)
    ours, theirs = own_quality(model, None, passage, **ABOUT), peer_quality(Ours(model), passage, vocab_size=VOCAB)
    assert theirs is not None and theirs.ppl == pytest.approx(ours.ppl, rel=1e-6)
    assert (theirs.mode, theirs.backend, theirs.dtype, theirs.texts_hash) == ("other", "other", "q8_0", ours.texts_hash)
    assert theirs.peer and ours.dense and not theirs.dense
    assert peer_quality(Ours(model, tells=False), passage, vocab_size=VOCAB) is None
    assert peer_quality(Ours(model), passage, vocab_size=VOCAB + 1) is None  # another vocabulary: these tokens are other words to it


def test_a_digest_names_what_an_adapter_does(tiny: Tiny, tmp_path: Path) -> None:
    """Other thresholds, other values: another digest. Another base, another card: the same. It survives saving."""

    model = tiny("opt")
    adapter = varied_adapter(model.config, "hash")
    assert len(adapter.digest) == 16 and adapter.with_base("other").digest == adapter.digest
    adapter.save(tmp_path / "adapter")
    assert Adapter.load(tmp_path / "adapter", model=model.config, base_hash="hash").digest == adapter.digest
    changed = dataclasses.replace(adapter.layers[0], neurons=AllNeurons())
    config: AdapterConfig = adapter.config
    entries = (dataclasses.replace(config.layers[0], entries={}), *config.layers[1:])
    other = dataclasses.replace(adapter, layers=(changed, *adapter.layers[1:]), config=dataclasses.replace(config, layers=entries))
    assert isinstance(entries[0], LayerConfig) and other.digest != adapter.digest
    predictor = mlp_of(adapter.layers[0])
    moved = dataclasses.replace(adapter.layers[0], neurons=PredictedNeurons(dataclasses.replace(predictor, bias_O=predictor.bias_O + 1)))
    assert dataclasses.replace(adapter, layers=(moved, *adapter.layers[1:])).digest != adapter.digest
