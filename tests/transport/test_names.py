"""A name server that does not answer: the edge to whoever is looked up waits, and no other.

stage 0, by a name ◄── looked up ── stage 1 ◄──────► stage 2
                           │
                           ▼
               a server that keeps still                  in a mount namespace of its own, for /etc/resolv.conf
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SILENT = "127.0.0.53"

STAGES = """
import socket, sys
from dnipipe.messages import Checkpoint
from dnipipe.transport import Side
from dnipipe.transport.zmq import ZmqTransport

server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind((sys.argv[1], 53))
server.settimeout(20)
middle, last = (ZmqTransport("run", queue=8, timeout=20, max_message=1000) for _ in range(2))
last.connect(middle.listen("tcp://127.0.0.1:*"))
last.send(Side.PREVIOUS, Checkpoint(1))
print(middle.receive([Side.NEXT], 20))
middle.connect("tcp://stage0.example:7000")
print(b"stage0" in server.recv(1000))
for k in range(2, 10):
    middle.send(Side.NEXT, Checkpoint(k))
    last.send(Side.PREVIOUS, Checkpoint(k))
    print(last.receive([Side.PREVIOUS], 10), middle.receive([Side.NEXT], 10))
sys.stdout.flush()
import os
os._exit(0)  # to end in order is to wait for the lookup
"""


@pytest.mark.processes
@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="needs root on Linux, and unshare, for a name server of its own",
)
def test_a_name_that_is_looked_up_for_long_holds_up_its_own_edge_alone(tmp_path: Path) -> None:
    asked = tmp_path / "resolv.conf"
    asked.write_text(f"nameserver {SILENT}\noptions timeout:30 attempts:1\n")
    inside = 'mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", inside, "sh", asked, sys.executable, "-c", STAGES, SILENT]
    if subprocess.run([*command[:7], "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount anything")
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    first, found, *lines = done.stdout.splitlines()
    assert "batch=1" in first and found == "True"
    assert [line.count(f"Checkpoint(batch={k})") for k, line in enumerate(lines, start=2)] == 8 * [2]
