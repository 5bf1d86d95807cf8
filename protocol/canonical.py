"""Canonical JSON: the one byte string of a value. What is signed or hashed is these bytes; floats have none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from protocol.errors import Code, Refused
from protocol.limits import CONTROL_BYTES_MAX
from protocol.types import Digest

T = TypeVar("T")

_INTEGER_END = 1 << 63  # SQLite and protobuf hold no more
_SHOWN_CHARACTERS_MAX = 160  # of a stranger's input, in one error line
_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}  # building one takes milliseconds, so each is built once


def to_bytes(value: object) -> bytes:
    """Sorted keys, no spaces, UTF-8. Equal values have equal bytes, on every machine."""
    return _text(_plain(value)).encode()


def from_bytes(cls: type[T], data: bytes) -> T:
    """The value that these bytes are the canonical form of; any other bytes are refused."""
    if len(data) > CONTROL_BYTES_MAX:
        raise Refused(Code.LIMIT, f"{cls.__name__} of {len(data)} bytes, at most {CONTROL_BYTES_MAX} are allowed")
    try:
        value: T = adapter(cls).validate_json(data, strict=True, extra="forbid")
    except ValidationError as error:
        raise Refused(Code.FIELD, _first(cls, error)) from None
    try:
        again = to_bytes(value)
    except (OverflowError, UnicodeEncodeError):
        raise Refused(Code.FIELD, f"{cls.__name__} holds a value that has no canonical form") from None
    if again != data:
        raise Refused(Code.FIELD, f"{cls.__name__} is not in canonical form")
    return value


def digest(value: object) -> Digest:
    """SHA-256 of the canonical bytes."""
    return Digest(hashlib.sha256(to_bytes(value)).hexdigest())


def shown(text: str) -> str:
    """A stranger's text, made safe and short enough for an error line."""
    visible = "".join(character if character.isprintable() else "?" for character in text[:_SHOWN_CHARACTERS_MAX])
    return visible if len(text) <= _SHOWN_CHARACTERS_MAX else visible + "…"


def _text(plain: object) -> str:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _plain(value: object) -> object:
    match value:
        case Enum():
            return _plain(value.value)
        case None | bool() | str():
            return value
        case int():
            if not -_INTEGER_END <= value < _INTEGER_END:
                raise OverflowError(f"{value.bit_length()} bits, at most 63 are allowed")
            return value
        case tuple() | list():
            return [_plain(item) for item in value]
        case Mapping():
            assert all(isinstance(key, str) for key in value), "an object's keys are strings"
            return {key: _plain(item) for key, item in value.items()}
    assert is_dataclass(value) and not isinstance(value, type), f"{type(value).__name__} has no canonical form"
    return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}


def adapter(cls: type[Any]) -> TypeAdapter[Any]:
    """What checks that parsed JSON is such a value."""
    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def _first(cls: type[object], error: ValidationError) -> str:
    detail = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join([cls.__name__, *(str(step) for step in detail["loc"])])
    return shown(f"{place}: {detail['msg']}")
