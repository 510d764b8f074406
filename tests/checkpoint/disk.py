"""What can happen to files: damage, a changed manifest, a process killed at any step, a disk that is full."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dnipipe.checkpoint import files


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


def resign(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and make its checksum fit: no damage, but hostile or from another version."""
    content = json.loads(path.read_text())["content"]
    change(content)
    crc32 = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    path.write_text(json.dumps({"crc32": crc32, "content": content}))


class Killed(BaseException):
    pass


def die_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> list[str]:
    """Every call that changes the disk counts as a step; the one numbered `step` raises instead."""
    done: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            done.append(name)
            if len(done) == step:
                raise error
            return real(*args, **options)

        return call

    for holder, name in (
        (os, "fsync"),
        (os, "replace"),
        (files, "save_file"),
        (shutil, "rmtree"),
        (Path, "write_text"),
    ):
        monkeypatch.setattr(holder, name, counted(name, getattr(holder, name)))
    return done


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """The kernel itself refuses to write more into one file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
