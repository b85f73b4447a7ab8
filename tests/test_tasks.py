"""Tasks: tokenisation at the join, scores equal to brute force whatever the batch, what runs sparse."""

import json
import math
import random

import pytest
import torch
from tokenizers import pre_tokenizers

from conftest import random_predictor
from dejavu.model.masked import MaskedSelection
from dejavu.model.predictor import Predictor
from dejavu.model.selectors import LayerAdapter
from dejavu.model.slow_tokenizer import byte_level_bpe
from dejavu.model.tokenizer import Tokenizer, build_tokenizer
from dejavu.model.transformer import DENSE, Selection, Transformer
from dejavu.quality.perplexity import MaskedSelections
from dejavu.quality.tasks import (
    NOTHING_SPARSE,
    Score,
    encode_pair,
    evaluate_task,
    item_requests,
    make_batches,
    make_request,
    parse_item,
    read_items,
    score_requests,
    summarize,
)
from helpers.adapters import predicted

ALPHABET = ["<s>", "</s>", "a", "b", "c", "d", "Ġ", ".", "ab", "Ġa", "Ġb", "Ġc", "Ċ"]
IDS = {token: index for index, token in enumerate(ALPHABET)}


def tokenizer_of(*, bos: bool = True, eos: bool = True) -> Tokenizer:
    merges = [("a", "b"), ("Ġ", "a"), ("Ġ", "b"), ("Ġ", "c")]
    backend = byte_level_bpe(IDS, merges, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    special = ({"bos_token": "<s>"} if bos else {}) | ({"eos_token": "</s>"} if eos else {})
    backend.add_special_tokens(list(special.values()))
    return build_tokenizer(backend, special_tokens=special, adds_bos=bos)


@pytest.fixture
def model(tiny) -> Transformer:
    return tiny("opt", vocab_size=len(ALPHABET))


def adapter(model: Transformer, *, threshold: float) -> tuple[LayerAdapter, ...]:
    config, generator = model.config, torch.Generator().manual_seed(9)

    def predictor(outputs: int) -> Predictor:
        return random_predictor(config.hidden_size, outputs, generator, threshold=threshold)

    return tuple(predicted(mlp=predictor(config.intermediate_size), heads=predictor(config.num_kv_heads)) for _ in range(config.num_layers))


def brute_score(model: Transformer, context: list[int], continuation: list[int], selection: Selection = DENSE) -> float:
    with torch.inference_mode():
        log_probs = model(torch.tensor([context + continuation]), selection)[0].double().log_softmax(-1)
    return sum(log_probs[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))


BOS, A, B, C, SPACE_B, AB = IDS["<s>"], IDS["a"], IDS["b"], IDS["c"], IDS["Ġb"], IDS["ab"]


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("c", " b", ([BOS, C], [SPACE_B])),
        ("c ", "b", ([BOS, C], [SPACE_B])),  # whitespace moves to the continuation
        ("c \n ", "b", ([BOS, C], [IDS["Ġ"], IDS["Ċ"], SPACE_B])),
        ("a", "b", ([BOS, A], [B])),  # "ab" is one token: the cut leaves nothing
        ("a", "bc", ([BOS, A], [C])),  # joined "ab", "c": cut as lm-eval cuts
        ("", "b", ([BOS], [B])),
        ("  ", "b", ([BOS], [IDS["Ġ"], SPACE_B])),
        ("", "<s>b", ([BOS], [B])),  # not doubled
        ("", "<s>", ([BOS], [BOS])),  # but never left without tokens
        ("<s>c", " b", ([BOS, C], [SPACE_B])),
    ],
)
def test_pair_is_cut_as_lm_eval_cuts_it(context, continuation, expected):
    assert encode_pair(tokenizer_of(), context, continuation, "here") == expected


def test_pair_without_bos():
    plain = tokenizer_of(bos=False)
    assert encode_pair(plain, "c", " b", "here") == ([C], [SPACE_B])
    assert encode_pair(plain, "", "b", "here") == ([IDS["</s>"]], [B])
    with pytest.raises(ValueError, match="BOS or EOS"):
        encode_pair(tokenizer_of(bos=False, eos=False), "", "b", "here")


def test_token_across_the_join_scores_its_parts(model):
    model, tokenizer = model, tokenizer_of(bos=False)
    request = make_request(*encode_pair(tokenizer, "a", "b", "here"), 24, "here")
    (score,), _ = score_requests(model, [request])
    assert score.log_prob == pytest.approx(brute_score(model, [A], [B]), abs=1e-5)


@pytest.mark.parametrize(
    "record",
    [
        {"context": "a", "choices": ["b", ""], "label": 0},
        {"contexts": ["a", "b"], "continuation": "", "label": 0},
        {"context": "a", "target": ""},
    ],
)
def test_empty_continuation_names_task_and_row(model, record):
    good = {
        "choices": {"context": "a", "choices": ["b", "c"], "label": 0},
        "contexts": {"contexts": ["a", "b"], "continuation": "c", "label": 0},
        "target": {"context": "a", "target": "b"},
    }
    form = next(key for key in good if key in record)
    with pytest.raises(ValueError, match="task 'quiz', row 3: a continuation is empty"):
        evaluate_task(model, tokenizer_of(), "quiz", [good[form], good[form], record])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"context": "a", "choices": ["b", "c"], "label": 2}, "label 2"),
        ({"context": "a", "choices": ["b", "c"], "label": -1}, "label -1"),
        ({"context": "a", "choices": ["b", "c"], "label": True}, "label True"),
        ({"context": "a", "choices": ["b", "c"]}, "label None"),
        ({"context": "a", "choices": "bc", "label": 0}, "list of strings"),
        ({"context": "a", "choices": [], "label": 0}, "list of strings"),
        ({"choices": ["b"], "label": 0}, "'context' must be a string"),
        ({"contexts": ["b"], "label": 0}, "'continuation' must be a string"),
        ({"question": "a"}, "no 'choices'"),
    ],
)
def test_bad_items_are_named(record, message):
    with pytest.raises(ValueError, match=message):
        parse_item(record, "here")


def test_forms_of_a_record_with_more_than_one():
    both = {"context": "x", "choices": ["y", "z"], "contexts": ["xy", "xz"], "continuation": "!", "label": 1, "id": 4}
    assert parse_item(both, "here").pairs == (("xy", "!"), ("xz", "!"))


def test_long_contexts_lose_their_start():
    request = make_request([BOS, *range(100, 110)], [50, 51, 52], 6, "here")
    assert request.inputs == (106, 107, 108, 109, 50, 51)
    assert request.targets == (50, 51, 52) and request.inputs[request.first] == 109
    assert make_request([1], [2, 3, 4], 3, "here").inputs == (1, 2, 3)
    with pytest.raises(ValueError, match="here: the continuation's 4 tokens exceed the model's context of 3"):
        make_request([1], [2, 3, 4, 5], 3, "here")


def random_requests(count: int, seed: int = 0):
    draw = random.Random(seed)
    requests = []
    for _ in range(count):
        context = [draw.randrange(len(ALPHABET)) for _ in range(draw.randint(1, 12))]
        continuation = [draw.randrange(len(ALPHABET)) for _ in range(draw.randint(1, 5))]
        requests.append((context, continuation))
    return requests


@pytest.mark.parametrize("strict", [False, True])
def test_scores_equal_brute_force_dense_and_sparse_in_any_batch_and_order(model, strict):
    layers = adapter(model, threshold=0.3)
    pairs = random_requests(13)
    pairs += [(pairs[0][0], [token]) for token in (3, 4, 5)]  # equal inputs, other targets

    def masked_brute(context, continuation):
        length = len(context) + len(continuation) - 1
        sparse = torch.zeros(1, length + 1, dtype=torch.bool)
        sparse[0, 0 if strict else len(context) : length] = True
        return brute_score(model, context, continuation, MaskedSelection(layers, sparse))

    expected_dense = [brute_score(model, *pair) for pair in pairs]
    expected_sparse = [masked_brute(*pair) for pair in pairs]
    assert max(abs(a - b) for a, b in zip(expected_dense, expected_sparse, strict=True)) > 0.05
    counted = set()
    for batch_tokens in (1, 40, 100, 10_000):
        order = list(range(len(pairs)))
        random.Random(batch_tokens).shuffle(order)
        masked = MaskedSelections(layers)
        requests = [make_request(*pairs[index], 24, "here") for index in order]
        dense, sparse = score_requests(model, requests, masked=masked, strict=strict, batch_tokens=batch_tokens)
        assert [s.log_prob for s in dense] == pytest.approx([expected_dense[i] for i in order], abs=1e-5)
        assert sparse is not None
        assert [s.log_prob for s in sparse] == pytest.approx([expected_sparse[i] for i in order], abs=1e-5)
        sums = (*masked.counter.mlp_L, *masked.counter.heads_L)
        counted.add((masked.counter.tokens, *(round(value, 9) for value in sums)))
    assert len(counted) == 1, "padding or batching changed the density"
    tokens = counted.pop()[0]
    distinct = {tuple(context + continuation[:-1]): len(continuation) - 1 for context, continuation in pairs}
    assert tokens == (sum(len(inputs) for inputs in distinct) if strict else sum(distinct.values()))


def test_batches_hold_what_they_promise():
    requests = [make_request(*pair, 24, "here") for pair in random_requests(30, seed=4)]
    seen = []
    for batch in make_batches(requests, strict=False, batch_tokens=50, device=torch.device("cpu")):
        rows, length = batch.ids_BT.shape
        assert rows == 1 or rows * length <= 50
        for row, indices in enumerate(batch.rows):
            seen += indices
            for index in indices:
                inputs = requests[index].inputs
                assert tuple(batch.ids_BT[row, : len(inputs)].tolist()) == inputs
                assert batch.sparse_BT[row].nonzero()[:, 0].tolist() == list(range(requests[index].first + 1, len(inputs)))
    assert sorted(seen) == list(range(30))


def test_choices_of_an_item_are_judged_by_one_context():
    tokenizer = tokenizer_of()
    item = parse_item({"context": "a b c d a b c d", "choices": [" a", " b c d", " c"], "label": 0}, "here")
    whole, cut = item_requests(tokenizer, item, 64, "here")
    assert not cut and {request.inputs[: request.first + 1] for request in whole} == {tuple(tokenizer.encode("a b c d a b c d"))}
    requests, cut = item_requests(tokenizer, item, 8, "here")
    contexts = {request.inputs[: request.first + 1] for request in requests}
    assert cut and contexts == {tuple(tokenizer.encode("a b c d a b c d"))[-(9 - len(requests[1].targets)) :]}
    assert [len(request.inputs) for request in requests] == [8 - len(requests[1].targets) + len(each.targets) for each in requests]


def test_items_whose_context_is_cut_are_counted(model):
    short, long = ({"context": context, "choices": [" a", " b c"], "label": 0} for context in ("a", "a b c d " * 60))
    assert [evaluate_task(model, tokenizer_of(), "quiz", records).dense["truncated"] for records in ([short], [long, short])] == [0, 1]


def test_accuracies_from_scores():
    choices = [
        {"context": "q", "choices": [" aa", " aaaaaaaa"], "label": 1},
        {"context": "q", "choices": [" é", " aaa"], "label": 0},
        {"context": "q", "choices": [" a", " b"], "label": 1},
        {"context": "q", "choices": [" éé", " aaa"], "label": 0},
    ]
    items = [parse_item(record, "here") for record in choices]
    # the first is right only by length (-2/2 < -6/8), the second by both (é counts as one character), the tie goes to the first, and
    # the last is wrong by characters (-2/2 < -2.4/3) and right by bytes (-2/4 > -2.4/3)
    scores = [[Score(first, False), Score(second, False)] for first, second in ((-2.0, -6.0), (-0.9, -3.0), (-1.0, -1.0), (-2.0, -2.4))]
    result = summarize(items, scores)
    assert (result["acc"], result["acc_norm"], result["acc_bytes"], result["n"]) == (1 / 2, 1 / 2, 3 / 4, 4)
    assert result["stderr"] == pytest.approx(math.sqrt(1 / 4 / 3)) and result["stderr_bytes"] == pytest.approx(math.sqrt(3 / 16 / 3))
    partial = [parse_item({"contexts": ["a", "bbbbbbb"], "continuation": "c", "label": 0}, "here")]
    result = summarize(partial, [[Score(-2.0, False), Score(-3.0, False)]])
    assert (result["acc"], result["acc_norm"], result["stderr"]) == (1.0, 1.0, None)
    last = [parse_item({"context": "a", "target": t}, "here") for t in ("b", "c")]
    result = summarize(last, [[Score(-1.0, True)], [Score(-3.0, False)]])
    assert (result["acc"], result["acc_norm"]) == (0.5, 0.5)
    assert result["ppl"] == pytest.approx(math.exp(2)) and result["ppl_stderr"] == pytest.approx(math.exp(2))


def test_whole_tasks_against_brute_force(model):
    tokenizer = tokenizer_of()
    draw = random.Random(2)

    def words(n):
        return " ".join("".join(draw.choice("abcd") for _ in range(draw.randint(1, 3))) for _ in range(n))

    records = [{"context": words(4), "choices": [" " + words(2) for _ in range(3)], "label": draw.randrange(3)} for _ in range(12)]
    result = evaluate_task(model, tokenizer, "quiz", records).dense
    right = 0
    for record in records:
        values = [brute_score(model, *encode_pair(tokenizer, record["context"], choice, "")) for choice in record["choices"]]
        right += values.index(max(values)) == record["label"]
    assert result["acc"] == right / 12

    context = "ab c"
    greedy = []
    for _ in range(2):
        ids = tokenizer.encode(context) + greedy
        with torch.inference_mode():
            greedy.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    request = make_request(tokenizer.encode(context), greedy, 64, "here")
    wrong = make_request(tokenizer.encode(context), [greedy[0], (greedy[1] + 1) % 13], 64, "here")
    assert [score.greedy for score in score_requests(model, [request, wrong])[0]] == [True, False]


def test_one_token_continuations_run_dense_unless_strict(model):
    tokenizer = tokenizer_of()
    layers = adapter(model, threshold=math.inf)
    records = [{"context": "ab c", "choices": [" a", " b"], "label": 0}, {"context": "d", "choices": [" c", " b"], "label": 1}]
    masked = MaskedSelections(layers)
    loose = evaluate_task(model, tokenizer, "yes-no", records, masked=masked)
    assert loose.sparse is not None
    assert loose.sparse["mlp_density"] is None and loose.sparse["note"] == NOTHING_SPARSE
    assert (loose.tokens, loose.tokens_sparse, masked.counter.tokens) == (4, 0, 0)
    masked = MaskedSelections(layers)
    strict = evaluate_task(model, tokenizer, "yes-no", records, masked=masked, strict=True)
    assert strict.sparse is not None
    assert strict.sparse["mlp_density"] == 0.0 and strict.sparse["head_density"] == 0.25
    assert strict.tokens_sparse == 4 and "note" not in strict.sparse


def test_mixed_forms_and_no_items_are_errors(model):
    mixed = [{"context": "a", "target": "b"}, {"context": "a", "choices": ["b", "c"], "label": 0}]
    with pytest.raises(ValueError, match="'quiz' mixes"):
        evaluate_task(model, tokenizer_of(), "quiz", mixed)
    with pytest.raises(ValueError, match="'quiz' has no items"):
        evaluate_task(model, tokenizer_of(), "quiz", [])


def test_reading_items(tmp_path):
    path = tmp_path / "quiz.jsonl"
    first = json.dumps({"context": "a", "target": "é\u2028"}, ensure_ascii=False)
    path.write_text(first + "\n\n" + json.dumps({"context": "b", "target": "c"}) + "\n", encoding="utf-8")
    assert [item["context"] for item in read_items(path)] == ["a", "b"]
    path.write_text('{"context": "a"}\n[1]\n')
    with pytest.raises(ValueError, match="line 2: not a JSON object"):
        read_items(path)
    path.write_text("{\n")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_items(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"quiz\.jsonl"):
        read_items(path)
    with pytest.raises(ValueError, match=r"none\.jsonl"):
        read_items(tmp_path / "none.jsonl")
