"""A run's folder: what lies where, in docs/files.md."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dnipipe.config import Config, Output, flat
from dnipipe.disk import disk
from dnipipe.errors import CheckpointError, ConfigError

SETTINGS = "config.toml"
ELSEWHERE = "name another folder with output.run"
LOCK = "lock"  # held by the run that is at work
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
        with disk(f"output.run = {folder}: cannot make this folder", "name another one", start=True):
            check_unused(folder)
            made = _made(folder)
            os.listdir(folder)  # a file in its place is none
    else:
        with disk(f"output.dir = {output.dir}: cannot make a folder in it", "name another one", start=True):
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


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder meanwhile, resumed ones too. Raises ConfigError if one is at work in it.

    By a lock, which the system takes back from a process that dies, on a file. Where there are no locks (some network
    file systems), or no file can be made, nobody is kept out.
    """
    path = folder / LOCK
    descriptor = _locked(path)
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                path.unlink()
            _held.discard(descriptor)
            os.close(descriptor)


_held: set[int] = set()  # locks of this process


def _let_go() -> None:
    """In a child that is forked, as a DataLoader's workers are: a lock lasts as long as anyone has it open."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def _locked(path: Path) -> int | None:
    for _ in range(100):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ConfigError(
                f"output.run = {path.parent}: another run is at work in this folder: wait until it has ended, or name "
                "another folder"
            ) from None
        except OSError:
            os.close(descriptor)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                _held.add(descriptor)
                return descriptor
        os.close(descriptor)  # the run that had it ended in this moment and took the file away: once more, a new one
    return None  # a file is never what it was a moment ago: such locks are none


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
            f"output.run = {folder} holds a run already: continue it with --resume {folder} (in a script "
            f'fit(..., resume="{folder}")), or name another folder'
        )


def check_apart(path: Path, folder: Path, or_else: str = "") -> None:
    """Raises ConfigError if the settings were read from what a new run in the folder would write over.

    or_else: what may be done instead of naming another folder.
    """
    own = folder / SETTINGS
    if own.exists() and own.samefile(path):
        raise ConfigError(
            f"output.run = {folder} would write over {path}, from which the settings were read: name another folder"
            f"{or_else}"
        )


def write_config(folder: Path, config: Config, way: str = ELSEWHERE) -> Path:
    """The settings as TOML, so that the run can be resumed from its folder, or another one started alike.

    All but output.run: a run is where its file lies. All or nothing. Raises ConfigError for text that no file can hold,
    a path that is not UTF-8; and if it cannot be written, with the way out.
    """
    lines, section = [], ""
    for name, value in flat(config):
        if name == "output.run":
            continue
        if name.split(".")[0] != section:
            section = name.split(".")[0]
            lines.append(f"\n[{section}]")
        lines.append(f"{name.split('.')[1]} = {_toml(name, value)}")
    path = folder / SETTINGS
    unfinished = path.with_name(f"{path.name}.unfinished")
    with disk(f"cannot write {path}", way, start=True):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_text("\n".join(lines).lstrip() + "\n", encoding="utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    return path


def _toml(name: str, value: Any) -> str:
    """JSON writes numbers, booleans, quoted text and lists as TOML does, but for infinity and some characters."""
    text = json.dumps(value, ensure_ascii=False)  # escaped, what is beyond U+FFFF would be two surrogates: not TOML
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} = {value!r} is not UTF-8, which the run's config.toml is: rename it") from None
    return {"Infinity": "inf", "-Infinity": "-inf"}.get(text, text).replace("\x7f", "\\u007f")
