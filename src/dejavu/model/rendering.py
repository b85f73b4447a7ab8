"""The environment that chat templates are written for: Jinja as transformers sets it up, in a sandbox that changes nothing.

In: a template and its variables. Out: the text. Foreign code, which may take any time and memory: bounded.py runs it.

Besides Jinja's own a template has: {% generation %} (the text of an assistant, which says nothing here), {% break %}, {% continue %},
`tojson` that neither escapes nor sorts, `raise_exception`, `strftime_now`, and of `dict` and `namespace` what leads nowhere else.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2.nodes
import jinja2.utils
from jinja2 import Template
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment


def render(template: str, variables: Mapping[str, Any]) -> str:
    """Raises ValueError for a template that is none; whatever its expressions raise else."""
    try:
        return _compiled(template).render(**variables)
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error}") from error


def literals(template: str) -> list[str]:
    """The texts that the template itself may write: what stands between its tags, and its constants."""
    tree = _environment().parse(template)
    texts = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
    return texts + [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: a block with a scope of its own, as the body of a call."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own declaration

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """`dict` of templates: makes them, and has no attributes of a class."""

    def __call__(self, *items: Any, **named: Any) -> dict[Any, Any]:
        return dict(*items, **named)

    def fromkeys(self, *keys: Any) -> dict[Any, Any]:
        return dict.fromkeys(*keys)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` of templates: without names that begin with an underscore, which are Python's own."""

    def __init__(*items: Any, **named: Any) -> None:  # `self` may be among the names
        attributes = dict(*items[1:], **named)
        for name in attributes:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(items[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no {name!r}: no name that begins with an underscore")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _json
    own: dict[str, Any] = {"raise_exception": _raise, "strftime_now": _now, "dict": _Dict(), "namespace": _Namespace}
    environment.globals.update(own)
    return environment


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)
