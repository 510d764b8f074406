"""One value against its setting's type and limits, and what a person reads if it does not fit."""

from __future__ import annotations

import difflib
from dataclasses import fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dnipipe.errors import ConfigError


@cache
def hints(section: type) -> dict[str, Any]:
    """Its settings' types; looked up once, for a grid of runs reads a thousand configurations."""
    return get_type_hints(section)


def check(name: str, value: Any, section: type, key: str) -> None:
    hint = hints(section)[key]
    item = next(item for item in fields(section) if item.name == key)
    if not _fits(value, hint):
        choices = _choices(hint)
        near = nearest(str(value), choices) if choices and isinstance(value, str) else ""
        raise ConfigError(f"{name} = {value!r}: expected {name_of(hint)}{near}")
    low, high = item.metadata["low"], item.metadata["high"]
    number = type(value) in (int, float)
    if number and (value != value or (low is not None and value < low) or (high is not None and value > high)):
        bounds = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
        raise ConfigError(f"{name} = {value}: expected {' and '.join(bounds)}")


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Union:
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(element, get_args(hint)[0]) for element in value)
    return type(value) is hint


def _choices(hint: Any) -> list[str]:
    options = get_args(hint) if get_origin(hint) is Union else (hint,)
    return [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]


def name_of(hint: Any) -> str:
    if get_origin(hint) is Union:
        return " or ".join(name_of(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return " | ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return {int: "a list of whole numbers", str: "a list of texts"}[get_args(hint)[0]]
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]


def nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
