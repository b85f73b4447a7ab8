"""Loads of the serving benchmark, the prompts that they draw from, and replies."""

from __future__ import annotations

from typing import Any

from dejavu.loadtest.client import Reply
from dejavu.loadtest.workload import Load, Mix, Prompts

TEXT = " ".join(f"word{number}" for number in range(4000))
PROMPTS = Prompts(text=TEXT)
EIGHT = Mix(lengths=(8,), shares=(1.0,))


def load(**changes: Any) -> Load:
    values: dict[str, Any] = {"prompt_tokens": EIGHT, "output_tokens": EIGHT, "concurrency": 2, "requests": 6}
    return Load(**(values | changes))


def replied(sent: float, ended: float, **changes: Any) -> Reply:
    values: dict[str, Any] = {"sent": sent, "ended": ended, "texts": [ended], "status": 200, "completion_tokens": 1}
    return Reply(**(values | changes))
