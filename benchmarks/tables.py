"""A cell of a table: the mean over seeds, their spread, how many, and what diverged; rows in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import mean

from benchmarks.cells import Record

MISSING = "–"
NOTE = (
    "Mean over seeds ± half of their range (largest minus smallest), the number of seeds in brackets; "
    f"{MISSING}: not run. A run whose loss became NaN or infinite is counted as diverged, and in no mean."
)


def average(records: Iterable[Record | None], value: Callable[[Record], float | None]) -> float | None:
    """The mean over the runs that have a value; None if none has."""
    values = _values(records, value)
    return mean(values) if values else None


def entry(
    records: Sequence[Record | None], value: Callable[[Record], float | None], digits: int, beside: str = ""
) -> str:
    """One cell: a record a seed, None where it has not been run. `beside` follows the figure."""
    values = _values(records, value)
    diverged = sum(record is not None and record.diverged is not None for record in records)
    parts = []
    if values:
        spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
        parts.append(f"{mean(values):.{digits}f}{spread} ({len(values)}){beside}")
    if diverged:
        parts.append(f"diverged ({diverged})")
    return ", ".join(parts) or MISSING


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def origin(records: Iterable[Record]) -> str:
    """Where the figures are from: processors, versions of torch, dates."""
    found = list(records)
    if not found:
        return "Nothing has been run yet.\n"
    seen = [sorted({getattr(record, name) for record in found}) for name in ("processor", "torch", "date")]
    dates = seen[2][0] if len(seen[2]) == 1 else f"{seen[2][0]} to {seen[2][-1]}"
    return f"Measured {dates} on {', '.join(seen[0])}, one core a run; torch {', '.join(seen[1])}.\n"


def _values(records: Iterable[Record | None], value: Callable[[Record], float | None]) -> list[float]:
    found = [value(record) for record in records if record is not None and record.diverged is None]
    return [one for one in found if one is not None]
