"""Tables and plots of the records: throughput, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import median

from benchmarks.plots import Plot
from benchmarks.tables import MISSING, markdown
from benchmarks.throughput.study import ALONE, RULES, SCHEDULES, SYSTEMS, Condition, Record, limit
from benchmarks.throughput.window import Measured

MANY = 8  # ranks, above which a table gives the lowest and the highest of them
NOTE = (
    "Samples a second of the slowest rank; medians of the repeats, ± half of their range, and in brackets the share of "
    "the limit. The limit: the slowest stage alone in a loop on a core of its own, or, with more stages than cores, "
    "all cores busy with the work of all stages; measured in turn with the systems. M: micro-batches in a step of a "
    "synchronous schedule, the best of those tried, at each delay. dnipipe updates after each micro-batch, a schedule "
    "after each step. Of "
    f"more than {MANY} stages the lowest and the highest figure; idle time only of stages that compute. Overhead: what "
    "the processor did in the stage's own thread that is not the model's (docs/files.md), without waits. "
)


def tables(records: Sequence[Record]) -> str:
    """All of it in Markdown."""
    parts = ["# Throughput", _origin(records) + NOTE]
    for group in _alike(records):
        parts.append(f"## {_title(group[0])}")
        parts.append(_throughput(records, group))
        parts.append(_costs(records, group))
        parts.append(_overhead(records, group))
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def plots(records: Sequence[Record]) -> list[Plot]:
    """Throughput and memory against the link's delay, where more than one delay was measured."""
    rates: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    memory: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for group in _alike(records):
        if len(group) < 2:
            continue
        delays = [1000 * condition.link.delay for condition in group]
        title = _title(group[0])
        bounds = [(delay, bound) for delay, one in zip(delays, group, strict=True) if (bound := limit(records, one))]
        rates[title] = {"limit": ([delay for delay, _ in bounds], [bound for _, bound in bounds])} if bounds else {}
        memory[title] = {}
        for system in _systems(records, group):
            runs = [_of(records, system, condition) for condition in group]
            known = [(delay, own) for delay, own in zip(delays, runs, strict=True) if own]
            xs = [delay for delay, _ in known]
            rates[title][system] = (xs, [median(r.rate for r in own) for _, own in known])
            memory[title][system] = (xs, [median(_largest(r) for r in own) for _, own in known])
    delay = "one-way delay of the link, ms"
    return [
        Plot("throughput", delay, "samples a second", rates, marks=True),
        Plot("memory", delay, "peak memory of the largest rank, MiB", memory, marks=True),
    ]


def _largest(record: Record) -> float:
    return max(rank.memory for rank in record.ranks)


def _throughput(records: Sequence[Record], group: Sequence[Condition]) -> str:
    head = ["", *(_delay(records, condition) for condition in group)]
    bounds = [limit(records, condition) for condition in group]
    rows = [["the limit", *(MISSING if bound is None else f"{bound:.1f}" for bound in bounds)]] if any(bounds) else []
    for system in _systems(records, group):
        rows.append([f"`{system}`", *(_rate(records, system, condition) for condition in group)])
    for system in (name for name in RULES if name in _systems(records, group)):
        rows.append([f"`{system}` : best schedule", *(_ratio(records, system, condition) for condition in group)])
    return markdown(head, rows)


def _delay(records: Iterable[Record], condition: Condition) -> str:
    """One way; of real hosts nobody knows it here."""
    real = any(r.links == "hosts" for r in records if r.condition == condition)
    return "the link as it is" if real else f"{1000 * condition.link.delay:g} ms"


def _rate(records: Sequence[Record], system: str, condition: Condition) -> str:
    runs = _of(records, system, condition)
    if not runs:
        return MISSING
    rates, bound = [r.rate for r in runs], limit(records, condition)
    share = f" ({median(rates) / bound:.2f})" if bound else ""
    tried = f", M = {runs[0].microbatches}" if system in SCHEDULES and system != "plain" else ""
    return f"{median(rates):.1f} ± {(max(rates) - min(rates)) / 2:.1f}{share}{tried}"


def _ratio(records: Sequence[Record], system: str, condition: Condition) -> str:
    own = [r.rate for r in _of(records, system, condition)]
    best = [median(r.rate for r in runs) for name in SCHEDULES if (runs := _of(records, name, condition))]
    return f"{median(own) / max(best):.2f} ×" if own and best else MISSING


def _costs(records: Sequence[Record], group: Sequence[Condition]) -> str:
    """Of the condition with the longest delay; by stage where it differs."""
    condition = group[-1]
    head = [
        f"at {_delay(records, condition)}",
        "idle by stage, %",
        "KB a sample sent by stage",
        "peak memory by stage, MiB",
        "gradients late by, updates",
    ]
    rows = []
    for system in _systems(records, group):
        runs = _of(records, system, condition)
        if runs:
            idle = MISSING if condition.sleep else _by_stage(runs, _idle, "{:.0f}")
            sent = _by_stage(runs, _sent, "{:.0f}")
            memory = _by_stage(runs, lambda rank: rank.memory, "{:.0f}")
            late = _by_stage(runs, lambda rank: rank.staleness, "{:.1f}")
            rows.append([f"`{system}`", idle, sent, memory, late])
    return markdown(head, rows)


def _overhead(records: Sequence[Record], group: Sequence[Condition]) -> str:
    """At each delay; "" where nothing of it was noted, as of a schedule."""
    rows = []
    for system in _systems(records, group):
        found = [_by_stage(_of(records, system, condition), _own, "{:.2f}") for condition in group]
        if set(found) != {MISSING}:
            rows.append([f"`{system}`", *found])
    head = ["overhead by stage, ms a batch", *(_delay(records, condition) for condition in group)]
    return markdown(head, rows) if rows else ""


def _own(rank: Measured) -> float | None:
    return None if rank.overhead is None else 1000 * rank.overhead


def _idle(rank: Measured) -> float:
    return 100 * (1 - rank.processor / rank.seconds)


def _sent(rank: Measured) -> float | None:
    return None if rank.sent is None else rank.sent / rank.samples / 1000


def _by_stage(runs: Sequence[Record], value: Callable[..., float | None], form: str) -> str:
    found: list[float | None] = []
    for ranks in zip(*(run.ranks for run in runs), strict=True):
        values = [one for rank in ranks if (one := value(rank)) is not None]
        found.append(median(values) if values else None)
    known = [one for one in found if one is not None]
    if len(found) > MANY and known:
        return f"{form.format(min(known))} to {form.format(max(known))}"
    return ", ".join(MISSING if one is None else form.format(one) for one in found) if known else MISSING


def _of(records: Iterable[Record], system: str, condition: Condition) -> list[Record]:
    return [r for r in records if r.system == system and r.condition == condition and r.repeat >= 0]


def _systems(records: Sequence[Record], group: Sequence[Condition]) -> list[str]:
    return [system for system in SYSTEMS if any(_of(records, system, condition) for condition in group)]


def _alike(records: Sequence[Record]) -> list[list[Condition]]:
    """Conditions that differ in the link's delay only, by delay."""
    groups: dict[Condition, list[Condition]] = {}
    for record in records:
        if record.system == ALONE:
            continue
        condition = record.condition
        own = groups.setdefault(replace(condition, link=replace(condition.link, delay=0.0)), [])
        if condition not in own:
            own.append(condition)
    return [sorted(own, key=lambda condition: condition.link.delay) for own in groups.values()]


def _title(condition: Condition) -> str:
    words = str(replace(condition, link=replace(condition.link, delay=0.0))).split(", ")
    return ", ".join(word for word in words if word != "0 ms")


def _origin(records: Sequence[Record]) -> str:
    if not records:
        return "Nothing has been measured yet. "
    sessions, torches, processors, links = (
        sorted({getattr(r, name) for r in records}) for name in ("session", "torch", "processor", "links")
    )
    return (
        f"Measured {', '.join(sessions)} on {', '.join(processors)}, each rank bound to a core, one thread each; torch "
        f"{', '.join(torches)}; links: {', '.join(links)}. "
    )


__all__ = ["plots", "tables"]
