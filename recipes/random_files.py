"""Made-up checkpoints for measuring memory and loading: random weights in a form that people come with.

    python recipes/random_files.py folder opt-1.3b DIR           a Hugging Face folder in fp16
    python recipes/random_files.py gguf llama-2-7b FILE.gguf     a GGUF file in the mixture of types that llama.cpp calls Q4_K_M

In: a shape. Out: the files, with the tokenizer of opt-mini, whose vocabulary is filled up with tokens that no text has. Blocks of a GGUF
file are drawn as bytes, with small fp16 scales: no quantiser is needed, and every bit pattern occurs.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from dejavu.bench.models.random import SHAPES, shape_of
from dejavu.config import ModelConfig
from dejavu.files import new_folder, write_json
from dejavu.model.bundle import bundled_folder
from dejavu.model.families import FAMILIES, config_to_hf, is_norm_weight, is_transposed, parameter_shapes
from dejavu.model.tokenizer import load_tokenizer

TOKENIZER = "opt-mini"
# Of each type: fp16 fields in a block of 256 values by their first byte, with the size that gives weights a standard deviation near 0.02.
SCALES = {"Q4_K": {0: 1e-4, 2: 7.5e-4}, "Q6_K": {208: 1.5e-5}}
GGUF_MODULES = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "norm1": "attn_norm",
    "norm2": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


def llama_2_7b() -> ModelConfig:
    """meta-llama/Llama-2-7b-hf: public config.json."""
    return replace(SHAPES["llama-2-7b-relu"](), activation="silu", mlp_bias=False)


def write_folder(shape: str, folder: Path) -> None:
    config = shape_of(shape)
    family, generator = FAMILIES[config.family], torch.Generator().manual_seed(0)
    tensors = {}
    for name, size in parameter_shapes(config).items():
        stored = size[::-1] if is_transposed(name) else size
        values = torch.ones(stored) if is_norm_weight(name) else torch.randn(stored, generator=generator).mul_(0.02)
        tensors[family.full_name(family.foreign_name(name, config))] = values.half()
    with new_folder(folder) as partial:
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        write_json(partial / "config.json", config_to_hf(config) | {"dtype": "float16"})
        load_tokenizer(bundled_folder(TOKENIZER)).save(partial)


def blocks(kind: str, rows: int, columns: int, random: np.random.Generator) -> np.ndarray:
    """Rows of random blocks of 256 values: uint8 [rows, bytes]."""
    size, size_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = random.integers(0, 256, (rows, columns // size, size_bytes), dtype=np.uint8)
    for first, scale in SCALES[kind].items():
        drawn = (random.random((rows, columns // size, 1), dtype=np.float32) + 0.5) * scale
        raw[:, :, first : first + 2] = drawn.astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


def write_q4_k_m(path: Path) -> None:
    config, random = llama_2_7b(), np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    _add_tokenizer(writer, config.vocab_size)
    for name, size in parameter_shapes(config).items():
        stored = _gguf_name(name)
        if len(size) == 1:
            writer.add_tensor(stored, np.ones(size, dtype=np.float32))
            continue
        rows, columns = size[::-1] if is_transposed(name) else size
        # The mixture: Q6_K for the head, and for v and down of half of the layers.
        fine = name == "head.weight" or (name.split(".")[-2] in ("v", "down") and int(name.split(".")[1]) % 2 == 0)
        kind = "Q6_K" if fine else "Q4_K"
        writer.add_tensor(stored, blocks(kind, rows, columns, random), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(ours: str) -> str:
    parts = ours.split(".")
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{GGUF_MODULES[parts[2]]}.{parts[3]}"
    return {"embed": "token_embd", "final_norm": "output_norm", "head": "output"}[parts[0]] + "." + parts[1]


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    content = json.loads((bundled_folder(TOKENIZER) / "tokenizer.json").read_text(encoding="utf-8"))
    ids = content["model"]["vocab"] | {added["content"]: added["id"] for added in content["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    unused = [f"<unused{number}>" for number in range(len(tokens), vocab_size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + unused)
    kinds = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.UNUSED] * len(unused)
    for added in content["added_tokens"]:
        kinds[added["id"]] = gguf.TokenType.CONTROL
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    special = content["added_tokens"][0]["id"]
    writer.add_bos_token_id(special)
    writer.add_eos_token_id(special)


if __name__ == "__main__":
    what, shape, where = sys.argv[1:]
    if what == "folder":
        write_folder(shape, Path(where))
    elif (what, shape) == ("gguf", "llama-2-7b"):
        write_q4_k_m(Path(where))
    else:
        raise SystemExit(__doc__)
