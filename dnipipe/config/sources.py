"""Where settings come from, the later over the earlier; all of them go through `build`.

a setting's default ─► what its rule begins with (_preset) ─► a TOML file, or the embedded run ─► `--section.key value`
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from dnipipe.config.sections import AT_A_CONSTANT_RATE, PRESETS, Optimizer, Rule
from dnipipe.config.settings import Config, describe
from dnipipe.config.values import hints, nearest
from dnipipe.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """A TOML file (or none: the embedded default), then `--section.key value` from the command line on top."""
    return build(over(default() if path is None else _read(Path(path)), overrides))


def over(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Nested plain values with `--section.key value` on top."""
    given, under = list(_pairs(overrides)), copy.deepcopy(dict(values))
    _change_rule(under, dict(given).get("rule.name"))
    for name, text in given:
        section, _, key = name.partition(".")
        if isinstance(under.setdefault(section, {}), dict):
            under[section][key] = _parse(name, text)
    return under


def default() -> dict[str, dict[str, Any]]:
    """The embedded default run: a byte-level language model on Python's own sources, sized for two cores."""
    return {
        "model": {"layers": 4, "width": 64},
        "data": {"batch": 16, "context": 32, "validation": 0.02},
        "optimizer": {"lr": 4e-3, "schedule": "cosine"},
        "train": {"batches": 1200},
        "checkpoint": {"every": 600},
    }


def build(values: Mapping[str, Any], scheduled: bool = False) -> Config:
    """Nested plain values, as TOML gives them, into a checked Config.

    scheduled: the rate changes by a schedule that is no setting, a script's own.
    """
    sections = hints(Config)
    parts = {}
    for section, table in _begun(values, scheduled).items():
        if section not in sections:
            within = [name for name in _all_names() if name.partition(".")[2] == section]
            near = f" (did you mean {within[0]}?)" if within else nearest(section, sections)
            raise ConfigError(f"unknown section [{section}]{near}")
        if not isinstance(table, Mapping):
            raise ConfigError(
                f"{section} = {table!r} is a section, not a setting: write [{section}] above its settings"
            )
        kind = sections[section]
        known = {item.name for item in fields(kind)}
        for key in table:
            if key not in known:
                raise ConfigError(f"unknown setting {section}.{key}{nearest(f'{section}.{key}', _all_names())}")
        parts[section] = kind(**{key: _convert(kind, key, value) for key, value in table.items()})
    return Config(**parts)


def _change_rule(values: Mapping[str, Any], new: str | None) -> None:
    """The command line names another rule: what the file says only because the old one begins so goes with that.

    A run's own config.toml says everything, and is what a run is resumed from with another rule.
    """
    rule = values.get("rule", {})
    old = str(rule.get("name", Rule.name)) if isinstance(rule, Mapping) else new
    if new is None or old is None or new == old:
        return
    constant = _constant(values)
    own = _preset(old, constant)
    for section, preset in (*own.items(), *_preset(new, constant).items()):
        table, kind = values.get(section), hints(Config)[section]
        for key in preset:
            begun = own.get(section, {}).get(key, getattr(kind, key))
            if isinstance(table, dict) and table.get(key) == begun:
                del table[key]


def _begun(values: Mapping[str, Any], scheduled: bool) -> dict[str, Any]:
    """The values on top of what the rules of the run begin with."""
    rule = values.get("rule", {})
    words = f"{rule.get('name', Rule.name)},{rule.get('then', '')}" if isinstance(rule, Mapping) else ""
    begun = dict(values)
    for name in {word.rpartition(":")[2].strip() for word in words.split(",")}:
        for section, preset in _preset(name, _constant(values) and not scheduled).items():
            table = begun.get(section, {})
            begun[section] = {**preset, **table} if isinstance(table, Mapping) else table
    return begun


def _preset(rule: str, constant: bool) -> dict[str, dict[str, Any]]:
    """What a run with that rule begins with."""
    changed = AT_A_CONSTANT_RATE.get(rule, {}) if constant else {}
    return {section: {**preset, **changed.get(section, {})} for section, preset in PRESETS.get(rule, {}).items()}


def _constant(values: Mapping[str, Any]) -> bool:
    """Whether no setting changes the rate, but for its warm-up."""
    optimizer = values.get("optimizer", {})
    return isinstance(optimizer, Mapping) and optimizer.get("schedule", Optimizer.schedule) == Optimizer.schedule


def _convert(kind: type, key: str, value: Any) -> Any:
    """TOML has lists where we have tuples, and writes 1 where 1.0 is meant; all else stays, to be checked."""
    hint = hints(kind)[key]
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(value)
    if hint is float and type(value) is int:
        return float(value)
    return value


def _all_names() -> list[str]:
    return [name for name, *_ in describe()]


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """`--a.b v`, `--a.b=v`; a setting without a value is a switch: `--a.b` means true."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or "." not in word.partition("=")[0]:
            raise ConfigError(f"cannot read {word!r}: settings are written --section.key value")
        name, equals, text = word[2:].partition("=")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        yield name.replace("-", "_"), text


def _parse(name: str, text: str) -> Any:
    """A word from the command line, read as its setting's type wants; what does not fit stays text, to be refused."""
    section, _, key = name.partition(".")
    kind = hints(Config).get(section)
    hint = hints(kind).get(key) if kind else None
    try:
        if get_origin(hint) is tuple:
            item = get_args(hint)[0]
            return tuple(item(part.strip()) for part in text.split(",") if part.strip())
        for option in get_args(hint) if get_origin(hint) is Union else (hint,):
            if option is bool:
                return {"true": True, "false": False}.get(text.lower(), text)
            if option in (int, float):
                return option(text)
    except ValueError:
        pass
    return text
