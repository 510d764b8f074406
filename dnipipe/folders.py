"""A run's folder: what lies where, in docs/files.md."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dnipipe.config import Config, Output, flat
from dnipipe.errors import CheckpointError, ConfigError

SETTINGS = "config.toml"
INITIAL = "initial.safetensors"  # of a run that a script began: the weights that all its processes start with


@contextmanager
def begun(output: Output, name: str, resume: bool = False) -> Iterator[Path]:
    """The folder of a run: output.run, or a new one, DIR/NAME-DATE-TIME, numbered if need be.

    It is made here and now, so that of runs that begin at once each has its own. At the end it goes again if it was
    made here and nothing was ever written into it. Raises ConfigError if it holds a run that is not to be resumed.
    """
    made = False
    if resume:
        folder = Path(output.run)
    elif output.run:
        folder = Path(output.run)
        check_unused(folder)
        made = _made(folder)
    else:
        folder, made = _new(Path(output.dir), name), True
    try:
        yield folder
    finally:
        if made:
            with suppress(OSError):  # it is not empty: there was a run
                folder.rmdir()


def _new(parent: Path, name: str) -> Path:
    stamp = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        folder = parent / f"{stamp}{suffix}"
        if _made(folder):
            return folder
    raise ConfigError(f"output.dir = {parent} is full of runs begun this second: set output.run")


def _made(folder: Path) -> bool:
    """Make the folder. False if it is there already: of several processes one makes it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def newest_run(parent: Path) -> Path:
    """The run under `parent` that saved last. Raises CheckpointError if none has."""
    saved = sorted(parent.glob("*/checkpoints/*/manifest.json"), key=lambda manifest: manifest.stat().st_mtime)
    if not saved:
        raise CheckpointError(f"no run in {parent} has a complete checkpoint: name the run's folder with --resume RUN")
    return saved[-1].parents[2]


def check_unused(folder: Path) -> None:
    """Raises ConfigError if the folder holds a run: a new one in it would overwrite its checkpoints."""
    if (folder / "summary.json").exists() or any(folder.glob("checkpoints/*/manifest.json")):
        raise ConfigError(
            f"output.run = {folder} holds a run already: continue it with --resume {folder}, or name another folder"
        )


def check_apart(path: Path, folder: Path) -> None:
    """Raises ConfigError if the settings were read from what a new run in the folder would write over."""
    own = folder / SETTINGS
    if own.exists() and own.samefile(path):
        raise ConfigError(
            f"output.run = {folder} would write over {path}, from which the settings were read: name another folder, "
            f"or continue what is there with --resume {folder}"
        )


def write_config(folder: Path, config: Config) -> Path:
    """The settings as TOML, so that the run can be resumed from its folder, or another one started alike.

    All but output.run: a run is where its file lies. Raises ConfigError for text that no file can hold: a path that is
    not UTF-8.
    """
    lines, section = [], ""
    for name, value in flat(config):
        if name == "output.run":
            continue
        if name.split(".")[0] != section:
            section = name.split(".")[0]
            lines.append(f"\n[{section}]")
        lines.append(f"{name.split('.')[1]} = {_toml(name, value)}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    path.write_text("\n".join(lines).lstrip() + "\n", encoding="utf-8")
    return path


def _toml(name: str, value: Any) -> str:
    """JSON writes numbers, booleans, quoted text and lists as TOML does, but for infinity and some characters."""
    text = json.dumps(value, ensure_ascii=False)  # escaped, what is beyond U+FFFF would be two surrogates: not TOML
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} = {value!r} is not UTF-8, which the run's config.toml is: rename it") from None
    return {"Infinity": "inf", "-Infinity": "-inf"}.get(text, text).replace("\x7f", "\\u007f")
