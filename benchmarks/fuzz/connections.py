"""Connections that are almost ZeroMQ's, to a stage with keys: each ends, and the neighbour still gets through."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dnipipe import keys
from dnipipe.keys import KeyRing
from dnipipe.messages import Checkpoint
from dnipipe.transport import Side
from dnipipe.transport.zmq import ZmqTransport

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)  # ZMTP 3.1, 64 bytes
PART = 1000
LIMIT = 60.0  # seconds


def connections(count: int, seed: int) -> Iterator[Counter[str]]:
    """What came of each next part of `count` connections. Raises AssertionError if the neighbour is kept out."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        assert list(keys.new(folder, [0, 1]))
        stage = ZmqTransport("run", queue=64, timeout=LIMIT, max_message=2**20, ring=KeyRing(folder, 0))
        stack.callback(stage.close)
        endpoint = stage.listen("tcp://127.0.0.1:*")
        for start in range(0, count, PART):
            before = Counter(stage.dropped)
            found: Counter[str] = Counter()
            for _ in range(min(PART, count - start)):
                found[_connect(endpoint, chance)] += 1
                if stage.receive([Side.NEXT], 0.0) is not None:
                    raise AssertionError("a message was delivered from a connection without a key")
            yield found + Counter(stage.dropped) - before
        neighbour = ZmqTransport("run", queue=64, timeout=LIMIT, max_message=2**20, ring=KeyRing(folder, 1))
        stack.callback(neighbour.close)
        neighbour.connect(endpoint)
        neighbour.send(Side.PREVIOUS, Checkpoint(7))
        got = stage.receive([Side.NEXT], LIMIT)
        assert got is not None and isinstance(got[1], Checkpoint) and got[1].batch == 7, got


def _connect(endpoint: str, chance: random.Random) -> str:
    """One connection, from one of many addresses of this machine, whose ports would else be used up; what it said."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    kind = chance.choice(
        ("nothing", "noise", "half a greeting", "a damaged greeting", "noise behind a greeting", "HELLO")
    )
    with socket.socket() as one:
        one.settimeout(2.0)
        one.bind((f"127.0.{chance.randrange(1, 255)}.{chance.randrange(1, 255)}", 0))
        try:
            one.connect((host, int(port)))
            one.sendall(_said(kind, chance))
            if chance.random() < 0.5:
                one.recv(4096)
        except OSError as error:  # it was closed, or the queue of connections is full: both are defence
            return f"{kind}: {os.strerror(error.errno) if error.errno else 'timed out'}"
    return kind


def _said(kind: str, chance: random.Random) -> bytes:
    noise = chance.randbytes(chance.randrange(1, 300))
    greeting = bytearray(GREETING)
    if kind == "nothing":
        return b""
    if kind == "noise":
        return noise
    if kind == "half a greeting":
        return GREETING[: chance.randrange(1, 64)]
    if kind == "a damaged greeting":
        greeting[chance.randrange(64)] ^= 1 << chance.randrange(8)
        return bytes(greeting) + noise
    if kind == "noise behind a greeting":
        return GREETING + noise
    hello = b"\x05HELLO" + b"\x01\x00" + bytes(72) + chance.randbytes(32 + 8 + 80)
    return GREETING + b"\x04" + bytes([len(hello)]) + hello[: chance.randrange(len(hello) + 1)] + noise
