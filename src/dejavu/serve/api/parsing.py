"""From the bytes of a request to a checked body: JSON as the standard has it, types taken at their word, one mistake named at a time.

In: raw bytes and a pydantic class. Out: an instance of it, or an ApiError of status 400 whose `param` is the path of the field at fault,
such as messages[0].content. A boolean is no number, a string of digits is none either. A field that nobody knows is refused, as it might
change the text, unless it is null.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, WrapValidator, model_validator

from dejavu.serve.api.errors import ApiError, invalid

ROLES = ("system", "developer", "user", "assistant")
SHOWN = 60  # characters of a wrong value that a message repeats
MAX_DIGITS = 40  # of an integer; no field takes as many
INSTANCE = re.compile(r" or instance of \w+")  # of a class of ours, which no client has
WORDS = {"valid dictionary or object to extract fields from": "object", "valid dictionary": "object", "a object": "an object"}


class Schema(BaseModel):
    """Base of every class that describes what is sent or received."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class Received(Schema):
    """Base of every class that describes a part of a request. neutral: fields of which one value alone, which asks for nothing, is
    taken."""

    neutral: ClassVar[frozenset[str]] = frozenset()
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _given(cls, values: Any) -> Any:
        """Without what is null: that always means that it is not given. Fields that are required are left, to be told so."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None or name in cls.model_fields}


Body = TypeVar("Body", bound=Received)


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 5.0 is an integer there."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)  # the last part of an Annotated[int, ...], or the document would not know its bounds


def explained(message: str) -> WrapValidator:
    """Of a field with several forms: what it must be, in place of why it is none of them."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(message) from None

    return WrapValidator(check)


def parse(body: bytes, kind: type[Body]) -> Body:
    """The body of a request. Raises ApiError."""
    values = parse_object(body)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _mistake(error, values, kind) from None


def parse_object(body: bytes) -> dict[str, Any]:
    """The object of a JSON text. Raises ApiError for bytes that are not UTF-8, what is no JSON, and NaN, Infinity and the like."""

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse(text)

    def integer(text: str) -> int:
        return int(text) if len(text) <= MAX_DIGITS else refuse(text)

    def refuse(text: str) -> Any:
        raise ValueError(f"{text[:SHOWN]} is no number here; send a finite one of at most {MAX_DIGITS} digits")

    try:
        text = body.decode("utf-8")
        values = json.loads(text, parse_constant=refuse, parse_float=number, parse_int=integer)
        if "\\u" in text:
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise invalid(
            "the body has one half of a surrogate pair, written \\ud800 to \\udfff, without the other; send whole characters"
        ) from None
    except UnicodeDecodeError:
        raise invalid("the body is not UTF-8; send text in that encoding") from None
    except RecursionError:
        raise invalid("the body is nested too deeply; send fewer objects and lists within one another") from None
    except ValueError as error:
        raise invalid(f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise invalid(f"the body must be a JSON object, not {_shown(values)}")
    return values


def _mistake(error: ValidationError, values: dict[str, Any], kind: type[Received]) -> ApiError:
    """The first thing wrong, in words."""
    found = error.errors(include_url=False)[0]
    param = _path(found["loc"], values, missing=found["type"] == "missing")
    required = kind.model_fields[param].is_required() if param in kind.model_fields else False
    if found["type"] == "missing" or (required and found["input"] is None):
        return invalid(f"{param} is missing; a request needs it", param=param)
    if found["type"].startswith("union_tag"):  # of messages, which differ by their role
        return invalid(f"{param}.role must be one of {', '.join(ROLES)}, not {_shown(found['input'].get('role'))}", param=f"{param}.role")
    if found["type"] == "extra_forbidden":
        return invalid(f"{param} is not known here, and might change the text; leave it out", param=param)
    if param in kind.neutral:
        return invalid(f"{param} {_shown(found['input'])} is not supported here; leave it out", param=param)
    own = found.get("ctx", {}).get("error")
    if isinstance(own, ValueError):
        return invalid(f"{param} {own}, not {_shown(found['input'])}", param=param)
    says = INSTANCE.sub("", found["msg"].removeprefix("Input ").partition(" after validation")[0])
    for of_python, of_json in WORDS.items():
        says = says.replace(of_python, of_json)
    return invalid(f"{param}: {says[:1].lower()}{says[1:]}, not {_shown(found['input'])}", param=param)


def _path(loc: tuple[str | int, ...], values: Any, *, missing: bool) -> str:
    """The path of a field as a client writes it. What pydantic adds to name the form that it tried is left out."""
    path, last = "", len(loc) - 1
    for position, part in enumerate(loc):
        if isinstance(part, int) and isinstance(values, list) and part < len(values):
            path, values = f"{path}[{part}]", values[part]
        elif isinstance(part, str) and isinstance(values, dict) and (part in values or (missing and position == last)):
            path, values = f"{path}.{part}" if path else part, values.get(part)
    return path


def _shown(value: Any) -> str:
    """A value as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
