"""Chat templates: from messages to the text and the token ids of a prompt.

In: a tokenizer with a Jinja template (as `chat_template` of a checkpoint or GGUF file) and messages {"role", "content"}. Out: the rendered
text, whose special tokens the template itself spells, so that none is added when it is tokenised. The text is that of
`apply_chat_template` of transformers, byte for byte.

Only what the template writes, and what the system and the model itself said, becomes control tokens: one that is spelled out in a message
of anybody else stays a text, or a user could write the turns of others. Such a token is set between two marks on its way through the
template. rendering.py has the template's environment; it runs in a process that can be ended (bounded.py).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dejavu.config import require
from dejavu.model import bounded
from dejavu.model.tokenizer import AddedTokens, Tokenizer

Message = Mapping[str, Any]
Messages = Sequence[Message]

TRUSTED = ("system", "developer", "assistant")  # roles whose messages may hold control tokens
BEGIN, END = "\ufdd0", "\ufdd1"  # two of the code points that are no characters, which no text holds
MARK = re.compile(f"[{BEGIN}{END}]")
ESCAPED = r"\ufdd0"  # where a template writes JSON in ASCII, or a list as Python shows it
RESERVED = ("messages", "chat_template")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field, by which one is found
WHAT = "the chat template"
CUT = "END_OF_THE_MESSAGE_TO_CONTINUE "  # written behind it and found again; the space tells whether the template trims


def rendered(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    sanitize_control_tokens: bool = True,
) -> str:
    """The messages as the model was trained to read them, up to where its answer begins; `rendered_ids` are its ids.

    chat_template_kwargs: variables of the template, such as {"enable_thinking": False}; with `tools` the template named tool_use is used
    where there is one; with `add_generation_prompt` false the text ends behind the last message, with `continue_final_message` true within
    it, for the model to go on. sanitize_control_tokens: put control tokens that messages of users and tools, tools, documents and
    variables spell out between marks.

    Raises ValueError for a tokenizer without a template, no messages, and what the template refuses.
    """
    require(len(messages) > 0, "there are no messages; give at least one")
    kwargs = dict(chat_template_kwargs or {})
    wrong = [name for name in RESERVED if name in kwargs]
    require(not wrong, f"{', '.join(wrong)} cannot be among chat_template_kwargs; leave it out")
    continues = kwargs.pop("continue_final_message", None) or False
    require(isinstance(continues, bool), f"continue_final_message must be true or false, not {str(continues)[:80]!r}")
    require(
        not (continues and kwargs.get("add_generation_prompt")),
        "continue_final_message and add_generation_prompt exclude one another: the first goes on with the last message, the second begins "
        "a new one; set one of them to true",
    )
    template = template_of(tokenizer, tools=kwargs.get("tools") is not None)
    prepared = [_prepared(message) for message in messages]
    try:
        if sanitize_control_tokens:
            tokens = _control_tokens(template, tokenizer.added_tokens)
            kwargs = _marked(kwargs, tokens)
            prepared = [message if message.get("role") in TRUSTED else _marked(message, tokens) for message in prepared]
        characters = _characters(prepared) + _characters(kwargs)
    except RecursionError:
        raise ValueError("a message or chat_template_kwargs is nested too deeply; leave what is in it out") from None
    if continues:
        content = prepared[-1].get("content")
        require(isinstance(content, str), "continue_final_message needs a last message whose content is a text")
        prepared[-1] = {**prepared[-1], "content": f"{content}{CUT}"}
    variables = {
        "tools": None,
        "documents": None,
        "add_generation_prompt": not continues,
        **tokenizer.special_tokens,
        **kwargs,
        "messages": prepared,
    }
    try:
        text = bounded.call("render", template, variables, characters=characters, what=WHAT)
    except ValueError as error:
        raise ValueError(f"{WHAT} cannot be rendered: {error}") from error
    return _cut(text) if continues else text


def _cut(text: str) -> str:
    """The text up to the end of the message to continue, without white space there if the template trims (the rule of transformers)."""
    before, found, after = text.rpartition(CUT.strip())
    require(bool(found), f"{WHAT} leaves the end of the last message out, so that it cannot be continued; send it without")
    return before if after.startswith(" ") else before.rstrip()


def template_of(tokenizer: Tokenizer, *, tools: bool = False) -> str:
    """The template for messages, with tools or without (the rule of transformers). ValueError where there is none."""
    named = tokenizer.named_templates
    if tools and "tool_use" in named:
        return named["tool_use"]
    if tokenizer.chat_template is None:
        require(not named, f"the model has chat templates, but none named default: {', '.join(sorted(named))}; name one of them default")
        raise ValueError("the model has no chat template, so it takes a text and no messages")
    return tokenizer.chat_template


def rendered_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a rendered text; nothing is added to them. What stands between marks is no control token (the rule of transformers)."""
    if MARK.search(text) is None and ESCAPED not in text:
        return tokenizer.encode_plain(text)
    pieces = _marks(tokenizer.added_tokens).split(text)  # a text, a marked token, a text, ...; None for a mark without its other
    ids = tokenizer.encode_plain(pieces[0])
    for index, piece in enumerate(pieces[1:], start=1):
        if piece:
            ids += tokenizer.encode_after(piece, as_text=index % 2 == 1)
    return ids


def chat_ids(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    sanitize_control_tokens: bool = True,
) -> list[int]:
    """Token ids of the rendered messages; see `rendered`."""
    text = rendered(tokenizer, messages, chat_template_kwargs=chat_template_kwargs, sanitize_control_tokens=sanitize_control_tokens)
    return rendered_ids(tokenizer, text)


def _prepared(message: Message) -> dict[str, Any]:
    """A message without fields that are None, and its reasoning under each of the names that templates read."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in REASONING if name in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _marked(value: Any, tokens: re.Pattern[str]) -> Any:
    """A value with marks around the control tokens of its strings; marks that it brings are dropped."""
    if isinstance(value, str):
        return tokens.sub(rf"{BEGIN}\g<0>{END}", MARK.sub("", value))
    if isinstance(value, Mapping):
        return {key: _marked(each, tokens) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(each, tokens) for each in value]
    return value


@functools.lru_cache(maxsize=4)
def _control_tokens(template: str, added: AddedTokens) -> re.Pattern[str]:
    """Special tokens, and added tokens that the template writes, unless they are white space."""
    try:
        written = "\0".join(bounded.call("literals", template, what=WHAT))
    except ValueError as error:
        raise ValueError(f"{WHAT} cannot be rendered: {error}") from error
    return _any_of([token for token, special in added if special or (token in written and not token.isspace())])


@functools.lru_cache(maxsize=4)
def _marks(added: AddedTokens) -> re.Pattern[str]:
    tokens = _any_of([token for token, _ in added]).pattern
    return re.compile(rf"(?:{BEGIN}|\\ufdd0)({tokens})(?:{END}|\\ufdd1)|{MARK.pattern}")


def _any_of(tokens: list[str]) -> re.Pattern[str]:
    """A pattern of the tokens, the longest first; of none it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(filter(None, tokens), key=len, reverse=True))) or "(?!)")


def _characters(value: Any) -> int:
    """How much text a value holds."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 0
