"""benchmarks.faults: what it reads out of ledgers; and faults, once each, on one small pipeline that outlives them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.faults import clocks
from benchmarks.faults.events import Event, detected, quantile, recovered, spread
from benchmarks.faults.pipeline import Pipeline, wrong
from benchmarks.faults.report import HEAD, Results, cells, table
from benchmarks.faults.rows import FAULTS, Row, measure
from dnipipe.service.ledger import Account


def account(begun: dict[int, float], **more: object) -> Account:
    return Account(begun=list(begun), times=list(begun.values()), **more)  # type: ignore[arg-type]


def test_a_stage_is_missed_when_a_neighbour_writes_it_down() -> None:
    accounts = [
        account({}, away=[{"gone": 1, "time": 3.0}, {"back": 1, "time": 5.0}, {"gone": 1, "time": 9.0}]),
        account({}, away=[{"gone": 0, "time": 2.5}]),
    ]
    assert detected(Event(1, 2.0, 2.0), accounts, 8.0) == 1.0
    assert detected(Event(1, 4.0, 4.0), accounts, 8.0) is None  # the next one is another fault's
    assert detected(Event(0, 2.0, 2.0), accounts, 8.0) == 0.5


def test_a_pipeline_has_recovered_when_every_stage_begins_what_none_had_begun() -> None:
    accounts = [account({1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}), account({1: 1.1, 2: 5.0, 4: 6.5})]
    assert recovered(Event(1, 1.0, 2.2), accounts) == pytest.approx(4.3)  # batch 4; 2 had been begun by stage 0
    assert recovered(Event(1, 1.0, 4.1), accounts) is None


def test_times_are_summed_up_by_ranks() -> None:
    assert spread([]) == {}
    assert spread([float(n) for n in range(1, 21)]) == {"median": 10.5, "p95": 19.0, "max": 20.0}
    assert quantile([3.0], 0.95) == 3.0


def test_what_is_not_exact_is_named() -> None:
    times = [0.0] * 3
    exact = [Account(begun=[1, 2, 3], times=times), Account(begun=[1, 2, 3], times=times)]
    assert wrong(exact) == []
    assert wrong([Account(begun=[1, 2, 3, 4]), exact[1]]) == []  # 4 is still under way
    assert wrong([exact[0], Account(begun=[1, 3])]) == ["between stages 0 and 1, without a reason: 1 batches (2)"]
    assert wrong([Account(begun=[1, 1, 3]), Account(begun=[1, 3])]) == ["stage 0: batch 1 was trained twice"]


def test_the_table_has_a_row_for_what_was_made_and_for_what_was_not(tmp_path: Path) -> None:
    made = Row("kill -9", 4, found=4, detected={"median": 0.1, "p95": 0.2, "max": 0.2}, loss=(400, 2.5), machine="m")
    made.recovered, made.batches, made.undone, made.peak = (
        {"median": 3, "p95": 4, "max": 5},
        [9, 9],
        [0, 1],
        [10**8] * 2,
    )
    lacking = Row("out of memory", skipped="needs more than this machine has: root")
    results = Results(tmp_path, {row.fault: row for row in (made, lacking)}, {0: {400: 2.4}, 1: {400: 2.5}})
    results.save()
    again = Results.load(tmp_path)
    assert table(again) == table(results)
    assert (
        "| kill -9 | 4 | 4 | 0.1 / 0.2 | 3.0 / 4.0 / 5.0 | exact | 9 9 | 0 1 | 2.500 at 400 | 2.450 ± 0.071 (2) |"
        in (table(again))
    )
    assert "| out of memory | not made | needs more than this machine has: root |" in table(again)
    assert len(cells(lacking, {})) == len(cells(made, {})) == len(HEAD)
    assert made.sound and not Row("hang", wrong=["gap"]).sound and not Row("hang", left=1).sound
    slow = "20 % loss for 60 s"  # where nobody may be taken for gone
    assert Row(slow).sound and not Row(slow, found=1).sound


# -- faults ------------------------------------------------------------------------------------------------------

SHORT = (
    "kill -9",
    "segmentation fault",
    "hang with the interpreter's lock",
    "second process of a stage",
    "own state damaged",
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with Pipeline(tmp_path_factory.mktemp("faults") / "pipeline", 3, silence=1.0, hung=3.0) as made:
        made.until_all_pass(5)
        yield made
    assert made.left == 0


@pytest.mark.processes
@pytest.mark.parametrize("number", range(len(SHORT)), ids=SHORT)
def test_the_pipeline_goes_on_behind_every_fault_and_its_ledgers_are_exact(pipeline: Pipeline, number: int) -> None:
    FAULTS[SHORT[number]].make(pipeline, (number + 1) % 3, random.Random(number))
    pipeline.until_all_pass(pipeline.last())
    assert wrong(pipeline.accounts()) == []


@pytest.mark.processes
@pytest.mark.skipif(bool(clocks.no_library()), reason="libfaketime is not installed: no clock was made to step")
def test_a_clock_that_steps_is_nobodys_concern(tmp_path: Path) -> None:
    """The steps are in the stage's ledger, so they were made; and no stage took another for gone."""
    pipeline = Pipeline(tmp_path / "pipeline", 2, rate=20.0, silence=2.0, hung=6.0)
    clocks.prepared(pipeline)
    with pipeline:
        pipeline.until_all_pass(5)
        clocks.step(pipeline, 0, random.Random(0))
        pipeline.until_all_pass(pipeline.last())
        meanwhile = [line for account in pipeline.accounts() for line in account.away]
        pipeline.close()  # all are asked to end at once, so one that is the last to go may see the other gone
        accounts = pipeline.accounts()
    steps = [round(b - a) for a, b in pairwise(accounts[0].times) if abs(b - a) > clocks.STEP / 2]
    assert len(steps) == 2 and all(abs(abs(step) - clocks.STEP) < 10 for step in steps) and abs(sum(steps)) < 10
    assert max(b - a for a, b in pairwise(accounts[1].times)) < 10
    assert wrong(accounts) == [] and not [line for line in meanwhile if "gone" in line]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_again_and_again(name: str) -> None:
    row = measure(name, 3, 1.0, 20.0, 0)
    if row.skipped:
        pytest.skip(row.skipped)
    assert row.sound, row
