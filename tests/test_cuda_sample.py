"""Sampling on the device, and the decode loop that feeds its tokens back: on the CPU under Triton's interpreter, on a GPU with -m gpu."""

import dataclasses

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from conftest import Tiny
from dejavu.config import SamplingConfig
from dejavu.engine.cuda import bucket
from dejavu.engine.cuda.decode_loop import DecodeRows, joined, packed_settings
from dejavu.engine.cuda.engine import CudaEngine
from dejavu.engine.interface import Decoded
from dejavu.engine.options import EngineOptions
from dejavu.engine.sampling import Sampler
from dejavu.engine.torch_engine import TorchEngine
from dejavu.kernels.cuda.sample import (
    Ring,
    SampleSettings,
    advance_rows,
    logprob_definition,
    random_words,
    sample_definition,
    sample_rows,
    sample_scratch,
)
from dejavu.model.counts import Counts
from helpers.cuda import DEVICES, on, prefilled, slow
from helpers.engines import random_layers

SETTINGS = ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (2.0, 40, 0.6), (1e-30, 3, 0.5), (5.0, 10**6, 1.0))


def settings_of(device: str, rows: int, kinds: tuple[tuple[float, int, float], ...] = SETTINGS, *, seed: int = 0) -> SampleSettings:
    """Rows of the kinds (temperature, top_k, top_p) in turn, each with a seed of its own, at steps of their own."""
    generator = torch.Generator().manual_seed(seed)
    of_rows = [kinds[row % len(kinds)] for row in range(rows)]
    return SampleSettings(
        temperature_B=torch.tensor([kind[0] for kind in of_rows], device=device),
        top_k_B=torch.tensor([kind[1] for kind in of_rows], dtype=torch.int32, device=device),
        top_p_B=torch.tensor([kind[2] for kind in of_rows], device=device),
        seed_B=torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator).to(device),
        step_B=(torch.arange(rows, dtype=torch.int32) * 3).to(device),
    )


def sampled(logits_BV: Tensor, settings: SampleSettings) -> list[int]:
    """The tokens of one launch, whose log-probabilities are checked here; the steps of `settings` rise."""
    rows, vocab = logits_BV.shape
    token_B = torch.full((rows,), -7, dtype=torch.int32, device=logits_BV.device)
    logprob_B = torch.full((rows,), 7.0, device=logits_BV.device)
    sample_rows(logits_BV, settings, sample_scratch(rows, vocab, logits_BV.device), token_B, logprob_B)
    expected_B = logprob_definition(logits_BV, token_B)
    torch.testing.assert_close(logprob_B.double().cpu(), expected_B, rtol=1e-6, atol=1e-5, equal_nan=True)
    return token_B.tolist()


def logits_of(rows: int, vocab: int, device: str, *, seed: int = 1) -> Tensor:
    """Random logits of few different values: every row has ties, also of its best."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * 4).round().div(2).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [2, 7, 1024, 1025, 5003])
def test_greedy_is_the_first_of_the_best(device: str, vocab: int) -> None:
    logits_BV = logits_of(3, vocab, device)
    logits_BV[1] = -0.5  # all the same
    logits_BV[2, vocab - 1] = 50.0
    settings = settings_of(device, 3, ((0.0, 0, 1.0), (0.0, 2, 0.5), (0.0, 0, 1.0)))
    first = [int((row_V == row_V.max()).nonzero()[0]) for row_V in logits_BV]
    assert sampled(logits_BV, settings) == first == [first[0], 0, vocab - 1]
    assert settings.step_B.tolist() == [1, 4, 7]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [13, slow(1301)])
def test_draws_equal_the_definition_given_the_same_numbers(device: str, vocab: int) -> None:
    """Greedy, free, top_k, top_p and both, over logits full of ties."""
    logits_BV, settings = logits_of(14, vocab, device), settings_of(device, 14)
    word_BV = random_words(settings.seed_B, settings.step_B, vocab)
    expected = sample_definition(logits_BV, settings, word_BV).tolist()
    assert sampled(logits_BV, settings) == expected


@pytest.mark.parametrize("device", DEVICES)
def test_cuts_cross_chunks_of_a_long_row(device: str) -> None:
    """Ties on both sides of a chunk's end, of which only some are kept."""
    logits_BV = torch.zeros(3, 4100, device=device)
    logits_BV[:, 4090:4099] = 9.0
    settings = settings_of(device, 3, ((3.0, 7, 1.0), (3.0, 0, 1e-4), (3.0, 8, 0.5)))
    word_BV = random_words(settings.seed_B, settings.step_B, 4100)
    expected = sample_definition(logits_BV, settings, word_BV).tolist()
    assert sampled(logits_BV, settings) == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [(0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 3, 0.9)], ids=str)
def test_rows_that_are_not_numbers_give_no_token(device: str, kind: tuple[float, int, float]) -> None:
    logits_BV = torch.randn(5, 1030, generator=torch.Generator().manual_seed(0))
    logits_BV[0, 1029] = torch.nan
    logits_BV[1, 3] = torch.inf
    logits_BV[2] = -torch.inf
    logits_BV[3, 5:] = -torch.inf  # as where only a part of the vocabulary has logits
    found = sampled(logits_BV.to(device), settings_of(device, 5, (kind,)))
    assert found[:3] == [-1, -1, -1] and 0 <= found[3] < 5 and found[4] >= 0


def test_log_probabilities_of_a_row_in_blocks_are_those_of_the_host() -> None:
    """Blocks that are far below, at -inf, and behind the best; the host's Sampler is greedy here, as the row is."""
    logits_BV = torch.randn(1, 4000, generator=torch.Generator().manual_seed(2)) * 3
    logits_BV[0, :1024] -= 200
    logits_BV[0, 1024:2048] = -torch.inf
    settings, token_B, logprob_B = settings_of("cpu", 1, ((0.0, 0, 1.0),)), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    sample_rows(logits_BV, settings, sample_scratch(1, 4000, torch.device("cpu")), token_B, logprob_B)
    expected = Sampler(SamplingConfig()).draw(logits_BV[0])
    assert (int(token_B), float(logprob_B)) == (expected.token_id, pytest.approx(expected.logprob, abs=1e-5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "layers"), [(3, 5), (2, 300)], ids=str)
def test_what_a_step_made_goes_into_the_next_place_of_the_ring(device: str, rows: int, layers: int) -> None:
    """Of many layers, more counts than the kernel copies at a time."""
    ring = Ring(
        token_NB=torch.zeros(3, rows, dtype=torch.int32, device=device),
        logprob_NB=torch.zeros(3, rows, device=device),
        counts_NMBL=torch.zeros(3, 2, rows, layers, dtype=torch.int32, device=device),
    )
    made = torch.ones(1, dtype=torch.int32, device=device)
    inputs_3B = torch.tensor([[9] * rows, [0, 7, 1][:rows], [5] * rows], dtype=torch.int32, device=device)
    token_B = torch.tensor([-1, 4, 6][:rows], dtype=torch.int32, device=device)
    logprob_B = torch.tensor([torch.nan, -1.5, -2.5][:rows], device=device)
    counts_MBL = torch.arange(2 * rows * layers, dtype=torch.int32, device=device).view(2, rows, layers) + 1
    advance_rows(token_B, logprob_B, counts_MBL, inputs_3B, ring, made, padding=7)
    assert made.tolist() == [2] and ring.token_NB.tolist() == [[0] * rows, token_B.tolist(), [0] * rows]
    torch.testing.assert_close(ring.logprob_NB[1], logprob_B, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ring.counts_NMBL[1], counts_MBL) and not ring.counts_NMBL[[0, 2]].any()
    assert inputs_3B[:, :2].tolist() == [[0, 9], [0, 7], [6, 5]]  # the padding row stays


def chi_square(counts_V: Tensor, probability_V: Tensor) -> float:
    expected_V = probability_V * counts_V.sum()
    return float(((counts_V - expected_V) ** 2 / expected_V).sum())


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_draws_follow_the_softmax_at_the_temperature(device: str) -> None:
    """Chi square with 5 degrees of freedom exceeds 25.7 once in 10000 times; the seeds are fixed."""
    logits_V = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, 1.5])
    rows = 20000 if device == "cuda" else 150
    settings = settings_of(device, rows, ((2.0, 0, 1.0),))
    logits_BV = logits_V.expand(rows, 6).contiguous().to(device)
    found = torch.tensor([sampled(logits_BV, settings) for _ in range(2)])  # two steps of each seed
    assert chi_square(found.flatten().bincount(minlength=6), (logits_V / 2).softmax(0)) < 25.7


def test_the_definition_follows_the_softmax() -> None:
    """Many more draws than the interpreter can make: the random numbers, and their noise in the tail."""
    logits_V, rows = torch.tensor([0.0, 3.0, -4.0, -2.0, 1.0, -1.0]), 5000
    settings = settings_of("cpu", rows, ((1.0, 0, 1.0),))
    settings.step_B.fill_(4)
    word_BV = random_words(settings.seed_B, settings.step_B, 6)
    found = sample_definition(logits_V.expand(rows, 6), settings, word_BV)
    assert chi_square(found.bincount(minlength=6), logits_V.softmax(0)) < 25.7


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("kind", "allowed"),
    [
        ((9.0, 3, 1.0), {1, 3, 6}),
        ((9.0, 1, 1.0), {1}),
        slow((1.0, 0, 0.42), {1}),
        slow((1.0, 0, 0.46), {1, 3}),
        ((1.0, 2, 0.6), {1}),  # the share is taken of what top_k left: 0.62 of two, 0.44 of seven
        slow((1.0, 0, 0.6), {1, 3}),
        slow((9.0, 0, 1e-9), {1}),
    ],
    ids=str,
)
def test_cuts_keep_exactly_what_they_should(device: str, kind: tuple[float, int, float], allowed: set[int]) -> None:
    logits_BV = torch.tensor([1.0, 4.0, 2.0, 3.5, -1.0, 0.5, 3.0], device=device).expand(8, 7).contiguous()
    assert set(sampled(logits_BV, settings_of(device, 8, (kind,)))) == allowed


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [(1.0, 2, 1.0), slow((1.0, 0, 0.17)), slow((1.0, 8, 0.2))], ids=str)
def test_of_equals_no_more_are_kept_than_needed(device: str, kind: tuple[float, int, float]) -> None:
    assert set(sampled(torch.zeros(10, 9, device=device), settings_of(device, 10, (kind,)))) == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_rows_token_depends_on_its_seed_and_step_alone(device: str) -> None:
    logits_BV, settings = logits_of(7, 1301, device), settings_of(device, 7)
    logits_BV[1:] = torch.randn(6, 1301, generator=torch.Generator().manual_seed(5)).to(device)
    alone = []
    for row in range(7):
        own = dataclasses.replace(settings, **{name: getattr(settings, name)[row : row + 1].clone() for name in settings.__slots__})
        alone += sampled(logits_BV[row : row + 1], own)
    first = sampled(logits_BV, settings)
    assert first == alone
    again = sampled(logits_BV, settings)  # the steps have risen
    assert again[0] == first[0] and again[1] != first[1]


def test_settings_reach_the_kernels_as_they_were_given() -> None:
    """Through the words that one copy brings to the device: seeds of 64 bits, temperatures beyond fp32, no cuts as none."""
    given = [
        SamplingConfig(temperature=0.7, top_k=5, top_p=0.9, seed=1),
        SamplingConfig(temperature=1e-300, seed=1),
        SamplingConfig(temperature=1e300, top_k=10**12, seed=2),
        SamplingConfig(temperature=1.0, top_p=1e-300),
    ]
    rows = DecodeRows(8, 96, 2, 8, torch.device("cpu"))
    rows.words.copy_(torch.from_numpy(packed_settings(given, [3, 4, 5, 6], 8)))
    settings = rows._settings
    assert settings.temperature_B.tolist() == pytest.approx([0.7, 0, 1e30, 1, 0, 0, 0, 0])
    assert settings.top_k_B.tolist() == [5, 0, 2**31 - 1, 0, 0, 0, 0, 0]
    assert settings.top_p_B[:3].tolist() == pytest.approx([0.9, 1, 1]) and 0 < settings.top_p_B[3] < 1e-30
    assert settings.step_B.tolist() == [3, 4, 5, 6, 0, 0, 0, 0]
    seeds = settings.seed_B.tolist()
    assert seeds[0] == seeds[1] and len(set(seeds[:4])) == 3 and seeds[4:] == [0] * 4
    assert (settings.seed_B[:4].abs() > 2**40).all()
    rows.words.copy_(torch.from_numpy(packed_settings(given[:2], [3, 3], 8, [0, 1])))
    assert settings.seed_B[0] == seeds[0] and settings.seed_B[1] not in seeds  # choices of one request


def test_parts_are_joined_by_token_and_by_row() -> None:
    """Of rows that ran apart no union is known, and the most layers that fell back count."""

    def part(start: int, fallback: int) -> Decoded:
        ids_NB = torch.arange(start, start + 4).view(2, 2)
        counts_NBL = ids_NB[..., None].repeat(1, 1, 3)
        return Decoded(
            token_NB=ids_NB, logprob_NB=-ids_NB.float(), counts=Counts(neurons=counts_NBL, heads=counts_NBL), union_NL=counts_NBL[:, 0],
            fallback_layers=fallback,
        )  # fmt: skip

    later, merged = joined([part(0, 1), part(4, 1)], dim=0), joined([part(0, 1), part(4, 2)], dim=1)
    assert later.token_NB.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]] and merged.token_NB.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert later.union_NL is not None and later.union_NL[:, 0].tolist() == [0, 2, 4, 6] and merged.union_NL is None
    assert (later.fallback_layers, merged.fallback_layers) == (1, 2) and later.counts.kept_inputs is None
    assert later.cpu().fallback_layers == 1, "what is no tensor stays"


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "rows", "crossing"), [slow("opt", 3, 8), ("llama", 1, 7)])
def test_decode_equals_greedy_steps(
    tiny: Tiny, device: str, family: str, rows: int, crossing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several pages, from the short step into the long one on the way, a ring that fills up; then on with a step. Tokens,
    log-probabilities, counts and unions are those of the torch engine."""
    monkeypatch.setattr(bucket, "SHORT", crossing)
    monkeypatch.setattr(bucket, "RING", 2)
    model = tiny(family)
    layers, slots, tokens = random_layers(model, mlp=1, heads=1), [2, 0, 1][:rows], [10, 23, 33][:rows]
    reference = prefilled(TorchEngine(model, layers, EngineOptions(num_slots=4, page_size=3)))
    engine = prefilled(CudaEngine(on(model, device), layers, EngineOptions(num_slots=4, page_size=3), crossover=False))
    expected, steps = [tokens], []
    for _ in range(4):
        steps.append(reference.step(expected[-1], slots))
        expected.append(steps[-1].logits_BV.argmax(-1).tolist())
    assert expected[1] != expected[3], "a text that repeats itself would hide a ring that does not turn"
    pages = list(engine._cache._tables[3])
    engine._cache.k_LPGSK.nan_to_num_()  # memory that was never written may be NaN, which differs from itself
    before = engine._cache.k_LPGSK[:, pages].clone()
    found = engine.decode(tokens, slots, 3)
    assert found.token_NB.dtype == torch.int64 and found.token_NB.device.type == device
    found = found.cpu()
    assert found.token_NB.tolist() == expected[1:4]
    for index, step in enumerate(steps[:3]):
        logprob_B = logprob_definition(step.logits_BV, found.token_NB[index])
        torch.testing.assert_close(found.logprob_NB[index].double(), logprob_B, rtol=0, atol=2e-5)
        assert found.counts[index] == step.counts
        assert found.union_NL is not None and step.union_L is not None and torch.equal(found.union_NL[index], step.union_L)
    assert found.fallback_layers == 0
    assert [engine.length(slot) for slot in range(4)] == [4 + slot + 3 * (slot in slots) for slot in range(4)]
    if rows == 3:
        assert engine._bucket(4).inputs[:, 3].tolist() == [0, 4, 0]  # the row that fills the bucket stays where it is
    assert set(engine._bucket(rows)._steps) == {crossing, engine.info.max_positions}
    assert engine.step(expected[3], slots).logits_BV.argmax(-1).tolist() == expected[4]
    assert torch.equal(engine._cache.k_LPGSK[:, pages], before)  # a sequence that was not decoded


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_seeds_repeat_in_any_batch_and_in_any_number_of_calls(tiny: Tiny, device: str) -> None:
    model = on(tiny("opt", num_layers=1), device)
    drawn, cut = SamplingConfig(temperature=1.5, seed=3), SamplingConfig(temperature=1.0, top_k=20, top_p=0.9, seed=4)
    whole = prefilled(CudaEngine(model, None, EngineOptions(num_slots=2))).decode([5, 6], [0, 1], 3, [drawn, cut]).token_NB
    for row, config in enumerate((drawn, cut)):
        engine = prefilled(CudaEngine(model, None, EngineOptions(num_slots=2)))
        first = engine.decode([5 + row], [row], 1, [config]).token_NB
        rest = engine.decode(first[-1].tolist(), [row], 2, [config]).token_NB
        assert torch.cat([first, rest])[:, 0].tolist() == whole[:, row].tolist()
    other = prefilled(CudaEngine(model, None, EngineOptions(num_slots=2))).decode([5], [0], 3, [dataclasses.replace(drawn, seed=8)])
    choice = prefilled(CudaEngine(model, None, EngineOptions(num_slots=2))).decode([5], [0], 3, [drawn], [1])
    for different in (other, choice):
        assert different.token_NB[:, 0].tolist() != whole[:, 0].tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_what_cannot_be_decoded_is_refused_before_anything_runs(tiny: Tiny, device: str) -> None:
    model = on(tiny("opt"), device)
    engine = CudaEngine(model, None, EngineOptions(num_slots=2, page_size=4, cache_tokens=16))
    engine.prefill(0, [1, 2, 3])
    with pytest.raises(ValueError, match="at least 1 token"):
        engine.decode([1], [0], 0)
    with pytest.raises(ValueError, match="cache is full: 6 more tokens for each of 2 rows need 4 pages and 3 are free"):
        engine.decode([1, 1], [0, 1], 6)
    with pytest.raises(ValueError, match="vocabulary"):
        engine.decode([10**6], [0], 2)
    with pytest.raises(ValueError, match="context"):
        CudaEngine(model).decode([1], [0], model.config.max_positions + 1)
    assert engine.length(0) == 3 and engine.length(1) == 0 and engine.free_pages == 3
