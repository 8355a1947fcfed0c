"""JSON → the frozen dataclasses it was written from, each value checked: a file from elsewhere can be anything."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


def revive(kind: type[T], value: Any, where: str = "") -> T:
    """`value` as a `kind`: a dataclass from a dict, tuples from lists, NaN from null.

    Raises `ValueError` that names the place in the file where something else stands. Unknown fields are passed over,
    so that a later version's file can be read.
    """
    return cast(T, _revive(kind, value, where))


def _revive(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        return _fields(cast(type, kind), value, where)
    origin = get_origin(kind)
    if origin is tuple:
        return _tuple(get_args(kind), _is(list, value, where), where)
    if origin is dict:
        item = get_args(kind)[1]
        return {str(k): _revive(item, v, f"{where}.{k}") for k, v in _is(dict, value, where).items()}
    if origin is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{where or 'it'} is {value!r:.40}, none of {', '.join(map(str, get_args(kind)))}")
        return value
    if origin in (Union, UnionType):
        parts = [part for part in get_args(kind) if part is not NoneType]
        return None if value is None else _revive(parts[0], value, where)
    if kind is float:
        return math.nan if value is None else _figure(_is((int, float), value, where), where)
    found = _is(kind, value, where)
    if kind is int:
        _figure(found, where)
    return found


def _figure(value: float, where: str) -> float:
    """A number as a float; one that a float cannot hold would end every sum it enters."""
    try:
        made = float(value)
    except OverflowError:
        made = math.inf
    if math.isinf(made):
        raise ValueError(f"{where or 'it'} is a number too large to be true")
    return made


def _fields(kind: type, value: Any, where: str) -> Any:
    found = _is(dict, value, where)
    hints = get_type_hints(kind)
    missing = [part.name for part in fields(kind) if part.name not in found and part.default is MISSING]
    if missing:
        raise ValueError(f"{where or 'it'} has no {missing[0]!r}")
    names = [part.name for part in fields(kind) if part.name in found]  # a later field has a default
    return kind(**{name: _revive(hints[name], found[name], f"{where}.{name}".lstrip(".")) for name in names})


def _tuple(kinds: tuple[Any, ...], values: list[Any], where: str) -> tuple[Any, ...]:
    if kinds[-1:] == (Ellipsis,):
        return tuple(_revive(kinds[0], value, f"{where}[{i}]") for i, value in enumerate(values))
    if len(kinds) != len(values):
        raise ValueError(f"{where or 'it'} has {len(values)} values instead of {len(kinds)}")
    return tuple(_revive(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, values, strict=True)))


def _is(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where or 'it'} is {type(value).__name__} {str(value)!r:.40}")
    return value
