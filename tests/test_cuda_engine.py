"""The cuda engine against the torch engine and the masked forward pass: on the CPU under Triton's interpreter, on a GPU with -m gpu."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from conftest import Tiny
from dejavu.config import RopeConfig
from dejavu.engine.cuda.engine import CudaEngine
from dejavu.engine.options import EngineOptions
from dejavu.engine.torch_engine import TorchEngine
from dejavu.model.transformer import Transformer
from helpers.cuda import DEVICES, cuda_engine_of, on, slow
from helpers.engines import GEMMA, decode, ids_of, masked_forward, random_layers

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {}),
    "llama": ("llama", {}),
    "llama-relu-wide-heads": ("llama", {"activation": "relu", "head_dim": 12, "num_heads": 6, "num_kv_heads": 2, "num_layers": 3}),
    "gemma": ("llama", GEMMA),
    "partial-yarn": ("llama", {"rope": RopeConfig(partial=0.5, attention_factor=1.3), "num_kv_heads": 1}),
    "opt-three-parts": ("opt", {"hidden_size": 112, "num_heads": 4, "num_kv_heads": 4, "head_dim": 28, "intermediate_size": 70}),
}
STEPS = 2


def made(tiny: Tiny, name: str) -> Transformer:
    family, overrides = MODELS[name]
    return tiny(family, **overrides)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "mlp", "heads", "options"),
    [
        ("llama", 1, 1, {}),
        ("opt", 2, None, {}),
        ("gemma", 1, 1, {}),
        ("partial-yarn", 0, None, {}),
        *(slow(name, 1, 1, {}) for name in MODELS if name not in ("llama", "gemma")),
        slow("opt", None, None, {}),
        slow("llama", 0, 0, {}),
        slow("opt", 1, None, {"ahead": "in-line"}),
        slow("opt", 1, 1, {"ahead": "branch"}),
        slow("llama", 1, 1, {"deterministic": True}),
    ],
    ids=str,
)
def test_decode_equals_the_torch_engine(
    tiny: Tiny, name: str, device: str, mlp: int | None, heads: int | None, options: dict[str, Any]
) -> None:
    """The same selections, logits to 2e-5, after a prefill of a few pages and with steps that begin new ones."""
    model = made(tiny, name)
    layers, ids = random_layers(model, mlp=mlp, heads=heads), ids_of(1, 11 + STEPS)
    torch_engine = TorchEngine(model, layers, EngineOptions(record=True, page_size=3))
    cuda_engine = cuda_engine_of(on(model, device), layers, record=True, page_size=3, **options)
    for engine in (torch_engine, cuda_engine):
        engine.prefill(0, ids[:11])
    (expected, expected_steps), (found, steps) = decode(torch_engine, ids[11:]), decode(cuda_engine, ids[11:])
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2e-5)
    for want, step in zip(expected_steps, steps, strict=True):
        assert want.selections is not None and step.selections is not None
        for one, other in zip(want.selections[0], step.selections[0], strict=True):
            for a, b in ((one.neurons_A, other.neurons_A), (one.heads_A, other.heads_A)):
                assert (a is None) == (b is None)
                assert a is None or b is None or a.tolist() == b.tolist()
        assert step.counts == want.counts


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "dtype"), [("opt", torch.float16), ("llama", torch.bfloat16)], ids=str)
def test_low_precision_is_as_good_as_the_plain_one(tiny: Tiny, name: str, device: str, dtype: torch.dtype) -> None:
    """Against fp32 with the same rounded weights, all neurons and heads selected: no worse than twice the plain forward pass."""
    model = made(tiny, name)
    layers, ids = random_layers(model, mlp=1, heads=1, threshold=-1e9), ids_of(2, 4)
    low = on(model, device, dtype)
    exact, _ = masked_forward(low.float() if device == "cpu" else on(low, "cpu", torch.float32), layers, ids)
    low = on(model, device, dtype)
    with torch.inference_mode():
        plain = low(torch.tensor([ids], device=device))[0].cpu()
    found, _ = decode(CudaEngine(low, layers), ids)
    limit = 2 * (plain - exact).abs().max() + 0.1 * torch.finfo(dtype).eps * exact.abs().max()
    assert (found.cpu() - exact).abs().max() <= limit


@pytest.mark.parametrize("device", DEVICES)
def test_engines_share_the_models_memory(tiny: Tiny, device: str) -> None:
    model = on(tiny("opt"), device)
    first = CudaEngine(model)
    address = model.blocks[0].qkv.weight.data_ptr()
    second = CudaEngine(model, random_layers(model, mlp=1, heads=1))
    joined = [engine._model.weights[0].qkv.data_ptr() for engine in (first, second)]
    assert [model.blocks[0].q.weight.data_ptr(), *joined] == [address] * 3
    assert model.blocks[0].q.weight.data_ptr() == address


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [({"pre_norm": False, "final_norm": False}, "norms after the blocks, no final norm"), ({"embed_size": 16}, "narrower than the model")],
)
def test_an_architecture_without_kernels_is_refused(tiny: Tiny, overrides: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        CudaEngine(tiny("opt", **overrides))


def test_an_unknown_way_of_looking_ahead_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="beside, branch, in-line"):
        CudaEngine(tiny("opt"), None, EngineOptions(ahead="sideways"))


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "mlp", "heads", "options"),
    [
        *((name, 1, 1, {}) for name in MODELS),
        ("opt", None, None, {}),
        ("llama", 0, 0, {}),
        ("opt", 2, None, {}),
        ("opt", 1, 1, {"deterministic": True}),
    ],
    ids=str,
)
def test_rows_of_a_batch_equal_the_torch_engine(
    tiny: Tiny, name: str, device: str, mlp: int | None, heads: int | None, options: dict[str, Any]
) -> None:
    """Three sequences of different lengths in a bucket of four: each row selects and gives what it does alone."""
    model = made(tiny, name)
    layers = random_layers(model, mlp=mlp, heads=heads)
    prompts = [ids_of(seed, length) for seed, length in ((3, 4), (4, 9), (5, 1))]
    torch_engine = TorchEngine(model, layers, EngineOptions(record=True, page_size=3, num_slots=3))
    cuda_engine = cuda_engine_of(on(model, device), layers, record=True, page_size=3, num_slots=3, crossover=False, **options)
    for engine in (torch_engine, cuda_engine):
        for slot, prompt in enumerate(prompts):
            engine.prefill(slot, prompt)
    for index in range(2):
        tokens = [index + 7, index + 20, index + 30]
        want, found = torch_engine.step(tokens, [2, 0, 1]), cuda_engine.step(tokens, [2, 0, 1])
        torch.testing.assert_close(found.logits_BV.cpu(), want.logits_BV, rtol=0, atol=2e-5)
        assert found.counts == want.counts
        assert want.selections is not None and found.selections is not None
        for expected_row, found_row in zip(want.selections, found.selections, strict=True):
            for one, other in zip(expected_row, found_row, strict=True):
                for a, b in ((one.neurons_A, other.neurons_A), (one.heads_A, other.heads_A)):
                    assert (a is None) == (b is None)
                    assert a is None or b is None or a.tolist() == b.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_fill_a_bucket_write_nowhere_that_matters(tiny: Tiny, device: str) -> None:
    model = on(tiny("opt"), device)
    engine = CudaEngine(model, random_layers(model, mlp=1, heads=1), EngineOptions(num_slots=4, page_size=3), crossover=False)
    for slot in range(4):
        engine.prefill(slot, ids_of(slot, 5))
    k_LPGSK = engine._cache.k_LPGSK
    k_LPGSK.nan_to_num_()  # pages that were never written hold anything, and NaN differs from itself
    before, tables = k_LPGSK.clone(), [list(pages) for pages in engine._cache._tables]
    engine.step([1, 2, 3], [0, 1, 2])
    changed = sorted(set((k_LPGSK != before).any(-1).any(-1).any(-1).any(0).nonzero().squeeze(1).tolist()))
    assert changed == sorted({tables[slot][-1] for slot in (0, 1, 2)} | {tables[4][0]})
    assert tables[4][0] not in {page for slot in range(4) for page in tables[slot]}
