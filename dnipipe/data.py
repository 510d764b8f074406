"""The data sets, as batches (x, y): MNIST from its four files, a text file, or Python's own source files.

    load(config) ─► Task(train, validation, …)       train       shuffled anew by each iter()
                                                     validation  in order, the held-out part
                     │ checks bytes once             both        every sample, the last batch shorter than the others
    check_batch(pair, classes, batch) ◄── each batch, a user's own too, before it is sent anywhere

Samples stay bytes in memory, and become floats or int64 batch by batch.
"""

from __future__ import annotations

import gzip
import math
import platform
import struct
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dnipipe.config import Config
from dnipipe.errors import ConfigError, DataError

DIGITS = 10  # classes of MNIST
SIDE = 28  # pixels of an image
DEFLATE = 1032  # times that gzip can shrink its input at most

BYTES = 256  # classes of a text
COUNT_AT_ONCE = 1 << 24  # byte pairs, so that counting a long text needs little memory


class Batches(Protocol):
    """Batches (x, y), from the start again with each iter(): what `load` makes, a DataLoader, a list."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


@dataclass(frozen=True, eq=False)
class Task:
    """What there is to learn."""

    train: Batches
    validation: Batches | None  # None: nothing to evaluate on
    classes: int | None  # labels are whole numbers in [0, classes); None: not known
    corpus: str  # one line: what it is, how much, what is held out
    baseline: tuple[str, float] | None  # what a simple model reaches on `validation`: (its name, nats per byte)
    prompt: Tensor | None  # (1, T) int64, bytes to continue; None: this is no text


class Samples:
    """Batches gathered from tensors in memory.

    Args:
        samples: their number.
        size: samples a batch; the last one has what is left.
        order: draws the positions (samples,) of one epoch, int64. It is called once by each iter(), at once, so that
            torch.manual_seed just before it decides the epoch.
        gather: positions (B,) -> x, y.
    """

    def __init__(
        self,
        samples: int,
        size: int,
        order: Callable[[], Tensor],
        gather: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        self.samples, self.size, self.order, self.gather = samples, size, order, gather

    def __len__(self) -> int:
        return math.ceil(self.samples / self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.gather, torch.split(self.order(), self.size))


def load(config: Config) -> Task:
    """The data that the configuration names. Both parts come in batches of data.batch: what fits in memory and on the
    wire in training fits in evaluation too.

    Raises DataError if it is missing, malformed or too short, ConfigError for a last batch that cannot be trained on.
    """
    return LOADERS[config.data.name](config)


def check_batch(pair: object, classes: int | None, batch: int) -> tuple[Tensor, Tensor]:
    """A batch as (x, y), looked at before it is used; `batch` is its number, for the message.

    Raises DataError: no pair of tensors, no samples, numbers of samples that differ, labels outside [0, classes).
    """
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        raise DataError(f"batch {batch} is {_kind(pair)}: expected a pair (x, y) of tensors")
    x, y = pair
    if x.dim() == 0 or y.dim() == 0 or x.shape[0] != y.shape[0]:
        raise DataError(
            f"batch {batch}: x {tuple(x.shape)} and y {tuple(y.shape)} differ in their number of samples, "
            "the first dimension: each sample needs its label"
        )
    if x.numel() == 0 or y.numel() == 0:
        raise DataError(f"batch {batch} is empty: x {tuple(x.shape)}, y {tuple(y.shape)}")
    if classes is not None:
        _check_labels(y, classes, batch)
    return x, y


def _check_labels(y: Tensor, classes: int, batch: int) -> None:
    if y.is_floating_point() or y.is_complex():
        raise DataError(f"batch {batch}: labels are {y.dtype}, expected whole numbers in [0, {classes})")
    wrong = (y < 0) | (y >= classes)
    if wrong.any():
        position = tuple(wrong.nonzero()[0].tolist())
        raise DataError(
            f"batch {batch}: label {y[position].item()} at position {list(position)} of y {tuple(y.shape)} is outside "
            f"[0, {classes}): number the classes from 0"
        )


def _kind(pair: object) -> str:
    if isinstance(pair, (tuple, list)):
        return f"a {type(pair).__name__} of {len(pair)} ({', '.join(type(part).__name__ for part in pair)})"
    return f"a {type(pair).__name__}"


# -- MNIST -------------------------------------------------------------------------------------------------------


def _mnist(config: Config) -> Task:
    """Images (B, 1, 28, 28) float32 in [0, 1], labels (B,) int64. data.limit cuts both parts, each to that many."""
    data = config.data
    images, labels = _digits(data.root, "train")
    if data.evaluate == "test":
        held = "the test set"
        held_images, held_labels = _digits(data.root, "t10k")
    else:
        held = "the last of the training images"
        cut = len(images) - int(len(images) * data.validation)
        images, held_images = images[:cut], images[cut:]
        labels, held_labels = labels[:cut], labels[cut:]
    most = data.limit or None
    train = _images(images[:most], labels[:most], data.batch, shuffle=True)
    validation = _images(held_images[:most], held_labels[:most], data.batch, shuffle=False)
    if not train.samples or not validation.samples:
        raise DataError(
            f"{data.root} leaves {train.samples} images to train on and {validation.samples} to evaluate on: "
            "change data.validation"
        )
    if data.batch == 1 or train.samples % data.batch == 1:
        raise ConfigError(
            f"{train.samples} images in batches of {data.batch} leave a batch of one, and batch norm cannot learn from "
            "one sample: change data.batch"
        )
    corpus = f"MNIST: {train.samples:,} images to train on, {validation.samples:,} to evaluate on ({held})"
    return Task(train, validation, DIGITS, corpus, None, None)


def _images(images: Tensor, labels: Tensor, size: int, shuffle: bool) -> Samples:
    count = len(images)

    def gather(positions: Tensor) -> tuple[Tensor, Tensor]:
        return images[positions].unsqueeze(1).float() / 255, labels[positions].long()

    return Samples(count, size, lambda: torch.randperm(count) if shuffle else torch.arange(count), gather)


def _digits(root: str, part: str) -> tuple[Tensor, Tensor]:
    """One part ("train", "t10k"): images (N, 28, 28) and labels (N,), both uint8."""
    images = _idx(_find(root, f"{part}-images-idx3-ubyte"), (SIDE, SIDE))
    path = _find(root, f"{part}-labels-idx1-ubyte")
    labels = _idx(path, ())
    if len(images) != len(labels):
        raise DataError(
            f"{path} has {len(labels)} labels, but there are {len(images)} images: take both from one source"
        )
    wrong = (labels >= DIGITS).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise DataError(f"{path}: label {int(labels[i])} at position {i} is outside [0, {DIGITS}): this is not MNIST")
    return images, labels


def _find(root: str, name: str) -> Path:
    """The file, compressed or not; torchvision keeps its copy in MNIST/raw."""
    paths = [Path(root, folder, name + end) for folder in ("", "raw", "MNIST/raw") for end in ("", ".gz")]
    found = next((path for path in paths if path.is_file()), None) if root else None
    if found is None:
        raise DataError(
            f"{f'no {name} in {root}' if root else 'data.name = mnist needs its files'}: pass --data.root PATH, the "
            "folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
            "t10k-labels-idx1-ubyte (.gz or not), for example the one that torchvision.datasets.MNIST downloads to"
        )
    return found


def _idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """An IDX file of bytes, (N, *shape) uint8. What its header claims is checked before memory is reserved for it."""
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path, "rb") if packed else open(path, "rb") as file:
            header = file.read(4 * (2 + len(shape)))
            count = _count(path, header, shape)
            expected = count * math.prod(shape)
            possible = path.stat().st_size * (DEFLATE if packed else 1)
            body = bytearray(file.read(expected + 1) if expected <= possible else b"")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; get the file again") from None
    if len(body) != expected:
        how = "more" if len(body) > expected else "fewer"
        raise DataError(f"{path} has {how} bytes than the {count} items that its header claims: get the file again")
    return torch.frombuffer(body, dtype=torch.uint8).view(count, *shape) if body else torch.empty(0, *shape).byte()


def _count(path: Path, header: bytes, shape: tuple[int, ...]) -> int:
    """N out of the header: a magic number (0, 0, 8 for bytes, the number of dimensions), N, the shape of one item."""
    wanted = 2 + len(shape)
    magic, *sizes = struct.unpack(f">{wanted}I", header) if len(header) == 4 * wanted else (0,)
    if magic != 0x801 + len(shape) or tuple(sizes[1:]) != shape:
        raise DataError(
            f"{path} is no MNIST file: magic number {magic:#x} and sizes {sizes}, expected {0x801 + len(shape):#x} and "
            f"[N{''.join(f', {size}' for size in shape)}]"
        )
    return int(sizes[0])


# -- text --------------------------------------------------------------------------------------------------------


def _text(config: Config) -> Task:
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


def _stdlib(config: Config) -> Task:
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


# Tests; pip; and encodings and pydoc_data, 2 MB that are tables and one reference text rather than code.
SKIPPED = frozenset({"test", "tests", "idle_test", "_bundled", "encodings", "pydoc_data"})


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


LOADERS: dict[str, Callable[[Config], Task]] = {"stdlib": _stdlib, "text": _text, "mnist": _mnist}

__all__ = ["Batches", "Samples", "Task", "bigram", "check_batch", "load", "stdlib_files"]
