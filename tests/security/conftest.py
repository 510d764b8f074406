"""Stages with keys, strangers without, and a cable that flips bits."""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dnipipe import keys
from dnipipe.keys import KeyRing
from dnipipe.transport import edge
from dnipipe.transport.zmq import ZmqTransport
from tests.transport.conftest import WAIT
from tests.transport.relay import Relay


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
    monkeypatch.setitem(edge.GRACE, "tcp", 0.2)
    monkeypatch.setattr("dnipipe.transport.zmq.LINGER", 0.0)  # what is sent here is not worth waiting for
    with contextlib.closing(Party(tmp_path)) as made:
        yield made


class Flipper(Relay):
    """A relay that flips one bit of what goes to its target, the one at byte `where`."""

    def __init__(self, where: int, chance: random.Random) -> None:
        super().__init__()
        self.left, self.bit, self.flipped = where, 1 << chance.randrange(8), False

    def _forth(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(65536)):
                if not self.flipped and self.left < len(data):
                    data[self.left] ^= self.bit
                    self.flipped = True
                self.left -= len(data)
                target.sendall(data)
