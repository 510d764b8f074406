"""Messages of every kind as they are on the wire, and what a seeded random generator makes of them."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgpack
import torch

from dnipipe import codec
from dnipipe.messages import (
    Activation,
    Agreed,
    Answer,
    Checkpoint,
    Evaluation,
    Gradient,
    Hello,
    Input,
    Labels,
    Link,
    Message,
    Report,
    Saved,
    Stop,
)

RUN = "run"
SEQ, NUMBERS = 8, 16  # bytes at the front of a header: its number on the edge; and before its msgpack

Frames = list[bytes]


def samples() -> list[Message]:
    """A message of each kind that a stage receives."""
    x, y, scale = torch.randn(8, 4), torch.arange(8), torch.ones(8, 1)
    return [
        Activation(1, x, y),
        Activation(1, x.to(torch.int8), y, scale),
        Input(1, x, y),
        Labels(1, y),
        Evaluation(1, x, None),
        Checkpoint(1),
        Stop(1, "why"),
        Gradient(1, x),
        Answer(1, torch.zeros(4, dtype=torch.float64)),
        Saved(1, 2),
        Report(1, 1, {"loss": 1.5}),
        Hello(RUN, 0, 2, 1, ("a=1",), (8, 4), "float32"),
        Link(0, 2, 1, RUN, ("a=1",), 0, "n", ""),
        Agreed(torch.zeros(9, dtype=torch.uint8)),
    ]


class Mutants:
    """An endless supply of frames, most of them no message."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.kinds = [[bytes(frame) for frame in codec.encode(message, RUN, 0)] for message in samples()]
        self.ways: list[Callable[[Frames], Frames]] = [self._bits, self._cut, self._frames, self._noise, self._field]

    def next(self, seq: int) -> Frames:
        """Begun from a message that is the right one on its edge, number `seq`."""
        header, *tensors = self.chance.choice(self.kinds)
        frames = [seq.to_bytes(SEQ, "little") + header[SEQ:], *tensors]
        for _ in range(self.chance.choice((1, 1, 1, 2, 3))):
            frames = self.chance.choice(self.ways)(frames)
        return frames

    def _bits(self, frames: Frames) -> Frames:
        k = self.chance.randrange(len(frames))
        changed = bytearray(frames[k])
        for _ in range(self.chance.choice((1, 1, 2, 8))):
            if changed:
                changed[self.chance.randrange(len(changed))] ^= 1 << self.chance.randrange(8)
        return [*frames[:k], bytes(changed), *frames[k + 1 :]]

    def _cut(self, frames: Frames) -> Frames:
        """A frame shorter, or longer."""
        k = self.chance.randrange(len(frames))
        short = frames[k][: self.chance.randrange(len(frames[k]) + 1)]
        changed = self.chance.choice((short, frames[k] + self.chance.randbytes(self.chance.randrange(1, 5000))))
        return [*frames[:k], changed, *frames[k + 1 :]]

    def _frames(self, frames: Frames) -> Frames:
        """More, fewer, or in another order."""
        changed = list(frames)
        if self.chance.random() < 0.5:
            changed.insert(self.chance.randrange(len(frames) + 1), self.chance.choice(frames))
        elif len(changed) > 1:
            changed.pop(self.chance.randrange(len(changed)))
        if self.chance.random() < 0.3:
            self.chance.shuffle(changed)
        return changed * self.chance.choice((1, 1, 1, 1, 1, 1, 1, 1, 1, 50))

    def _noise(self, frames: Frames) -> Frames:
        return [self.chance.randbytes(self.chance.choice((0, 1, 16, 17, 200, 5000))), *frames[1:]]

    def _field(self, frames: Frames) -> Frames:
        """A header that is msgpack, with a value that should not be there."""
        try:
            header = msgpack.unpackb(frames[0][NUMBERS:], strict_map_key=False)
        except Exception:  # whatever an earlier step has made of it
            return frames
        where = header
        while isinstance(where, dict) and where:
            key = self.chance.choice(list(where))
            if not isinstance(where[key], dict) or self.chance.random() < 0.2:
                where[key] = self._value(3)
                break
            where = where[key]
        return [frames[0][:NUMBERS] + msgpack.packb(header), *frames[1:]]

    def _value(self, depth: int) -> object:
        """Anything that msgpack can say."""
        plain: list[object] = [
            *(0, 1, -1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, 1.5, float("nan"), None, True, "", "float32", b"\0"),
            *("x" * 300, "Activation", ["float32", [2**31, 2**31]], ["float32", [2**40]], ["int64", [-1]], ["float64"]),
            *([[[[[[]]]]]], ["bool", [8, 4]], ["float32", [1] * 9], msgpack.ExtType(5, b"abc")),
        ]
        if depth and self.chance.random() < 0.3:
            inside = [self._value(depth - 1) for _ in range(self.chance.randrange(5))]
            return inside if self.chance.random() < 0.5 else {str(k): value for k, value in enumerate(inside)}
        return self.chance.choice(plain)


__all__ = ["RUN", "Frames", "Mutants", "samples"]
