"""How a command that writes text draws it: its options, a word on what was chosen, and the same for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dejavu.config import SamplingConfig
    from dejavu.language_model import LanguageModel

OWN = "not set: as the model comes with, else greedy"
Temperature = Annotated[float | None, typer.Option("--temperature", metavar="X", help=f"0 is greedy; {OWN}.")]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="N", help="Draw from the N likeliest tokens; not set: the model's own.")]
TopP = Annotated[
    float | None, typer.Option("--top-p", metavar="X", help="Draw from the likeliest tokens of this total; not set: the model's own.")
]


def sampling_words(lm: LanguageModel, *, dense: bool = False, **overrides: float | None) -> str:
    """Such as "temperature 0.6, top_p 0.9 (of the adapter)". overrides: temperature, top_k and top_p, None where not given."""
    named = [name for name, value in overrides.items() if value is not None]
    source = _source(lm, dense=dense)
    origin = {"default": "", "model": "of the model", "adapter": "of the adapter"}[source]
    if named:
        origin = f"{', '.join(named)} as asked" + (f", else {origin}" if origin and len(named) < len(overrides) else "")
    words = chosen(lm, dense=dense, **overrides).words
    return f"{words} ({origin})" if origin else words


def sampling_values(lm: LanguageModel, *, seed: int | None, dense: bool = False, **overrides: float | None) -> dict[str, Any]:
    """The key `sampling` of a command's object. source: adapter, model or default, of what was not given."""
    values = chosen(lm, dense=dense, **overrides).to_dict() | {"seed": seed}
    return values | {"source": _source(lm, dense=dense), "asked": [name for name, value in overrides.items() if value is not None]}


def chosen(lm: LanguageModel, *, dense: bool = False, **overrides: Any) -> SamplingConfig:
    return lm.sampling_of(dense=dense).overridden(**overrides)


def _source(lm: LanguageModel, *, dense: bool) -> str:
    if not dense and lm.adapter is not None and lm.adapter.sampling is not None:
        return "adapter"
    return "default" if lm.checkpoint.sampling is None else "model"
