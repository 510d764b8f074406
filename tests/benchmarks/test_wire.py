"""The study `wire`: valid cells, the bytes they carry, tables from given records. Nothing is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cells import Records
from benchmarks.wire.__main__ import main
from benchmarks.wire.report import WireStudy
from benchmarks.wire.study import ALL, EVERY, FORM, NONE, ROWS, TASKS, WAYS, carried
from tests.benchmarks.conftest import record


def test_every_cell_is_a_run_in_the_laboratory_and_sends_less_in_one_way(tmp_path: Path) -> None:
    cells = WireStudy().cells(Records(tmp_path))
    assert len({cell.key for cell in cells}) == len(cells)
    for cell in cells:
        config, way = cell.loaded, cell.labels["way"]
        assert config.transport.kind == "local" and config.train.batches > 0
        assert (config.wire.gradient_every > 1) == (way in (EVERY, ALL))
        assert (config.wire.gradient_rows < 1) == (way in (ROWS, ALL))
        assert way in (FORM, ALL) or config.wire.gradients == config.wire.activations == "as is"


def test_bytes_are_those_of_what_crosses_an_edge() -> None:
    """float32 (16, 64, 64) or (256, 256); a float32 scale a row in int8; no gradient where none is used."""
    study = WireStudy()

    def of(task: str, way: str, value: str) -> tuple[float, float]:
        return carried(study.seeds(task, way, value)[0].loaded)

    whole = 16 * 64 * 64 * 4
    assert of("lm-synthetic", FORM, "as is") == (whole, whole)
    assert of("lm-blend", FORM, "bfloat16") == (whole / 2, whole / 2)
    assert of("lm-synthetic", FORM, "int8") == (whole / 4 + 16 * 64 * 4,) * 2
    assert of("lm-synthetic", EVERY, "4") == of("lm-synthetic", ROWS, "0.25") == (whole, whole / 4)
    assert of("mnist-linear", ALL, "int8, 8, 0.125") == (256 * 256 + 4 * 256, (32 * 256 + 4 * 32) / 8)


def test_tables_and_plots_show_what_there_is(tmp_path: Path) -> None:
    study, records = WireStudy(), Records(tmp_path)
    for way, value, loss in ((FORM, "as is", 2.0), (EVERY, "8", 2.25), (NONE, "", 2.5)):
        for cell in study.seeds("lm-synthetic", way, value):
            records.add(cell, record(cell, loss))
    table = study.tables(records)["lm-synthetic"]
    assert "| form | as is | 256 | 256 | 512 | 2.000 (1) |" in table
    assert "| every n-th | 8 | 256 | 32 | 288 | 2.250 (1) |" in table
    assert "| no gradients |  | 256 | 0 | 256 | 2.500 (1) |" in table
    assert "| rows | 0.5 | 256 | 128 | 384 | – |" in table
    lines = next(plot for plot in study.plots(records) if plot.name == "lm-synthetic").panels[""]
    assert lines[EVERY] == ([512, 288], [2.0, 2.25]) and lines[FORM] == ([512], [2.0])


@pytest.mark.parametrize("task", TASKS)
def test_a_rule_that_needs_every_gradient_is_only_rounded(task: str) -> None:
    assert TASKS[task].ways == ((FORM,) if task == "lm-blend" else tuple(WAYS))


def test_the_commands_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--task", "mnist-linear", "--only", "seed=0", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "--wire.gradient_rows 0.125 --train.seed 0" in shown and "lm" not in shown.split()
