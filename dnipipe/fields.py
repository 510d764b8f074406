"""The fields of a header, as the dataclasses of messages.py have them: a table a message, and a check a field.

What comes in is of the exact type and size, or a MessageError that names the field.
"""

from __future__ import annotations

from collections.abc import Callable
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from dnipipe.errors import MessageError
from dnipipe.messages import Message

Check = Callable[[Any, str], Any]  # (value, name of the field) -> the value as the dataclass has it, or MessageError


def a_tensor(value: Any, where: str) -> Any:
    """Marks a tensor in the tables, which has a layout and a frame."""
    raise AssertionError(where)


def _exactly(wanted: type, what: str) -> Check:
    """type(), not isinstance: a bool is no int, and 1 is no float."""

    def check(value: Any, where: str) -> Any:
        if type(value) is not wanted:
            raise MessageError(f"{where}: {short(value)} is not {what}")
        return value

    return check


def _whole(value: Any, where: str) -> Any:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise MessageError(f"{where}: {short(value)} is not a whole number of 64 bits")
    return value


def _tuple_of(check: Check) -> Check:
    def each(value: Any, where: str) -> Any:
        if type(value) is not list:
            raise MessageError(f"{where}: {short(value)} is not a list")
        return tuple([check(element, where) for element in value])

    return each


def _numbers(value: Any, where: str) -> Any:
    """dict[str, float]. NaN and infinity may pass: they are what a report must be able to say."""
    if type(value) is not dict:
        raise MessageError(f"{where}: {short(value)} is not a map")
    for key, number in value.items():
        _text(key, f"{where}: key")
        if type(number) is not float and type(number) is not int:
            raise MessageError(f"{where}[{short(key)}]: {short(number)} is not a number")
    return {key: float(number) for key, number in value.items()}


_text = _exactly(str, "text")
_CHECKS: dict[Any, Check] = {
    str: _text,
    bool: _exactly(bool, "true or false"),
    int: _whole,
    tuple[str, ...]: _tuple_of(_text),
    tuple[int, ...]: _tuple_of(_whole),
    dict[str, float]: _numbers,
    Tensor: a_tensor,
}
Table = dict[str, tuple[Check, str]]  # field -> its check, and what an error calls the field


def _table(kind: str, checks: dict[str, Check]) -> Table:
    return {name: (check, f"{kind}.{name}") for name, check in checks.items()}


HEADER = _table(
    "header",
    {"protocol": _whole, "run": _text, "type": _text, "fields": _exactly(dict, "a map")},
)


def same_names(value: Any, table: Table, where: str) -> None:
    if type(value) is not dict:
        raise MessageError(f"{where}: {short(value)} is not a map")
    if value.keys() != table.keys():
        missing = [name for name in table if name not in value]
        unknown = [name for name in value if name not in table]
        raise MessageError(f"{where}: missing {short(missing)}, unknown {short(unknown)}")


def unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key appears twice in a map")
    return made


def short(value: Any) -> str:
    """Part of an error's one line: what others sent must neither flood nor break it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _is_optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType) and type(None) in get_args(hint)


TYPES: dict[str, Any] = {kind.__name__: kind for kind in get_args(Message)}
_HINTS = {name: get_type_hints(kind) for name, kind in TYPES.items()}
OPTIONAL = {name: {key for key, hint in hints.items() if _is_optional(hint)} for name, hints in _HINTS.items()}
TABLES = {
    name: _table(
        name,
        {
            key: _CHECKS[get_args(hint)[0] if _is_optional(hint) else hint]
            for key, hint in hints.items()
            if key != "batch"  # one of the numbers
        },
    )
    for name, hints in _HINTS.items()
}
FRESH = {name for name, hints in _HINTS.items() if dict[str, float] in hints.values()}  # never the same twice
OF_A_BATCH = {name for name, hints in _HINTS.items() if "batch" in hints}
