"""`dejavu adapt` on a tiny model: from the command line to an adapter that every other command runs with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import Tiny
from dejavu.cli.main import run
from dejavu.language_model import LanguageModel
from dejavu.loading import load
from dejavu.model.bundle import export
from dejavu.model.masked import MaskedSelection
from dejavu.model.tokenizer import Tokenizer
from dejavu.offline.adapt.training import Trainer
from helpers.native import needs_library
from helpers.texts import LONG_TEXT

ADAPT = (
    *("adapt", "model", "--text", "text.txt", "-o", "adapter", "--density", "0.3", "--rank", "6", "--lora-rank", "3", "--batch", "4"),
    *("--micro-batch", "2", "--length", "16", "--learning-rate", "0.005", "--device", "cpu"),
)


@pytest.fixture(scope="module")
def work(tiny: Tiny, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny gated model and a text."""
    path = tmp_path_factory.mktemp("adapt")
    export(tiny("llama", num_layers=3, intermediate_size=96), tokenizer, path / "model")
    (path / "text.txt").write_text(LONG_TEXT)
    return path


@pytest.fixture
def call(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command line with --json in the folder; its object, after checking the status; with `error`, what stderr must hold."""
    monkeypatch.chdir(work)

    def invoke(*arguments: str, status: int = 0, error: str = "") -> Any:
        capsys.readouterr()
        found = run([*arguments, "--json"])
        captured = capsys.readouterr()
        assert found == status and (error in captured.err if error else captured.err == ""), captured.err
        return json.loads(captured.out) if status == 0 else None

    return invoke


def test_adapting_resumes_and_its_adapter_runs_everywhere(call, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, done = Trainer.train_step, []

    def interrupted(self: Trainer) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(0)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    monkeypatch.setattr(Trainer.run, "__kwdefaults__", {"report": None, "stop": None, "save_minutes": 0.0})
    call(*ADAPT, "--steps", "6", status=130, error="run the same command again to go on")
    assert (work / "adapter.partial" / "state.safetensors").is_file()
    monkeypatch.setattr(Trainer, "train_step", step)
    call(*ADAPT, "--steps", "7", status=2, error="steps is 6 there and 7 here")
    assert call(*ADAPT, "--steps", "6", "--pause", "1e-9")["paused"] is True
    result = call(*ADAPT, "--steps", "6")
    assert {"kl", "ppl_dense", "ppl_sparse", "mlp_density", "ppl_unmasked"} <= set(result) and result["steps"] == 6
    assert not (work / "adapter.partial").exists() and 0.1 < result["mlp_density"] < 0.7
    rows = [json.loads(row) for row in (work / "adapter" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 6] and len(rows[0]["density_L"]) == 3

    evaluated = call("eval", "model", "--adapter", "adapter", "--text", "text.txt", "--backend", "torch")
    dense = call("eval", "model", "--dense", "--text", "text.txt", "--backend", "torch")
    assert evaluated["dense"]["ppl"] == dense["dense"]["ppl"] and evaluated["sparse"]["ppl"] != dense["dense"]["ppl"]
    assert 0.1 < evaluated["mlp_density"] < 0.7
    prompt = ("--prompt", "the cat", "-n", "12", "--ignore-eos", "--backend", "torch")
    assert call("generate", "model", *prompt, "--adapter", "adapter")["mlp_density"] < 0.7
    lm, base = (load(work / "model", adapter=adapter, backend="torch") for adapter in (work / "adapter", None))
    ids = lm.tokenizer.encode("the cat sat on the mat")
    sparse = lm.logits(ids)
    assert torch.equal(lm.logits(ids, dense=True), base.logits(ids)) and not torch.equal(sparse, base.logits(ids))
    assert lm.generate("the", max_new_tokens=9, ignore_eos=True, dense=True) == base.generate("the", max_new_tokens=9, ignore_eos=True)
    assert torch.equal(base.logits(ids, adapter=lm.adapter), sparse)
    call("export", "model", "copy", "--adapter", "adapter", "--peft", "lora")
    assert load(work / "copy").adapter is not None
    check_peft(work)


def check_peft(work: Path) -> None:
    """W + alpha / r * B A of the two files, by transformers' names, is what a sparse run computes with."""
    config = json.loads((work / "lora" / "adapter_config.json").read_text())
    tensors = load_file(work / "lora" / "adapter_model.safetensors")
    assert config["peft_type"] == "LORA" and config["r"] == 3 and config["base_model_name_or_path"] == "model"
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    lm = load(work / "model", adapter=work / "adapter", backend="torch")
    layers, base = lm.layers(), load_file(work / "model" / "model.safetensors")
    assert layers is not None and layers[1].block is not None
    block = layers[1].block
    for name, module, merged in (
        ("self_attn.q_proj", block.q, block.q.weight),
        ("self_attn.o_proj", block.o, block.o.weight.T),
        ("mlp.down_proj", block.down, block.down.weight.T),
    ):
        plain = f"model.layers.1.{name}"
        A, B = (tensors[f"base_model.model.{plain}.lora_{letter}.weight"] for letter in "AB")
        assert A.shape[0] == B.shape[1] == 3, module
        torch.testing.assert_close(base[f"{plain}.weight"] + config["lora_alpha"] / config["r"] * B @ A, merged)
    norm = block.norm1.weight
    assert norm is not None and torch.equal(tensors["base_model.model.model.layers.1.input_layernorm.weight"], norm)
    assert len(tensors) == 3 * (7 * 2 + 2)


def greedy(lm: LanguageModel, prompt: str, count: int) -> str:
    """The likeliest continuation by whole masked passes, of which the prompt runs dense."""
    layers, ids = lm.layers(), lm.tokenizer.encode(prompt)
    assert layers is not None
    start = len(ids)
    for _ in range(count):
        sparse_BT = torch.arange(len(ids))[None] >= start
        ids.append(int(lm.model(torch.tensor([ids]), MaskedSelection(layers, sparse_BT))[0, -1].argmax()))
    return lm.tokenizer.decode(ids[start:])


@needs_library
def test_the_native_engine_decodes_as_the_masked_forward(call, work: Path) -> None:
    if not (work / "adapter").exists():
        call(*ADAPT, "--steps", "3")
    for dtype in ("fp32", "int8"):
        lm = load(work / "model", adapter=work / "adapter", backend="native", dtype=dtype, cache_dtype="fp32")
        ids = lm.tokenizer.encode("the cat sat on the mat")
        plain, masked = lm.logits(ids, dense=True), lm.logits(ids)
        assert (plain - masked).abs().max() > 1e-3
        text = lm.generate("the cat sat", max_new_tokens=10, ignore_eos=True)
        other = load(work / "model", adapter=work / "adapter", backend="torch").generate("the cat sat", max_new_tokens=10, ignore_eos=True)
        assert dtype != "fp32" or str(text) == str(other) == greedy(lm, "the cat sat", 10)
        assert text.mlp_density is not None and text.mlp_density < 0.7


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--density", "1.5"), "density must lie in (0, 1)"),
        (("--micro-batch", "3"), "multiple of micro_batch 3"),
        (("--device", "cuda9"), "device 'cuda9' is not known"),
        (("--length", "4000"), "length 4000 exceeds"),
        (("--checkpoint-layers", "yes"), "--checkpoint-layers takes auto, on or off, not 'yes'"),
        (("--pause", "-1"), "--pause takes a positive number"),
        (("--chat-share", "0.2", "--chat-tokens", "0"), "--chat-tokens must be at least 1"),
    ],
)
def test_mistakes_are_one_line(call, arguments: tuple[str, ...], error: str) -> None:
    call(*ADAPT, *arguments, status=2, error=error)


def test_a_relu_model_is_written_out_as_one(call, work: Path) -> None:
    """The merged model, dense, says what the base says with the adapter, sparse; transformers reads its activation."""
    options = ("relu" if option == "adapter" else option for option in ADAPT)
    found = call(*options, "--activation", "relu", "--steps", "8")
    assert found["mlp_density"] < 0.9
    merged = call("export", "model", "merged", "--adapter", "relu", "--merge")
    assert merged["merged"] is True and merged["adapter"] is False
    assert json.loads((work / "merged" / "config.json").read_text())["hidden_act"] == "relu"
    say = ("generate", "--prompt", "the cat", "-n", "8", "--ignore-eos", "--dtype", "fp32")
    assert call(*say, "model", "--adapter", "relu")["text"] == call(*say, "merged")["text"]
    call("export", "merged", "twice", "--merge", status=2, error="there are none; give an adapter of dejavu adapt")
    few = call("quantize", "model", "--adapter", "relu", "--merge", "--text", "text.txt", "-o", "few", "--dtype", "q8_0")
    lm, whole = load(work / "few", backend="torch"), load(work / "model", adapter=work / "relu", backend="torch")
    assert few["adapter"] is few["merged"] is True and abs(few["rise"]) < 0.01 and lm.adapter is not None
    assert lm.adapter.config.method == "exact" and lm.adapter.config.base_hashes == (lm.base_hash,)
    ids = lm.tokenizer.encode("the cat sat on the mat")
    torch.testing.assert_close(lm.logits(ids), whole.logits(ids), atol=0.05, rtol=0)
    call("quantize", "merged", "--text", "text.txt", "-o", "no", "--merge", status=2, error="there are none; give an adapter")
