"""dejavu inside transformers: the same greedy tokens, and everything else left to it."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextStreamer

import dejavu
from dejavu.generation import engine_cache
from dejavu.model.bundle import export
from helpers.screens import screen_of, with_screen
from helpers.transformers_models import SIZES, reference_of

PROMPT = torch.tensor([[2, 5, 7, 11, 13, 17]])


@pytest.fixture
def net() -> Any:
    torch.manual_seed(0)
    model = reference_of("llama", SIZES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return model


def greedy(net: Any, ids: torch.Tensor, **options: Any) -> list[list[int]]:
    return net.generate(ids, **({"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | options)).tolist()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "falcon", "nemotron"])
def test_greedy_tokens_are_those_of_transformers(kind: str) -> None:
    torch.manual_seed(1)
    extra = {} if kind == "falcon" else {"head_dim": 8}
    model = reference_of(kind, {key: value for key, value in SIZES.items() if kind != "falcon" or "key_value" not in key} | extra).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    expected = greedy(model, PROMPT)
    assert dejavu.attach(model) is model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert greedy(model, PROMPT) == expected


def test_rows_padded_on_the_left_and_rows_that_end(net: Any) -> None:
    """Each as it is alone; what has ended is filled up with the padding token."""
    ids = torch.tensor([[0, 0, 2, 5, 7], [2, 31, 37, 41, 43]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ends = greedy(net, ids, attention_mask=mask)[0][8]
    expected = greedy(net, ids, attention_mask=mask, eos_token_id=ends)
    dejavu.attach(net)
    assert greedy(net, ids, attention_mask=mask, eos_token_id=ends) == expected
    assert expected[0][-1] == 0 and expected[1][-1] != 0
    assert greedy(net, ids, attention_mask=mask, eos_token_id=[ends, 95]) == expected
    assert greedy(net, PROMPT, max_new_tokens=1)[0][:6] == PROMPT[0].tolist()


def test_max_length_and_the_model_s_own_settings(net: Any) -> None:
    net.generation_config = GenerationConfig(max_length=9, eos_token_id=2, pad_token_id=0)
    expected = net.generate(PROMPT).tolist()
    dejavu.attach(net)
    assert net.generate(PROMPT).tolist() == expected and len(expected[0]) <= 9
    config = GenerationConfig(max_new_tokens=4, eos_token_id=2, pad_token_id=0)
    assert len(net.generate(PROMPT, generation_config=config)[0]) == 10
    assert net.generate(input_ids=PROMPT, max_new_tokens=4).tolist() == net.generate(PROMPT, generation_config=config).tolist()


def test_sampling_repeats_by_torch_s_seed_and_keeps_to_its_cut(net: Any) -> None:
    dejavu.attach(net)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(
            net.generate(PROMPT.repeat(2, 1), do_sample=True, temperature=2.0, max_new_tokens=12, pad_token_id=0, eos_token_id=None)
        )
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0][0], draws[0][1]), "rows draw from streams of their own"
    only = net.generate(PROMPT, do_sample=True, top_k=1, max_new_tokens=6, pad_token_id=0, eos_token_id=None).tolist()
    assert only == greedy(net, PROMPT, max_new_tokens=6, eos_token_id=None)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"forced_eos_token_id": 0}, "forced_eos_token_id=0"),
        ({"repetition_penalty": 1.3}, "repetition_penalty=1.3"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}, "padding on the left"),
        ({"max_new_tokens": 200}, "more than the context of 64"),
        ({"stopping_criteria": []}, "stopping_criteria"),
        ({"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, "asked for .*repetition_penalty=1.3, no_repeat_ngram_size=2: generated"),
    ],
)
def test_the_rest_goes_to_transformers_said_once(net: Any, options: dict[str, Any], reason: str) -> None:
    call = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0} | options
    plain = net.generate(PROMPT, **call)
    dejavu.attach(net)
    with pytest.warns(UserWarning, match=reason):
        found = net.generate(PROMPT, **call)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (found == plain).all() if isinstance(found, torch.Tensor) else torch.equal(found.sequences, plain.sequences)
        net.generate(PROMPT, **call)


class Recorder:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.values: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        assert value.device.type == "cpu" and not self.ended
        self.values.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


def test_streamers_get_what_transformers_gives_them(net: Any, recwarn: pytest.WarningsRecorder) -> None:
    ids = torch.tensor([[0, 0, 2, 5, 7], [2, 31, 37, 41, 43]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ends = greedy(net, ids, attention_mask=mask)[0][8]
    calls = (({"attention_mask": mask, "eos_token_id": ends}, ids), ({"max_new_tokens": 1}, PROMPT), ({}, PROMPT))
    theirs, ours = [Recorder() for _ in calls], [Recorder() for _ in calls]
    expected = [greedy(net, prompt, streamer=each, **options) for each, (options, prompt) in zip(theirs, calls, strict=True)]
    dejavu.attach(net)
    recwarn.clear()
    assert [greedy(net, prompt, streamer=each, **options) for each, (options, prompt) in zip(ours, calls, strict=True)] == expected
    assert [each.values for each in ours] == [each.values for each in theirs] and {each.ended for each in ours} == {1}
    assert ours[0].values[-1][0] == 0, "padding behind the end of a row"
    assert not recwarn.list, "sparse, not by transformers"


def test_a_text_streamer_prints_the_text_as_it_comes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = dejavu.load("opt-mini", backend="torch", dtype="fp32")
    export(lm.model, lm.tokenizer, tmp_path / "hf")
    net = dejavu.attach(AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval(), lm.adapter, backend="torch")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "hf")
    inputs = tokenizer("The lighthouse keeper", return_tensors="pt")
    found = net.generate(**inputs, max_new_tokens=8, do_sample=False, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == tokenizer.decode(found[0]) + "\n"


def test_a_streamer_that_is_none_is_left_to_transformers(net: Any) -> None:
    dejavu.attach(net)
    with pytest.warns(UserWarning, match="generate was given streamer"), pytest.raises(AttributeError):
        greedy(net, PROMPT, streamer=3)


def test_what_only_sampling_reads_does_not_matter_to_a_greedy_text(net: Any) -> None:
    expected = greedy(net, PROMPT)
    dejavu.attach(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert greedy(net, PROMPT, min_p=0.1) == expected
    with pytest.warns(UserWarning, match=r"min_p=0\.1"):
        greedy(net, PROMPT, min_p=0.1, do_sample=True)


def test_a_text_whose_length_nothing_says_has_our_default_whoever_writes_it(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None)
    dejavu.attach(net)
    for default, length in ((7, 6 + 7), (256, 64)):
        monkeypatch.setattr("dejavu.attached.MAX_NEW_TOKENS", default)
        assert net.generate(PROMPT).shape == (1, length)
        with pytest.warns(UserWarning, match="num_beams") if default == 7 else contextlib.nullcontext():
            assert net.generate(PROMPT, num_beams=2).shape == (1, length)
    assert net.generate(PROMPT, max_length=9).shape == (1, 9)
    with pytest.warns(UserWarning, match="0 new tokens"), pytest.raises(ValueError, match="max_new_tokens"):
        net.generate(PROMPT, max_new_tokens=0)


def test_detach_undoes_it(net: Any) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    own = vars(net).copy()
    dejavu.attach(net)
    greedy(net, PROMPT)
    with pytest.raises(ValueError, match="attached already"):
        dejavu.attach(net)
    assert dejavu.detach(net) is net and dejavu.detach(net) is net
    assert vars(net) == own and net.generate.__func__ is type(net).generate
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_screened_head_that_the_backend_has_not_is_told(tmp_path: Path) -> None:
    lm = dejavu.load("opt-mini", backend="torch", dtype="fp32")
    assert lm.adapter is not None
    export(lm.model, lm.tokenizer, tmp_path / "hf", adapter=with_screen(lm.adapter, screen_of(lm.model, threshold=1e-4)))
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with pytest.warns(UserWarning, match="backend torch has no screened head: the full one runs"):
        dejavu.attach(net, tmp_path / "hf" / "adapter", backend="torch")


def test_an_adapter_makes_it_sparse_and_has_to_be_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model through transformers: our sparse tokens."""
    lm = dejavu.load("opt-mini", backend="torch", dtype="fp32")
    export(lm.model, lm.tokenizer, tmp_path / "hf", adapter=lm.adapter)
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert lm.adapter is not None
    dejavu.attach(net, tmp_path / "hf" / "adapter", backend="torch")
    ids = torch.tensor([lm.tokenizer.encode("The lighthouse keeper")])
    made = []
    original = engine_cache.make_engine

    def watched(*args: Any, **options: Any) -> Any:
        made.append(original(*args, **options))
        return made[-1]

    monkeypatch.setattr(engine_cache, "make_engine", watched)
    found = net.generate(ids, max_new_tokens=8, do_sample=False)
    expected = lm.generate("The lighthouse keeper", max_new_tokens=8, temperature=0)
    assert found[0, ids.shape[1] :].tolist() == list(expected.token_ids) and made[0].info.sparse
    dejavu.detach(net)
    with torch.no_grad():
        net.model.decoder.layers[0].fc1.weight[:64] += 0.1
    for adapter in (lm.adapter, tmp_path / "hf" / "adapter"):
        with pytest.raises(ValueError, match="hash"):
            dejavu.attach(net, adapter)
    with pytest.raises(ValueError, match="Linear is no model of transformers"):
        dejavu.attach(torch.nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_padding_without_a_mask_is_taken_as_transformers_takes_it(net: Any) -> None:
    """Where the padding token is none that ends a text."""
    ids = torch.tensor([[0, 0, 2, 5, 7], [2, 31, 37, 41, 43]])
    net.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=95)
    expected = net.generate(ids, max_new_tokens=20).tolist()
    dejavu.attach(net)
    assert net.generate(ids, max_new_tokens=20).tolist() == expected
    assert net.generate(ids, eos_token_id=[40, 4], pad_token_id=None, max_new_tokens=3).shape == (2, 8)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"suppress_tokens": torch.tensor([3, 4])}, "suppress_tokens"),
        ({"do_sample": True, "top_p": 0.0, "top_k": 1}, "top_p of 0"),
    ],
)
def test_odd_values_go_to_transformers(net: Any, options: dict[str, Any], reason: str) -> None:
    dejavu.attach(net)
    with pytest.warns(UserWarning, match=reason):
        net.generate(PROMPT, **({"max_new_tokens": 3, "pad_token_id": 0} | options))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "torch", "dtype": "bf16"}, "dtype 'bf16' is not one of backend 'torch'"),
        ({"backend": "torch", "dtype": "banana"}, "dtype 'banana'"),
        ({"adapter": 3}, "an adapter is an Adapter"),
    ],
)
def test_what_cannot_be_attached(net: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dejavu.attach(net, **arguments)
    assert not hasattr(net, "_dejavu")
