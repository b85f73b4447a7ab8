"""What a user may call something of the Hugging Face hub: `owner/name`, with a revision, with a file of it, or its address.

In: a word. Out: a HubName, or None where the word can only be a path. Nothing is looked up anywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from dejavu.config import require

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
NAME = re.compile(rf"(?P<repo>{HUB_ID.pattern})(?:@(?P<revision>[^:@\s]+))?(?::(?P<file>[^:]+))?")
ADDRESS = re.compile(r"https?:/+(?:www\.)?(?P<host>[^/]+)/*(?P<path>[^?#]*).*")  # one slash is left where it passed for a path
HOSTS = ("huggingface.co", "hf.co")
PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
FORMS = "ORG/NAME, ORG/NAME@REVISION or ORG/NAME:FILE.gguf"


@dataclass(frozen=True, kw_only=True, slots=True)
class HubName:
    """A repository of models, a branch, tag or commit of it (None: its main branch), and one GGUF file of it (None: a whole model)."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return self.repo + ("" if self.revision is None else f"@{self.revision}") + ("" if self.file is None else f":{self.file}")

    @property
    def model(self) -> str:
        """What a model of it is called, and what adapters state as their base: the name without the revision."""
        return str(HubName(repo=self.repo, file=self.file))

    @property
    def gguf_files(self) -> list[str]:
        """The file, or all parts of it where it is one of several; none where a whole model is named."""
        if self.file is None:
            return []
        part = PART.fullmatch(self.file)
        return [self.file] if part is None else [f"{part['stem']}-{i:05}-of-{part['count']}.gguf" for i in range(1, int(part["count"]) + 1)]


def hub_name(word: str, revision: str | None = None) -> HubName | None:
    """The name in a word; None for a path, which is all but `owner/name` where no folder `owner` is here.

    Raises ValueError for a web address that is none of a model, and for two revisions that differ.
    """
    address = ADDRESS.fullmatch(word)
    found = NAME.fullmatch(word.rstrip("/") if address is None else _from_address(word, address))
    if found is None or (address is None and _looks_local(word, found["repo"])):
        return None
    named = found["revision"]
    require(
        revision is None or named in (None, revision), f"{word!r} names revision {named!r}, and revision= {revision!r}; give one of the two"
    )
    return HubName(repo=found["repo"], revision=named or revision, file=found["file"])


def _looks_local(word: str, repo: str) -> bool:
    return word.startswith((".", "~")) or repo.endswith(".gguf") or Path(repo).parent.is_dir()


def _from_address(word: str, address: re.Match[str]) -> str:
    """`https://huggingface.co/ORG/NAME`, perhaps with `/tree/REVISION` or `/blob/REVISION/FILE.gguf`, as a name."""
    parts = [unquote(part) for part in address["path"].strip("/").split("/")]
    repo, kind, revision, file = "/".join(parts[:2]), "".join(parts[2:3]), "".join(parts[3:4]), "/".join(parts[4:])
    whole = kind == "" or (kind == "tree" and revision != "" and file == "")
    a_file = kind in ("blob", "resolve") and file.endswith(".gguf")
    is_model = address["host"] in HOSTS and HUB_ID.fullmatch(repo) is not None and (whole or a_file)
    require(is_model, f"{word} is no address of a model in the Hugging Face hub; give {FORMS}")
    return repo + (f"@{revision}" if revision else "") + (f":{file}" if file else "")
