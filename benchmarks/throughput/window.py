"""What a rank measures of itself between two moments: wall-clock time, processor time, bytes sent, memory."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """A moment, in seconds and bytes."""

    clock: float  # since 1970, as metrics have it
    wall: float  # of a clock that nobody sets
    processor: float  # of this process, all threads
    sent: float | None  # by the network card; None: there is none of this rank's own


def sample(card: str = "eth0") -> Sample:
    path = Path("/sys/class/net") / card / "statistics" / "tx_bytes"
    sent = float(path.read_text()) if path.exists() else None
    return Sample(time.time(), time.monotonic(), time.process_time(), sent)


@dataclass(frozen=True)
class Measured:
    """Of one rank, while it was being measured."""

    samples: float
    seconds: float
    processor: float  # seconds
    sent: float | None  # bytes
    memory: float  # largest resident size of the process so far, MiB
    staleness: float | None = None  # updates, mean
    overhead: float | None = None  # seconds of the processor a batch that are not the model's


class Window:
    """Opened, and closed with the number of samples trained in between."""

    def __init__(self) -> None:
        self.measured: Measured | None = None

    def open(self) -> None:
        self._began = sample()

    def close(self, samples: float) -> None:
        self.measured = between(self._began, sample(), samples)


def between(first: Sample, last: Sample, samples: float) -> Measured:
    sent = None if first.sent is None or last.sent is None else last.sent - first.sent
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Measured(samples, last.wall - first.wall, last.processor - first.processor, sent, memory)


__all__ = ["Measured", "Sample", "Window", "between", "sample"]
