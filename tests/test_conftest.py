"""The fixtures themselves: what tests of every part rely on."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer

from conftest import Brute, Tiny


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_tiny_is_random_and_repeatable(tiny: Tiny, brute: Brute, family: str) -> None:
    ids = [2, 5, 7, 11, 13]
    first, same, other = tiny(family), tiny(family), tiny(family, seed=1)
    logprobs_TV = brute(first, ids)
    assert logprobs_TV.shape == (5, 96) and logprobs_TV.isfinite().all()
    assert torch.equal(logprobs_TV, brute(same, ids)) and not torch.equal(logprobs_TV, brute(other, ids))
    assert torch.allclose(logprobs_TV.exp().sum(-1), torch.ones(5))
    assert 0.1 < logprobs_TV.std() < 3, "neither flat nor decided"
    assert tiny(family, num_layers=3, head_dim=16).config.head_dim == 16


def test_tok96_round_trips_and_fits_the_tiny_models(tok96: Tokenizer) -> None:
    text = "The cat sat, then ran (2 times)\nto that hat!"
    encoding = tok96.encode(text)
    assert encoding.ids[0] == 2 and max(encoding.ids) < 96 and len(encoding.ids) < len(text)
    assert tok96.decode(encoding.ids) == text
    assert tok96.encode(text, add_special_tokens=False).ids == encoding.ids[1:]


@pytest.mark.usefixtures("poisoned_empty")
def test_poisoned_empty_fills_with_nan() -> None:
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(5, dtype=torch.bfloat16).isnan().all()
    assert (torch.empty(2, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
