"""What is kept of the rows, and the table of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.faults.pipeline import window_bytes
from benchmarks.faults.rows import FAULTS, Row
from benchmarks.tables import MISSING, markdown

SIGMAS = 2.0  # standard deviations of the undisturbed runs, within which a loss is theirs
SPREAD = 0.01  # part by which the peaks of one and the same process differ from run to run
HEAD = (
    "fault", "amount", "noticed", "after, s: median / p95", "progress again, s: median / p95 / max",
    "delivered", "not let in", "ledger", "batches by stage", "undone", "loss", "undisturbed",
    "peak memory, MB", "limit", "left behind",
)  # fmt: skip
NOTE = """
- **noticed**: how many of the faults made a neighbour take the stage for gone; of an attack, how many were counted
  where something of it was not let in, or made a stage end a connection; *after*: since the fault began.
- **delivered**: messages that a stage was given and its neighbour had not sent, bit for bit, or not so often;
  *not let in*: messages and connections, by reason, under an attack; also the neighbour's own that were on the way when
  a connection ended. With keys a message that was changed or repeated ends the connection and is in no other count.
- **progress again**: from the fault's end until every stage has begun a batch that none had begun before.
- **ledger**: exact, if each stage trained each batch at most once and every batch that a stage has and the next one has
  not is accounted for.
- **undone**: batches by stage whose lessons were lost with a process, since it had not saved them yet.
- **loss**: on held-out text, nats a byte, at the first evaluation some 400 batches behind the last fault;
  *undisturbed*: mean ± standard deviation (seeds) of runs that nothing happened to, after as many batches, and how many
  of these standard deviations the loss is above it; within: 2 at most, above or below.
- **peak memory**: of any process of each stage; *limit*: the highest peak of the undisturbed runs and a hundredth of
  it, by which such peaks differ from run to run, and what a full window may take (`window_bytes` in `pipeline.py`).
- **left behind**: processes of the run that were there after it was ended.
"""


@dataclass
class Results:
    """Rows by fault, and of undisturbed runs the losses by seed and batch; kept in one file."""

    folder: Path
    rows: dict[str, Row] = field(default_factory=dict)
    undisturbed: dict[int, dict[int, float]] = field(default_factory=dict)
    peaks: dict[int, list[int]] = field(default_factory=dict)  # of memory, bytes by stage, of undisturbed runs by seed

    @classmethod
    def load(cls, folder: Path) -> Results:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "faults.json"
        if not path.exists():
            return cls(folder)
        values = json.loads(path.read_text())
        rows = {name: Row(**row) for name, row in values["rows"].items()}
        losses = {
            int(seed): {int(batch): loss for batch, loss in curve.items()}
            for seed, curve in values["undisturbed"].items()
        }
        return cls(folder, rows, losses, {int(seed): peak for seed, peak in values.get("peaks", {}).items()})

    def save(self) -> None:
        values: dict[str, Any] = {
            "rows": {name: dataclasses.asdict(row) for name, row in self.rows.items()},
            "undisturbed": self.undisturbed,
            "peaks": self.peaks,
        }
        (self.folder / "faults.json").write_text(json.dumps(values, indent=1) + "\n")

    def beside(self, row: Row) -> list[float]:
        """The losses of the undisturbed runs after as many batches."""
        return self.after(row.loss[0]) if row.loss else []

    def after(self, batches: float) -> list[float]:
        return [curve[batch] for curve in self.undisturbed.values() for batch in curve if batch == batches]

    def sigmas(self, row: Row) -> float | None:
        """How far its loss is above theirs, in their standard deviations; None without."""
        losses = self.beside(row)
        return (row.loss[1] - mean(losses)) / stdev(losses) if row.loss and len(losses) > 1 else None

    def limits(self, row: Row) -> list[int]:
        """Bytes that each stage's memory should not have exceeded; [] if nothing is known of undisturbed runs, or the
        row is older than their peaks: what a process takes has changed since."""
        if row.delivered is None:
            return []
        peaks = [peak for peak in self.peaks.values() if len(peak) == row.stages]
        highest = [round((1 + SPREAD) * max(of)) for of in zip(*peaks, strict=True)]
        return [most + window_bytes(k, row.stages) for k, most in enumerate(highest)]

    def outside(self, row: Row) -> list[str]:
        """In what it is not as undisturbed runs are."""
        sigmas, over = self.sigmas(row), any(p > limit for p, limit in zip(row.peak, self.limits(row), strict=False))
        return [*["loss"] * (sigmas is not None and abs(sigmas) > SIGMAS), *["memory"] * over]

    def good(self, row: Row) -> bool:
        """Sound, and not outside but for a reason that is known."""
        return row.sound and all(what in FAULTS[row.fault].known for what in self.outside(row))


def table(results: Results) -> str:
    """Markdown: where it ran, and a row a fault, in the order of the study; then why some are outside."""
    rows = [results.rows[name] for name in FAULTS if name in results.rows]
    lines = [cells(row, results) for row in rows]
    known = [
        f"- **{row.fault}**, {what} not within: {FAULTS[row.fault].known.get(what) or _unknown(row, what, results)}.\n"
        for row in rows
        for what in results.outside(row)
    ]
    return f"# A pipeline under faults\n\n{_origin(rows)}\n{markdown(HEAD, lines)}\n{''.join(known)}{NOTE}"


def cells(row: Row, results: Results) -> list[str]:
    if row.skipped:
        return [row.fault, "not made", row.skipped, *[MISSING] * (len(HEAD) - 3)]
    progress = _times(row.recovered, ("median", "p95", "max"))
    attack = FAULTS[row.fault].attack
    return [
        row.fault,
        str(row.amount),
        str(row.found),
        _times(row.detected, ("median", "p95")),
        f"{progress}{f'; {row.open} never' if row.open else ''}{f'; hung: {row.hung[:200]}' if row.hung else ''}",
        MISSING if row.delivered is None else str(row.delivered),
        ", ".join(f"{n} {why}" for why, n in row.kept_out.items()) if attack and row.kept_out else MISSING,
        "; ".join(row.wrong)[:300] or "exact",
        " ".join(map(str, row.batches)),
        " ".join(map(str, row.undone)),
        f"{row.loss[1]:.3f} at {row.loss[0]:.0f}" if row.loss else MISSING,
        _beside(row, results),
        _megabytes(row.peak),
        _limit(row, results),
        str(row.left),
    ]


def line(row: Row) -> str:
    """For a person who waits for the table."""
    named = zip(HEAD[1:], cells(row, Results(Path()))[1:], strict=True)
    return f"{row.fault}: " + ", ".join(f"{name} {text}" for name, text in named if text != MISSING)


def _times(found: Mapping[str, float], names: Sequence[str]) -> str:
    return " / ".join(f"{found[name]:.1f}" for name in names) if found else MISSING


def _beside(row: Row, results: Results) -> str:
    """Mean ± standard deviation over the seeds, after as many batches, and the verdict."""
    losses, sigmas = results.beside(row), results.sigmas(row)
    if not losses:
        return MISSING
    if sigmas is None:
        return _spread(losses)
    verdict = "**not within**" if "loss" in results.outside(row) else "within"
    return f"{_spread(losses)}: {sigmas:+.1f} σ, {verdict}"


def _spread(losses: Sequence[float]) -> str:
    between = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"{mean(losses):.3f}{between} ({len(losses)})"


def _unknown(row: Row, what: str, results: Results) -> str:
    """And, of a loss, what may be worth knowing: the last stage has not had every batch of the first."""
    evaluated = {batch for curve in results.undisturbed.values() for batch in curve}
    if what != "loss" or not evaluated or not row.batches:
        return "no reason is known"
    near = min(evaluated, key=lambda batch: abs(batch - row.batches[-1]))
    beside = f"undisturbed runs after {near}, about as many as the last stage has begun: {_spread(results.after(near))}"
    return f"no reason is known ({beside})"


def _limit(row: Row, results: Results) -> str:
    if not (limits := results.limits(row)):
        return MISSING
    return f"{_megabytes(limits)}: {'**not within**' if 'memory' in results.outside(row) else 'within'}"


def _megabytes(sizes: Sequence[int]) -> str:
    return " ".join(f"{size / 1e6:.0f}" for size in sizes)


def _origin(rows: Sequence[Row]) -> str:
    made = [row for row in rows if not row.skipped]
    if not made:
        return "Nothing has been measured yet.\n"
    where = sorted({f"{row.stages} stages on {row.machine}, {row.date}" for row in made})
    loads = [row.load for row in made]
    return (
        f"{'; '.join(where)}; {min(loads):.1f} to {max(loads):.1f} other processes at work on the machine when a "
        "row began.\n"
    )
