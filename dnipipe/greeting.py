"""What neighbours say to one another before anything else: a Hello, and each must fit the other's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from dnipipe.errors import HandshakeError, PeerStopped, WaitTimeout
from dnipipe.messages import Hello, Message, Stop
from dnipipe.transport import Side, Transport


def greet(transport: Transport, mine: dict[Side, Hello], limit: float, interrupted: Callable[[], bool]) -> None:
    """Exchange Hello on each side and refuse a neighbour that does not fit. `limit`: seconds, of transport.timeout.

    Raises HandshakeError; WaitTimeout at the limit, or when woken and `interrupted`; PeerStopped for a neighbour that
    has failed.
    """
    for side, hello in mine.items():
        transport.send(side, hello)
    deadline = time.monotonic() + limit
    waiting = set(mine)
    while waiting:
        got = transport.receive(list(waiting), max(0.0, deadline - time.monotonic()))
        if got is None and (interrupted() or time.monotonic() >= deadline):
            me, whose = f"stage {mine[next(iter(waiting))].stage}", " and ".join(sorted(side.value for side in waiting))
            if interrupted():
                raise WaitTimeout(f"{me} was asked to end before its {whose} stage said Hello")
            raise WaitTimeout(f"{me} waited {limit:g} s for the Hello of its {whose} stage (transport.timeout)")
        if got is not None:
            side, message = got
            if isinstance(message, Stop):
                raise PeerStopped(message.reason)
            check_hello(mine[side], message, side)
            waiting.remove(side)


def check_hello(mine: Hello, theirs: Message, side: Side) -> None:
    """Raises HandshakeError that names the first field in which the neighbour's Hello does not fit."""
    if not isinstance(theirs, Hello):
        raise HandshakeError(f"the {side.value} stage began with a {type(theirs).__name__} instead of a Hello")
    expected = replace(mine, stage=mine.stage + (1 if side is Side.NEXT else -1))
    for field in ("protocol", "run", "stages", "stage", "incarnation", "shape", "dtype"):
        here, there = getattr(expected, field), getattr(theirs, field)
        if here != there:
            raise HandshakeError(
                f"stage {mine.stage} refuses its {side.value} stage: {field} is {there!r} there, {here!r} expected here"
            )
    check_settings(mine.settings, theirs.settings, f"stage {mine.stage}", f"stage {theirs.stage}")


def check_settings(mine: tuple[str, ...], theirs: tuple[str, ...], me: str, they: str) -> None:
    """Raises HandshakeError that names the first setting in which two stages differ."""
    for here, there in zip(mine, theirs, strict=False):
        if here != there:
            raise HandshakeError(f"{me} and {they} have different settings: {here} here, {there} there")
    if len(mine) != len(theirs):
        raise HandshakeError(
            f"{me} has {len(mine)} settings and {they} has {len(theirs)}: different versions of dnipipe"
        )


__all__ = ["check_hello", "check_settings", "greet"]
