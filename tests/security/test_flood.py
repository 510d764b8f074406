"""Strangers at a stage's port: oversize frames, and connections that say nothing until no file is left."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.faults import strangers
from dnipipe.errors import PeerLost
from dnipipe.keys import KeyRing
from dnipipe.messages import Answer, Checkpoint
from dnipipe.transport.silent import keep_waiting
from tests.security.conftest import Party
from tests.transport.conftest import NEXT, PREVIOUS, WAIT, batches

LISTENER = """
import resource, sys
from pathlib import Path
from dnipipe.keys import KeyRing
from dnipipe.transport import Side
from dnipipe.transport.zmq import ZmqTransport

folder, own = map(Path, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
transport = ZmqTransport("run", queue=8, timeout=60.0, max_message=2**20, ring=KeyRing(folder, 0))
print(transport.listen("tcp://127.0.0.1:*"), flush=True)
print(transport.receive([Side.NEXT], 60.0)[1].batch, flush=True)
own.write_bytes(b"a checkpoint")  # there are files left
print("saved", flush=True)
transport.receive([Side.NEXT], 60.0)
transport.close()
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="counts on Linux's limits")
@pytest.mark.parametrize(("count", "word"), [(400, b""), (150, b"\xff")], ids=["silent", "a byte, then silent"])
def test_400_idle_connections_do_not_keep_the_neighbour_out(
    party: Party, tmp_path: Path, count: int, word: bytes
) -> None:
    """The listener may have 128 files open. Connections that do not greet are closed (HANDSHAKE_IVL); those that say
    nothing, once there is a crowd, wait in the kernel and take none of its files (transport/silent.py).
    """
    command = [sys.executable, "-c", LISTENER, str(party.at(0)), str(tmp_path / "saved")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child, contextlib.ExitStack() as idle:
        idle.callback(child.kill)
        assert child.stdout
        endpoint = child.stdout.readline().strip()
        crowd = [idle.enter_context(one) for one in strangers.silent(endpoint, count)]
        for one in crowd:
            one.setblocking(True)
            one.sendall(word)
        b, began = party.one(KeyRing(party.at(1), 1), timeout=60.0), time.monotonic()
        b.connect(endpoint)
        b.send(PREVIOUS, Checkpoint(7))
        assert child.stdout.readline().strip() == "7" and child.stdout.readline().strip() == "saved"
        print(f"the neighbour's message came after {time.monotonic() - began:.2f} s")
        while len(list(Path(f"/proc/{child.pid}/fd").iterdir())) > 40:
            time.sleep(0.05)
        assert (sum(map(strangers.still_open, crowd)) > 200) == (not word)


@pytest.mark.skipif(sys.platform != "linux", reason="counts on Linux's limits")
def test_to_keep_a_crowd_waiting_takes_no_file() -> None:
    """It may have taken the last one before anybody heard of it."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.create_server(("127.0.0.1", 0)) as server:
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                os.dup(0)
            keep_waiting(server.fileno())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT) > 0


def test_an_oversize_frame_is_not_taken_in(party: Party) -> None:
    """libzmq reads its length and ends the connection."""
    a, b = party.one(KeyRing(party.at(0), 0), limit=4096), party.one(KeyRing(party.at(1), 1), timeout=WAIT)
    b.connect(a.listen("tcp://127.0.0.1:*"))
    b.send(PREVIOUS, Checkpoint(1))
    assert batches(a, NEXT, 1) == [1]
    b.send(PREVIOUS, Answer(2, torch.zeros(2000)))
    with pytest.raises(PeerLost):
        for k in range(3, 1000):
            b.send(PREVIOUS, Checkpoint(k))
            assert a.receive([NEXT], 0.05) is None  # what follows is behind a gap


def test_frames_beyond_the_limit_are_not_kept(party: Party) -> None:
    """With the neighbour's key even: 300,000 frames are one message, of which five are kept while it is read."""
    a, ring = party.one(KeyRing(party.at(0), 0)), KeyRing(party.at(1), 1)
    with strangers.bare(a.listen("tcp://127.0.0.1:*"), ring) as peer:
        peer.send_multipart([b"x"] * 300_000)
        assert a._edges[NEXT].socket.poll(1000 * WAIT)
        while not a.dropped:
            assert a.receive([NEXT], 0.1) is None
    assert a.dropped == {"too many frames": 1}
