"""One of the two processes: `python -m benchmarks.transport.rank JSON`. Rank 0 says what was measured, a line each.

for each repeat         every size, and for each all channels, one after another, beginning with another each time
  flood, then ping      in bursts of a tenth of a second: so what else the machine does hits all alike
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from benchmarks.transport.channels import WINDOW, Channel, opened

DIFFERENT = 4  # tensors that are sent in turn


@dataclass(frozen=True)
class Order:
    """What both ranks do. `sizes`: bytes of a tensor. `volume`: bytes of a burst, about; `burst`: tensors at most."""

    rank: int
    folder: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    repeats: int
    volume: int = 2**27
    burst: int = 2000

    @classmethod
    def from_json(cls, text: str) -> Order:
        values: dict[str, Any] = json.loads(text)
        return cls(**{**values, "names": tuple(values["names"]), "sizes": tuple(values["sizes"])})

    def turns(self) -> Iterator[tuple[int, int, str]]:
        """(repeat, size, channel), the same order on both ranks. The first repeat, -1, warms up."""
        for repeat in range(-1, self.repeats):
            for size in self.sizes:
                first = repeat % len(self.names)
                for name in (*self.names[first:], *self.names[:first]):
                    yield repeat, size, name

    def count(self, size: int) -> int:
        return max(1, min(self.burst, self.volume // size) // WINDOW) * WINDOW


@dataclass(frozen=True)
class Burst:
    """One turn. Seconds; processor time is that of a flood, at each end."""

    channel: str
    size: int  # bytes of a tensor
    repeat: int
    rate: float  # bytes a second
    latency: float  # half a round trip
    sender: float  # processor seconds a byte
    receiver: float


def turn(channel: Channel, rank: int, size: int, count: int) -> tuple[float, float, float]:
    """(seconds of a flood, its processor seconds here, seconds of a round trip)."""
    tensors = [torch.randn(size // 4) for _ in range(DIFFERENT)]
    rounds = max(8, count // 8)
    began, worked = time.perf_counter(), time.process_time()
    if rank == 0:
        channel.flood(tensors, count)
    else:
        channel.drain(tensors[0], count)
    flooded, worked = time.perf_counter(), time.process_time() - worked
    if rank == 0:
        channel.ping(tensors[0], rounds)
    else:
        channel.pong(tensors[0], rounds)
    return flooded - began, worked, (time.perf_counter() - flooded) / rounds


def carry_out(order: Order) -> Iterator[Burst]:
    """Rank 0's bursts, with what rank 1 says about its own processor time."""
    folder = Path(order.folder)
    words = FileStore(str(folder / "words.store"), 2)
    with ExitStack() as stack:
        channels = {name: stack.enter_context(closing(opened(name, order.rank, folder))) for name in order.names}
        for number, (repeat, size, name) in enumerate(order.turns()):
            count = order.count(size)
            seconds, worked, there_and_back = turn(channels[name], order.rank, size, count)
            if order.rank == 1:
                words.set(str(number), str(worked))
            elif repeat >= 0:
                total = count * size
                away = float(words.get(str(number)))
                yield Burst(name, size, repeat, total / seconds, there_and_back / 2, worked / total, away / total)
        words.add("ended", 1)
        while order.rank == 1 and int(words.add("ended", 0)) < 2:  # rank 0 may still read
            time.sleep(0.01)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for burst in carry_out(Order.from_json(sys.argv[1])):
        print(json.dumps(asdict(burst)), flush=True)
