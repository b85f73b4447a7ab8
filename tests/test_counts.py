"""Counts: indexed, merged, averaged and compared as one value; densities from them, by tensors and by plain sums."""

from __future__ import annotations

import types

import pytest
import torch

from dejavu.model.counts import Counts, DensityCounter, Sizes
from dejavu.model.selectors import InputPoints

POINTS = InputPoints(sizes=(4, 8, 4, 16), shares=(0.75, 0.25, 0.5, 0.5))


def counts(rows: int, *, inputs: bool) -> Counts:
    """Of two layers, all numbers different."""
    numbers = torch.arange(1, 12 * rows + 1)
    kept = numbers[4 * rows :].view(rows, 2, 4) if inputs else None
    return Counts(neurons=numbers[: 2 * rows].view(rows, 2), heads=numbers[2 * rows : 4 * rows].view(rows, 2), kept_inputs=kept)


def sizes(*, inputs: bool) -> Sizes:
    return types.SimpleNamespace(num_layers=2, num_neurons=16, num_heads=8, input_points=POINTS if inputs else None)


@pytest.mark.parametrize("inputs", [False, True])
def test_what_is_taken_apart_and_put_together_is_the_same(inputs: bool) -> None:
    whole = counts(3, inputs=inputs)
    assert Counts.stack([whole[row] for row in range(3)]) == whole == Counts.cat([whole[:1], whole[1:]])
    assert whole != whole.mean()[None] and whole[0] != whole[1] and (whole[0].kept_inputs is not None) == inputs
    assert torch.equal(whole.mean().neurons, whole.neurons.double().mean(0)) and whole.mean().heads.dtype == torch.float64
    assert whole != counts(3, inputs=not inputs) and whole.cpu() == whole and whole != "another thing"


@pytest.mark.parametrize("inputs", [False, True])
def test_densities_of_rows_are_means_over_layers(inputs: bool) -> None:
    whole, of = counts(3, inputs=inputs), sizes(inputs=inputs)
    mlp_BL, attention_BL = whole.densities(of)
    assert whole.mean_densities(of) == [
        pytest.approx(both) for both in zip(mlp_BL.mean(1).tolist(), attention_BL.mean(1).tolist(), strict=True)
    ]
    if not inputs:
        assert mlp_BL.tolist() == (whole.neurons / 16).double().tolist() and attention_BL.tolist() == (whole.heads / 8).double().tolist()


def test_kept_inputs_are_weighed_by_what_reads_them() -> None:
    """All neurons and heads; of the inputs half at attention, a quarter at output, all at the MLP's, none at down."""
    found = Counts(neurons=torch.tensor([16]), heads=torch.tensor([8]), kept_inputs=torch.tensor([[2, 2, 4, 0]]))
    mlp, attention = found.densities(sizes(inputs=True))
    assert mlp.tolist() == [0.5] and attention.tolist() == [0.75 / 2 + 0.25 / 4]


def test_a_counter_takes_tokens_and_sums_over_tokens() -> None:
    counter = DensityCounter(2)
    assert counter.mlp_density() is None and counter.head_density() is None
    counter.add([0.5, 1.0], [1.0, 1.0])
    counter.add([1.0, 2.0], [0.5, 0.5], 2)
    assert counter.tokens == 3 and counter.mlp_per_layer() == [0.5, 1.0] and counter.mlp_density() == 0.75
    assert counter.head_density() == pytest.approx(0.5)
