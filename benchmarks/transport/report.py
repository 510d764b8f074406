"""A table of the study for each figure, from its bursts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from benchmarks.tables import MISSING, markdown
from benchmarks.transport.channels import BASES, NAMES, WINDOW
from benchmarks.transport.rank import Burst

FIGURES: dict[str, tuple[Callable[[Burst], float], int]] = {
    f"Throughput, one way, {WINDOW} tensors under way, GB/s": (lambda burst: burst.rate / 1e9, 2),
    "Latency, half a round trip, µs": (lambda burst: 1e6 * burst.latency, 0),
    "Processor time a MB, sender, µs": (lambda burst: 1e12 * burst.sender, 0),
    "Processor time a MB, receiver, µs": (lambda burst: 1e12 * burst.receiver, 0),
}


def tables(bursts: Sequence[Burst], about: Mapping[str, object]) -> str:
    """Everything in Markdown: a row a channel, a column a size."""
    sizes = sorted({burst.size for burst in bursts})
    names = [name for name in NAMES if any(burst.channel == name for burst in bursts)]
    repeats = 1 + max((burst.repeat for burst in bursts), default=-1)
    head = [
        "# What a transport costs\n\n",
        f"Measured {about['date']} on {about['processor']}, {about['cores']} cores, load {about['load']}; torch "
        f"{about['torch']}, pyzmq {about['pyzmq']}. Two processes, each bound to a core; medians of {repeats} "
        "interleaved bursts ± half the range of the middle half of them.\n",
    ]
    parts = []
    for title, (value, digits) in FIGURES.items():
        rows = [[name, *(_entry(_values(bursts, name, size, value), digits) for size in sizes)] for name in names]
        parts.append(f"\n## {title}\n\n" + markdown(["", *map(_short, sizes)], rows))
    rows = [
        [f"{name} : {other}", *(_ratio(bursts, name, other, size) for size in sizes)]
        for name in names
        if name in BASES
        for other in dict.fromkeys((BASES[name], "gloo"))
        if other in names
    ]
    parts.append(
        "\n## Throughput beside what carries it, and beside gloo\n\n" + markdown(["", *map(_short, sizes)], rows)
    )
    return "".join([*head, *parts])


def _values(bursts: Sequence[Burst], name: str, size: int, value: Callable[[Burst], float]) -> list[float]:
    return [value(burst) for burst in bursts if (burst.channel, burst.size) == (name, size)]


def _entry(values: Sequence[float], digits: int) -> str:
    if not values:
        return MISSING
    return f"{median(values):.{digits}f} ± {_spread(values):.{digits}f}"


def _spread(values: Sequence[float]) -> float:
    """Half the range of the middle half: on a busy machine a single burst may be stopped for any time."""
    ordered, cut = sorted(values), len(values) // 4
    middle = ordered[cut : len(ordered) - cut]
    return (middle[-1] - middle[0]) / 2


def _ratio(bursts: Sequence[Burst], name: str, other: str, size: int) -> str:
    """Of bursts of the same repeat, which were neighbours in time."""
    mine, theirs = (
        {burst.repeat: burst.rate for burst in bursts if (burst.channel, burst.size) == (which, size)}
        for which in (name, other)
    )
    return _entry([rate / theirs[repeat] for repeat, rate in mine.items() if repeat in theirs], 2)


def _short(size: int) -> str:
    return f"{size // 2**20} MB" if size >= 2**20 else f"{size // 2**10} KB"
