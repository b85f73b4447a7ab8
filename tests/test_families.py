"""Every family equals transformers on tiny random checkpoints that transformers itself saved (fp32, 1e-5), and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from conftest import Tiny, open_fp32
from dejavu.model.checkpoint import Checkpoint
from dejavu.model.families import config_from_hf, config_to_hf, foreign_targets, parameter_shapes
from dejavu.model.layers import inverse_frequencies
from helpers.transformers_models import IDS, saved

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
OPT: dict[str, Any] = COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32}
LLAMA: dict[str, Any] = COMMON | {"intermediate_size": 48, "num_key_value_heads": 4}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 5e5,
}


def assert_equal_logits(folder: Path, reference: PreTrainedModel) -> Checkpoint:
    checkpoint = open_fp32(folder)
    with torch.inference_mode():
        ours, theirs = checkpoint.model(IDS), reference(IDS).logits
    assert theirs.std() > 0.1, "a reference that says something"
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    return checkpoint


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"word_embed_proj_dim": 16, "do_layer_norm_before": False},  # the layout of opt-350m
        {"do_layer_norm_before": False},
        {"_remove_final_layer_norm": True},
        {"word_embed_proj_dim": 16},
        {"enable_bias": False},
        {"layer_norm_elementwise_affine": False},
        {"enable_bias": False, "layer_norm_elementwise_affine": False, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
        {"tie_word_embeddings": False},
        {"activation_function": "gelu"},
        {"activation_function": "gelu_new"},
    ],
    ids=str,
)
def test_opt_equals_transformers(tmp_path: Path, tok96: tokenizers.Tokenizer, flags: dict[str, Any]) -> None:
    config = OPTConfig(**(OPT | flags))
    checkpoint = assert_equal_logits(tmp_path, saved(OPTForCausalLM(config), tok96, tmp_path))
    assert checkpoint.config.tied_head == flags.get("tie_word_embeddings", True)
    assert checkpoint.config.final_norm == (flags.get("do_layer_norm_before", True) and "_remove_final_layer_norm" not in flags)
    assert config_from_hf(config_to_hf(checkpoint.config)) == checkpoint.config


@pytest.mark.parametrize(
    "flags",
    [
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1, "head_dim": 16},
        {"head_dim": 16},
        {"hidden_act": "relu"},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2, "head_dim": 16},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"rope_parameters": LLAMA3},
    ],
    ids=str,
)
def test_llama_equals_transformers(tmp_path: Path, tok96: tokenizers.Tokenizer, flags: dict[str, Any]) -> None:
    reference = saved(LlamaForCausalLM(LlamaConfig(**(LLAMA | flags))), tok96, tmp_path)
    config = assert_equal_logits(tmp_path, reference).config
    assert (config.tied_head, config.head_dim) == (flags.get("tie_word_embeddings", False), flags.get("head_dim", 8))
    assert config_from_hf(config_to_hf(config)) == config


class Elementwise(torch.nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("fields", "function"),
    [
        ({"hidden_act": "relu2"}, lambda g: g.relu() ** 2),
        ({"hidden_act": "fatrelu", "hidden_act_param": 0.3}, lambda g: g * (g > 0.3)),
    ],
    ids=["relu2", "fatrelu"],
)
def test_activations_that_transformers_llama_lacks(
    tmp_path: Path, tok96: tokenizers.Tokenizer, fields: dict[str, Any], function: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    reference = saved(LlamaForCausalLM(LlamaConfig(**LLAMA)), tok96, tmp_path)
    for layer in reference.model.layers:
        layer.mlp.act_fn = Elementwise(function)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert_equal_logits(tmp_path, reference)


def test_the_activation_of_the_config_is_used() -> None:
    hf = LLAMA | {"model_type": "llama", "hidden_act": "fatrelu", "hidden_act_param": 0.01}
    config = config_from_hf(hf)
    assert (config.activation, config.activation_threshold) == ("fatrelu", 0.01)
    assert config_from_hf(config_to_hf(config)) == config
    assert config_from_hf(hf | {"hidden_act": "relu2"}).activation == "relu2"
    with pytest.raises(ValueError, match="hidden_act_param"):
        config_from_hf({key: value for key, value in hf.items() if key != "hidden_act_param"})
    with pytest.raises(ValueError, match=r"'mish'.*supported.*fatrelu.*relu2.*silu"):
        config_from_hf(hf | {"hidden_act": "mish"})
    with pytest.raises(ValueError, match=r"'mish'.*supported"):
        config_from_hf(OPT | {"model_type": "opt", "activation_function": "mish"})


ROPE_STYLES = [
    ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    (
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    ({"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}, {"rope_parameters": LLAMA3}),
]


@pytest.mark.parametrize(("old", "new"), ROPE_STYLES, ids=["default", "linear", "llama3"])
def test_old_and_new_rope_configs_are_bit_equal(
    tmp_path: Path, tok96: tokenizers.Tokenizer, old: dict[str, Any], new: dict[str, Any]
) -> None:
    saved(LlamaForCausalLM(LlamaConfig(**LLAMA)), tok96, tmp_path)
    path = tmp_path / "config.json"
    bare = {k: v for k, v in json.loads(path.read_text()).items() if not k.startswith("rope")}
    logits = []
    for style, dtype_key in ((old, "torch_dtype"), (new, "dtype")):
        path.write_text(json.dumps({k: v for k, v in bare.items() if k != "dtype"} | style | {dtype_key: "float32"}))
        logits.append(open_fp32(tmp_path).model(IDS))
    path.write_text(json.dumps(bare))
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], open_fp32(tmp_path).model(IDS)), "the setting matters"


def test_rope_theta_reaches_the_frequencies_and_two_values_are_refused() -> None:
    hf = LLAMA | {"model_type": "llama", "hidden_act": "silu", "rope_parameters": {"rope_type": "default", "rope_theta": 500000}}
    rope = config_from_hf(hf).rope
    assert rope is not None and inverse_frequencies(rope, 8)[1].item() == pytest.approx(0.03760603, rel=1e-6)
    assert config_from_hf(hf | {"rope_theta": 500000}).rope == rope, "both, in agreement"
    with pytest.raises(ValueError, match=r"rope_theta: 500000 and 10000"):
        config_from_hf(hf | {"rope_theta": 10000.0})
    with pytest.raises(ValueError, match=r"rope_type: 'default' and 'linear'"):
        config_from_hf(hf | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    with pytest.raises(ValueError, match=r"'su2' is not supported; supported: default, linear, dynamic, llama3, yarn, longrope"):
        config_from_hf(hf | {"rope_parameters": {"rope_type": "su2", "rope_theta": 1e4, "factor": 2.0}})
    for place in ({"partial_rotary_factor": 0.5}, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}):
        with pytest.raises(ValueError, match="partial_rotary_factor 0.5"):
            config_from_hf(hf | place)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mamba"},
            r"model_type 'mamba' is not supported; supported: arcee, falcon, .* llama, .* opt, .* qwen3",
        ),
        ({"model_type": None}, r"model_type None is not supported"),
        ({"hidden_size": None}, r"no 'hidden_size'"),
        ({"num_hidden_layers": -1}, r"num_hidden_layers must be a positive whole number, not -1"),
        ({"num_attention_heads": 5}, r"hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 3}, r"num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised"),
        ({"eos_token_id": "</s>"}, r"eos_token_id.*'</s>'"),
        ({"rope_theta": 10**400}, r"rope_theta must be a number"),
    ],
)
def test_bad_configs_are_named(changes: dict[str, Any], message: str) -> None:
    good = LLAMA | {"model_type": "llama", "hidden_act": "silu", "head_dim": None}
    assert config_from_hf(good).head_dim == 8
    with pytest.raises(ValueError, match=message):
        config_from_hf(good | changes)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_every_parameter_has_one_foreign_name(tiny: Tiny, family: str) -> None:
    config = tiny(family, tied_head=False, num_layers=12).config
    targets = foreign_targets(config)
    assert sorted(target.name for target in targets.values()) == sorted(parameter_shapes(config))
    assert {target.name.split(".")[-2] for target in targets.values() if target.transposed} == {"o", "down"}
