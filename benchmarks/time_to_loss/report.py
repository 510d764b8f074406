"""Tables, plots and the map: seconds to the target, against the best synchronous schedule's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

from benchmarks.cells import Records
from benchmarks.plots import Line, Plot
from benchmarks.tables import MISSING, markdown
from benchmarks.time_to_loss.race import Run, Runs
from benchmarks.time_to_loss.study import SYNC, SYSTEMS, UNIT, Task, reached, target


@dataclass(frozen=True)
class Row:
    """One link of one task, in the map.

    Args:
        delay: one way, seconds. samples: that a stage trains in a round trip, at the pace of the fastest decoupled
            system. seconds: to the target, by system; None: it did not come there. first: who was there first.
    """

    task: str
    delay: float
    samples: float
    seconds: dict[str, float | None]
    first: str

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def rows(name: str, task: Task, runs: Runs, records: Records) -> list[Row]:
    """By delay; only links where `sync` and another system were raced."""
    loss = target(name, task, records)
    if loss is None:
        return []
    found = []
    for delay in dict.fromkeys(run.delay for run in runs.raced(name)):
        here = [run for run in runs.raced(name) if run.delay == delay]
        own = {s: mine for s in SYSTEMS if (mine := [run for run in here if run.system == s])}
        paces = [run.pace for system, mine in own.items() if system != SYNC for run in mine]
        seconds = {system: _seconds(mine, loss) for system, mine in own.items()}
        known = {system: one for system, one in seconds.items() if one is not None}
        if SYNC in own and paces and known:
            found.append(Row(name, delay, 2 * delay / min(paces), seconds, min(known, key=lambda s: known[s])))
    return found


def _seconds(runs: Sequence[Run], loss: float) -> float | None:
    """The median of the seeds; None if one of them did not come to the loss."""
    found = [reached(run.by_seconds, loss) for run in runs]
    known = [one for one in found if one is not None]
    return median(known) if len(known) == len(found) else None


def tables(name: str, task: Task, runs: Runs, records: Records) -> str:
    """One task's, in Markdown."""
    loss, links = target(name, task, records), rows(name, task, runs, records)
    if loss is None or not links:
        return f"## {name}\n\nNothing has been raced yet.\n"
    systems = [system for system in SYSTEMS if any(system in row.seconds for row in links)]
    head = ["seconds", *(f"{1000 * row.delay:g} ms one way" for row in links)]
    body = [[f"`{system}`", *(_entry(row, system) for row in links)] for system in systems]
    body.append(["first", *(f"`{row.first}`" for row in links)])
    body.append([f"round trip / time of {UNIT} samples", *(f"{row.samples / UNIT:.1f}" for row in links)])
    text = (
        f"## {name}: seconds to a validation loss of {loss:.4f}\n\nBackprop's best of its search after {task.target} "
        f"samples. In brackets the seconds of `{SYNC}` divided by it: above 1 it is ahead.\n\n{markdown(head, body)}"
    )
    return f"{text}\n{_details(name, runs, loss)}"


def _entry(row: Row, system: str) -> str:
    if system not in row.seconds:
        return MISSING
    seconds, sync = row.seconds[system], row.seconds[SYNC]
    if seconds is None:
        return "not reached"
    return f"{seconds:.1f}" + (f" ({sync / seconds:.2f} ×)" if sync is not None and system != SYNC else "")


def _details(name: str, runs: Runs, loss: float) -> str:
    """A line a race."""
    body = [
        [
            f"{1000 * run.delay:g} ms",
            f"`{run.system}`",
            str(run.setting),
            f"{1 / run.pace:.0f}",
            MISSING if (samples := reached([(x, y) for x, _, y in run.points], loss)) is None else f"{samples:.0f}",
            MISSING if run.staleness is None else f"{run.staleness:.1f}",
            f"{min((y for _, _, y in run.points), default=float('nan')):.4f}",
        ]
        for run in runs.raced(name)
    ]
    head = ["link", "", "chosen", "samples/s", "samples to the target", "late in stage 0, updates", "lowest loss"]
    return markdown(head, body)


def plots(name: str, task: Task, runs: Runs, records: Records) -> list[Plot]:
    """Loss against wall-clock by link, and the map."""
    panels: dict[str, dict[str, Line]] = {}
    for run in runs.raced(name):
        line = [s for _, s, _ in run.points], [loss for _, _, loss in run.points]
        panels.setdefault(f"{1000 * run.delay:g} ms one way", {}).setdefault(run.system, line)
    loss = target(name, task, records)
    if loss is not None:
        for lines in panels.values():
            lines["target"] = [0.0, max(x for line in lines.values() for x in line[0])], [loss, loss]
    links = rows(name, task, runs, records)
    ratios: dict[str, Line] = {}
    for system in SYSTEMS:
        known = [
            (row.samples / UNIT, sync / own)
            for row in links
            if (own := row.seconds.get(system)) is not None and (sync := row.seconds[SYNC]) is not None
        ]
        if known:
            ratios[system] = [x for x, _ in known], [y for _, y in known]
    level = "" if loss is None else f" to {loss:.3f}"
    return [
        Plot(f"{name}-loss", "seconds", f"{name}: validation loss", panels),
        Plot(
            f"{name}-map",
            f"round trip / time of {UNIT} samples",
            f"sync's seconds{level} / own",
            {name: ratios},
            marks=True,
        ),
    ]


__all__ = ["Row", "plots", "rows", "tables"]
