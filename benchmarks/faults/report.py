"""What is kept of the rows, and the table of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.faults.rows import FAULTS, Row
from benchmarks.tables import MISSING, markdown

HEAD = (
    "fault", "amount", "taken for gone", "after, s: median / p95", "progress again, s: median / p95 / max",
    "ledger", "batches by stage", "undone", "loss", "undisturbed", "peak memory, MB", "left behind",
)  # fmt: skip
NOTE = """
- **taken for gone**: how many of the faults made a neighbour take the stage for gone; *after*: since the fault began.
- **progress again**: from the fault's end until every stage has begun a batch that none had begun before.
- **ledger**: exact, if each stage trained each batch at most once and every batch that a stage has and the next one has
  not is accounted for.
- **undone**: batches by stage whose lessons were lost with a process, since it had not saved them yet.
- **loss**: on held-out text, nats a byte, at the first evaluation some 400 batches behind the last fault;
  *undisturbed*: mean ± standard deviation (seeds) of runs that nothing happened to, after as many batches.
- **left behind**: processes of the run that were there after it was ended.
"""


@dataclass
class Results:
    """Rows by fault, and the losses of undisturbed runs by seed and batch; kept in one file."""

    folder: Path
    rows: dict[str, Row] = field(default_factory=dict)
    undisturbed: dict[int, dict[int, float]] = field(default_factory=dict)

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
        return cls(folder, rows, losses)

    def save(self) -> None:
        values: dict[str, Any] = {
            "rows": {name: dataclasses.asdict(row) for name, row in self.rows.items()},
            "undisturbed": self.undisturbed,
        }
        (self.folder / "faults.json").write_text(json.dumps(values, indent=1) + "\n")


def table(results: Results) -> str:
    """Markdown: where it ran, and a row a fault, in the order of the study."""
    order = [name for name in FAULTS if name in results.rows]
    rows = [results.rows[name] for name in order]
    lines = [cells(row, results.undisturbed) for row in rows]
    return f"# A pipeline under faults\n\n{_origin(rows)}\n{markdown(HEAD, lines)}\n{NOTE}"


def cells(row: Row, undisturbed: Mapping[int, Mapping[int, float]]) -> list[str]:
    if row.skipped:
        return [row.fault, "not made", row.skipped, *[MISSING] * (len(HEAD) - 3)]
    progress = _times(row.recovered, ("median", "p95", "max"))
    return [
        row.fault,
        str(row.amount),
        str(row.found),
        _times(row.detected, ("median", "p95")),
        f"{progress}{f'; {row.open} never' if row.open else ''}{f'; hung: {row.hung[:200]}' if row.hung else ''}",
        "; ".join(row.wrong)[:300] or "exact",
        " ".join(map(str, row.batches)),
        " ".join(map(str, row.undone)),
        f"{row.loss[1]:.3f} at {row.loss[0]:.0f}" if row.loss else MISSING,
        _beside(row, undisturbed),
        " ".join(f"{peak / 1e6:.0f}" for peak in row.peak),
        str(row.left),
    ]


def line(row: Row) -> str:
    """For a person who waits for the table."""
    named = zip(HEAD[1:], cells(row, {})[1:], strict=True)
    return f"{row.fault}: " + ", ".join(f"{name} {text}" for name, text in named if text != MISSING)


def _times(found: Mapping[str, float], names: Sequence[str]) -> str:
    return " / ".join(f"{found[name]:.1f}" for name in names) if found else MISSING


def _beside(row: Row, undisturbed: Mapping[int, Mapping[int, float]]) -> str:
    """Mean ± standard deviation over the seeds, after as many batches."""
    losses = [curve[row.loss[0]] for curve in undisturbed.values() if row.loss and row.loss[0] in curve]
    if not losses:
        return MISSING
    spread = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"{mean(losses):.3f}{spread} ({len(losses)})"


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
