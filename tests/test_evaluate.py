"""The whole evaluation: its keys, dense and sparse, what it refuses, how texts are cut."""

import json
import math
import random

import pytest
import torch
from tokenizers import pre_tokenizers

from conftest import random_predictor
from dejavu.figures import Evaluation, Quality
from dejavu.model.selectors import LayerAdapter
from dejavu.model.slow_tokenizer import byte_level_bpe
from dejavu.model.tokenizer import Tokenizer, build_tokenizer
from dejavu.model.transformer import Transformer
from dejavu.quality.evaluate import BOS_NEVER, BOS_ONCE, evaluate, scored_part
from dejavu.quality.perplexity import perplexity
from helpers.adapters import predicted


def tokenizer_of(*, bos: bool = True) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", *alphabet, "th", "Ġth"])}
    backend = byte_level_bpe(vocabulary, [("t", "h"), ("Ġ", "th")], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    backend.add_special_tokens(["<s>"])
    return build_tokenizer(backend, special_tokens={"bos_token": "<s>"}, adds_bos=bos)


@pytest.fixture
def model(tiny) -> Transformer:
    return tiny("opt", vocab_size=260, max_positions=32, num_layers=3)


def layers_of(model: Transformer, threshold: float) -> tuple[LayerAdapter, ...]:
    """Layer 1 stays dense; the others have an MLP predictor."""
    config = model.config
    generator = torch.Generator().manual_seed(1)
    predictor = random_predictor(config.hidden_size, config.intermediate_size, generator, threshold=threshold)
    return predicted(mlp=predictor), LayerAdapter(), predicted(mlp=predictor)


def words(count: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choice("thé ox") for _ in range(3)).strip() or "x" for _ in range(count))


def sides(result: Evaluation) -> tuple[Quality, Quality]:
    """Dense and sparse."""
    assert result["sparse"] is not None
    return result["dense"], result["sparse"]


TEXTS = {"one.txt": words(40, 1), "two.txt": words(90, 2)}
TASKS = {
    "quiz": [{"context": words(3, i), "choices": [" " + words(2, 50 + i), " " + words(2, 80 + i)], "label": i % 2} for i in range(9)],
    "yes-no": [{"context": words(3, i), "choices": [" ", "t"], "label": i % 2} for i in range(4)],
    "last": [{"context": words(3, i), "target": " " + words(1, 20 + i)} for i in range(5)],
}


def test_dense_and_sparse_side_by_side(model):
    tokenizer = tokenizer_of()
    stages: list[tuple[str, int, int]] = []
    result = evaluate(
        model,
        tokenizer,
        layers_of(model, 0.2),
        texts=TEXTS,
        tasks=TASKS,
        limit=6,
        stride=16,
        progress=lambda what, done, total: stages.append((what, done, total)),
    )
    json.dumps(result, allow_nan=False)
    for side in sides(result):
        assert {"ppl", "texts", "tasks", "mlp_density", "head_density"} <= set(side)
        assert set(side["texts"]) == set(TEXTS) and set(side["tasks"]) == set(TASKS)
        assert all({"ppl", "bits_per_byte", "stderr", "tokens"} <= set(text) for text in side["texts"].values())
        assert all({"acc", "acc_norm", "acc_bytes", "stderr", "n", "truncated"} <= set(task) for task in side["tasks"].values())
        assert [side["tasks"][name]["n"] for name in TASKS] == [6, 4, 5]
        nll = sum(math.log(text["ppl"]) * text["tokens"] for text in side["texts"].values())
        assert side["ppl"] == pytest.approx(math.exp(nll / sum(text["tokens"] for text in side["texts"].values())))
    dense, sparse = sides(result)
    for name, text in TEXTS.items():
        ids = tokenizer.encode_plain(text)
        expected = perplexity(model, ids, bos=0, context=32, stride=16)
        assert dense["texts"][name]["ppl"] == pytest.approx(expected.ppl) and dense["texts"][name]["tokens"] == len(ids)
        assert dense["texts"][name]["bits_per_byte"] == pytest.approx(expected.nll / len(text.encode()) / math.log(2))
    assert sparse["ppl"] and dense["ppl"] and result["rise_stderr"] and sparse["ppl"] != dense["ppl"]
    assert result["rise"] == pytest.approx(sparse["ppl"] / dense["ppl"] - 1) and result["rise_stderr"] > 0
    assert sparse["mlp_density_per_layer"][1] == 1.0 and 0 < sparse["mlp_density_per_layer"][0] < 1
    assert sparse["mlp_density"] == pytest.approx(sum(sparse["mlp_density_per_layer"]) / 3) == result["mlp_density"]
    assert (sparse["head_density"], dense["mlp_density"], dense["mode"], sparse["mode"]) == (1.0, 1.0, "dense", "predicted")
    assert sparse["tasks"]["yes-no"]["mlp_density"] is None and "note" in sparse["tasks"]["yes-no"]
    assert 0 < sparse["tokens_sparse"] < sparse["tokens"] and dense["tokens_sparse"] == 0
    assert (result["stride"], result["context"], result["bos"]) == (16, 32, BOS_ONCE)
    assert {what for what, _, _ in stages} == {"one.txt dense", "one.txt sparse", "two.txt dense", "two.txt sparse", *TASKS}
    assert all(done <= total for _, done, total in stages)


def test_without_an_adapter(model):
    result = evaluate(model, tokenizer_of(), None, texts=TEXTS, tasks={})
    assert result["sparse"] is None and result["rise"] is None and result["mlp_density"] == 1.0


def test_tasks_alone_have_no_perplexity(model):
    result = evaluate(model, tokenizer_of(), layers_of(model, 0.2), texts={}, tasks={"quiz": TASKS["quiz"]})
    assert result["dense"]["ppl"] is None and result["rise"] is None and sides(result)[1]["mlp_density"] < 1


def test_nothing_kept_is_seen_in_every_number(model):
    """ParsedRequest sparsity must reach the scores: density 0 is reported and equals a model whose down weights are zero."""
    tokenizer = tokenizer_of()
    layers = tuple(LayerAdapter(neurons=layers_of(model, math.inf)[0].neurons) for _ in range(3))
    result = evaluate(model, tokenizer, layers, texts=TEXTS, tasks=TASKS, strict=True)
    with torch.no_grad():
        for block in model.blocks:
            block.down.weight.zero_()
    gone = evaluate(model, tokenizer, None, texts=TEXTS, tasks=TASKS)["dense"]
    assert result["mlp_density"] == 0.0
    dense, sparse = sides(result)
    assert sparse["ppl"] and dense["ppl"] and sparse["ppl"] == pytest.approx(gone["ppl"], rel=1e-6)
    assert abs(sparse["ppl"] / dense["ppl"] - 1) > 0.01
    assert sparse["tasks"]["last"]["ppl"] == pytest.approx(gone["tasks"]["last"]["ppl"], rel=1e-5)
    assert sparse["tasks"]["quiz"]["acc"] == gone["tasks"]["quiz"]["acc"]


def test_sparse_run_that_ran_nothing_sparse_is_an_error(model):
    tasks = {"yes-no": TASKS["yes-no"]}
    with pytest.raises(ValueError, match=r"no token was scored sparse.*--strict"):
        evaluate(model, tokenizer_of(), layers_of(model, 0.2), texts={}, tasks=tasks)
    strict = evaluate(model, tokenizer_of(), layers_of(model, 0.2), texts={}, tasks=tasks, strict=True)
    assert sides(strict)[1]["tokens_sparse"] == 8
    with pytest.raises(ValueError, match="selects in no layer"):
        evaluate(model, tokenizer_of(), (LayerAdapter(),) * 3, texts=TEXTS, tasks={})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": {}}, "nothing to evaluate"),
        ({"texts": {"void.txt": ""}}, "'void.txt' is empty"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"limit": -1}, "limit must be at least 1, not -1"),
        ({"context": 33}, "33 exceeds the model's 32"),
        ({"stride": 40}, "not 40"),
    ],
)
def test_bad_input_is_named(model, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, tokenizer_of(), None, **({"texts": TEXTS, "tasks": {}} | changes))


def test_adapter_of_another_depth_is_named(model):
    with pytest.raises(ValueError, match="2 layers, the model 3"):
        evaluate(model, tokenizer_of(), layers_of(model, 0.1)[:2], texts=TEXTS, tasks={})


@pytest.mark.parametrize("max_tokens", range(1, 30))
@pytest.mark.parametrize("bos", [True, False])
def test_bytes_are_those_of_the_scored_tokens(max_tokens, bos):
    tokenizer, text = tokenizer_of(bos=bos), "the thé 語 thx 🙂 th"
    part = scored_part(tokenizer, text, max_tokens)
    assert part.ids == tokenizer.encode_plain(text)[: len(part.ids)]
    assert max_tokens - 3 <= len(part.ids) <= max_tokens or len(part.ids) == len(tokenizer.encode_plain(text))
    scored = part.ids if bos else part.ids[1:]
    # byte-level: the entries "th" and "Ġth" are two and three bytes, all others one
    lengths = {tokenizer.backend.token_to_id("th"): 2, tokenizer.backend.token_to_id("Ġth"): 3}
    assert part.num_bytes == sum(lengths.get(token, 1) for token in scored)


@pytest.mark.parametrize(("bos", "text", "expected"), [(True, "ox", 0), (True, "<s>ox", 0), (False, "ox", None)])
def test_bos_once_or_never(bos, text, expected):
    part = scored_part(tokenizer_of(bos=bos), text, 100)
    assert (part.bos, len(part.ids)) == (expected, 2)
    assert part.num_bytes == (2 if bos else 1)


def test_tokenizer_without_bos_says_so(model):
    result = evaluate(model, tokenizer_of(bos=False), None, texts={"t": "the ox"}, tasks={})
    assert result["bos"] == BOS_NEVER
    assert result["dense"]["texts"]["t"]["tokens"] == len(tokenizer_of().encode_plain("the ox")) - 1
