"""From tokens to text: stop strings, UTF-8 borders, and spaces where a text continues its prompt."""

import codecs
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, pre_tokenizers

from dejavu.generation.generation import generate_tokens
from dejavu.generation.pieces import Piece
from dejavu.generation.text import StopStrings, TextStream
from dejavu.model.slow_tokenizer import byte_level_bpe
from dejavu.model.token_bytes import BYTE_LEVEL
from dejavu.model.tokenizer import Tokenizer, build_tokenizer
from helpers.scripted import LETTERS, ByteTokenizer, ScriptedEngine, run


def joined(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


# Stop strings


@pytest.mark.parametrize(
    ("words", "stop", "text", "reason", "tokens"),
    [
        (["DEF", "G", "HI", "J", "K"], ["DEFGHIJ"], "", "stop", 4),
        (["DEF", "G", "X"], ["DEFGHIJ"], "DEFGX", "length", 3),
        (["DEF", "G"], ["DEFGHIJ"], "DEFG", "length", 2),
        (["a", "a", "a", "b", "c"], ["aab"], "a", "stop", 4),
        (["one two three"], ["three", "two"], "one ", "stop", 1),  # both within one token: the first to complete
        (["x", "ab"], ["b", "ab"], "xa", "stop", 2),  # both complete at once: the first listed
        (["x", "ab"], ["ab", "b"], "x", "stop", 2),
        (["x", "y"], ["z"], "xy", "length", 2),
        (["\n", "\n"], ["\n\n"], "", "stop", 2),
    ],
)
def test_stop_strings(words: list[str], stop: list[str], text: str, reason: str, tokens: int) -> None:
    pieces, result = run(words, stop=stop)
    assert (result, result.finish_reason, result.new_tokens) == (text, reason, tokens)
    assert joined(pieces) == text


def test_nothing_is_held_back_without_need() -> None:
    pieces, _ = run(["abc", "de", "f", "x"], stop=["efg"])
    assert [piece.text for piece in pieces] == ["abc", "d", "efx"]
    assert [piece.token_ids for piece in pieces] == [(0,), (1,), (2, 3)]


def test_a_lone_string_is_one_stop_string() -> None:
    assert run(["a", "b", "ab"], stop="ba")[1] == "a"


@pytest.mark.parametrize("stop", ["", [""], ["x", ""]])
def test_an_empty_stop_string_is_refused(stop: Sequence[str]) -> None:
    if stop == "":
        stop = [stop]
    with pytest.raises(ValueError, match="must not be empty"):
        run(["a"], stop=stop)


def first_completed(text: str, stops: list[str]) -> str:
    """Oracle: try every end, shortest first, and at each end the stops in their order."""
    for end in range(1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return text


@given(words=st.lists(LETTERS, max_size=12), stops=st.lists(LETTERS.filter(bool), max_size=3))
def test_stop_strings_against_the_oracle(words: list[str], stops: list[str]) -> None:
    """Any split of any text: the pieces join to the text before the first completed stop, and nothing is sent too early or late."""
    text = "".join(words)
    expected = first_completed(text, stops)
    matcher, sent, seen = StopStrings(stops), "", ""
    for word in words:
        seen += word
        sent += matcher.push(word)
        assert expected.startswith(sent), "sent what belongs to a stop string"
        if matcher.stopped:
            break
        held = seen[len(sent) :]
        assert held == "" or any(len(stop) > len(held) and stop.startswith(held) for stop in stops), "held back without need"
    else:
        sent += matcher.flush()
    assert sent == expected and matcher.stopped == (expected != text or first_completed(text, stops) != text)


@given(words=st.lists(LETTERS, min_size=1, max_size=10), stops=st.lists(LETTERS.filter(bool), max_size=3), limit=st.integers(0, 10))
def test_the_stream_joins_to_the_text(words: list[str], stops: list[str], limit: int) -> None:
    pieces, result = run(words, stop=stops, max_new_tokens=min(limit, len(words)))
    text = "".join(words[:limit])
    assert joined(pieces) == result == first_completed(text, stops)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == result.finish_reason
    assert tuple(i for piece in pieces for i in piece.token_ids) == result.token_ids == tuple(range(result.new_tokens))
    assert all(piece.text for piece in pieces[:-1])


# UTF-8 at token borders


@given(text=st.text(max_size=12), tail=st.binary(max_size=3))
def test_characters_are_sent_whole(text: str, tail: bytes) -> None:
    """A token per byte: nothing sent holds a replacement character that the text does not have; unfinished bytes come at the end."""
    ids = list(text.encode() + tail)
    stream, sent = TextStream(ByteTokenizer(), [65]), ""
    for token_id in ids:
        sent += stream.push(token_id)
    final = (text.encode() + tail).decode("utf-8", errors="replace")
    assert sent == codecs.getincrementaldecoder("utf-8")(errors="replace").decode(text.encode() + tail), "held back without need"
    assert sent + stream.flush() == final
    assert stream.flush() == ""


def byte_level_tokenizer() -> Tokenizer:
    """GPT-2-like: 256 tokens, one for each byte, and </s>."""
    backend = byte_level_bpe({character: byte for character, byte in BYTE_LEVEL.items()}, [], pre_tokenizers.ByteLevel())
    backend.add_special_tokens(["</s>"])
    return build_tokenizer(backend, special_tokens={"eos_token": "</s>"})


KINDS: dict[str, tuple[Callable[[], Any], int]] = {
    "bytes": (ByteTokenizer, 0),
    "byte level": (byte_level_tokenizer, 0),
    "byte tokens": (lambda: metaspace_tokenizer(), 2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pattern", "pieces"), [(b"\xef\xbf\xbd", ["", "", "\ufffd"]), (b"\x80", ["\ufffd"]), (b"\xff", ["\ufffd"])])
def test_replacement_characters_are_sent_as_they_come(kind: str, pattern: bytes, pieces: list[str]) -> None:
    """A real U+FFFD, and a byte that can begin no character: neither can become anything else."""
    make, first = KINDS[kind]
    stream = TextStream(make(), [])
    assert [stream.push(byte + first) for byte in 40 * pattern] == 40 * pieces
    assert stream.flush() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_that_the_prompt_began_is_text_once_it_is_finished(kind: str) -> None:
    make, first = KINDS[kind]
    before, s = (259, 261) if kind == "byte tokens" else (ord("a"), ord("s"))
    prompt = [before, *(byte + first for byte in "😀".encode()[:2])]
    stream = TextStream(make(), prompt)
    assert [stream.push(token_id) for token_id in (*(byte + first for byte in "😀".encode()[2:]), s)] == ["", "😀", "s"]
    stream = TextStream(make(), prompt)
    assert [stream.push(token_id) for token_id in (s, s)] == ["s", "s"], "what the prompt began belongs to the prompt"
    stream = TextStream(make(), prompt, echoed=True)
    begun = make().decode(prompt).removeprefix(make().decode([before]))
    assert begun and stream.push(s) == begun + "s"


def test_a_character_taken_back_by_a_wrong_byte_stays_sent() -> None:
    """A decoder of byte tokens writes replacements for a whole run of bytes once one of them is wrong."""
    tokenizer = metaspace_tokenizer()
    stream = TextStream(tokenizer, [259])
    assert [stream.push(byte + 2) for byte in "€".encode() + b"\x80a"] == ["", "", "€", "\ufffd", "a"]
    stream = TextStream(tokenizer, [259])
    assert [stream.push(token_id) for token_id in (0x80 + 2, 260, 258, 259)] == ["\ufffd", " cat", " ", " the"], "spaces stay"
    stream = TextStream(tokenizer, [259])
    assert [stream.push(byte + 2) for byte in "€€".encode()] == ["", "", "€", "", "", "€"]


def test_an_unfinished_character_is_sent_when_it_is_whole() -> None:
    stream = TextStream(ByteTokenizer(), [])
    assert [stream.push(byte) for byte in "é€😀!".encode()] == ["", "é", "", "", "€", "", "", "", "😀", "!"]


def test_a_stop_string_behind_an_unfinished_character() -> None:
    ids = [*b"ab", 0xE2]
    generation = generate_tokens(ScriptedEngine(ids), ByteTokenizer(), [1], max_new_tokens=3, stop=["b\ufffd"])
    assert (generation.result(), generation.result().finish_reason) == ("a", "stop")


def metaspace_tokenizer() -> Tokenizer:
    """SentencePiece-like: a word's space belongs to its token, and the decoder drops the first one."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁cat", "s", "▁sat"]
    backend = BackendTokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["</s>"])
    return build_tokenizer(backend, special_tokens={"eos_token": "</s>"})


# A token is a word of the vocabulary (from 258 on), EOS, or one byte of a character: such bytes come whole.
CHARACTER = st.characters(exclude_characters="\ufffd", codec="utf-8").map(lambda character: [byte + 2 for byte in character.encode()])
WORD = st.integers(257, 262).map(lambda token_id: [1 if token_id == 257 else token_id])
TOKEN_LISTS = st.lists(CHARACTER | WORD, max_size=10).map(lambda parts: [*chain(*parts)])


@given(prompt=TOKEN_LISTS, new=TOKEN_LISTS)
def test_the_text_continues_the_prompt_with_its_spaces(prompt: list[int], new: list[int]) -> None:
    tokenizer = metaspace_tokenizer()
    prompt = [259, *prompt]
    stream = TextStream(tokenizer, prompt)
    text = "".join(stream.push(token_id) for token_id in new) + stream.flush()
    assert tokenizer.decode(prompt) + text == tokenizer.decode(prompt + new)


# Ends, counts, speeds
