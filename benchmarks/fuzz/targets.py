"""What is read from a socket or a file, as functions of bytes: each returns for whatever it is given, or has a bug.

A target lets the one error pass that its reader promises for what is none; anything else escapes, and is a finding.
tests/test_properties.py calls them with what Hypothesis makes up, guided.py with what a coverage-guided fuzzer does.
"""

from __future__ import annotations

import json
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.fuzz.mutants import RUN, samples
from dnipipe import checkpoint, codec
from dnipipe.config import load
from dnipipe.errors import CheckpointError, ConfigError, MessageError, TraceError
from dnipipe.messages import Message
from dnipipe.service import ledger

LENGTH = struct.Struct("<H")  # before each frame but the last, where frames stand in one string
BATCH = 1  # of the checkpoint


@dataclass(frozen=True)
class Target:
    """Args:
    run: takes any bytes; whatever it raises is a finding.
    seeds: what is no garbage, to begin from.
    """

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


# -- from a socket -----------------------------------------------------------------------------------------------


def header(data: bytes) -> None:
    with suppress(MessageError):
        codec.read_header(data)


def message(data: bytes) -> None:
    """What is taken for a message must be one: written again and read again it is the same."""
    try:
        run, seq, found = codec.decode(split(data), limit=2**20)
    except MessageError:
        return
    *numbers, again = codec.decode(split(join(codec.encode(found, run, seq))))
    assert numbers == [run, seq] and alike(found, again), found


def alike(sent: Message, came: Message) -> bool:
    """Bit for bit, so that NaN equals itself; and no tensor that came requires a gradient."""
    return type(sent) is type(came) and all(_equal(value, vars(came)[name]) for name, value in vars(sent).items())


def _equal(sent: object, came: object) -> bool:
    if isinstance(sent, Tensor) and isinstance(came, Tensor):
        form = sent.dtype == came.dtype and sent.shape == came.shape and not came.requires_grad
        return form and torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (sent, came)))
    return type(sent) is type(came) and repr(sent) == repr(came)


def split(data: bytes) -> list[codec.Frame]:
    """Frames, each in memory of its own."""
    frames: list[codec.Frame] = []
    while len(data) >= LENGTH.size:
        (length,) = LENGTH.unpack_from(data)
        frames.append(memoryview(bytearray(data[LENGTH.size : LENGTH.size + length])))
        data = data[LENGTH.size + length :]
    return frames


def join(frames: Sequence[codec.Frame]) -> bytes:
    return b"".join(LENGTH.pack(len(frame)) + bytes(frame) for frame in frames)


# -- from a file -------------------------------------------------------------------------------------------------


def config(data: bytes) -> None:
    with suppress(ConfigError):
        load(_written("config.toml", data))


def words(data: bytes) -> None:
    """A command line, its words a line each."""
    with suppress(ConfigError):
        load(None, data.decode(errors="replace").split("\n"))


def manifest(data: bytes) -> None:
    """As a file; and, if it is JSON, as the content of one whose checksum is right."""
    name = f"checkpoints/{BATCH:08d}/manifest.json"
    folder = _written(name, data).parent.parent.parent
    with suppress(CheckpointError):
        checkpoint.at(folder, BATCH)
    try:
        content = json.loads(data)
        whole = {"crc32": zlib.crc32(json.dumps(content, sort_keys=True).encode()), "content": content}
        text = json.dumps(whole)
    except (ValueError, RecursionError):
        return
    _written(name, text.encode())
    with suppress(CheckpointError):
        checkpoint.at(folder, BATCH)


def ledger_of(data: bytes) -> None:
    with suppress(TraceError):
        ledger.read(_written("ledger.jsonl", data))


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def _written(name: str, data: bytes) -> Path:
    path = Path(_folder().name) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# -- what is no garbage ------------------------------------------------------------------------------------------


def _headers() -> list[bytes]:
    return [bytes(codec.encode(sample, RUN, 0)[0]) for sample in samples()]


def _messages() -> list[bytes]:
    return [join(codec.encode(sample, RUN, 0)) for sample in samples()]


def _configs() -> list[bytes]:
    lm = b'[model]\nname = "transformer"\nlayers = 4\nwidth = 64\n[data]\nname = "text"\nroot = "a"\nbatch = 16\n'
    rule = b'[rule]\nname = "local"\nthen = "501:synthetic"\n[optimizer]\nlr = 1e-3\n[pipeline]\nboundaries = [1, 2]\n'
    return [lm, rule, lm + rule]


def _words() -> list[bytes]:
    return [
        b"--rule.name\nblend\n--optimizer.lr=1e-3",
        b"--output.trace\n--pipeline.boundaries\n1,2",
        b"--data.root\na",
    ]


def _manifests() -> list[bytes]:
    part = {
        "boundary": "1",
        "bytes": 9,
        "crc32": 1,
        "tensors": {"weights/0.weight": ["float32", [2, 3]], "optimizer/0.weight/exp_avg": ["float32", [2, 3]]},
        "numbers": {"optimizer/0.weight/step": 1.0},
        "counters": {"updates": 3},
    }
    whole = {"format": 1, "batch": BATCH, "stages": 1, "settings": {"model.width": 8}, "parts": [part]}
    return [json.dumps(whole).encode()]


def _ledgers() -> list[bytes]:
    lines = [
        {"start": 1, "from": 0, "before": 0, "time": 1.5},
        {"begun": 1, "time": 2.5},
        {"gone": 1, "unanswered": [1], "last": 1},
        {"alone": 2},
        {"skipped": 3, "why": "away"},
        {"back": 1, "last": None},
        {"end": True},
    ]
    return ["".join(json.dumps(line) + "\n" for line in lines).encode()]


TARGETS = {
    "header": Target(header, _headers),
    "message": Target(message, _messages),
    "config": Target(config, _configs),
    "words": Target(words, _words),
    "manifest": Target(manifest, _manifests),
    "ledger": Target(ledger_of, _ledgers),
}
