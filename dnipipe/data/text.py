"""Text as bytes, each to be told from those before: a file, or Python's own source files; and what bigrams reach."""

from __future__ import annotations

import platform
import sys
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from dnipipe.config import Config
from dnipipe.data.task import Samples, Task
from dnipipe.errors import DataError

BYTES = 256  # classes of a text
COUNT_AT_ONCE = 1 << 24  # byte pairs, so that counting a long text needs little memory
# Tests; pip; and encodings and pydoc_data, 2 MB that are tables and one reference text rather than code.
SKIPPED = frozenset({"test", "tests", "idle_test", "_bundled", "encodings", "pydoc_data"})


def read_file(config: Config) -> Task:
    """One file, read as bytes."""
    data = config.data
    if not data.root:
        raise DataError("data.name = text needs a file: pass --data.root FILE")
    try:
        with open(data.root, "rb") as file:
            text = file.read(data.limit or -1)
    except OSError as error:
        raise DataError(f"cannot read {data.root}: {error.strerror}; pass --data.root FILE") from None
    return _language(config, text, f"{Path(data.root).name}: ")


def read_stdlib(config: Config) -> Task:
    """Python's own source files, one after the other."""
    folder = Path(sysconfig.get_path("stdlib"))
    text, files = bytearray(), 0
    for path in stdlib_files(folder):
        text += path.read_bytes()
        files += 1
        if 0 < config.data.limit <= len(text):
            del text[config.data.limit :]
            break
    if not text:
        raise DataError(
            f"this Python has no source files in {folder}: use a text of your own, --data.name text --data.root FILE"
        )
    return _language(config, text, f"Python {platform.python_version()}'s own sources: {files} files, ")


def stdlib_files(folder: Path) -> list[Path]:
    """The .py files of the standard library in `folder`, without its tests and without what is bundled or generated.

    Sorted by the file's own name, then by its folder, so that every run of one Python version sees the same bytes, and
    the end, which is held out, is not all of one package.
    """

    # a sitecustomize.py or site-packages is this machine's, and no module of the standard library
    top = [path for path in folder.glob("*") if path.name.removesuffix(".py") in sys.stdlib_module_names]
    paths = [path for one in top for path in ([one] if one.suffix == ".py" else one.rglob("*.py"))]
    names = [path.relative_to(folder) for path in paths]
    wanted = [path for path in names if not SKIPPED.intersection(path.parts)]
    return [folder / path for path in sorted(wanted, key=lambda path: (path.name, path.as_posix()))]


def _language(config: Config, text: bytes | bytearray, source: str) -> Task:
    """Next-byte prediction: x (B, T) int64 and y (B, T), the same bytes one later; T = data.context.

    The text's end is held out, data.validation of it. Each epoch cuts the rest from a new random start, so that the
    cuts fall elsewhere; at most T - 1 bytes at its beginning and T at its end are left out of an epoch. The held-out
    part is cut from its first byte, and what does not fill a window at its end is left out.
    """
    data, length = config.data, config.data.context
    stored = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
    train, held = stored.tensor_split([len(stored) - int(len(stored) * data.validation)])
    if len(train) < 2 * length or len(held) < length + 1:
        raise DataError(
            f"{source}{len(stored):,} bytes leave {len(train):,} to train on and {len(held):,} held out, but context "
            f"{length} needs at least {2 * length} and {length + 1}: use a longer text, or change data.context or "
            "data.validation"
        )
    windows, held_windows = (len(train) - length) // length, (len(held) - 1) // length
    held = held[: held_windows * length + 1]  # what is evaluated on, exactly
    return Task(
        train=_windows(train, windows, data.batch, length, shuffle=True),
        validation=_windows(held, held_windows, data.batch, length, shuffle=False),
        classes=BYTES,
        corpus=f"{source}{len(stored):,} bytes, the last {len(stored) - len(train):,} held out",
        baseline=("bigram model of the same bytes", bigram(train, held)),
        prompt=held[:length].long().unsqueeze(0),
    )


def _windows(text: Tensor, count: int, size: int, length: int, shuffle: bool) -> Samples:
    window = torch.arange(length + 1)

    def order() -> Tensor:
        if not shuffle:
            return torch.arange(count) * length
        return torch.randperm(count) * length + torch.randint(length, ())

    def gather(starts: Tensor) -> tuple[Tensor, Tensor]:
        seen = text[starts.unsqueeze(1) + window].long()  # (B, T + 1)
        return seen[:, :-1].contiguous(), seen[:, 1:].contiguous()

    return Samples(count, size, order, gather)


def bigram(train: Tensor, held: Tensor) -> float:
    """Mean nats per byte with which a bigram model of `train` predicts each byte of `held` but the first.

    p(b | a) = (n(a, b) + 1) / (n(a) + 256), n the counts in `train`: add-one smoothing. Both are uint8 (N,).
    """
    counts = _pairs(train).double().view(BYTES, BYTES) + 1
    nats = -(counts / counts.sum(1, keepdim=True)).log().flatten()
    seen = _pairs(held)
    return ((nats * seen).sum() / seen.sum()).item()


def _pairs(text: Tensor) -> Tensor:
    """How often each pair of neighbouring bytes occurs: (65536,), at 256 a + b."""
    counts = torch.zeros(BYTES * BYTES, dtype=torch.int64)
    for start in range(0, len(text) - 1, COUNT_AT_ONCE):
        part = text[start : start + COUNT_AT_ONCE + 1].int()  # one more: the pair across the cut
        counts += torch.bincount(part[:-1] * BYTES + part[1:], minlength=BYTES * BYTES)
    return counts
