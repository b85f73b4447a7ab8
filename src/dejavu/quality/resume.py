"""Finished parts of a long measurement, kept so that an interrupted run does not measure them again.

In: a part's name and how to measure it. Out: the part, plain JSON; in a file, those that are finished.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dejavu.damage import content_of
from dejavu.files import read_object, write_json


@dataclass
class PartStore:
    """Finished parts by name, kept in a JSON file where there is one. Parts measured with other settings are dropped."""

    settings: Mapping[str, Any]
    path: Path | None = None
    parts: dict[str, Any] = field(default_factory=dict)
    reused: int = 0

    def __post_init__(self) -> None:
        if self.path is not None and self.path.is_file():
            held = read_object(self.path)
            if held.get("settings") == dict(self.settings):
                with content_of(self.path, "remove it, and everything is measured again"):
                    self.parts = dict(held["parts"])

    def get(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The part of this name, measured and kept if it is not there yet."""
        if name in self.parts:
            self.reused += 1
            return self.parts[name]
        self.parts[name] = measure()
        if self.path is not None:
            write_json(self.path, {"settings": dict(self.settings), "parts": self.parts})
        return self.parts[name]
