"""What docker/report.py makes of ledgers, and when it says that the faults cost too much."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.docker.conftest import FAULT, STEADY, made, times

Said = pytest.CaptureFixture[str]


def judged(report: ModuleType, run: Path, said: Said) -> tuple[int, list[str], str]:
    """The status, the cells of the row, and all that it printed."""
    status = report.main(run, made(run.with_name("undisturbed")))
    text = said.readouterr().out
    title, rule, row = [line for line in text.splitlines() if line.startswith("|")]
    assert len(title) == len(rule) == len(row) and set(rule) <= set("|- ")
    return status, [cell.strip() for cell in row.strip("|").split("|")], text


def test_a_row_says_what_the_fault_cost(report: ModuleType, tmp_path: Path, capsys: Said) -> None:
    status, row, text = judged(report, made(tmp_path / "run"), capsys)
    assert status == 0 and row == ["kill", "2", "5.0", "1.00 1.00", "0 0 50", "0 0 10"]
    assert text.startswith("`docker/chaos.sh`, 1970-01-01: 1 faults in 400 batches\n\n|")
    assert "loss 1.0000, undisturbed 1.0000 (+0.0%)" in text and "every gap explained" in text


# -- the stages before the fault -----------------------------------------------------------------------------------


def slow(rate: float) -> dict[int, float]:
    """So many batches a second while stage 2 stands, and what it missed afterwards."""
    return times((1000, 1020, 10), (1020, 1025, rate), (1025, 1030, 20 - rate), (1030, 1040, 10))


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(("rate", "status"), [(7.8, 1), (8.0, 0), (8.2, 0)])
def test_each_of_them_has_to_go_on(
    report: ModuleType, tmp_path: Path, capsys: Said, stage: int, rate: float, status: int
) -> None:
    both = [STEADY, STEADY]
    both[stage] = slow(rate)
    found, row, text = judged(report, made(tmp_path / "run", *both), capsys)
    assert found == status and row[3].split()[stage] == f"{rate / 10:.2f}"
    assert (f"the stages before a fault: stage {stage} at 0.78 after kill 2\n" in text) == bool(status)


STOPS = times((1000, 1020, 10), (1020, 1022, 10), (1025, 1043, 10))


@pytest.mark.parametrize(("unguided", "status", "rates"), [(20, 0, "1.00 1.00"), (21, 1, "0.40 0.40")])
def test_until_one_has_trained_all_that_it_may_alone(
    report: ModuleType, tmp_path: Path, capsys: Said, unguided: int, status: int, rates: str
) -> None:
    found, row, _ = judged(report, made(tmp_path / "run", STOPS, STOPS, unguided=unguided), capsys)
    assert (found, row[3]) == (status, rates)


def test_or_its_last_batch(report: ModuleType, tmp_path: Path, capsys: Said) -> None:
    through = times((1000, 1021, 10))
    late = {batch: at if at < 1020 else at + 5 for batch, at in through.items()}
    status, row, _ = judged(report, made(tmp_path / "run", through, through, late), capsys)
    assert status == 0 and row[2:4] == ["5.0", "1.00 1.00"]


@pytest.mark.parametrize(
    "fault",
    [
        FAULT | {"stage": 0},  # there is none before it
        FAULT | {"begin": 1030.0, "end": 1031.0},  # nothing stood
    ],
)
def test_where_none_had_to_go_on_alone_there_is_no_rate(
    report: ModuleType, tmp_path: Path, capsys: Said, fault: dict[str, Any]
) -> None:
    status, row, _ = judged(report, made(tmp_path / "run", fault=fault), capsys)
    assert status == 0 and row[3] == "-"


# -- the loss and the ledgers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "status"), [(0.5, 0), (1.029, 0), (1.031, 1), (math.nan, 1)])
def test_the_loss_may_be_3_percent_above_the_undisturbed_one(
    report: ModuleType, tmp_path: Path, capsys: Said, loss: float, status: int
) -> None:
    assert judged(report, made(tmp_path / "run", loss=loss), capsys)[0] == status


@pytest.mark.parametrize(
    ("stage", "before", "after", "told"),
    [
        (2, '{"begun": 400,', '{"begun": 399,', "stage 2: batch 399 was trained twice"),
        (1, '{"alone": 201}\n', "", "stages 1 and 2: [201] without a reason"),
    ],
)
def test_a_ledger_that_is_not_in_order_is_told(
    report: ModuleType, tmp_path: Path, capsys: Said, stage: int, before: str, after: str, told: str
) -> None:
    run = made(tmp_path / "run")
    ledger = run / f"stage-{stage}" / "ledger.jsonl"
    assert before in ledger.read_text()
    ledger.write_text(ledger.read_text().replace(before, after))
    status, _, text = judged(report, run, capsys)
    assert status == 1 and told in text
