"""What docker/picture.py draws of a made-up run."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from tests.docker.conftest import FAULT, made, write

pytest.importorskip("matplotlib", reason="the extra dnipipe[plots] is not installed: docker/picture.py was not run")


@pytest.fixture
def picture(report: ModuleType) -> ModuleType:
    return importlib.import_module("picture")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = made(tmp_path / "run")
    lines = [{"time": 1000.0 + 5 * n, "loss": 3.0 - n / 10} for n in range(8)]
    write(folder / "metrics" / "stage-2.jsonl", {"time": 999.0}, *lines)  # the first before a batch was through
    return folder


def test_the_loss_is_the_last_stages(picture: ModuleType, run: Path) -> None:
    seconds, losses = picture.losses(run, 2)
    assert seconds == [5.0 * n for n in range(8)] and losses[0] == 3.0 and losses[-1] == 2.3


def test_a_stage_that_stands_is_seen_to_and_the_time_is_marked(
    picture: ModuleType, report: ModuleType, run: Path
) -> None:
    figure, axis = picture.pyplot.subplots()
    found = report.Run(run)
    picture.rates(axis, found, 1000.0)
    picture.mark(axis, FAULT, 1000.0, found)
    before, hit = axis.lines[1], axis.lines[2]
    assert set(before.get_ydata()) == {10.0}
    assert [x for x, y in zip(hit.get_xdata(), hit.get_ydata(), strict=True) if y == 0] == [20.0, 22.0]
    (marked,) = axis.patches
    assert (marked.get_x(), marked.get_width()) == (20.0, 5.0)
    picture.pyplot.close(figure)


def test_a_png_is_made(picture: ModuleType, run: Path, tmp_path: Path) -> None:
    picture.main(run, run, tmp_path / "chaos.png")
    assert (tmp_path / "chaos.png").read_bytes().startswith(b"\x89PNG")
