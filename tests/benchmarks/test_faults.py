"""benchmarks.faults: what it reads out of ledgers; and faults, once each, on one small pipeline that outlives them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.emulator import Emulator, missing
from benchmarks.faults import clocks, witness
from benchmarks.faults.events import Event, detected, noticed, quantile, recovered, spread
from benchmarks.faults.pipeline import Pipeline, window_bytes, wrong
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


def test_an_attack_is_noticed_when_it_is_counted_or_ends_a_connection() -> None:
    accounts = [account({}, away=[{"gone": 1, "time": 3.0}]), account({}, away=[{"back": 0, "time": 2.2}])]
    assert noticed(Event(1, 2.0, 2.0), accounts, [], 8.0) == 1.0
    assert noticed(Event(1, 2.0, 2.0), accounts, [1.0, 2.5], 8.0) == 0.5
    assert noticed(Event(1, 4.0, 4.0), accounts, [9.0], 8.0) is None


def test_what_is_delivered_must_have_been_sent_and_as_often(tmp_path: Path) -> None:
    lines = {
        0: ['{"sent": "next", "sum": "a"}', '{"sent": "next", "sum": "b"}', '{"got": "next", "sum": "g"}'],
        1: [
            '{"got": "previous", "sum": "a"}',
            '{"sent": "previous", "sum": "g"}',
            '{"dropped": "damaged", "number": 2',
        ],
    }
    lines[1][-1] += ', "time": 5.0}\n{"dropped": "Gradient to stage 0, which is away", "number": 9, "time": 5.0}'
    for stage, texts in lines.items():
        (tmp_path / str(stage)).write_text("\n".join(texts) + '\n{"cut short by a k')
    stages = [witness.read(tmp_path / str(stage)) for stage in (0, 1, 2)]
    assert witness.strange(stages) == 0 and witness.reasons(stages) == {"damaged": 2}
    stages[1].got["previous"]["a"] += 1  # again
    stages[0].got["next"]["forged"] += 1
    assert witness.strange(stages) == 2


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
        "| kill -9 | 4 | 4 | 0.1 / 0.2 | 3.0 / 4.0 / 5.0 | – | – | exact | 9 9 | 0 1 | 2.500 at 400 | "
        "2.450 ± 0.071 (2): +0.7 σ, within | 100 100 | – | 0 |"
    ) in table(again)
    assert "| out of memory | not made | needs more than this machine has: root |" in table(again)
    assert len(cells(lacking, again)) == len(cells(made, again)) == len(HEAD)
    assert (
        made.sound
        and not Row("hang", delivered=1).sound
        and not Row("hang", wrong=["gap"]).sound
        and not Row("hang", left=1).sound
    )
    slow = "20 % loss for 60 s"  # where nobody may be taken for gone
    assert Row(slow).sound and not Row(slow, found=1).sound


def test_loss_and_memory_are_held_against_undisturbed_runs(tmp_path: Path) -> None:
    losses = {seed: {400: loss} for seed, loss in enumerate((2.3, 2.4, 2.5))}
    results = Results(tmp_path, {}, losses, {0: [10**8, 9 * 10**7], 1: [9 * 10**7, 10**8]})
    limits = [101 * 10**6 + window_bytes(stage, 2) for stage in (0, 1)]
    row = Row("hang", loss=(400, 2.59), peak=limits, stages=2, delivered=0)
    assert results.limits(row) == limits and results.outside(row) == [] and results.good(row)
    row.loss, row.peak = (400, 2.61), [limits[0], limits[1] + 1]
    assert results.outside(row) == ["loss", "memory"] and not results.good(row)
    results.rows["hang"] = row
    assert "2.400 ± 0.100 (3): +2.1 σ, **not within**" in table(results)
    for what in ("loss", "memory"):
        assert f"**hang**, {what} not within: no reason is known." in table(results)
    row.batches = [800, 430]
    assert "undisturbed runs after 400, about as many as the last stage has begun: 2.400 ± 0.100 (3))" in table(results)
    row.loss, row.peak = (400, 2.19), limits
    assert results.outside(row) == ["loss"]  # better is no undisturbed run's either
    of_its_nature = Row("kill -9 while saving", loss=(400, 2.7), peak=limits, stages=2, delivered=0)
    assert results.outside(of_its_nature) == ["loss"] and results.good(of_its_nature)
    of_its_nature.peak = [limits[0] + 1, limits[1]]  # which is not
    assert results.outside(of_its_nature) == ["loss", "memory"] and not results.good(of_its_nature)
    assert results.outside(Row("hang", loss=(200, 9.9), stages=3, delivered=0)) == []  # nothing to hold it against
    assert results.limits(Row("hang", peak=limits, stages=2)) == []  # of a time when no memory was held against it


def test_a_full_window_is_some_batches_at_each_stage_and_on_each_edge() -> None:
    h, y = 16 * 32 * 32 * 4, 16 * 32 * 8  # bytes of an activation, and of a batch's labels
    edge = 2 * h + y
    assert [window_bytes(k, 3) for k in range(3)] == [4 * (4 * h + y + edge), 4 * (4 * h + y + 2 * edge), 4 * edge]


# -- faults ------------------------------------------------------------------------------------------------------

SHORT = (
    "kill -9",
    "segmentation fault",
    "hang with the interpreter's lock",
    "second process of a stage",
    "own state damaged",
    "bit flipped",
    "recorded bytes again",
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with Pipeline(tmp_path_factory.mktemp("faults") / "pipeline", 3, cabled=True, silence=1.0, hung=3.0) as made:
        made.until_all_pass(5)
        yield made
    assert made.left == 0


@pytest.mark.processes
@pytest.mark.parametrize("number", range(len(SHORT)), ids=SHORT)
def test_the_pipeline_goes_on_behind_every_fault_and_its_ledgers_are_exact(pipeline: Pipeline, number: int) -> None:
    FAULTS[SHORT[number]].make(pipeline, (number + 1) % 3, random.Random(number))
    pipeline.until_all_pass(pipeline.last())
    assert wrong(pipeline.accounts()) == [] and witness.strange(pipeline.testimonies()) == 0


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """Two stages, in hosts of their own where there can be such, and with clocks that can be set."""
    with contextlib.ExitStack() as stack:
        emulator = None if missing() else stack.enter_context(Emulator(2))
        folder = tmp_path_factory.mktemp("two") / "pipeline"
        made = Pipeline(folder, 2, 20.0, emulator, silence=2.0, hung=6.0)
        if not clocks.no_library():
            clocks.prepared(made)
        stack.enter_context(made)
        made.until_all_pass(5)
        yield made
    assert made.left == 0


@pytest.mark.processes
@pytest.mark.skipif(bool(clocks.no_library()), reason="libfaketime is not installed: no clock was made to step")
def test_a_clock_that_steps_is_nobodys_concern(two: Pipeline) -> None:
    """The steps are in the stage's ledger, so they were made; and no stage took another for gone."""
    gone = [sum("gone" in line for line in account.away) for account in two.accounts()]
    first = [len(account.times) for account in two.accounts()]
    clocks.step(two, 0, random.Random(0))
    two.until_all_pass(two.last() + 2)
    accounts = two.accounts()
    times = [account.times[since - 1 :] for account, since in zip(accounts, first, strict=True)]
    steps = [round(b - a) for a, b in pairwise(times[0]) if abs(b - a) > clocks.STEP / 2]
    assert len(steps) == 2 and all(abs(abs(step) - clocks.STEP) < 10 for step in steps) and abs(sum(steps)) < 10
    assert max(b - a for a, b in pairwise(times[1])) < 10
    assert wrong(accounts) == [] and gone == [sum("gone" in line for line in account.away) for account in accounts]


@pytest.mark.processes
@pytest.mark.skipif(bool(missing()), reason=f"no link was cut one way: this needs {missing()}")
def test_a_link_that_carries_one_way_only_ends_and_is_mended(two: Pipeline) -> None:
    """Stage 1 hears, and is not heard, for as long as it takes stage 0 to give it up."""
    gone = sum("gone" in line for line in two.account(0).away)
    assert two.emulator
    two.emulator.cut = frozenset({(1, 0)})
    two.until("stage 0 misses it", lambda: sum("gone" in line for line in two.account(0).away) > gone)
    two.emulator.cut = frozenset()
    two.until_all_pass(two.last())
    assert wrong(two.accounts()) == [] and witness.strange(two.testimonies()) == 0


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_again_and_again(name: str) -> None:
    row = measure(name, 3, 1.0, 20.0, 0)
    if row.skipped:
        pytest.skip(row.skipped)
    assert row.sound, row
