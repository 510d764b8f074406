"""The emulated network: what one host sends reaches another after the link's delay, at its rate. Needs root."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from benchmarks.emulator import ETHERNET, MTU, Emulator, Link, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"hosts cannot be emulated here: this needs {missing()}")

SERVE = """
import socket, sys
server = socket.create_server((sys.argv[1], 4711))
print("listening", flush=True)
peer = server.accept()[0]
size = 0
while size < int(sys.argv[2]):
    got = peer.recv(1 << 16)
    if not got: break
    size += len(got)
peer.sendall(b"done")
"""
ASK = """
import socket, sys, time
peer = socket.create_connection((sys.argv[1], 4711), timeout=20)
began = time.monotonic()
peer.sendall(bytes(int(sys.argv[2])))
assert peer.recv(4) == b"done"
print(time.monotonic() - began)
"""


def seconds(emulator: Emulator, size: int) -> float:
    """From sending so many bytes from host 1 to host 0 until its answer is here."""
    server = subprocess.Popen(
        [*emulator.within(0), sys.executable, "-c", SERVE, emulator.address(0), str(size)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout and server.stdout.readline() == "listening\n"
        command = [*emulator.within(1), sys.executable, "-c", ASK, emulator.address(0), str(size)]
        return float(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    finally:
        server.kill()
        server.wait()
        if server.stdout:
            server.stdout.close()


def test_an_answer_takes_two_delays_and_the_link_can_change() -> None:
    """A packet is never early; how late it is depends on the machine."""
    with Emulator(2, Link(delay=0.15)) as emulator:
        assert seconds(emulator, 10) >= 0.3
        emulator.link = Link()
        assert seconds(emulator, 10) < 0.3


def test_a_line_with_a_rate_takes_its_time() -> None:
    with Emulator(2, Link(rate=8e6)) as emulator:
        assert seconds(emulator, 1_000_000) >= 0.9  # a megabyte a second; the first packets find the line free
        assert emulator.dropped == 0


@pytest.mark.parametrize("mtu", [MTU, ETHERNET])
def test_a_packet_is_no_longer_than_was_asked_for(mtu: int) -> None:
    with Emulator(2, mtu=mtu) as emulator:
        for host in range(2):
            command = [*emulator.within(host), "ip", "link", "show", "eth0"]
            assert f" mtu {mtu} " in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_nothing_of_it_stays_behind() -> None:
    with Emulator(2) as emulator:
        names = [words[3] for words in (emulator.within(0), emulator.within(1))]
        there = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        assert all(name in there for name in names)
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not any(name in left for name in names)


HEAR = """
import socket, sys
heard = socket.socket(type=socket.SOCK_DGRAM)
heard.bind((sys.argv[1], 4712))
print("bound", flush=True)
while (word := heard.recv(99)) != b"end": print(word.decode(), flush=True)
"""
SAY = """
import socket, sys
for word in sys.argv[2:]: socket.socket(type=socket.SOCK_DGRAM).sendto(word.encode(), (sys.argv[1], 4712))
"""


def test_a_link_is_cut_in_one_direction_and_packets_are_lost() -> None:
    with Emulator(3) as emulator:
        hears = [*emulator.within(0), sys.executable, "-c", HEAR, emulator.address(0)]
        with subprocess.Popen(hears, stdout=subprocess.PIPE, text=True) as hearing:
            try:
                assert hearing.stdout and hearing.stdout.readline() == "bound\n"

                def say(host: int, *words: str) -> None:
                    command = [*emulator.within(host), sys.executable, "-c", SAY, emulator.address(0), *words]
                    subprocess.run(command, check=True, timeout=60)

                def until_lost(count: int) -> None:
                    end = time.monotonic() + 60
                    while emulator.lost < count:
                        assert time.monotonic() < end, emulator.lost
                        time.sleep(0.01)

                emulator.cut = frozenset({(1, 0)})
                say(1, "cut")
                until_lost(1)
                say(2, "another host")
                assert hearing.stdout.readline() == "another host\n"
                emulator.cut = frozenset({(0, 1)})
                say(1, "the other direction")
                assert hearing.stdout.readline() == "the other direction\n"
                emulator.cut, emulator.link = frozenset(), Link(loss=0.5)
                say(2, *["half"] * 100)
                until_lost(1 + 20)
                emulator.link = Link()
                say(2, "end")
                heard = hearing.stdout.read().split()
            finally:
                hearing.kill()
    assert heard == ["half"] * (101 - emulator.lost)
