"""Families other than OPT and Llama equal transformers on tiny random checkpoints that transformers itself saved (fp32), decode as they
compute whole sequences, and go back to a folder that transformers loads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import dejavu
from conftest import open_fp32
from dejavu.engine.backends import CAPABILITIES, make_engine, pick_backend
from dejavu.engine.options import EngineOptions
from dejavu.engine.torch_engine import TorchEngine
from dejavu.kernels.native import missing_reason
from dejavu.model.bundle import export, write_bundle
from dejavu.model.checkpoint import Checkpoint
from dejavu.model.families import config_from_hf, config_to_hf
from dejavu.model.masked import MaskedSelection
from helpers.cuda import DEVICES, cuda_engine_of, on, slow
from helpers.engines import random_layers
from helpers.transformers_models import IDS, SIZES, reference_of, saved

FALCON: dict[str, Any] = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "intermediate_size")}
ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, stated": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.5,
        "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False,
    },
    "yarn, mscale": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 1.3,
    },
}  # fmt: skip
PARTIAL: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
LONG = {"long_factor": [1.0, 2.0, 3.0, 4.0], "short_factor": [1.0, 1.1, 1.2, 1.5]}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    *(("llama, " + name, "llama", SIZES | {"rope_parameters": rope}) for name, rope in ROPES.items()),
    ("llama, drelu", "llama", SIZES),
    ("mistral", "mistral", SIZES | {"sliding_window": None}),
    ("mistral, window", "mistral", SIZES | {"sliding_window": 4}),
    ("mistral, head size", "mistral", SIZES | {"sliding_window": 4, "head_dim": 12, "hidden_act": "relu"}),
    ("qwen2", "qwen2", SIZES),
    ("qwen2, tied", "qwen2", SIZES | {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("qwen2, window", "qwen2", SIZES | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("qwen3", "qwen3", SIZES | {"head_dim": 16}),
    ("qwen3, biases", "qwen3", SIZES | {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    ("qwen3, window", "qwen3", SIZES | {"head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    ("arcee", "arcee", SIZES),
    ("arcee, biases", "arcee", SIZES | {"attention_bias": True, "mlp_bias": True, "hidden_act": "silu"}),
    ("nemotron", "nemotron", SIZES),
    ("nemotron, all", "nemotron", SIZES | {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "tie_word_embeddings": True}),
    ("nemotron, a quarter", "nemotron", SIZES | {"rope_parameters": PARTIAL | {"partial_rotary_factor": 0.25}}),
    ("phi3", "phi3", SIZES),
    ("phi3, window", "phi3", SIZES | {"sliding_window": 4}),
    ("phi3, in part", "phi3", SIZES | {"rope_parameters": PARTIAL}),
    ("phi3, longrope", "phi3", SIZES | {
        "original_max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, **LONG},
    }),
    ("gemma", "gemma", SIZES | {"head_dim": 8, "num_hidden_layers": 2}),
    ("gemma, biases", "gemma", SIZES | {
        "head_dim": 12, "attention_bias": True, "tie_word_embeddings": False, "num_hidden_layers": 2,
    }),
    ("gemma2", "gemma2", SIZES | {"head_dim": 8, "query_pre_attn_scalar": 24, "sliding_window": 4}),
    ("gemma2, no caps", "gemma2", SIZES | {
        "head_dim": 8, "sliding_window": 64, "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True,
    }),
    ("gemma2, caps that matter", "gemma2", SIZES | {
        "head_dim": 8, "query_pre_attn_scalar": 4, "sliding_window": 4, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0,
    }),
    ("gemma3", "gemma3_text", SIZES | {
        "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }),
    ("gemma3, wide", "gemma3_text", SIZES | {
        "head_dim": 8, "sliding_window": 512, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }),
    ("granite", "granite", SIZES | {
        "embedding_multiplier": 12.0, "attention_multiplier": 0.2, "residual_multiplier": 0.22, "logits_scaling": 8.0,
        "attention_bias": True,
    }),
    ("starcoder2", "starcoder2", SIZES),
    ("starcoder2, window", "starcoder2", SIZES | {"sliding_window": 4, "use_bias": False, "tie_word_embeddings": False}),
    ("stablelm", "stablelm", SIZES | {"use_qkv_bias": True}),
    ("stablelm, beside", "stablelm", SIZES | {"use_parallel_residual": True, "rope_parameters": PARTIAL}),
    ("falcon", "falcon", FALCON),
    ("falcon, as many", "falcon", FALCON | {"multi_query": False, "bias": True}),
    ("falcon, in turn", "falcon", FALCON | {"parallel_attn": False, "bias": True}),
    ("falcon, new", "falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon, new, one norm", "falcon", FALCON | {
        "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "bias": True,
    }),
    ("falcon, own head", "falcon", FALCON | {"tie_word_embeddings": False, "ffn_hidden_size": 40}),
]  # fmt: skip


@pytest.fixture(scope="module")
def opened(tok96: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PreTrainedModel, Checkpoint, Path]]:
    """Cases by name, made when first asked for."""
    made: dict[str, tuple[PreTrainedModel, Checkpoint, Path]] = {}

    class Made(dict[str, tuple[PreTrainedModel, Checkpoint, Path]]):
        def __missing__(self, name: str) -> tuple[PreTrainedModel, Checkpoint, Path]:
            kind, fields = next((kind, fields) for case, kind, fields in CASES if case == name)
            folder = tmp_path_factory.mktemp("family")
            reference = saved(reference_of(kind, fields), tok96, folder)
            if "drelu" in name:
                path = folder / "config.json"
                path.write_text(path.read_text().replace('"hidden_act": "silu"', '"hidden_act": "drelu"'))
                for layer in reference.model.layers:
                    layer.mlp.forward = lambda x, mlp=layer.mlp: mlp.down_proj(mlp.gate_proj(x).relu() * mlp.up_proj(x).relu())
            self[name] = reference, open_fp32(folder), folder
            return self[name]

    return Made(made)


NAMES = [name for name, _, _ in CASES]
EXPORTED = ("phi3, longrope", "stablelm, beside", "falcon, new")  # of the variants, those that an export writes in a way of their own


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(opened: dict[str, Any], name: str) -> None:
    reference, checkpoint, _ = opened[name]
    with torch.inference_mode():
        ours, theirs = checkpoint.model(IDS), reference(IDS).logits
    assert theirs.std() > 0.1, "a reference that says something"
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-5)
    assert checkpoint.notes == ()


@pytest.mark.parametrize("name", NAMES)
def test_decode_equals_the_masked_forward_pass(opened: dict[str, Any], name: str) -> None:
    """Dense prefill of a few tokens, then steps with predictors of neurons and heads."""
    model = opened[name][1].model
    layers = random_layers(model, mlp=1, heads=1)
    engine = TorchEngine(model, layers, EngineOptions(page_size=3))
    found = [engine.prefill(0, IDS[0, :3].tolist())] + [engine.step([token], [0]).logits_BV[0] for token in IDS[0, 3:].tolist()]
    sparse = torch.arange(IDS.shape[1])[None] >= 3
    with torch.inference_mode():
        expected = model(IDS[:1], MaskedSelection(layers, sparse))[0, 2:]
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-5, atol=5e-5)
    assert not torch.equal(expected, model(IDS[:1])[0, 2:]), "the selection matters"


@pytest.mark.parametrize("name", [name if "," not in name or name in EXPORTED else slow(name) for name in NAMES])
def test_an_export_is_loaded_by_transformers_and_by_us(opened: dict[str, Any], name: str, tmp_path: Path) -> None:
    if "drelu" in name:
        pytest.skip("transformers has no drelu")
    _, checkpoint, _ = opened[name]
    export(checkpoint.model, checkpoint.tokenizer, tmp_path / "hf")
    again = open_fp32(tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager", dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = checkpoint.model(IDS)
        torch.testing.assert_close(again.model(IDS), expected, rtol=1e-5, atol=5e-5)
        torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("name", ["nemotron", "phi3", "gemma3", "falcon, new"])
def test_a_bundle_of_it_is_loaded(opened: dict[str, Any], name: str, tmp_path: Path) -> None:
    """In our own names and layout, so that nothing comes apart or is added to."""
    _, checkpoint, _ = opened[name]
    write_bundle(checkpoint.model, checkpoint.tokenizer, tmp_path / "bundle")
    with torch.inference_mode():
        error = (open_fp32(tmp_path / "bundle").model(IDS) - checkpoint.model(IDS)).abs().mean()
        assert 0 < error < 0.1 * checkpoint.model(IDS).std()


@pytest.mark.parametrize("name", NAMES)
def test_a_backend_computes_it_or_says_what_it_does_not(opened: dict[str, Any], name: str) -> None:
    model = opened[name][1].model
    beyond = CAPABILITIES["native"].beyond(model.config)
    if pick_backend() != "native":
        pytest.skip("the native engine is not here")
    assert make_engine(model).info.backend == ("torch" if beyond else "native")
    if beyond:
        with pytest.raises(ValueError, match=f"does not compute .*{beyond[0]}.*use --backend torch"):
            make_engine(model, None, EngineOptions(backend="native"))
        return
    layers = random_layers(model, mlp=1, heads=1)
    engines = [make_engine(model, layers, EngineOptions(backend=backend, num_slots=2)) for backend in ("torch", "native")]
    for slot in range(2):
        logits = [engine.prefill(slot, IDS[slot, : 3 + slot].tolist()) for engine in engines]
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-4)
    for index in range(5, 9):
        want, found = (engine.step(IDS[:, index].tolist(), [0, 1]) for engine in engines)
        torch.testing.assert_close(found.logits_BV, want.logits_BV, rtol=1e-5, atol=1e-4)
        assert found.counts == want.counts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [name if name in ("nemotron", "gemma3", "falcon") else slow(name) for name in NAMES])
def test_the_gpu_computes_it_or_says_what_it_does_not(opened: dict[str, Any], name: str, device: str) -> None:
    """Two rows together, then each alone."""
    pytest.importorskip("triton")
    model = opened[name][1].model
    beyond = CAPABILITIES["cuda"].beyond(model.config)
    if beyond:
        with pytest.raises(ValueError, match=f"does not compute .*{beyond[0]}.*use --backend torch"):
            cuda_engine_of(on(model, device), None)
        return
    layers = random_layers(model, mlp=1, heads=1)
    engines = (
        TorchEngine(model, layers, EngineOptions(num_slots=2)),
        cuda_engine_of(on(model, device), layers, num_slots=2, crossover=False),
    )
    for slot in range(2):
        for engine in engines:
            engine.prefill(slot, IDS[slot, : 5 + slot].tolist())
    for index, rows in enumerate(([0, 1], [0], [1]), start=6):
        want, found = (engine.step([int(IDS[row, index]) for row in rows], rows) for engine in engines)
        torch.testing.assert_close(found.logits_BV.cpu(), want.logits_BV, rtol=1e-5, atol=1e-4)
        assert found.counts == want.counts


@pytest.mark.parametrize("name", ["llama, drelu", "arcee"])
def test_it_is_loaded_for_a_backend_that_computes_it(opened: dict[str, Any], name: str) -> None:
    """By name it is refused before a weight is read; auto goes to torch and says so."""
    folder = opened[name][2]
    lm = dejavu.load(folder)
    assert str(lm.generate("the cat", max_new_tokens=3)) is not None
    if name == "llama, drelu":
        said = any("does not compute an activation of the up projection" in note for note in lm.notes)
        assert lm.backend == "torch" and said != (pick_backend() == "torch")
        if pick_backend() == "native":
            with pytest.raises(ValueError, match="backend 'native' does not compute an activation of the up projection"):
                dejavu.load(folder, backend="native")
    else:
        assert lm.backend != "torch" or pick_backend() == "torch"


@pytest.mark.parametrize(("name", "backend"), [("falcon", "native"), ("llama, drelu", "torch")])
def test_what_the_gpu_does_not_compute_runs_on_the_cpu(
    opened: dict[str, Any], name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing_reason() is not None:
        pytest.skip("the native engine is not here")
    monkeypatch.setattr("dejavu.loading.pick_backend", lambda *_, **__: "cuda")
    lm = dejavu.load(opened[name][2])
    assert lm.backend == backend and any(note.startswith(f"backend {backend} on the CPU: cuda does not compute") for note in lm.notes)


def test_minicpm_is_llama_with_scales(tok96: tokenizers.Tokenizer, tmp_path: Path) -> None:
    """transformers has no such class: its Llama, with the embedding, what blocks add and the logits scaled in the weights."""
    reference = saved(reference_of("llama", SIZES | {"tie_word_embeddings": False}), tok96, tmp_path)
    path = tmp_path / "config.json"
    scales = '"model_type": "minicpm", "scale_emb": 3.0, "scale_depth": 1.4, "dim_model_base": 8'
    path.write_text(path.read_text().replace('"model_type": "llama"', scales))
    checkpoint = open_fp32(tmp_path)
    with torch.no_grad():
        reference.model.embed_tokens.weight *= 3.0
        reference.lm_head.weight *= 8 / 32
        for layer in reference.model.layers:
            layer.self_attn.o_proj.weight *= 1.4 / 3**0.5
            layer.mlp.down_proj.weight *= 1.4 / 3**0.5
        torch.testing.assert_close(checkpoint.model(IDS), reference(IDS).logits, rtol=1e-5, atol=2e-5)
    assert config_from_hf(config_to_hf(checkpoint.config)) == checkpoint.config


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("falcon", {"alibi": True}, "alibi positions are not supported"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window is off"),
        ("qwen2", {"layer_types": ["linear_attention"] * 3}, "linear_attention are not supported"),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "1 layer_types of 3 layers"),
        ("gemma2", {"use_bidirectional_attention": True}, "for encoders"),
        ("mistral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported for model_type 'mistral'"),
        ("mistral", {"sliding_window": -3}, "sliding_window must be a positive"),
    ],
)
def test_what_is_not_supported_is_said(kind: str, changes: dict[str, Any], message: str) -> None:
    hf = SIZES | {"model_type": kind, "hidden_act": "silu"} | changes
    with pytest.raises(ValueError, match=message):
        config_from_hf(hf)


# Fields as published checkpoints have them, with small sizes.
PUBLISHED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"model_type": "falcon", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 96, "multi_query": True,
         "parallel_attn": True, "new_decoder_architecture": False, "alibi": False, "bias": False, "layer_norm_epsilon": 1e-05},
        {"max_positions": 2048, "num_kv_heads": 1, "parallel": True, "shared_norm": True},
    ),
    (
        {"model_type": "falcon", "n_embed": 32, "n_head": 4, "n_layer": 2, "vocab_size": 96,
         "new_decoder_architecture": True, "num_kv_heads": 2},
        {"num_layers": 2, "num_kv_heads": 2, "shared_norm": False},
    ),
    (
        SIZES | {"model_type": "sparsellama", "hidden_act": "fatrelu", "hidden_act_param": 0.01, "rope_scaling": None},
        {"family": "llama", "activation": "fatrelu"},
    ),
    (
        SIZES | {"architectures": ["MiniCPMForCausalLM"], "hidden_act": "silu", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16},
        {"family": "minicpm", "embed_scale": 12.0, "logit_scale": 0.5},
    ),
    (SIZES | {"model_type": "mistral", "hidden_act": "silu", "max_position_embeddings": 8192}, {"window": 4096, "windowed": (0, 1, 2)}),
    (SIZES | {"model_type": "mistral", "hidden_act": "silu", "sliding_window": None, "max_position_embeddings": 8192}, {"window": None}),
    (
        SIZES | {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None},
        {"head_dim": 256, "activation": "gelu_tanh", "embed_scale": 32**0.5, "tied_head": True},
    ),
    (
        SIZES | {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "hidden_activation": None},
        {"head_dim": 256, "activation": "gelu_tanh", "window": None, "attention_cap": 50.0},
    ),
    (
        SIZES | {"model_type": "phi3", "hidden_act": "silu", "original_max_position_embeddings": 16, "sliding_window": 262144,
                 "rope_scaling": {"type": "su", **LONG}},
        {"max_positions": 16, "window": None},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("hf", "fields"), PUBLISHED, ids=lambda value: str(value.get("model_type", "")) if "vocab_size" in value else "")
def test_configs_as_published(hf: dict[str, Any], fields: dict[str, Any]) -> None:
    config = config_from_hf(hf)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": "dynamic"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' has no factor"),
        ({"rope_theta": "1e4"}, "rope_theta must be a number"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a positive number"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "1 short factors"),
        ({"model_type": "gemma3"}, "text_config"),
        ({"num_hidden_layers": 20_000}, r"num_layers must be positive and at most 1,024, not 20,000"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive whole number, not True"),
        ({"vocab_size": 1 << 63}, "vocab_size must be a positive whole number, not 9223372036854775808"),
        ({"head_dim": 1 << 24}, "4 heads of 16777216 are wider"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps must be a positive number, not inf"),
        ({"rope_theta": math.nan}, "rope_theta must be a number, not nan"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "rope factor must be positive, not 0.0"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope factor must be positive, not -2"),
        ({"rope_scaling": {"type": "linear", "factor": [2]}}, r"rope_scaling\.factor must be a number, not \[2\]"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}}, "less than high_freq_factor"),
        ({"rope_scaling": [1]}, r"rope_scaling must be an object, not \[1\]"),
        ({"architectures": 5}, "architectures must be a list of names, not 5"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, not 'yes'"),
        ({"eos_token_id": True}, "eos_token_id must be one id or a list of ids, not True"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern must be positive"),
        ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": 3}}, r"rope_parameters\.full_attention must be an object"),
    ],
)
def test_bad_values_of_a_config_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_hf(SIZES | {"model_type": "llama", "hidden_act": "silu"} | changes)
