"""Several hosts on this machine, joined by links with a delay, jitter and a rate: what a network does to any program.

    host 0: a namespace, 10.99.0.1 on a TUN device ──┐                       ┌── host 1: 10.99.0.2
                                                     └─► this process: each ─┘
                                                         packet is held until it is due

A program in a host sees a network card and nothing else, so gloo, ZeroMQ and plain TCP all cross the same link. Needs
root, `ip` (iproute2) and /dev/net/tun; no module for network emulation in the kernel, which many machines lack. A
packet may carry 64 KB, so that few have to be held; where it matters how a message comes in pieces, and what a line's
buffer holds, as many bytes as on a real link (ETHERNET).
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import threading
import time
from dataclasses import dataclass
from types import TracebackType

MTU, ETHERNET = 65000, 1500  # bytes a packet may have
SET_INTERFACE, TUN, NO_PACKET_INFO = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
BUFFER = 0.4  # seconds of packets that may wait for the line of a host with a rate; what comes on top is dropped
BURST = 64  # packets taken from one host before the next has its turn


@dataclass(frozen=True)
class Link:
    """Between any two hosts.

    Args:
        delay: one way, seconds. jitter: up to so much more, uniformly; packets stay in order.
        rate: of a host's outgoing line, bits a second; 0: no limit. loss: share of the packets that are lost.
    """

    delay: float = 0.0
    jitter: float = 0.0
    rate: float = 0.0
    loss: float = 0.0


def missing() -> str:
    """What this machine lacks for it; "" if nothing."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "root"
    if shutil.which("ip") is None:
        return "the command ip (package iproute2)"
    return "" if os.path.exists("/dev/net/tun") else "/dev/net/tun"


class Emulator:
    """Hosts 0 … n-1, for as long as it is entered. `link` may be set at any time; what is under way keeps its time."""

    def __init__(self, hosts: int, link: Link | None = None, mtu: int = MTU) -> None:
        self.hosts, self.link, self.mtu = hosts, link or Link(), mtu
        self.dropped = 0  # packets that found a line's buffer full
        self.lost = 0  # packets that a link lost, or that it was cut for
        self.cut: frozenset[tuple[int, int]] = frozenset()  # (from, to): no packet gets there; may be set at any time
        self._name = f"dnp{os.getpid()}"
        self._devices: list[int] = []  # file descriptors
        self._ended = threading.Event()
        self._forwarding = threading.Thread(target=self._forward, daemon=True)

    @staticmethod
    def address(host: int) -> str:
        return f"10.99.0.{host + 1}"

    def within(self, host: int) -> list[str]:
        """The beginning of a command that runs in this host."""
        return ["ip", "netns", "exec", f"{self._name}-{host}"]

    def __enter__(self) -> Emulator:
        try:
            for host in range(self.hosts):
                self._add(host)
        except BaseException:
            self._remove()
            raise
        self._forwarding.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._forwarding.join()
        self._remove()

    def _add(self, host: int) -> None:
        space, device = f"{self._name}-{host}", f"{self._name}t{host}"[-15:]
        _ip("netns", "add", space)
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        self._devices.append(descriptor)
        fcntl.ioctl(descriptor, SET_INTERFACE, struct.pack("16sH", device.encode(), TUN | NO_PACKET_INFO))
        _ip("link", "set", device, "netns", space, "name", "eth0")
        _ip("-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "mtu", str(self.mtu), "txqueuelen", "10000", "up")
        _ip("-n", space, "link", "set", "lo", "up")

    def _remove(self) -> None:
        for descriptor in self._devices:
            os.close(descriptor)
        self._devices = []
        for host in range(self.hosts):
            subprocess.run(["ip", "netns", "del", f"{self._name}-{host}"], capture_output=True, check=False)

    def _forward(self) -> None:
        """Read, decide when it is due, deliver. Packets of one host to another keep their order."""
        hosts = {socket.inet_aton(self.address(host)): host for host in range(self.hosts)}
        waiting: list[tuple[float, int, int, bytes]] = []  # (due, number, host, packet)
        number = 0
        free = [0.0] * self.hosts  # when each host's line has sent what it has
        last: dict[tuple[int, int], float] = {}  # when the newest packet from one host to another is due
        sources = {descriptor: host for host, descriptor in enumerate(self._devices)}
        while not self._ended.is_set():
            wait = 0.1 if not waiting else min(0.1, max(0.0, waiting[0][0] - time.monotonic()))
            for descriptor in select.select(self._devices, (), (), wait)[0]:  # poll() knows whole milliseconds only
                source, link = sources[descriptor], self.link
                for packet in _packets(descriptor):
                    target = hosts.get(packet[16:20])
                    if target is None:
                        continue
                    if (source, target) in self.cut or random.random() < link.loss:
                        self.lost += 1
                        continue
                    leaves = now = time.monotonic()
                    if link.rate:
                        leaves = max(now, free[source])
                        if leaves > now + BUFFER:
                            self.dropped += 1
                            continue
                        leaves = free[source] = leaves + 8 * len(packet) / link.rate
                    due = max(leaves + link.delay + link.jitter * random.random(), last.get((source, target), 0.0))
                    last[source, target] = due
                    number += 1
                    heapq.heappush(waiting, (due, number, target, packet))
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, _, target, packet = heapq.heappop(waiting)
                try:
                    os.write(self._devices[target], packet)
                except BlockingIOError:
                    self.dropped += 1


def _packets(descriptor: int) -> list[bytes]:
    """IPv4 packets that a host wants to send, up to BURST."""
    found: list[bytes] = []
    while len(found) < BURST:
        try:
            packet = os.read(descriptor, 65536)
        except BlockingIOError:
            break
        if len(packet) >= 20 and packet[0] >> 4 == 4:
            found.append(packet)
    return found


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


__all__ = ["ETHERNET", "Emulator", "Link", "missing"]
