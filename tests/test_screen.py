"""The screened head: exact logits for a shortlist that low-rank scores choose, whatever threads and batch mates there are."""

from __future__ import annotations

import pytest
import torch

from conftest import Tiny
from dejavu.bench.bytes_read import formats_of, weight_bytes
from dejavu.engine.backends import make_engine
from dejavu.engine.native.weights import packed_model
from dejavu.engine.options import EngineOptions
from dejavu.kernels.quantize import rounded as rounded_matrix
from dejavu.kernels.screen import low_rank, screen_rank, screened_logits
from dejavu.model.transformer import Transformer
from dejavu.quality.head_agreement import head_agreement
from helpers.engines import decode, ids_of, random_layers
from helpers.native import DTYPES, ISAS, NATIVE_MODELS, engine_of, needs_library
from helpers.pairs import all_pairs

SHORTLIST = 17


@pytest.fixture(params=NATIVE_MODELS)
def model(request: pytest.FixtureRequest, tiny: Tiny) -> Transformer:
    family, overrides = NATIVE_MODELS[request.param]
    return tiny(family, **overrides)


def test_the_rank_is_a_third_of_the_width_in_whole_steps() -> None:
    assert [screen_rank(width) for width in (1, 33, 64, 192, 193, 384, 576, 768, 4096)] == [1, 33, 64, 64, 128, 128, 192, 256, 1408]


def test_the_approximation_is_the_best_of_its_rank() -> None:
    head_VE = torch.randn(151, 37, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 37)
    left, values, right = torch.linalg.svd(head_VE.double(), full_matrices=False)
    for rank in (1, 5, 36):
        A_RE, B_VR = low_rank(head_VE, rank)
        assert A_RE.shape == (rank, 37) and B_VR.shape == (151, rank)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        torch.testing.assert_close((B_VR @ A_RE).double(), best, rtol=0, atol=1e-5)


def test_the_definition_keeps_the_largest_scores_and_of_equal_ones_the_first() -> None:
    head_VE, x_E = torch.tensor([[1.0, 0.0], [2.0, 5.0], [2.0, -5.0], [2.0, 0.0], [0.5, 9.0]]), torch.tensor([1.0, 1.0])
    A_RE = torch.tensor([[1.0, 0.0]])
    found_V = screened_logits(x_E, head_VE, A_RE, head_VE @ A_RE.T, 2)
    assert found_V.tolist() == [-torch.inf, 7.0, -3.0, -torch.inf, -torch.inf]


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shortlist_has_the_exact_logits_of_the_best_scores(model: Transformer, dtype: str) -> None:
    """Bit for bit those of the full head; and no token left out scores higher than one kept, but for how scores are rounded."""
    ids, layers = ids_of(3, 9), random_layers(model, mlp=0, heads=0)
    full, screened = engine_of(model, layers, dtype=dtype), engine_of(model, layers, dtype=dtype, screened_head=SHORTLIST)
    assert screened.info.screened_head == SHORTLIST and full.info.screened_head == 0
    head_VE = rounded_matrix((model.embed if model.head is None else model.head).weight, dtype)
    A_RE, B_VR = (rounded_matrix(matrix, "int8") for matrix in low_rank(head_VE, screen_rank(head_VE.shape[1])))
    prefilled = [engine.prefill(0, ids[:4]) for engine in (full, screened)]
    steps = [[engine.step([token], [0]).logits_BV[0] for token in ids[4:]] for engine in (full, screened)]
    for full_V, found_V in [prefilled, *zip(*steps, strict=True)]:
        kept = found_V.isfinite()
        assert int(kept.sum()) == SHORTLIST and (found_V[~kept] == -torch.inf).all()
        assert torch.equal(found_V[kept], full_V[kept])
        # The hidden state that these logits belong to, as far as the scores depend on it.
        cap = model.config.logit_cap
        plain_V = cap * torch.atanh(full_V.double() / cap) if cap else full_V.double()
        x_E = torch.linalg.lstsq(head_VE.double(), plain_V[:, None], driver="gelsd").solution[:, 0].float()
        score_V = B_VR @ (A_RE @ x_E)
        assert score_V[kept].min() >= score_V[~kept].max() - 0.05 * score_V.std()


@needs_library
@pytest.mark.parametrize(("dtype", "count", "isa"), all_pairs(DTYPES, [1, 5, 95], ISAS))
def test_threads_and_batch_mates_change_no_bit(tiny: Tiny, dtype: str, count: int, isa: str) -> None:
    model = tiny("llama")
    ids = ids_of(11, 6)
    together = engine_of(model, num_slots=3, dtype=dtype, screened_head=count, threads=3, instruction_set=isa)
    for row in range(3):
        together.prefill(row, ids[row : row + 2])
    step = together.step(ids[3:6], [0, 1, 2])
    for row in range(3):
        alone = engine_of(model, dtype=dtype, screened_head=count, threads=1, instruction_set=isa)
        alone.prefill(0, ids[row : row + 2])
        found = alone.step([ids[3 + row]], [0]).logits_BV[0]
        assert torch.equal(found, step.logits_BV[row]) and int(found.isfinite().sum()) == count


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_of_equal_scores_the_first_tokens_are_kept(tiny: Tiny, threads: int) -> None:
    model = tiny("llama", vocab_size=101, tied_head=False)
    assert model.head is not None
    model.head.weight.zero_()
    logits_V = engine_of(model, screened_head=40, threads=threads).prefill(0, [5])
    assert logits_V[:40].eq(0).all() and logits_V[40:].eq(-torch.inf).all()


@needs_library
def test_a_screen_is_worked_out_once_for_a_packed_model(tiny: Tiny) -> None:
    model = tiny("opt")
    packed = packed_model(model, "int8")
    assert packed.screen(model) is packed.screen(model)


@needs_library
def test_bad_screens_are_refused(tiny: Tiny) -> None:
    model = tiny("opt")
    for count in (-1, 96, 1000):
        with pytest.raises(ValueError, match=f"a screened head takes 1 to 95 tokens of the vocabulary, or 0 for all, not {count}"):
            engine_of(model, screened_head=count)
    with pytest.raises(ValueError, match="a screened head is not available on backend 'torch'"):
        make_engine(model, None, EngineOptions(backend="torch", screened_head=5))
    model.blocks[1].norm1.bias[3] = torch.nan  # pyrefly: ignore[unsupported-operation]
    with pytest.raises(ValueError, match="logits are not finite"):
        engine_of(model, screened_head=5).prefill(0, [1])


@needs_library
def test_agreement_is_the_share_of_equal_choices(tiny: Tiny) -> None:
    """Against both engines asked one token at a time; a longer shortlist agrees more often, a whole one but for a token nearly always."""
    model = tiny("opt", hidden_size=96, num_heads=4, num_kv_heads=4, head_dim=24, max_positions=40)
    ids = ids_of(17, 70)
    shares = []
    for count in (1, 4, 95):
        found = head_agreement(model, None, ids, EngineOptions(screened_head=count, backend="native", dtype="int8"), max_tokens=60)
        assert (found["screened_head"], found["rank"], found["tokens"]) == (count, 64, 58), "two windows, each from its second token on"
        shares.append(found["agreement"])
    full, screened = engine_of(model, dtype="int8", page_size=16), engine_of(model, dtype="int8", page_size=16, screened_head=1)
    same = 0
    for window in (ids[:40], ids[40:60]):
        for engine in (full, screened):
            engine.free(0)
        choices = [decode(engine, window)[0].argmax(1)[1:] for engine in (full, screened)]
        same += int((choices[0] == choices[1]).sum())
    assert shares[0] == same / 58 and 0.1 < shares[0] < shares[1] < 1 and shares[2] > 0.95
    with pytest.raises(ValueError, match="at least 2 tokens, not 1"):
        head_agreement(model, None, ids[:1], EngineOptions(screened_head=4, backend="native"))


@needs_library
def test_useful_bytes_of_a_screened_head(tiny: Tiny) -> None:
    model = tiny("opt", hidden_size=96, num_heads=4, num_kv_heads=4, head_dim=24)
    full, screened = (formats_of(engine_of(model, dtype="int8", screened_head=count).info) for count in (0, 10))
    difference = weight_bytes(model.config, full) - weight_bytes(model.config, screened)
    assert difference == 96 * (96 + 4) - (64 * (96 + 4) + 96 * (64 + 4) + 10 * (96 + 4))
