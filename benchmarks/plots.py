"""Lines in panels, as a PNG file. matplotlib is imported when the first is drawn; without it, nothing is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

Line = tuple[Sequence[float], Sequence[float]]  # x, y


@dataclass(frozen=True)
class Plot:
    """One picture.

    Args:
        panels: title -> label -> line; panels stand side by side and share the y axis.
        marks: draw the points too: for lines that have few.
    """

    name: str
    x: str
    y: str
    panels: Mapping[str, Mapping[str, Line]]
    marks: bool = False


def draw(plots: Sequence[Plot], folder: Path) -> list[str]:
    """Names of the files written: those plots that have a line. One line on the screen if matplotlib is missing."""
    drawn = [plot for plot in plots if any(plot.panels.values())]
    if drawn and find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed (pip install -e '.[plots]')")
        return []
    for plot in drawn:
        _draw(plot, folder / f"{plot.name}.png")
    return [f"{plot.name}.png" for plot in drawn]


def _draw(plot: Plot, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    panels = {title: lines for title, lines in plot.panels.items() if lines}
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    palette = pyplot.get_cmap("tab10" if len(labels) <= 10 else "tab20")
    colours = {label: palette(number % palette.N) for number, label in enumerate(labels)}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(2 + 4 * len(panels), 4), sharey=True, squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for label, (x, y) in lines.items():
            axis.plot(x, y, label=label, color=colours[label], marker="o" if plot.marks else "", markersize=4)
        axis.set(title=title, xlabel=plot.x)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(plot.y)
    handles = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
