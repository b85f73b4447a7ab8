"""Contextual sparsity for language models: read only the weights that the token at hand needs.

    import dejavu
    lm = dejavu.load("opt-mini")
    print(lm.generate("The lighthouse keeper", max_new_tokens=64))

Nothing heavy is imported until `load`, `LanguageModel` or `Adapter` is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dejavu.version import __version__

if TYPE_CHECKING:
    from dejavu.attached import attach, detach
    from dejavu.config import SamplingConfig
    from dejavu.figures import Evaluation, Profile, Training
    from dejavu.generation.generation import GeneratedText, Generation
    from dejavu.language_model import LanguageModel
    from dejavu.loading import load
    from dejavu.model.adapter import Adapter

__all__ = [
    "Adapter", "Evaluation", "GeneratedText", "Generation", "LanguageModel", "Profile", "SamplingConfig", "Training", "__version__",
    "attach", "detach", "load",
]  # fmt: skip

_LAZY = {"load": "dejavu.loading", "LanguageModel": "dejavu.language_model", "Adapter": "dejavu.model.adapter"}
_LAZY |= {"attach": "dejavu.attached", "detach": "dejavu.attached", "SamplingConfig": "dejavu.config"}
_LAZY |= dict.fromkeys(("Evaluation", "Profile", "Training"), "dejavu.figures")
_LAZY |= dict.fromkeys(("GeneratedText", "Generation"), "dejavu.generation.generation")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dejavu' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
