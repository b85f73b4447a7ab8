"""A LoRA of PEFT where a model or an adapter of ours is meant. In: a folder. Out: a ValueError that says how to use it, if it is one."""

from __future__ import annotations

from pathlib import Path

from dejavu.config import shown
from dejavu.files import read_object

CONFIG_FILE = "adapter_config.json"


def refuse_peft(folder: Path) -> None:
    """Raise ValueError for a folder with PEFT's config and none of a model or of an adapter of ours."""
    path = folder / CONFIG_FILE
    if (folder / "config.json").is_file() or not path.is_file():
        return
    base = read_object(path).get("base_model_name_or_path")
    raise ValueError(
        f"{folder} is a LoRA of PEFT ({CONFIG_FILE}) for {shown(base)}, neither a model nor an adapter of dejavu; merge it into its base "
        "(PeftModel.from_pretrained(base, folder).merge_and_unload(), then save_pretrained) and give the folder of the result"
    )
