"""How a command that sends messages has the model's chat template read them: its options."""

from __future__ import annotations

from typing import Annotated, Any

import typer

ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option("--chat-template-kwargs", metavar="JSON", help="Variables of the chat template, such as '{\"enable_thinking\": false}'."),
]
ControlTokens = Annotated[
    bool, typer.Option("--control-tokens", help="Control tokens that a message spells out are control tokens, not a text.")
]


def template_kwargs(given: str | None) -> dict[str, Any]:
    """The object of a JSON text; nothing for None. Raises ValueError for anything else."""
    from dejavu.files import parse_json

    if given is None:
        return {}
    try:
        found = parse_json(given)
    except ValueError as error:
        raise ValueError(f"--chat-template-kwargs {given!r} is no JSON ({error}); give an object such as '{{\"name\": true}}'") from error
    if not isinstance(found, dict):
        raise ValueError(f"--chat-template-kwargs {given!r} is no JSON object; give one such as '{{\"name\": true}}'")
    return found
