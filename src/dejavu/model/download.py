"""A model or an adapter fetched from the Hugging Face hub into its local cache, by huggingface_hub.

In: a HubName and a consent. Out: the files in the cache that `dejavu` reads, and no others. What there is, how large it is and the
config.json of a model are looked at before the consent: what is not to be loaded is refused, unasked and unfetched. Large files come
one after the other, so that what is cut off is one of them, which the next call goes on with. The config.json comes last: a folder that
has one is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Collection, Generator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from huggingface_hub import HfApi, ModelInfo, constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import (
    WeakFileLock,
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    hf_raise_for_status,
)

from dejavu.config import ModelConfig, require
from dejavu.model.adapter import CARD_FILE, CONFIG_FILE, TENSOR_FILE
from dejavu.model.bundle import ADAPTER_FOLDER
from dejavu.model.families import config_from_hf
from dejavu.model.generation_config import GENERATION_FILE
from dejavu.model.hub_name import HubName
from dejavu.model.tokenizer import TEMPLATES_FOLDER

HUB_S, REQUEST_S = 9.0, 5.0  # until a hub that does not answer a question is given up, in all and for one request of it
LARGEST_CONFIG = 1_000_000  # bytes of a config.json, which is read before the consent
LARGEST_PLAIN = 50_000_000_000  # bytes; the hub sends larger files by another protocol, which huggingface_hub may have or not
KEY = re.compile(r"[0-9a-f]{40,64}")  # it becomes the name of a file
COMMIT = re.compile(r"[0-9a-f]{40}")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
# What huggingface_hub's library for HTTP raises: which one that is depends on its version.
HUB_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OSError)  # pyrefly: ignore[bad-assignment]
# What huggingface_hub raises for an answer that is no JSON, or JSON of another shape: that of a login page, or of a proxy.
ODD_ANSWERS = (json.JSONDecodeError, AttributeError, KeyError, TypeError)
ODD = "does not answer as the Hugging Face hub does; check the network and HF_ENDPOINT"

SMALL_FILES = (
    GENERATION_FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
SENTENCEPIECE = "tokenizer.model"
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), (SENTENCEPIECE,))  # one of them is needed
ADAPTER_FILES = (TENSOR_FILE, GENERATION_FILE, CARD_FILE, CONFIG_FILE)
# Weights in the order of preference: of each pair the first that the repository has any of. Shards go with their index.
WEIGHTS = (
    ("model.safetensors.index.json", re.compile(r"model-\d+-of-\d+\.safetensors")),
    ("model.safetensors.index.json", re.compile(r"[^/]+-\d+-of-\d+\.safetensors")),
    (None, re.compile(r"model\.safetensors")),
    (None, re.compile(r"(?!adapter_model)[^/]+\.safetensors")),
    ("pytorch_model.bin.index.json", re.compile(r"pytorch_model-\d+-of-\d+\.bin")),
    (None, re.compile(r"pytorch_model\.bin")),
)

Kind = Literal["model", "adapter"]
CheckConfig = Callable[[ModelConfig], object]
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """What a download would fetch: of `total` bytes `missing` are not on this machine. begun: a part is. hint: another way to it."""

    name: str
    total: int
    missing: int
    begun: bool
    hint: str

    @property
    def text(self) -> str:
        state = "is only in part on this machine" if self.begun else "is not on this machine"
        share = "" if self.missing == self.total else f" (of {sized(self.total)})"
        return f"{self.name} {state}: {sized(self.missing)}{share} from the Hugging Face hub{self.hint}"


Consent = Callable[[Offer], bool]
Download = bool | Consent


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """A file of a repository. key: its name in the cache, which is its SHA-256 where it is `large`."""

    name: str
    size: int
    key: str
    large: bool

    def held(self, folder: Path) -> int:
        """Bytes of it that the cache of the repository has."""
        sizes = [path.stat().st_size for path in (folder / "blobs" / self.key, self.partial(folder)) if path.is_file()]
        return min(self.size, max(sizes, default=0))

    def partial(self, folder: Path) -> Path:
        return folder / "blobs" / f"{self.key}.incomplete"


def fetch(
    hub: HubName, kind: Kind, consent: Literal[True] | Consent, *, check: CheckConfig | None = None, begun: bool = False, hint: str = ""
) -> bool:
    """Fetch what is missing of a model or an adapter, if the consent is True or says yes to the offer; whether it was.

    check: called before that with the architecture of a model that has a config.json (a GGUF file has none); what it raises ends it.
    Raises ValueError, with the fix: for a hub that does not answer, a name or revision that it does not have, one whose terms are not
    accepted, files that are none of a model, an architecture that is not supported, too little disk, and a download cut off, which the
    next call goes on with.
    """
    info = _model_info(hub)
    files = _chosen(info, hub, kind)
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub.repo, repo_type="model")
    commit = info.sha or ""
    if kind == "model" and hub.file is None:
        config = _config(hub, commit, files[-1])
        if check is not None:
            check(config)
    total, missing = _total(files), _missing(files, folder)
    if consent is not True and not consent(Offer(name=str(hub), total=total, missing=missing, begun=begun or missing < total, hint=hint)):
        return False
    _check_disk(missing, folder, hub)
    try:
        for file in files:
            if file.large and file.size <= LARGEST_PLAIN:
                _fetch_large(hub, commit, file, folder)
        with _without_bars():
            for file in files:
                hf_hub_download(hub.repo, file.name, revision=commit)
        _note_commit(folder, hub.revision or constants.DEFAULT_REVISION, commit)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"interrupted; {_kept(files, folder, hub)}") from stop
    except HUB_ERRORS as error:
        reason = _reason(error, hub)
        if isinstance(error, RepositoryNotFoundError):  # a gated one too
            raise ValueError(reason) from error
        raise ValueError(f"the download broke off: {reason}; {_kept(files, folder, hub)}") from error
    return True


def _note_commit(folder: Path, revision: str, commit: str) -> None:
    """Say in the cache which commit a branch or tag is, as huggingface_hub does for files that are asked for by that name.

    By that name a file could be of a newer commit than the others.
    """
    if revision != commit:
        noted = folder / "refs" / revision
        noted.parent.mkdir(parents=True, exist_ok=True)
        noted.write_text(commit)


def sized(count: int) -> str:
    """A number of bytes for a person."""
    for unit, size, digits in (("GB", 1e9, 1), ("MB", 1e6, 0), ("kB", 1e3, 0)):
        if count >= size:
            return f"{count / size:,.{digits}f} {unit}"
    return f"{count} bytes"


def _total(files: Sequence[RemoteFile]) -> int:
    return sum(file.size for file in files)


def _missing(files: Sequence[RemoteFile], folder: Path) -> int:
    return sum(file.size - file.held(folder) for file in files)


def _kept(files: Sequence[RemoteFile], folder: Path, hub: HubName) -> str:
    total = _total(files)
    return f"{sized(total - _missing(files, folder))} of {sized(total)} of '{hub}' are here, and the same command goes on from there"


def _model_info(hub: HubName) -> ModelInfo:
    """What the hub says of a repository."""

    def ask() -> ModelInfo:
        info = HfApi().model_info(hub.repo, revision=hub.revision, files_metadata=True, timeout=REQUEST_S)
        if info.gated:  # what there is anyone may see; the files need the terms accepted
            HfApi().auth_check(hub.repo)
        return info

    info = _answer(ask, hub)
    require(COMMIT.fullmatch(info.sha or "") is not None, f"{constants.ENDPOINT} {ODD}")
    return info


def _config(hub: HubName, commit: str, file: RemoteFile) -> ModelConfig:
    """The architecture that config.json states, which is read and not kept."""
    require(file.size <= LARGEST_CONFIG, f"{file.name} of '{hub}' has {sized(file.size)}, which is too much for one; check the name")

    def ask() -> bytes:
        address = hf_hub_url(hub.repo, file.name, revision=commit)
        response = get_session().get(address, headers=build_hf_headers(), timeout=REQUEST_S)
        hf_raise_for_status(response)
        return response.content

    content = _answer(ask, hub)
    try:
        hf = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{file.name} of '{hub}' is not valid JSON ({error}); take another revision, or tell its owner") from error
    require(isinstance(hf, dict), f"{file.name} of '{hub}' holds no JSON object")
    try:
        return config_from_hf(hf)
    except ValueError as error:
        raise ValueError(f"'{hub}' is no model that dejavu reads, and is not fetched: {error}") from error


def _answer(ask: Callable[[], Answer], hub: HubName) -> Answer:
    """What the hub answers within HUB_S seconds."""
    answer: Future[Answer] = Future()

    def settle() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:
            answer.set_exception(error)

    # In a thread of its own: a name that is not resolved and addresses tried one after the other have no time limit together.
    threading.Thread(target=settle, daemon=True).start()
    try:
        return answer.result(HUB_S)
    except ODD_ANSWERS as error:  # first: to older versions of huggingface_hub one of them is of HUB_ERRORS too
        raise ValueError(f"{constants.ENDPOINT} {ODD}") from error
    except HUB_ERRORS as error:
        raise ValueError(_reason(error, hub)) from error


def _reason(error: Exception, hub: HubName) -> str:
    """What went wrong, and what to do."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return _reason(error.__cause__, hub)
    if isinstance(error, GatedRepoError):
        return f"{hub.repo!r} is gated: accept its terms at https://huggingface.co/{hub.repo}, then log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"{hub.repo!r} has no revision {hub.revision!r}; https://huggingface.co/{hub.repo}/commits lists those it has"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return f"the Hugging Face hub has no {hub.repo!r}, or it is private; check the name, or log in with `hf auth login`"
    if status is not None:
        return f"the Hugging Face hub answers with status {status}; try again later"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"{constants.HF_HUB_CACHE} cannot be written ({error.strerror}); free some space, or set HF_HUB_CACHE to another folder"
    first: BaseException = error  # libraries wrap errors in their own, which say more about the library
    while (cause := first.__cause__ or first.__context__) is not None:
        first = cause
    why = " ".join(str(first).split())[:100] or "no answer in time"
    return f"the Hugging Face hub at {constants.ENDPOINT} does not answer as it should ({why}); check the network, or try again later"


def _chosen(info: ModelInfo, hub: HubName, kind: Kind) -> list[RemoteFile]:
    """The files of a repository that are read, config.json last. Raises ValueError where it holds no such thing."""
    held = {sibling.rfilename: sibling for sibling in info.siblings or []}
    names = _adapter_names(held, hub) if kind == "adapter" else _gguf_names(held, hub) if hub.file is not None else _model_names(held, hub)
    return [_remote(held[name], hub) for name in names if name in held]


def _remote(sibling: RepoSibling, hub: HubName) -> RemoteFile:
    key = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id or ""
    require(
        KEY.fullmatch(key) is not None, f"{constants.ENDPOINT} gives {sibling.rfilename!r} of {hub.repo!r} the hash {key!r}, which is none"
    )
    return RemoteFile(name=sibling.rfilename, size=sibling.size or 0, key=key, large=sibling.lfs is not None)


def _adapter_names(held: Collection[str], hub: HubName) -> list[str]:
    lora = "; it holds a LoRA of PEFT" if "adapter_config.json" in held else ""
    require(
        TENSOR_FILE in held and CONFIG_FILE in held, f"{hub.repo!r} holds no adapter of dejavu: no {CONFIG_FILE} with {TENSOR_FILE}{lora}"
    )
    return list(ADAPTER_FILES)


def _gguf_names(held: Collection[str], hub: HubName) -> list[str]:
    names = hub.gguf_files
    absent = [name for name in names if name not in held]
    if absent:
        ggufs = _ggufs(held)
        like = [name for name in ggufs if (hub.file or "").lower() in name.lower()] or ggufs
        raise ValueError(f"{hub.repo!r} has no file {absent[0]!r}; its .gguf files: {', '.join(like) or 'none'}")
    require(all(name.endswith(".gguf") for name in names), f"{hub.file!r} is no .gguf file; name one, or give {hub.repo!r} for the model")
    return names


def _model_names(held: Collection[str], hub: HubName) -> list[str]:
    weights = _weights(held)
    if not weights or CONFIG_FILE not in held:
        ggufs = _ggufs(held)
        require(not ggufs, f"{hub.repo!r} holds GGUF files; name one of them, as '{hub.repo}:FILE': {', '.join(ggufs)}")
        raise ValueError(
            f"{hub.repo!r} holds no model that dejavu reads: no {CONFIG_FILE} with weights in safetensors or pytorch_model.bin"
        )
    require(
        TENSOR_FILE not in held or weights != [TENSOR_FILE],
        f"{hub.repo!r} is an adapter, not a model; give the model that it was made for, and --adapter {hub.repo}",
    )
    require(
        any(all(name in held for name in names) for names in TOKENIZERS),
        f"{hub.repo!r} holds no tokenizer that dejavu reads: no tokenizer.json, nor vocab.json with merges.txt, nor {SENTENCEPIECE}; "
        "take a copy of the model that has one",
    )
    older = [] if "tokenizer.json" in held else [SENTENCEPIECE]
    templates = sorted(name for name in held if name.startswith(f"{TEMPLATES_FOLDER}/") and name.endswith(".jinja"))
    adapter = [f"{ADAPTER_FOLDER}/{name}" for name in ADAPTER_FILES]
    return [*weights, *SMALL_FILES, *older, *templates, *adapter, CONFIG_FILE]


def _weights(held: Collection[str]) -> list[str]:
    for index, pattern in WEIGHTS:
        names = sorted(name for name in held if pattern.fullmatch(name))
        if names and (index is None or index in held):
            return [*names, *([] if index is None else [index])]
    return []


def _ggufs(held: Collection[str]) -> list[str]:
    return sorted(name for name in held if name.endswith(".gguf"))


def _check_disk(missing: int, folder: Path, hub: HubName) -> None:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    require(
        missing <= free,
        f"'{hub}' needs {sized(missing)}, and {there} has {sized(free)} free; free some space, or set HF_HUB_CACHE to a folder elsewhere",
    )


@contextmanager
def _without_bars() -> Generator[None]:
    """No bars of small files, which would be a line each. Those of large ones huggingface_hub shows where stderr is a terminal."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _fetch_large(hub: HubName, commit: str, file: RemoteFile, folder: Path) -> None:
    """Bring a large file under the name that huggingface_hub looks for, from where the last download stopped, and check it.

    huggingface_hub goes on after a cut within one call, but its newer versions begin such a file anew in their next.
    """
    blob, partial = folder / "blobs" / file.key, file.partial(folder)
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / folder.name / f"{file.key}.lock"
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        with partial.open("ab") as out:
            if out.tell() > file.size:
                out.truncate(0)
                out.seek(0)
            address = hf_hub_url(hub.repo, file.name, revision=commit)
            shown = Path(file.name).name
            http_get(address, out, resume_size=out.tell(), headers=build_hf_headers(), expected_size=file.size, displayed_filename=shown)
        with partial.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        if digest != file.key:
            partial.unlink()
            raise ValueError(f"{file.name} of '{hub}' came damaged, and was deleted; run the same command again to fetch it anew")
        partial.replace(blob)
