"""What a word for something of the hub names."""

from __future__ import annotations

from pathlib import Path

import pytest

from dejavu.model.hub_name import HubName, hub_name

NAMES = {
    "me/tiny": HubName(repo="me/tiny"),
    "me/tiny/": HubName(repo="me/tiny"),
    "me/tiny-1.5_b@v2.0": HubName(repo="me/tiny-1.5_b", revision="v2.0"),
    "me/tiny@refs/pr/3": HubName(repo="me/tiny", revision="refs/pr/3"),
    "me/tiny:tiny.Q4_0.gguf": HubName(repo="me/tiny", file="tiny.Q4_0.gguf"),
    "me/tiny@v2:low/tiny.gguf": HubName(repo="me/tiny", revision="v2", file="low/tiny.gguf"),
    "https://huggingface.co/me/tiny": HubName(repo="me/tiny"),
    "https:/huggingface.co/me/tiny": HubName(repo="me/tiny"),  # as a path has it
    "https://hf.co/me/tiny/?library=x#card": HubName(repo="me/tiny"),
    "https://huggingface.co/me/tiny/tree/refs%2Fpr%2F3": HubName(repo="me/tiny", revision="refs/pr/3"),
    "https://huggingface.co/me/tiny/blob/main/low/tiny.gguf": HubName(repo="me/tiny", revision="main", file="low/tiny.gguf"),
}
PATHS = (
    "./foo",
    ".models/foo",
    "../foo",
    "~/foo",
    "/foo/bar",
    "foo",
    "a/b/c",
    "C:\\models\\x",
    "C:/models/x",
    "me/tiny.gguf",
    "me/tiny@",
    "here/foo",
    "",
)


@pytest.mark.parametrize("word", NAMES)
def test_a_name(word: str) -> None:
    name = hub_name(word)
    assert name == NAMES[word]
    assert hub_name(str(name)) == name
    assert name is not None and name.model == str(name).replace(f"@{name.revision}", "")


def test_a_path_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert [word for word in PATHS if hub_name(word) is not None] == []


@pytest.mark.parametrize(
    "word",
    [
        "https://huggingface.co/me",
        "https://huggingface.co/datasets/me/data",
        "https://huggingface.co/me/tiny/blob/main/config.json",
        "https://huggingface.co/me/tiny/tree/main/low",
        "https://example.org/me/tiny",
    ],
)
def test_another_address_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match=r"is no address of a model .*; give ORG/NAME, ORG/NAME@REVISION or ORG/NAME:FILE\.gguf"):
        hub_name(word)


def test_a_revision_is_said_once() -> None:
    assert hub_name("me/tiny", "v2") == hub_name("me/tiny@v2", "v2") == HubName(repo="me/tiny", revision="v2")
    with pytest.raises(ValueError, match="names revision 'v1', and revision= 'v2'"):
        hub_name("me/tiny@v1", "v2")


def test_parts_of_a_file() -> None:
    whole, part = HubName(repo="me/tiny", file="a.gguf"), HubName(repo="me/tiny", file="q/a-00002-of-00003.gguf")
    assert whole.gguf_files == ["a.gguf"] and HubName(repo="me/tiny").gguf_files == []
    assert part.gguf_files == [f"q/a-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
