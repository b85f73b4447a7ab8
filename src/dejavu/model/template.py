"""Chat templates: from messages to the text and the token ids of a prompt.

In: a tokenizer with a Jinja template (as `chat_template` of a checkpoint or GGUF file) and messages {"role", "content"}. Out: the rendered
text, whose special tokens the template itself spells, so that none is added when it is tokenised.
Templates come with models, so they run in a sandbox that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dejavu.config import require
from dejavu.model.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]


def rendered(tokenizer: Tokenizer, messages: Messages) -> str:
    """The messages as the model was trained to read them, up to where its answer begins.

    Raises ValueError for a tokenizer without a template, no messages, and what the template refuses.
    """
    require(len(messages) > 0, "there are no messages; give at least one")
    if tokenizer.chat_template is None:
        raise ValueError("the model has no chat template, so it takes a text and no messages")

    def refuse(message: str) -> None:  # what templates call where roles do not take turns, say
        raise TemplateError(message)

    special = {name: token for name, token in tokenizer.special_tokens.items() if name in ("bos_token", "eos_token")}
    try:
        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(tokenizer.chat_template)
        template.globals["raise_exception"] = refuse
        return template.render(messages=list(messages), add_generation_prompt=True, **special)
    except Exception as error:  # a template is foreign code: besides its own errors it raises whatever its expressions do
        line = f" (line {error.lineno})" if isinstance(error, TemplateSyntaxError) else ""
        raise ValueError(f"the chat template cannot be rendered{line}: {error}") from error


def chat_ids(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Token ids of the rendered messages; nothing is added to them."""
    return tokenizer.encode_plain(rendered(tokenizer, messages))
