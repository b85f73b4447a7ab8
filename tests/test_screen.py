"""The screened head: exact logits for likely clusters of the vocabulary, whatever threads and batch mates there are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from conftest import Tiny
from dejavu.bench.bytes_read import formats_of, weight_bytes
from dejavu.config import SamplingConfig
from dejavu.engine.backends import make_engine
from dejavu.engine.native.engine import NativeEngine
from dejavu.engine.options import EngineOptions
from dejavu.engine.sampling import Sampler
from dejavu.generation.pieces import Token
from dejavu.generation.rows import Row, advance
from dejavu.kernels.quantize import rounded as rounded_matrix
from dejavu.kernels.quantized import QuantizedMatrix, wide
from dejavu.kernels.screen import Screen, fit_screen, screened_logits
from dejavu.model.transformer import Transformer
from dejavu.quality.head_agreement import head_agreement
from helpers.engines import decode, ids_of, random_layers
from helpers.native import DTYPES, ISAS, NATIVE_MODELS, engine_of, needs_library
from helpers.pairs import all_pairs
from helpers.screens import screen_of


@pytest.fixture(params=NATIVE_MODELS)
def model(request: pytest.FixtureRequest, tiny: Tiny) -> Transformer:
    family, overrides = NATIVE_MODELS[request.param]
    return tiny(family, **overrides)


def made(centroids: list[list[float]], members: list[int], sizes: list[int], threshold: float) -> Screen:
    bias_C = torch.tensor(sizes).log()
    matrix = QuantizedMatrix.of(torch.tensor(centroids), "int8")
    return Screen(
        centroids=matrix, bias_C=bias_C, members_V=torch.tensor(members).int(), sizes_C=torch.tensor(sizes).int(), threshold=threshold
    )


def test_the_definition_keeps_clusters_whose_tokens_are_likely_in_the_mean() -> None:
    """Masses 1/4 and 2/4 and 1/4 of clusters of one, two and three tokens."""
    head_VE, x_E = torch.arange(6.0)[:, None], torch.tensor([1.0])
    screen = made([[0.0], [0.0], [-(torch.tensor(3.0).log().item())]], [4, 0, 2, 1, 3, 5], [1, 2, 3], 0.2)
    none = -torch.inf
    assert screened_logits(x_E, head_VE, screen).tolist() == [0, none, 2, none, 4, none]
    assert screened_logits(x_E, head_VE, screen.at(0.05)).tolist() == [0, 1, 2, 3, 4, 5]
    assert screened_logits(x_E, head_VE, screen.at(0.9)).isfinite().any(), "the likeliest cluster is always kept"


def test_clusters_are_of_rows_that_give_like_logits() -> None:
    """Rows differ most in a direction that no state has: it does not count. And the same input gives the same clusters."""
    generator = torch.Generator().manual_seed(0)
    kind_V = torch.randint(4, (400,), generator=generator)
    head_VE = torch.stack([kind_V * 5.0, 100 * torch.randn(400, generator=generator), 0.1 * torch.randn(400, generator=generator)], 1)
    moment_EE = torch.diag(torch.tensor([1.0, 1e-9, 1.0])).double()
    one, two = (fit_screen(head_VE, moment_EE, threshold=0.1, clusters=12) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.tensors, two.tensors, strict=True))
    for tokens in one.members_V.long().split(one.sizes_C.tolist()):
        assert len(kind_V[tokens].unique()) == 1


def test_the_estimated_mass_is_that_of_normally_distributed_logits() -> None:
    """Of a single cluster: mean exp(logit), whose logarithm the bias and the centroid estimate."""
    generator = torch.Generator().manual_seed(0)
    head_VE, x_NE = torch.randn(20_000, 8, generator=generator) * 0.3, torch.randn(64, 8, generator=generator)
    screen = fit_screen(head_VE, (x_NE.T @ x_NE / 64).double(), threshold=0.1, clusters=1)
    found_N = x_NE @ screen.centroids.dequantize()[0] + screen.bias_C[0]
    assert abs(float((found_N - (head_VE @ x_NE.T).logsumexp(0)).mean())) < 0.05


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_tokens_are_those_of_the_definition_with_the_logits_of_the_full_head(model: Transformer, dtype: str) -> None:
    """Bit for bit. Which clusters are kept may differ where a mass lies at the threshold, for how activations are rounded."""
    ids, layers = ids_of(3, 9), random_layers(model, mlp=0, heads=0)
    screen = screen_of(model, threshold=1 / model.config.vocab_size)
    full, screened = engine_of(model, layers, dtype=dtype), engine_of(model, layers, dtype=dtype, screen=screen)
    assert screened.info.screen is screen and full.info.screen is None
    head_VE = rounded_matrix(wide(model.head_matrix), dtype)
    prefilled = [engine.prefill(0, ids[:4]) for engine in (full, screened)]
    assert torch.equal(*prefilled), "a prompt's last token has the full head"
    for token in ids[4:]:
        full_V, found_V = (engine.step([token], [0]).logits_BV[0] for engine in (full, screened))
        kept_V = found_V.isfinite()
        assert torch.equal(found_V[kept_V], full_V[kept_V]) and (found_V[~kept_V] == -torch.inf).all()
        kept_C = [part for part in kept_V[screen.members_V.long()].split(screen.sizes_C.tolist())]
        assert all(part.all() or not part.any() for part in kept_C) and int(kept_V.sum()) > 0
        cap = model.config.logit_cap
        plain_V = cap * torch.atanh(full_V.double() / cap) if cap else full_V.double()
        # The hidden state that these logits belong to, as far as they tell it.
        x_E = torch.linalg.lstsq(head_VE.double(), plain_V[:, None], driver="gelsd").solution[:, 0].float()
        sure = [screened_logits(x_E, head_VE, screen.at(screen.threshold * factor)).isfinite() for factor in (1.3, 1 / 1.3)]
        assert (kept_V | ~sure[0]).all() and (sure[1] | ~kept_V).all()


@needs_library
def test_a_text_that_adds_to_logits_has_the_full_head(tiny: Tiny) -> None:
    """A bias raises a token that would be left out, and what is kept may be forbidden as a whole."""
    model, ids = tiny("llama"), ids_of(3, 5)
    screen = screen_of(model, threshold=0.3)

    def prepared(screen: Screen | None) -> NativeEngine:
        engine = engine_of(model, screen=screen)
        engine.prefill(0, ids[:4])
        return engine

    kept_V = prepared(screen).step(ids[4:], [0]).logits_BV[0].isfinite()
    full_V = prepared(None).step(ids[4:], [0]).logits_BV[0]
    assert torch.equal(prepared(screen).step(ids[4:], [0], full_head=True).logits_BV[0], full_V)
    cut = int((~kept_V).nonzero()[-1])
    cases: list[tuple[dict[str, Any], int]] = [
        ({"bias": {cut: 100.0}}, cut),
        ({"forbidden": frozenset(kept_V.nonzero().squeeze(1).tolist())}, int(full_V.masked_fill(kept_V, -torch.inf).argmax())),
    ]
    for added, expected in cases:
        row = Row(slot=0, sampler=Sampler(SamplingConfig()), last=ids[4], **added)
        (step,) = advance(prepared(screen), [row])
        (token,) = step.tokens_B
        assert isinstance(token, Token) and token.token_id == expected


@needs_library
@pytest.mark.parametrize(("dtype", "share", "isa"), all_pairs(DTYPES, [0.01, 1.0, 3.0], ISAS))
def test_threads_and_batch_mates_change_no_bit(tiny: Tiny, dtype: str, share: float, isa: str) -> None:
    model = tiny("llama")
    ids, screen = ids_of(11, 6), screen_of(model, threshold=share / model.config.vocab_size)
    together = engine_of(model, num_slots=3, dtype=dtype, screen=screen, threads=3, instruction_set=isa)
    for row in range(3):
        together.prefill(row, ids[row : row + 2])
    step = together.step(ids[3:6], [0, 1, 2])
    for row in range(3):
        alone = engine_of(model, dtype=dtype, screen=screen, threads=1, instruction_set=isa)
        alone.prefill(0, ids[row : row + 2])
        assert torch.equal(alone.step([ids[3 + row]], [0]).logits_BV[0], step.logits_BV[row])


@needs_library
def test_bad_screens_are_refused(tiny: Tiny) -> None:
    model = tiny("opt")
    screen = screen_of(model, threshold=0.01)
    for threshold in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="leaves tokens out below a probability between 0 and 1"):
            screen.at(threshold)
    with pytest.raises(ValueError, match="must hold each of 96 tokens once"):
        replace(screen, members_V=screen.members_V.clone().fill_(3))
    with pytest.raises(ValueError, match="a screened head is not available on backend 'torch'"):
        make_engine(model, None, EngineOptions(backend="torch", screen=screen))
    with pytest.raises(ValueError, match="is of another model"):
        engine_of(tiny("opt", vocab_size=97), screen=screen)
    model.blocks[1].norm1.bias[3] = torch.nan  # pyrefly: ignore[unsupported-operation]
    with pytest.raises(ValueError, match="logits are not finite"):
        engine_of(model, screen=screen).prefill(0, [1])


@needs_library
def test_agreement_and_missed_mass_are_those_of_both_engines(tiny: Tiny) -> None:
    """Of two windows, each from its second token on; a lower threshold misses less."""
    model = tiny("opt", hidden_size=96, num_heads=4, num_kv_heads=4, head_dim=24, max_positions=40)
    ids, screen = ids_of(17, 70), screen_of(model, threshold=0.5)
    options = EngineOptions(backend="native", dtype="int8", threads=1)
    found = {
        threshold: head_agreement(model, None, ids, replace(options, screen=screen.at(threshold)), max_tokens=60)
        for threshold in (0.5, 0.01, 1e-9)
    }
    full, screened = engine_of(model, dtype="int8", page_size=16), engine_of(model, dtype="int8", page_size=16, screen=screen)
    same, missed, kept = 0, 0.0, 0
    for window in (ids[:40], ids[40:60]):
        full_TV, screened_TV = ((engine.free(0), decode(engine, window)[0])[1][1:] for engine in (full, screened))
        same += int((full_TV.argmax(1) == screened_TV.argmax(1)).sum())
        missed += float(full_TV.softmax(1)[screened_TV == -torch.inf].sum())
        kept += int(screened_TV.isfinite().sum())
    least = found[0.5]
    assert (least["screened_head"], least["tokens"], least["agreement"]) == (0.5, 58, same / 58)
    assert least["shortlist"] == kept / 58 and least["missed"] == pytest.approx(missed / 58, rel=1e-4)
    assert least["missed"] > found[0.01]["missed"] > found[1e-9]["missed"] == 0 and found[1e-9]["agreement"] == 1
    with pytest.raises(ValueError, match="at least 2 tokens, not 1"):
        head_agreement(model, None, ids[:1], replace(options, screen=screen))


@needs_library
def test_useful_bytes_of_a_screened_head(tiny: Tiny) -> None:
    model = tiny("opt", hidden_size=96, num_heads=4, num_kv_heads=4, head_dim=24)
    screen = screen_of(model, threshold=0.01).at(0.01, tokens=10.0)
    full, screened = (formats_of(engine_of(model, dtype="int8", screen=each).info) for each in (None, screen))
    difference = weight_bytes(model.config, full) - weight_bytes(model.config, screened)
    assert difference == 96 * (96 + 4) - (len(screen.sizes_C) * (96 + 4 + 4) + 10 * (96 + 4))
