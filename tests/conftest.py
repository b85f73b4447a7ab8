"""What tests share: tiny random models, a tiny tokenizer, the dense oracle and poisoned memory. Nothing touches a network.

    def test_x(tiny, tok96, brute):
        model = tiny("opt", num_layers=3)             # a Transformer, fp32, random but the same on every run
        ids = tok96.encode("the cat sat").ids         # starts with </s>, every id < 96
        logprobs_TV = brute(model, ids)

The fixtures are functions or values that last for the whole run, so hypothesis tests can use them too. Do not change
what they return in place, except a model: `tiny` builds a new one on each call.
"""

from __future__ import annotations

import gc
import os
import signal

# Before torch and huggingface_hub are imported: both read their variable once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms (poisoned_empty) need on CUDA

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: kernels then run on the CPU

from dejavu.config import ModelConfig, RopeConfig
from dejavu.model.checkpoint import Checkpoint, load_checkpoint
from dejavu.model.predictor import Predictor
from dejavu.model.tokenizer import Tokenizer, build_tokenizer
from dejavu.model.transformer import Transformer

pytest.register_assert_rewrite("helpers")  # their asserts say what was compared, as those of test files do
pytest_plugins = ["helpers.command_line", "helpers.interpreter", "helpers.standins"]  # fixtures that are long or of one subject

gc.disable()  # while modules are imported and tests collected: all of it stays
torch.set_num_threads(1)  # tiny tensors, and one core for each xdist worker
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()


TINY_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "head_dim": 8,
    "max_positions": 64,
    "bos_token_id": 2,
    "eos_token_ids": (2,),
}
TINY_FAMILIES = {
    "opt": {"num_kv_heads": 4, "activation": "relu", "qkv_bias": True, "out_bias": True, "mlp_bias": True, "tied_head": True},
    "llama": {
        "num_kv_heads": 2,
        "activation": "silu",
        "gated": True,
        "norm": "rmsnorm",
        "positions": "rope",
        "position_offset": 0,
        "rope": RopeConfig(),
        "tied_head": False,
    },
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-cases", type=int, default=2000, help="Damaged files that test_fuzz.py tries, of all kinds together.")


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """^C raises KeyboardInterrupt, as at a terminal: a shell starts what it puts into the background with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Tiny(Protocol):
    """`tiny(family, *, seed=0, **overrides)`: see the fixture."""

    def __call__(self, family: str, *, seed: int = 0, **overrides: Any) -> Transformer: ...


class Brute(Protocol):
    """`brute(model, ids)`: see the fixture."""

    def __call__(self, model: Transformer, ids: Sequence[int]) -> Tensor: ...


def _randomize(model: Transformer, seed: int) -> None:
    """Weights ~ N(0, 1 / fan_in), so that activations stay near 1; norms ~ N(1, 0.1), biases ~ N(0, 0.1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_weights():
            if parameter.dim() == 1:
                mean, std = (1.0 if "norm" in name and name.endswith("weight") else 0.0), 0.1
            else:
                input_major = name.endswith((".down.weight", ".o.weight"))
                mean, std = 0.0, parameter.shape[0 if input_major else 1] ** -0.5
            parameter.normal_(mean, std, generator=generator)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """`tiny("opt" | "llama", seed=0, **ModelConfig fields)`: a random fp32 Transformer in eval mode, without gradients.

    2 layers, hidden 32, 4 heads of 8 (llama: 2 key/value heads), 64 neurons, vocabulary 96, context 64, BOS = EOS = 2.
    opt: ReLU, biases, learned positions, tied head. llama: gated SiLU, RMSNorm, RoPE, own head.
    """

    def build(family: str, *, seed: int = 0, **overrides: Any) -> Transformer:
        config = ModelConfig.from_dict({"family": family, **TINY_SIZES, **TINY_FAMILIES[family], **overrides})
        model = Transformer(config)
        _randomize(model, seed)
        return model.eval().requires_grad_(False)

    return build


@pytest.fixture(scope="session")
def tok96() -> Backend:
    """A byte-level BPE tokenizer of exactly 96 entries: 4 special tokens, 75 characters, 17 merges; `encode` adds </s> first.

    <s> 0, <pad> 1, </s> 2, <unk> 3, as OPT's. It knows letters, digits, space, newline and `.,;:'"!?-()`, and drops others.
    """
    characters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n.,;:'\"!?-()"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    symbols = sorted({symbol for piece, _ in byte_level.pre_tokenize_str(characters) for symbol in piece})
    tokenizer = Backend(models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=96, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], initial_alphabet=symbols, show_progress=False
    )
    text = "the cat sat on the mat and then the other cat ran to the hat there that the man had on his hand in the end"
    tokenizer.train_from_iterator([text] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    assert tokenizer.get_vocab_size() == 96
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer(tok96: Backend) -> Tokenizer:
    """dejavu's Tokenizer around a copy of `tok96`, </s> being its BOS and EOS."""
    return build_tokenizer(Backend.from_str(tok96.to_str()), special_tokens={"bos_token": "</s>", "eos_token": "</s>"})


def random_predictor(hidden_size: int, outputs: int, generator: torch.Generator, *, rank: int = 5, threshold: float = 0.0) -> Predictor:
    """A predictor of `outputs` neurons or heads from a layer's own input, without biases."""
    A_RD = torch.randn(rank, hidden_size, generator=generator)
    B_OR = torch.randn(outputs, rank, generator=generator)
    return Predictor(A_RD=A_RD, B_OR=B_OR, bias_O=torch.zeros(outputs), threshold=threshold, lookahead=0)


def open_fp32(folder: Path) -> Checkpoint:
    """The checkpoint of a folder or file, computed in fp32."""
    return load_checkpoint(folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def brute() -> Brute:
    """`brute(model, ids)`: log-probabilities [T, V] of one dense fp32 forward pass over the ids, no cache: the oracle.

    Row t is the distribution of token t + 1. Logits themselves are `model(torch.tensor([ids]))[0]`.
    """

    def logprobs(model: Transformer, ids: Sequence[int]) -> Tensor:
        with torch.inference_mode():
            return model(torch.tensor([list(ids)]))[0].log_softmax(-1)

    return logprobs


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Within the test, uninitialised float memory (torch.empty, new_empty, resize_) is NaN, and integers are the largest."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
