"""What a fault did, read from the ledgers afterwards.

begin ── end ─────────── every stage has begun a batch that no stage had begun at `end`      recovered: from `end` on
  └──── a neighbour writes "gone"                                                             detected: from `begin` on
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median

from dnipipe.service.ledger import Account


@dataclass(frozen=True)
class Event:
    """One fault: where, and when it began and ended, seconds since 1970 (the same, if it has no length)."""

    stage: int
    begin: float
    end: float


def detected(event: Event, accounts: Sequence[Account], until: float) -> float | None:
    """Seconds until a neighbour of that stage took it for gone; None if none did before `until`."""
    times = [
        float(line["time"])
        for account in accounts
        for line in account.away
        if line.get("gone") == event.stage and event.begin <= line["time"] <= until
    ]
    return min(times) - event.begin if times else None


def noticed(event: Event, accounts: Sequence[Account], kept_out: Iterable[float], until: float) -> float | None:
    """Seconds until a stage ended a connection, or did not let something in, at one of these times; None likewise."""
    ended = [float(line["time"]) for account in accounts for line in account.away if "gone" in line]
    times = [time for time in (*ended, *kept_out) if event.begin <= time <= until]
    return min(times) - event.begin if times else None


def recovered(event: Event, accounts: Sequence[Account]) -> float | None:
    """Seconds from the fault's end to progress at every stage; None if a stage has made none yet."""
    before = max(_highest(account, event.end) for account in accounts)
    found = []
    for account in accounts:
        later = [time for batch, time in zip(account.begun, account.times, strict=True) if batch > before]
        if not later:
            return None
        found.append(min(later))
    return max(found) - event.end


def _highest(account: Account, time: float) -> int:
    """The highest batch id that was begun by then."""
    count = bisect_right(list(accumulate(account.times, max)), time)
    return max(account.begun[:count], default=0)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, p95 and the largest; {} of none."""
    if not values:
        return {}
    return {"median": median(values), "p95": quantile(values, 0.95), "max": max(values)}
