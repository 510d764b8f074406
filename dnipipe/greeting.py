"""What a stage must hear from its neighbour before anything else: a Hello that fits its own."""

from __future__ import annotations

from dataclasses import replace

from dnipipe.errors import HandshakeError
from dnipipe.messages import Hello, Message
from dnipipe.transport import Side


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


__all__ = ["check_hello", "check_settings"]
