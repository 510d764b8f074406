"""The pipeline's timeline as a PNG: a row a stage, time from left to right. matplotlib is imported where used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dnipipe.errors import UsageError

Row = tuple[int, str, float, float]  # stage, what its time was spent on, begin, end (seconds)

# work in full colours, waits in greys, what the pipeline costs on top in reds; any other name gets one of OTHERS
COLOURS = {
    "forward": "#1f77b4",
    "backward": "#2ca02c",
    "predictor": "#ff7f0e",
    "loss": "#bcbd22",
    "optimizer": "#9467bd",
    "device": "#aec7e8",
    "data": "#8c564b",
    "evaluation": "#17becf",
    "checkpoint": "#e377c2",
    "wait_input": "#e4e4e4",
    "wait_window": "#c6c6c6",
    "wait_send": "#a8a8a8",
    "wait_end": "#f2f2f2",
    "serialize": "#ff9896",
    "send": "#d62728",
    "receive": "#8b1a1a",
    "keep": "#393b79",
    "report": "#4d4d4d",
}
OTHERS = "tab20"  # matplotlib's


def draw(panels: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Title -> rows, a panel each, one under another with one scale of time; each begins with its own first row.

    Raises UsageError if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError(f"{path}: drawing needs the extra: pip install 'dnipipe[plots]'") from None
    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    colours = colours_of([name for rows in panels.values() for _, name, _, _ in rows])
    heights = [1 + 0.5 * len({stage for stage, *_ in rows}) for rows in panels.values()]
    size = (14, max(0.6 + sum(heights), 0.3 + 0.22 * len(colours)))  # inches; room for the legend
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=size, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axis, (title, rows) in zip(axes[:, 0], panels.items(), strict=True):
        _fill(axis, rows, colours)
        axis.set(title=title, ylabel="stage")
    axes[-1, 0].set_xlabel("ms")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    names = [name.replace("_", " ") for name in colours]
    figure.legend(handles, names, loc="outside right upper", fontsize="small")
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)


def _fill(axis: Any, rows: Sequence[Row], colours: Mapping[str, Any]) -> None:
    """One axis: its stages from top to bottom, time in milliseconds from the first begin."""
    zero = min(begin for _, _, begin, _ in rows)
    bars: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)  # (begin, length), milliseconds
    for stage, name, begin, end in rows:
        bars[stage, name].append((1e3 * (begin - zero), 1e3 * (end - begin)))
    for (stage, name), each in bars.items():
        axis.broken_barh(each, (stage - 0.4, 0.8), facecolor=colours[name], linewidth=0)
    stages = sorted({stage for stage, _ in bars})
    axis.set_yticks(stages)
    axis.set_ylim(stages[-1] + 0.5, stages[0] - 0.5)
    axis.margins(x=0)


def colours_of(names: Sequence[str]) -> dict[str, Any]:
    """Of the names that occur, the known ones first."""
    from matplotlib import colormaps

    palette = colormaps[OTHERS]
    known = {name: colour for name, colour in COLOURS.items() if name in names}
    others = sorted(set(names) - known.keys())
    return known | {name: palette(number % palette.N) for number, name in enumerate(others)}


__all__ = ["Row", "draw"]
