"""Who connects to a stage's port and is not its neighbour: with what key, and with what to say."""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import zmq

from dnipipe import codec, keys
from dnipipe.codec import Frame
from dnipipe.keys import KeyRing

REPAIR = 19  # TCP_REPAIR of linux/tcp.h: closed in this state, a connection ends without a word to the other end

Kind = Callable[[Path, int, Path], "KeyRing | None"]

# -- keys, of a stranger who speaks as stage `stage`, whose neighbour reads its keys in `folder` ------------------


def none(folder: Path, stage: int, aside: Path) -> None:
    return None


def of_his_own(folder: Path, stage: int, aside: Path) -> KeyRing:
    """He knows all public keys, and has made a pair of that stage himself. aside: a folder that is not there yet."""
    shutil.copytree(folder, aside)
    assert list(keys.new(aside, [stage]))
    return KeyRing(aside, stage)


def of_another_stage(folder: Path, stage: int, aside: Path) -> KeyRing:
    ring = KeyRing(folder, stage - 1)
    ring.stage = stage
    return ring


def revoked(folder: Path, stage: int, aside: Path) -> KeyRing:
    """A second pair of that stage, revoked before it was ever used; the first one stays."""
    assert list(keys.new(folder, [stage]))
    ring = KeyRing(folder, stage)
    newest = max((folder / "public").glob(f"stage-{stage}-*.key"), key=lambda path: int(path.stem.rpartition("-")[2]))
    assert list(keys.revoke(folder, [newest.stem]))
    return ring


KINDS: dict[str, Kind] = {
    "none": none,
    "of his own": of_his_own,
    "of another stage": of_another_stage,
    "revoked": revoked,
}

# -- connections ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bare(endpoint: str, ring: KeyRing | None = None) -> Iterator[zmq.Socket[bytes]]:
    """A socket that says whatever it likes to that stage, as the next one."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.linger = 100  # ms; with 0 libzmq may abort, as in transport/edge.py
        if ring:
            peer.curve_publickey, peer.curve_secretkey = ring.public, ring.secret
            peer.curve_serverkey = ring.keys(ring.stage - 1)[0]
        peer.connect(endpoint)
        yield peer


def sealed(frames: Sequence[Frame]) -> list[Frame]:
    """With the checksum that is right, as over tcp without keys."""
    return [*frames, codec.checksum(frames)]


def silent(endpoint: str, count: int) -> list[socket.socket]:
    """Connections that say nothing."""
    return [_connecting(endpoint) for _ in range(count)]


def _connecting(endpoint: str) -> socket.socket:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    one = socket.socket()
    one.setblocking(False)
    one.connect_ex((host, int(port)))
    return one


def still_open(one: socket.socket) -> bool:
    """At its other end, too, or nobody there has seen it yet. What it said is taken."""
    with contextlib.suppress(ConnectionError):
        try:
            while one.recv(4096, socket.MSG_DONTWAIT):
                pass
        except BlockingIOError:
            return True
    return False
