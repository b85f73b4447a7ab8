"""Perplexity: each token once, equal to brute force, whatever the batch; masked runs really mask."""

import math
import random

import pytest
import torch

from conftest import random_predictor
from dejavu.model.selectors import LayerAdapter
from dejavu.model.transformer import DENSE, Transformer
from dejavu.quality.perplexity import (
    MaskedSelections,
    PerplexityResult,
    paired_rise,
    perplexity,
    pooled,
    rolling_windows,
    score_targets,
)
from helpers.adapters import predicted

VOCAB, BOS = 11, 2


@pytest.fixture
def model(tiny) -> Transformer:
    return tiny("opt", vocab_size=VOCAB, max_positions=16)


def constant_predictors(model: Transformer, threshold: float) -> tuple[LayerAdapter, ...]:
    """MLP predictors whose scores are finite, so that a threshold of +inf keeps no neuron and -inf every one."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    predictor = random_predictor(config.hidden_size, config.intermediate_size, generator, threshold=threshold)
    return (predicted(mlp=predictor),) * config.num_layers


def brute_nll(model: Transformer, ids: list[int], *, context: int, stride: int, bos: int | None = BOS) -> float:
    """Token by token: the window in which a token is predicted, found by arithmetic of its own, one row of it looked at."""
    sequence = ids if bos is None else [bos, *ids]
    total = 0.0
    for target in range(1, len(sequence)):
        end = context
        while end < target:
            end += stride
        end = min(end, len(sequence) - 1)
        with torch.inference_mode():
            logits = model(torch.tensor([sequence[max(0, end - context) : end]]), DENSE)[0].double()
        log_probs = logits.log_softmax(-1)
        total -= log_probs[target - 1 - max(0, end - context), sequence[target]].item()
    return total


def test_windows_of_the_case():
    windows = rolling_windows(list(range(10)), bos=99, context=4)
    assert [(w.inputs, w.targets) for w in windows] == [
        ([99, 0, 1, 2], [0, 1, 2, 3]),
        ([3, 4, 5, 6], [4, 5, 6, 7]),
        ([5, 6, 7, 8], [8, 9]),
    ]


@pytest.mark.parametrize("bos", [None, 77])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9, 10, 23])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_every_token_is_predicted_once_after_its_own_past(bos, count, stride):
    ids = list(range(count))
    sequence = ids if bos is None else [bos, *ids]
    windows = rolling_windows(ids, bos=bos, context=4, stride=stride)
    assert [t for w in windows for t in w.targets] == sequence[1:]
    for window in windows:
        scored = window.inputs[len(window.inputs) - len(window.targets) :]
        assert [sequence.index(t) - 1 for t in window.targets] == [sequence.index(i) for i in scored]
        assert len(window.inputs) <= 4


def test_numbers_of_a_model_without_knowledge(model):
    with torch.no_grad():
        model.embed.weight.zero_()  # the head is tied
    result = perplexity(model, list(range(10)), bos=BOS, context=4)
    assert result.nll == pytest.approx(23.978952727983707, rel=1e-14)
    assert (result.tokens, result.windows, result.stride) == (10, 3, 4)
    assert result.ppl == pytest.approx(11, rel=1e-14)
    assert result.word_perplexity(4) == pytest.approx(401.31159963300337, rel=1e-13)
    assert result.byte_perplexity(20) == pytest.approx(3.3166247903554, rel=1e-13)
    assert result.bits_per_byte(20) == pytest.approx(1.7297158093186487, rel=1e-13)
    assert result.stderr == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("count", "bos"), [*((n, BOS) for n in (1, 4, 5, 8, 9, 10)), *((n, None) for n in (2, 4, 5, 8, 9, 10))])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_equals_brute_force(model, count, stride, bos):
    ids = [random.Random(count).randrange(VOCAB) for _ in range(count)]
    result = perplexity(model, ids, bos=bos, context=4, stride=stride)
    assert result.tokens == count - (bos is None)
    assert result.nll == pytest.approx(brute_nll(model, ids, context=4, stride=stride, bos=bos), rel=1e-6)


def test_batches_and_chunks_of_logits_change_nothing(model, monkeypatch):
    ids = [random.Random(1).randrange(VOCAB) for _ in range(101)]
    whole = perplexity(model, ids, bos=BOS, context=8, stride=5, batch_tokens=10_000)
    monkeypatch.setattr("dejavu.quality.perplexity.LOGITS_AT_ONCE", 3 * VOCAB)
    seen = []
    for batch_tokens in (1, 17, 64):
        part = perplexity(model, ids, bos=BOS, context=8, stride=5, batch_tokens=batch_tokens, progress=lambda *now: seen.append(now))
        assert part.window_tokens == whole.window_tokens
        assert part.window_nll == pytest.approx(whole.window_nll, rel=1e-5)
    assert seen[-1] == (101, 101)


def test_greedy_and_nll_of_large_logits(model):
    hidden = 1000 * torch.randn(7, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    logits = model.logits(hidden).double()
    targets = logits.argmax(-1)
    targets[3] = logits[3].argmin()
    nll, greedy = score_targets(model, hidden, targets)
    expected = -logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert torch.allclose(nll, expected, rtol=1e-6, atol=1e-9)
    assert greedy.tolist() == [True] * 3 + [False] + [True] * 3


def test_standard_error_is_the_spread_of_resampled_windows():
    """Against the bootstrap over windows, of which the delta method is the first-order answer."""
    draw = random.Random(3)
    counts = [8] * 60 + [3]
    result = PerplexityResult(
        window_nll=tuple(n * draw.gauss(2.0, 0.3) for n in counts), window_tokens=tuple(counts), context=8, stride=8, bos=True
    )
    values = []
    for _ in range(2000):
        picked = [draw.randrange(len(counts)) for _ in counts]
        values.append(math.exp(sum(result.window_nll[i] for i in picked) / sum(counts[i] for i in picked)))
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    assert result.stderr == pytest.approx(spread, rel=0.1)
    single = PerplexityResult(window_nll=(9.0,), window_tokens=(4,), context=8, stride=8, bos=True)
    assert single.stderr is None


def test_pooled_weighs_tokens_not_texts():
    short = PerplexityResult(window_nll=(4.0,), window_tokens=(1,), context=8, stride=8, bos=True)
    long = PerplexityResult(window_nll=(8.0, 1.0), window_tokens=(8, 1), context=8, stride=8, bos=True)
    assert pooled([short, long]).ppl == pytest.approx(math.exp(13 / 10))


def test_paired_rise_cancels_what_makes_a_text_hard():
    nll = (8.0, 30.0, 1.0, 15.0)
    dense = PerplexityResult(window_nll=nll, window_tokens=(10, 10, 10, 10), context=10, stride=10, bos=True)
    alike = PerplexityResult(window_nll=tuple(x + 0.1 for x in nll), window_tokens=(10,) * 4, context=10, stride=10, bos=True)
    rise = paired_rise(dense, alike)
    assert rise.rise == pytest.approx(math.exp(0.01) - 1)
    assert rise.rise == pytest.approx(alike.ppl / dense.ppl - 1)
    assert rise.stderr == pytest.approx(0, abs=1e-12)
    uneven = PerplexityResult(window_nll=(8.2, 30.0, 1.2, 15.0), window_tokens=(10,) * 4, context=10, stride=10, bos=True)
    # differences of 0.02, 0, 0.02, 0 a token: sample deviation 0.011547 over 4 windows
    assert paired_rise(dense, uneven).stderr == pytest.approx(math.exp(0.01) * 0.0115470 / 2, rel=1e-5)


def test_no_neuron_kept_equals_a_model_without_down_weights(model):
    ids = [random.Random(5).randrange(VOCAB) for _ in range(30)]
    dense = perplexity(model, ids, bos=BOS, context=8)
    masked = MaskedSelections(constant_predictors(model, math.inf))
    sparse = perplexity(model, ids, bos=BOS, context=8, selection_factory=masked)
    assert masked.counter.mlp_density() == 0.0
    assert masked.counter.head_density() == 1.0
    assert masked.counter.tokens == 8 + 8 + 8 + 8  # the last window is filled from the left
    with torch.no_grad():
        for block in model.blocks:
            block.down.weight.zero_()
    gone = perplexity(model, ids, bos=BOS, context=8)
    assert sparse.window_nll == pytest.approx(gone.window_nll, rel=1e-6)
    assert abs(sparse.ppl / dense.ppl - 1) > 0.01


def test_every_neuron_kept_equals_dense(model):
    ids = [random.Random(6).randrange(VOCAB) for _ in range(30)]
    masked = MaskedSelections(constant_predictors(model, -math.inf))
    sparse = perplexity(model, ids, bos=BOS, context=8, selection_factory=masked)
    assert masked.counter.mlp_density() == 1.0
    assert sparse == perplexity(model, ids, bos=BOS, context=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": []}, "longer text"),
        ({"ids": [3], "bos": None}, "longer text"),
        ({"context": 17}, "17 exceeds the model's 16"),
        ({"context": 0}, "context must be at least 1, not 0"),
        ({"stride": 5}, "between 1 and the context 4, not 5"),
        ({"stride": 0}, "not 0"),
    ],
)
def test_bad_input_is_named(model, changes, message):
    values = {"ids": [3, 4, 5], "bos": BOS, "context": 4} | changes
    with pytest.raises(ValueError, match=message):
        perplexity(model, values.pop("ids"), **values)


def test_nan_in_the_weights_is_an_error_not_a_number(model):
    with torch.no_grad():
        model.blocks[0].down.weight[3, 3] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        perplexity(model, [3, 4, 5], bos=BOS, context=4)
