"""The study `learning.regime`: valid cells that differ where they should, a table from given records. No training."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cells import Records
from benchmarks.learning.regime import BATCHES, DELAYS, RATES, SEEDS, RegimeStudy, columns, main
from tests.benchmarks.conftest import record


def test_the_rules_of_a_regime_train_on_the_same_batches(tmp_path: Path) -> None:
    study = RegimeStudy()
    cells = study.cells(Records(tmp_path))
    assert len({cell.key for cell in cells}) == len(cells) == len(BATCHES) * len(RATES) * len(SEEDS) * len(columns())
    for cell in cells:
        config = cell.loaded
        assert (config.data.batch, str(config.train.seed)) == (cell.labels["batch"], str(cell.labels["seed"]))
        assert config.optimizer.lr == float(str(cell.labels["rate"])) and config.train.batches == 800
        assert config.transport.kind == "local"


def test_the_table_holds_each_against_backprop_with_its_own_seeds(tmp_path: Path) -> None:
    study, records = RegimeStudy(), Records(tmp_path)
    for seed, loss in enumerate((2.0, 2.2, 9.0)):
        cell = study.cell(16, "1e-3", "sync", 0, seed)
        records.add(cell, record(cell, loss))
    for seed, loss in enumerate((2.1, 2.31)):
        cell = study.cell(16, "1e-3", "blend", 2, seed)
        records.add(cell, record(cell, loss))
    cell = study.cell(16, "1e-3", "local", 0, 0)
    records.add(cell, record(cell, None))
    rows = study.tables(records)["regime"].splitlines()
    row = next(line for line in rows if line.startswith("| 16 | 1e-3 |"))
    assert "| 4.400 ± 3.500 (3) | diverged (1) |" in row and "2.205 ± 0.105 (2) +5.0 %" in row
    panels = study.plots(records)[0].panels["batch 16, rate 1e-3"]
    assert panels == {"blend": ([2], [pytest.approx(5.0)])}


def test_what_no_delay_changes_is_run_once() -> None:
    assert [rule for rule, _ in columns()] == ["sync", "local", *["blend-0"] * len(DELAYS), *["blend"] * len(DELAYS)]


def test_without_records_there_is_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--table", "--seeds", "0", "--out", str(tmp_path)]) == 0
    assert "Nothing has been run yet." in capsys.readouterr().out
    assert "| 64 | 4e-3 | – |" in (tmp_path / "README.md").read_text()
