"""The timeline as a PNG, of our spans and of another system's under them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dnipipe import cli
from dnipipe.errors import UsageError
from dnipipe.tracing import Row, draw, merged, read
from tests.tracing.conftest import Write


def test_a_png_is_made(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    another: list[Row] = [(0, "forward", 5.0, 5.002), (1, "bubble", 5.0, 5.004)]
    draw({"ours": merged(read(write(batches=2))).rows(), "1F1B": another}, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", ["-o", "--png"])
def test_a_file_that_cannot_be_written_is_named(
    write: Write, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    assert cli.main(["trace", str(write()), option, str(tmp_path / "file" / "below")]) == 2
    shown = capsys.readouterr().err
    assert f"cannot write {tmp_path / 'file'}" in shown and len(shown.splitlines()) == 1


def test_each_name_has_a_colour_of_its_own() -> None:
    pytest.importorskip("matplotlib")
    from dnipipe.tracing.picture import COLOURS, colours_of

    names = ["bubble", "all-reduce", *reversed(COLOURS), "forward"]
    colours = colours_of(names)
    assert list(colours) == [*COLOURS, "all-reduce", "bubble"] and len({str(each) for each in colours.values()}) == len(
        colours
    )


def test_without_matplotlib_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"t\.png: drawing needs the extra: pip install 'dnipipe\[plots\]'"):
        draw({"ours": [(0, "forward", 0.0, 1.0)]}, tmp_path / "t.png")
