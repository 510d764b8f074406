"""A checkpoint's files: their names, written all or nothing, read back only if they are as they were written.

written beside as NAME.tmp ─► synced ─► renamed to NAME ─► its folder synced
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dnipipe.checkpoint.format import Part, form_of, need
from dnipipe.errors import CheckpointError, DiskError

MANIFEST = "manifest.json"
LARGEST_JSON = 1 << 28  # bytes; some two million tensors


def folder_of(run: Path, batch: int) -> Path:
    return run / "checkpoints" / f"{batch:08d}"


def tensors_file(stage: int) -> str:
    return f"stage-{stage}.safetensors"


def record_file(stage: int) -> str:
    return f"stage-{stage}.json"


def batches_of(run: Path) -> list[int]:
    """Batch ids that have a folder, complete or not. Links and anything else are not ours."""
    above = run / "checkpoints"
    if not above.is_dir():
        return []
    names = [path.name for path in above.iterdir() if path.is_dir() and not path.is_symlink()]
    return [int(name) for name in names if re.fullmatch("[0-9]{8,18}", name) and name == folder_of(run, int(name)).name]


# -- writing -----------------------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """All of the file or nothing. Raises OSError."""
    _write(path, lambda temporary: _save(tensors, temporary))


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """What safetensors raises has its errno in the text."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"\(os error ([0-9]+)\)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    # read back once, so that the checksum is of what a reader gets: a tuple becomes a list, a key a string
    body = json.loads(json.dumps(content))
    text = json.dumps({"crc32": zlib.crc32(_canonical(body)), "content": body}, indent=1)
    _write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """All of it or nothing: written beside, synced, renamed; the rename synced too."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()  # a full disk needs the room
        raise


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(what: str, way: str = "older checkpoints are untouched") -> Iterator[None]:
    """Give an error from the disk its one line."""
    try:
        yield
    except OSError as error:
        reason = f"{what}: {error.strerror or error}; {way}"
        raise DiskError(error.errno or errno.EIO, reason, error.filename) from error
    except KeyError as error:  # from safetensors' table of dtypes
        raise CheckpointError(f"{what}: safetensors cannot hold {error}") from error


# -- reading -----------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The table that write_json put there. Raises CheckpointError if it is not there, or not as it was written."""
    try:
        need(0 < _size(path) <= LARGEST_JSON, f"{path} is empty or too large")
        outer = json.loads(path.read_text(encoding="utf-8"))
        body = outer["content"]
        need(outer["crc32"] == zlib.crc32(_canonical(body)), f"{path} is damaged: its checksum does not fit")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not there: this checkpoint was never completed") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    need(isinstance(body, dict), f"{path} is damaged: no table")
    return dict(body)


def check_size(path: Path, part: Part) -> None:
    try:
        size = _size(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    need(size == part.bytes, f"{path} has {size} bytes instead of {part.bytes}: it was cut short or replaced")


def verify(path: Path, part: Part) -> None:
    check_size(path, part)
    try:
        need(measure(path) == (part.bytes, part.crc32), f"{path} is damaged: its checksum does not fit")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def read_tensors(path: Path, part: Part, ids: list[str]) -> dict[str, Tensor]:
    """The file's tensors by their ids, if the whole of it is as it was written."""
    if not ids:
        return {}
    verify(path, part)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {id: file.get_tensor(id).clone() for id in ids}  # a clone outlives the file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    for id, tensor in tensors.items():
        need(form_of(tensor) == part.tensors[id], f"{path} is damaged: {id} is not as the manifest has it")
    return tensors


def measure(path: Path) -> tuple[int, int]:
    """Bytes and crc32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return size, crc


def _size(path: Path) -> int:
    """Bytes of a regular file: what a link or a pipe leads to is not ours to read. Raises OSError."""
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return status.st_size
