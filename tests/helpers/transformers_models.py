"""Tiny random models of transformers, saved as it saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": None,
}
IDS = torch.tensor([[2, 5, 7, 11, 13, 17, 19, 23, 29], [2, 31, 37, 41, 43, 47, 53, 59, 61]])


def saved(model: PreTrainedModel, tokenizer: tokenizers.Tokenizer, folder: Path) -> PreTrainedModel:
    """A model of random values, saved with a tokenizer."""
    randomise(model).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Random values in *every* parameter: transformers starts biases at 0 and norms at 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(centre, 0.2 if parameter.dim() == 1 else 0.3, generator=generator)
    return model.eval()


def reference_of(kind: str, fields: dict[str, Any]) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model
