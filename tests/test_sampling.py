"""Sampling: what is drawn, with which log-probability, and from whose random numbers."""

import math

import pytest
import torch

from dejavu.config import SamplingConfig
from dejavu.engine.sampling import Distribution, Sampler

LOGITS = torch.tensor([1.0, 4.0, 2.0, 3.5, -1.0, 0.5, 3.0])


def draws(count: int, *, index: int = 0, **settings: float | int | None) -> list[int]:
    sampler = Sampler(SamplingConfig(**settings), index=index)  # pyrefly: ignore[bad-argument-type]
    return [sampler.draw(LOGITS).token_id for _ in range(count)]


def test_greedy_takes_the_best() -> None:
    assert draws(3) == [1, 1, 1]


@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0, 7.0])
def test_logprob_is_that_of_the_full_softmax_before_temperature(temperature: float) -> None:
    sampler = Sampler(SamplingConfig(temperature=temperature, top_k=2, top_p=0.9, seed=3))
    token = sampler.draw(LOGITS)
    assert token.logprob == pytest.approx(float(LOGITS.log_softmax(0)[token.token_id]), abs=1e-6)


def test_frequencies_follow_the_softmax_at_the_temperature() -> None:
    counts = torch.bincount(torch.tensor(draws(4000, temperature=2.0, seed=1)), minlength=7) / 4000
    assert (counts - (LOGITS / 2).softmax(0)).abs().max() < 0.03


def test_top_k_keeps_exactly_k() -> None:
    assert set(draws(500, temperature=5.0, top_k=3, seed=1)) == {1, 3, 6}
    assert set(draws(20, temperature=5.0, top_k=1, seed=1)) == {1}
    assert set(draws(500, temperature=5.0, top_k=100, seed=1)) == set(range(7))
    tied = Sampler(SamplingConfig(temperature=1.0, top_k=2, seed=0))
    assert len({tied.draw(torch.zeros(9)).token_id for _ in range(200)}) == 2


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    prob = LOGITS.softmax(0).sort(descending=True).values
    first, second = float(prob[0]), float(prob[0] + prob[1])
    assert set(draws(500, temperature=1.0, top_p=first - 1e-3, seed=1)) == {1}
    assert set(draws(500, temperature=1.0, top_p=first + 1e-3, seed=1)) == {1, 3}
    assert set(draws(500, temperature=1.0, top_p=second + 1e-3, seed=1)) == {1, 3, 6}
    assert set(draws(500, temperature=1.0, top_p=1e-9, seed=1)) == {1}
    assert set(draws(2000, temperature=3.0, top_p=1.0, seed=1)) == set(range(7))


@pytest.mark.parametrize("top_p", [5e-324, 1e-300, 1e-17, 1e-16, 0.1, 1 - 1e-16, 1.0])
@pytest.mark.parametrize("top_k", [1, 3, 7, None])
@pytest.mark.parametrize("spread", [0.0, 1e-12, 1.0, 50.0])
def test_some_token_is_left_whatever_is_cut(top_p: float, top_k: int | None, spread: float) -> None:
    """Also where 1 - top_p is 1, and where all weigh the same."""
    logits_V = spread * torch.arange(7).float()
    sampler = Sampler(SamplingConfig(temperature=1.0, top_k=top_k, top_p=top_p, seed=1))
    found = {sampler.draw(logits_V).token_id for _ in range(20)}
    assert found <= set(range(7)) and (spread < 1 or top_k != 1 or found == {6})


def test_top_p_is_taken_of_what_top_k_left() -> None:
    # Of the two best alone the first has 0.62: top_p 0.6 keeps it only. Of all seven it has 0.44, and two would be kept.
    assert set(draws(300, temperature=1.0, top_k=2, top_p=0.6, seed=1)) == {1}
    assert set(draws(300, temperature=1.0, top_p=0.6, seed=1)) == {1, 3}


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-5])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    assert set(draws(20, temperature=temperature, seed=2)) == {1}


def test_a_seed_gives_the_same_draws_whatever_else_draws() -> None:
    alone = draws(50, temperature=1.0, seed=7)
    mine, other = Sampler(SamplingConfig(temperature=1.0, seed=7)), Sampler(SamplingConfig(temperature=1.0))
    interleaved = []
    for _ in range(50):
        other.draw(LOGITS)
        interleaved.append(mine.draw(LOGITS).token_id)
        torch.rand(3)
    assert interleaved == alone == draws(50, temperature=1.0, seed=7)
    assert draws(50, temperature=1.0, seed=8) != alone


def test_choices_differ_and_choice_0_is_the_lone_one() -> None:
    choices = [draws(50, index=index, temperature=1.0, seed=7) for index in range(3)]
    assert choices[0] == draws(50, temperature=1.0, seed=7)
    assert len({tuple(choice) for choice in choices}) == 3


def test_without_a_seed_draws_are_fresh() -> None:
    assert draws(60, temperature=1.0) != draws(60, temperature=1.0)


@pytest.mark.parametrize("seed", [5, None])
def test_the_global_random_state_is_untouched(seed: int | None) -> None:
    before = torch.get_rng_state()
    draws(5, temperature=1.0, top_k=3, top_p=0.9, seed=seed)
    draws(5, temperature=1.0, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_k", [None, 2])
def test_logits_that_are_no_numbers_are_refused(temperature: float, top_k: int | None) -> None:
    sampler = Sampler(SamplingConfig(temperature=temperature, top_k=top_k, seed=0))
    with pytest.raises(ValueError, match="NaN"):
        sampler.draw(torch.tensor([0.0, math.nan, 1.0]))
    with pytest.raises(ValueError, match="NaN"):
        sampler.draw(torch.tensor([0.0, math.inf, 1.0]))


def test_low_precision_logits() -> None:
    assert Sampler(SamplingConfig()).draw(LOGITS.bfloat16()).token_id == 1


def test_the_likeliest_come_first_and_the_smaller_id_at_ties() -> None:
    logprob_V = LOGITS.double().log_softmax(0)
    expected = [(index, pytest.approx(float(logprob_V[index]), abs=1e-12)) for index in (1, 3, 6, 2, 0, 5, 4)]
    for count in range(9):
        assert list(Distribution(LOGITS).top(count)) == expected[:count]
    assert [token_id for token_id, _ in Distribution(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])).top(3)] == [1, 3, 0]
    screened = torch.tensor([-math.inf, 1.0, -math.inf, 2.0])
    assert [token_id for token_id, _ in Distribution(screened).top(4)] == [3, 1], "what is impossible has no log-probability"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_changes_what_is_drawn_and_not_its_log_probability(temperature: float) -> None:
    sampler, found = Sampler(SamplingConfig(temperature=temperature, seed=1)), Distribution(LOGITS)
    assert {sampler.choose(found, {4: 100.0, 1: -100.0}) for _ in range(50)} == {4}
    assert found.logprob(4) == pytest.approx(float(LOGITS.log_softmax(0)[4]), abs=1e-6)
    assert 1 not in {sampler.choose(found, {1: -100.0}) for _ in range(200)}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_all_is_forbidden_nothing_is_drawn(temperature: float) -> None:
    logits_V = torch.tensor([1.0, -math.inf, 2.0])
    with pytest.raises(ValueError, match="no token is left to draw"):
        Sampler(SamplingConfig(temperature=temperature, seed=1)).choose(Distribution(logits_V), {0: -math.inf, 2: -math.inf})


def test_a_bias_is_in_the_logits_before_temperature_and_cuts() -> None:
    biased = LOGITS.double()
    biased[5] += 3.0
    settings = SamplingConfig(temperature=1.7, top_k=3, top_p=0.9, seed=5)
    one, other = Sampler(settings), Sampler(settings)
    drawn = [one.choose(Distribution(LOGITS), {5: 3.0}) for _ in range(100)]
    assert drawn == [other.choose(Distribution(biased)) for _ in range(100)] and 5 in drawn


def test_min_p_keeps_what_is_at_least_so_likely_as_the_likeliest() -> None:
    """By probabilities at the temperature: at 1 half of 0.4 keeps 0.4 and 0.3, at 2 they lie nearer, and 0.1 has half of it too."""
    logits_V = torch.tensor([0.4, 0.3, 0.19, 0.11]).log()
    for temperature, kept in ((1.0, {0, 1}), (2.0, {0, 1, 2, 3})):
        sampler = Sampler(SamplingConfig(temperature=temperature, min_p=0.5, seed=0))
        assert {sampler.draw(logits_V).token_id for _ in range(200)} == kept
    both = Sampler(SamplingConfig(temperature=2.0, min_p=0.5, top_k=2, top_p=0.999, seed=0))
    assert {both.draw(logits_V).token_id for _ in range(200)} == {0, 1}
    with pytest.raises(ValueError, match="min_p must lie in"):
        SamplingConfig(min_p=2.0)
