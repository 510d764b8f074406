"""What a socket is told about memory, waiting and strangers: every option that differs from ZeroMQ's own value."""

from __future__ import annotations

import zmq

from dnipipe.codec import HEADER_LIMIT
from dnipipe.transport.arriving import TELLS

STILL = 10  # seconds without a byte from the neighbour, or from its machine, after which it is gone

# bytes by which CURVE makes a frame longer (RFC 26: "MESSAGE", a nonce, flags, a code that authenticates it)
SEALED = 33


def options(queue: int, max_message: int, linger: float, tcp: bool, ipv6: bool) -> dict[zmq.SocketOption, int]:
    """Every option that decides about memory, waiting or strangers; ZeroMQ's own value after each reason."""
    table = {
        zmq.SNDHWM: queue,  # messages held for a neighbour that is slow; then send waits (1000)
        zmq.RCVHWM: queue,  # messages held for us (1000)
        zmq.MAXMSGSIZE: max(max_message, HEADER_LIMIT) + SEALED,  # bytes a frame may make us reserve (no limit)
        zmq.LINGER: int(1000 * linger),  # ms in which close delivers what was sent (for ever)
        zmq.HANDSHAKE_IVL: 2000,  # ms until one that does not greet is closed, or strangers use up our files (30000)
        zmq.RECONNECT_IVL: 100,  # ms before the first try to connect again (100)
        zmq.RECONNECT_IVL_MAX: 500,  # ms, to which it doubles; who comes back is not kept waiting (no doubling)
        zmq.IMMEDIATE: 0,  # 1 would, when the neighbour closes, discard what it sent and we have not read yet (0)
        zmq.SNDTIMEO: 1000,  # ms: our calls do not wait, we poll; a mistake must not hang (for ever)
        zmq.RCVTIMEO: 1000,  # ms, likewise (for ever)
        zmq.BACKLOG: 8,  # connections waiting to be accepted: there is one neighbour (100)
        zmq.IPV6: int(ipv6),  # off unless the address is one: else "localhost" may be two addresses (0)
    }
    if tcp:  # a socket file's other end cannot vanish without a trace
        table[zmq.HEARTBEAT_IVL] = 1000  # ms between two signs of life (none)
        table |= _on_linux() if TELLS else _elsewhere()
    return table


def _on_linux() -> dict[zmq.SocketOption, int]:
    """A sign of life stands behind the frame that is on its way, and none is asked for: a frame may take its time."""
    return {
        zmq.HEARTBEAT_TIMEOUT: 0,  # ms without one, until the connection counts as broken; 0: never (IVL)
        zmq.TCP_MAXRT: 1000 * STILL,  # ms in which nothing sent is acknowledged, until the kernel ends it (15 minutes)
    }


def _elsewhere() -> dict[zmq.SocketOption, int]:
    """Where no kernel is asked how much of a frame has come (arriving.py): each must be whole in time."""
    return {
        zmq.HEARTBEAT_TIMEOUT: 1000 * STILL,
        zmq.HEARTBEAT_TTL: 1000 * STILL,  # ms, the same asked of the neighbour (none)
    }


__all__ = ["STILL", "options"]
