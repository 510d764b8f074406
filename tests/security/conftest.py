"""Stages with keys, and strangers without."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.relay import Recorder, free_port
from dnipipe import keys
from dnipipe.keys import KeyRing
from dnipipe.messages import Gradient
from dnipipe.service import links
from dnipipe.service.links import Links
from dnipipe.transport import line
from dnipipe.transport.zmq import ZmqTransport
from tests.service.test_links import Pair, activation
from tests.transport.conftest import NEXT, PREVIOUS, WAIT


class Party:
    """Transports of stages 0, 1 and 2 over tcp; each stage reads a key folder of its own, as on a host of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[ZmqTransport] = []
        assert list(keys.new(folder / "0", [0, 1, 2]))
        for stage in ("1", "2"):
            shutil.copytree(folder / "0", folder / stage)

    def at(self, stage: int) -> Path:
        return self.folder / str(stage)

    def one(self, ring: KeyRing | None, timeout: float = 2.0, limit: int = 2**20) -> ZmqTransport:
        made = ZmqTransport("run", queue=64, timeout=timeout, max_message=limit, ring=ring)
        self.made.append(made)
        return made

    def pair(self, locked: bool = True, through: Callable[[str], str] = str) -> tuple[ZmqTransport, ZmqTransport]:
        """Stages 0 and 1, with keys or without; `through` may lead 1 another way to what 0 listens on."""
        a, b = (self.one(KeyRing(self.at(k), k) if locked else None, WAIT) for k in (0, 1))
        b.connect(through(a.listen("tcp://127.0.0.1:*")))
        return a, b

    def give(self, name: str, source: int, *targets: int) -> None:
        """Copy a public key."""
        for target in targets:
            shutil.copy(self.at(source) / "public" / f"{name}.key", self.at(target) / "public")

    def close(self) -> None:
        for transport in self.made:
            transport.close()


@pytest.fixture
def party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Party]:
    monkeypatch.setitem(line.GRACE, "tcp", 0.2)
    monkeypatch.setattr("dnipipe.transport.zmq.LINGER", 0.0)  # what is sent here is not worth waiting for
    with contextlib.closing(Party(tmp_path)) as made:
        yield made


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with Recorder() as made:
        yield made


@pytest.fixture
def between(tmp_path: Path, recorder: Recorder, locked: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """Independent stages 0 and 1, and the recorder between them."""
    monkeypatch.setattr(links, "AGAIN", 0.2)
    if locked:
        assert list(keys.new(tmp_path, [0, 1]))
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    made = Pair(endpoint, recorder.start(endpoint), tmp_path if locked else None)
    yield made
    for each in made.made:
        each.close()


def say(speaker: Links, *numbers: int) -> None:
    for k in numbers:
        to, message = (NEXT, activation(k)) if speaker.stage == 0 else (PREVIOUS, Gradient(k, torch.ones(2, 3)))
        speaker.send(to, message)
