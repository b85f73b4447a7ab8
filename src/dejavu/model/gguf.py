"""GGUF files of the llama architecture (SmolLM2 among them): metadata to a config and a tokenizer, tensors in their own grid.

In: a `.gguf` file. Out: a Hugging Face-like config dict, tensors under plain Hugging Face names, and a Tokenizer.
Every quantisation that `gguf.quants` knows is read. llama.cpp stores the rows of q and k so that the two halves of a
rotated pair are neighbours; Hugging Face keeps the halves apart, and so do we: row (h, j, s) goes to row (h, s, j).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, pre_tokenizers
from torch import Tensor

from dejavu.config import require
from dejavu.kernels.quantized import Matrix, QuantizedMatrix
from dejavu.model.tokenizer import Tokenizer, build_tokenizer, byte_level_bpe

MODULES = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOKEN_CONTROL, TOKEN_USER_DEFINED = 3, 4
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    ),
}


class GGUFFile:
    """An open GGUF file. Raises ValueError where it cannot be read (no such file, truncated, another architecture)."""

    def __init__(self, path: Path) -> None:
        import gguf  # not needed for other files, and not everywhere

        self.path = path
        try:
            self.reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError, struct.error) as error:
            raise ValueError(f"{path} is no readable GGUF file (truncated?): {error}") from error
        self.architecture = self._field("general.architecture")
        require(self.architecture == "llama", f"{path}: GGUF architecture {self.architecture!r} is not supported; supported: llama")

    def _optional(self, key: str) -> Any:
        field = self.reader.get_field(key)
        return None if field is None else field.contents()

    def _field(self, key: str) -> Any:
        value = self._optional(key)
        require(value is not None, f"{self.path}: GGUF metadata has no {key!r}")
        return value

    def _tensor_names(self) -> set[str]:
        return {tensor.name for tensor in self.reader.tensors}

    def hf_config(self) -> dict[str, Any]:
        """The Hugging Face config that the metadata stand for."""
        names = self._tensor_names()
        key = self.architecture
        scaling = self._optional(f"{key}.rope.scaling.type")
        return {
            "model_type": "llama",
            "vocab_size": self._optional(f"{key}.vocab_size") or len(self._field("tokenizer.ggml.tokens")),
            "hidden_size": self._field(f"{key}.embedding_length"),
            "intermediate_size": self._field(f"{key}.feed_forward_length"),
            "num_hidden_layers": self._field(f"{key}.block_count"),
            "num_attention_heads": self._num_heads(),
            "num_key_value_heads": self._num_kv_heads(),
            "head_dim": self._optional(f"{key}.attention.key_length") or self._optional(f"{key}.rope.dimension_count"),
            "max_position_embeddings": self._field(f"{key}.context_length"),
            # Stored as fp32: the shortest decimal is the value that the original config spelled out.
            "rms_norm_eps": float(str(np.float32(self._field(f"{key}.attention.layer_norm_rms_epsilon")))),
            "rope_theta": float(str(np.float32(self._optional(f"{key}.rope.freq_base") or 10000.0))),
            "rope_scaling": None if scaling in (None, "none") else {"type": scaling, "factor": self._field(f"{key}.rope.scaling.factor")},
            "hidden_act": "silu",
            "attention_bias": "blk.0.attn_q.bias" in names,
            "mlp_bias": "blk.0.ffn_up.bias" in names,
            "tie_word_embeddings": "output.weight" not in names,
            "bos_token_id": self._optional("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._optional("tokenizer.ggml.eos_token_id"),
        }

    def _num_heads(self) -> int:
        return self._field(f"{self.architecture}.attention.head_count")

    def _num_kv_heads(self) -> int:
        return self._optional(f"{self.architecture}.attention.head_count_kv") or self._num_heads()

    def sizes(self) -> Counter[str]:
        """How many values are stored as which type, by its name in lower case; fp32 and fp16 as everywhere here."""
        sizes: Counter[str] = Counter()
        for tensor in self.reader.tensors:
            kind = tensor.tensor_type.name.lower()
            sizes[{"f32": "fp32", "f16": "fp16"}.get(kind, kind)] += int(tensor.n_elements)
        return sizes

    def stored_dtype(self) -> str:
        """What most values are stored as."""
        return self.sizes().most_common(1)[0][0]

    def tensors(self) -> Iterator[tuple[str, Matrix]]:
        """(plain Hugging Face name, values) of every tensor of the file: fp32, or a matrix in its own grid."""
        from gguf import quants

        heads = {"attn_q": self._num_heads(), "attn_k": self._num_kv_heads()}
        for stored in self.reader.tensors:
            parts = stored.name.split(".")
            known = MODULES.get(parts[0]) if len(parts) == 2 else LAYER_MODULES.get(parts[2]) if len(parts) == 4 else None
            if known is None:
                raise ValueError(f"{self.path}: tensor {stored.name!r} is not supported for architecture {self.architecture!r}")
            in_grid = stored.data.dtype == np.uint8 and stored.data.ndim == 2
            rows = stored.data if in_grid else quants.dequantize(stored.data, stored.tensor_type).astype(np.float32)
            held = torch.from_numpy(np.array(rows))
            if len(parts) == 4 and parts[2] in heads:
                held = _halves_apart(held, heads[parts[2]])
            name = f"{known}.{parts[1]}" if len(parts) == 2 else f"layers.{parts[1]}.{known}.{parts[3]}"
            grid = stored.tensor_type.name.lower()
            held = held.view(torch.bfloat16) if grid == "bf16" and in_grid else held
            yield name, QuantizedMatrix(grid, held, None, int(stored.shape[0])) if in_grid else held

    def tokenizer(self) -> Tokenizer:
        """The byte-level BPE tokenizer of the metadata. ValueError for another kind of tokenizer."""
        model = self._field("tokenizer.ggml.model")
        require(model == "gpt2", f"{self.path}: GGUF tokenizer {model!r} is not supported; supported: gpt2 (byte-level BPE)")
        pre = self._optional("tokenizer.ggml.pre") or "gpt-2"
        known = ", ".join(PRE_TOKENIZERS)
        require(pre in PRE_TOKENIZERS, f"{self.path}: GGUF pre-tokenizer {pre!r} is not supported; supported: {known}")
        tokens, kinds = self._field("tokenizer.ggml.tokens"), self._field("tokenizer.ggml.token_type")
        merges = [(first, second) for first, _, second in (merge.partition(" ") for merge in self._field("tokenizer.ggml.merges"))]
        backend = byte_level_bpe({token: i for i, token in enumerate(tokens)}, merges, PRE_TOKENIZERS[pre]())
        for kind, special in ((TOKEN_CONTROL, True), (TOKEN_USER_DEFINED, False)):
            added = [AddedToken(token, normalized=False, special=special) for token, of in zip(tokens, kinds, strict=True) if of == kind]
            backend.add_special_tokens(added) if special else backend.add_tokens(added)
        special = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {role: self._optional(f"tokenizer.ggml.{name}_token_id") for role, name in special.items()}
        return build_tokenizer(
            backend,
            special_tokens={role: tokens[i] for role, i in ids.items() if i is not None},
            adds_bos=bool(self._optional("tokenizer.ggml.add_bos_token")),
            chat_template=self._optional("tokenizer.chat_template"),
        )


def _halves_apart(rows: Tensor, num_heads: int) -> Tensor:
    """Undo llama.cpp's order of the rows of q and k: rows [heads * (K/2) * 2, ..] to [heads * 2 * (K/2), ..]."""
    return rows.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(rows.shape)
