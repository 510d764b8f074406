"""Time to loss: what is chosen for a link and what is said of a race, with invented runs; searches are real, and tiny.

Contest ─► probes (here: made up) ─► searches in the laboratory ─► choice ─► races (made up) ─► tables, map
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cells import ROOT, Cell, Records
from benchmarks.throughput.places import Here
from benchmarks.time_to_loss.__main__ import main
from benchmarks.time_to_loss.contest import Contest
from benchmarks.time_to_loss.race import PROBE, RACE, Course, Run, Runs, pace, points, staleness
from benchmarks.time_to_loss.report import plots, rows, tables
from benchmarks.time_to_loss.study import (
    NO_SPLIT,
    SYNC,
    SYSTEMS,
    TASKS,
    Setting,
    Task,
    lateness,
    reached,
    search,
    target,
    words,
)
from dnipipe.config import load
from tests.benchmarks.conftest import TOML, record


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """Two batches and two rates a system, 30 batches of 8 at most, on a text of its own."""
    (tmp_path / "tiny.toml").write_text(TOML.partition("[transport]")[0])
    return Task(
        str(tmp_path / "tiny.toml"),
        "text",
        rates={batch: ("1e-3", "1e-2") for batch in (8, 16)},
        batches=(8, 16),
        samples=192,
        target=128,
        every=64,
    )


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text"
    path.write_bytes(bytes(i * i % 251 for i in range(20_000)))
    return str(path)


class Invented(Course):
    """Runs that nobody made: `sync` takes a step's round trip, and larger batches pay it less often."""

    def run(
        self, kind: str, name: str, task: Task, system: str, setting: Setting, delay: float, samples: int, seed: int
    ) -> Run:
        each = 0.01 + (4 * delay / setting.batch if system == SYNC else 0.002)
        line = [[n, n * each, 6.0 - n / 64] for n in range(64, samples + 1, 64)] if kind == RACE else []
        return Run(kind, name, system, setting, delay, seed, samples, each, 3.0, line, "none", "", "2026-01-01 00:00")


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_run_has_valid_settings(name: str, system: str) -> None:
    task = TASKS[name]
    for batch in task.batches:
        setting = Setting(batch, task.rates[batch][0], ("gpipe", 4) if system == SYNC else NO_SPLIT)
        config = load(ROOT / task.config, words(task, system, setting, task.samples))
        assert config.train.batches * batch == task.samples and config.pipeline.stages == 2
        assert config.rule.name == system.partition("-")[0] and config.transport.kind == "zmq"
        assert task.samples / task.every == config.train.batches / config.eval.every
    searched = [cell.loaded for cell in search(name, task, system, 4)]
    assert len(searched) == 9  # the same budget for all
    assert {config.transport.kind for config in searched} == {"local"}
    assert {config.pipeline.stages for config in searched} == {1 if system == SYNC else 2}


def test_a_target_is_reached_between_two_evaluations() -> None:
    line = [(10.0, 3.0), (20.0, 2.0), (30.0, 2.5), (40.0, 1.0)]
    assert reached(line, 2.5) == 15.0 and reached(line, 2.0) == 20.0 and reached(line, 1.6) == pytest.approx(36.0)
    assert reached(line, 0.9) is None and reached([], 1.0) is None and reached(line, 5.0) == 10.0


def test_a_gradient_is_late_by_what_it_waits_and_the_delay_over_the_time_of_a_batch() -> None:
    assert [lateness("blend", delay, 0.01, 0.0) for delay in (0.0, 0.01, 0.05, 10.0)] == [0, 1, 4, 64]
    assert [lateness("delayed-4", delay, 0.01, 1.0) for delay in (0.0, 0.02)] == [2, 4]  # 4 batches, both ways
    assert lateness("local", 10.0, 0.01, 1.0) == lateness(SYNC, 10.0, 0.01, 0.0) == 0


def metrics(batch: int, seconds: float, evaluation: float, **more: float) -> dict[str, float]:
    left_out = {"seconds.evaluation": evaluation, "seconds.checkpoint": 0.0, "seconds.wait_end": 0.0}
    return {"batch": batch, "batches": 10, "seconds": seconds, **left_out, **more}


def test_evaluations_cost_no_time() -> None:
    last = [metrics(10, 1.0, 0.0), metrics(20, 3.0, 2.0), metrics(40, 2.0, 0.0)]
    first = [metrics(20, 1.0, 0.0), metrics(40, 1.0, 0.0, **{"eval.batch": 30, "eval.loss": 2.5})]
    assert points(first, last, 8) == [[240, 3.0, 2.5]]  # 2 s to batch 20, and half of the next 2 s
    assert pace(last, 8) == pytest.approx(3.0 / (30 * 8))
    late = [metrics(5, 1.0, 0.0, staleness=9.0), metrics(20, 1.0, 0.0, staleness=2.0), metrics(40, 1.0, 0.0)]
    assert staleness(late) == 2.0 and staleness(last) is None


def test_the_target_is_backprops_best_loss_after_so_many_samples(task: Task, tmp_path: Path) -> None:
    records = Records(tmp_path / "search")
    cells = list(search("t", task, SYNC, 0))
    for number, cell in enumerate(cells):
        assert target("t", task, records) is None
        batch = cell.loaded.data.batch
        records.add(cell, record(cell, 1.0, evaluations=[[128 / batch, 3.0 - number, 0.1], [192 / batch, -9.0, 0.1]]))
    assert target("t", task, records) == 0.0


def contest(task: Task) -> Contest:
    return Contest("t", task, (SYNC, "local", "delayed-4"), (0.0, 0.1), (0,))


@pytest.mark.processes
def test_a_contest_is_searched_raced_and_not_made_again(task: Task, text: str, tmp_path: Path) -> None:
    runs, records = Runs(tmp_path / "runs.jsonl"), Records(tmp_path / "search")
    course = Invented(Here(), "none", text)
    few = replace(contest(task), task=replace(task, rates={8: ("1e-2",)}, batches=(8,)))
    assert few.carry_out(course, runs, records, jobs=2)
    assert {(run.system, run.delay) for run in runs.all if run.kind == RACE} == {
        (system, delay) for system in few.systems for delay in few.delays
    }
    late = {record.settings["transport.delay"] for record in records if record.settings["rule.name"] == "delayed"}
    assert late == {4}  # 3 updates of 4 batches, half of it; 100 ms more are one batch of 8 × 12 ms
    before = len(runs.all), len(list(records))
    again = Runs(tmp_path / "runs.jsonl")
    assert again.all == runs.all
    assert few.carry_out(course, again, Records(tmp_path / "search"), jobs=2)
    assert (len(again.all), len(list(records))) == before
    text_of = tables("t", few.task, runs, records)
    assert "| `sync` |" in text_of and "| round trip / time of 8 samples | 0.0 | 2.1 |" in text_of


def searched(cells: list[Cell], records: Records) -> None:
    """Small batches need fewer samples, and the first rate fewer than the second."""
    for cell in cells:
        batch, rate = cell.loaded.data.batch, cell.loaded.optimizer.lr
        samples = 64 + batch + 64 * (rate > 5e-3)
        records.add(cell, record(cell, 1.0, evaluations=[[1, 5.0, 0.0], [samples / batch, 2.0, 0.0]]))


def test_the_choice_is_the_setting_that_is_expected_to_be_first_on_this_link(task: Task, tmp_path: Path) -> None:
    runs, records = Runs(tmp_path / "runs.jsonl"), Records(tmp_path / "search")
    own, course = contest(task), Invented(Here(), "none", "")
    for system, setting, delay in own.probes():
        runs.add(course.run(PROBE, "t", task, system, setting, delay, 64, 0))
    searched(list(own.searches(runs)), records)
    assert target("t", task, records) == 2.0
    split = ("1f1b", 2)
    assert own.choice(SYNC, 0.0, runs, records) == (Setting(8, "1e-3", split), 128)  # a margin, in whole evaluations
    assert own.choice(SYNC, 0.1, runs, records)[0] == Setting(16, "1e-3", split)  # fewer round trips
    assert own.choice("local", 0.1, runs, records)[0] == Setting(8, "1e-3")


def test_the_tables_and_the_map_say_who_was_first(task: Task, tmp_path: Path) -> None:
    runs, records = Runs(tmp_path / "runs.jsonl"), Records(tmp_path / "search")
    searched(list(search("t", task, SYNC, 0)), records)
    for delay, seconds in ((0.0, 1.0), (0.05, 4.0)):
        for system, own in ((SYNC, seconds), ("local", 2.0)):
            run = Invented(Here(), "none", "").run(RACE, "t", task, system, Setting(8, "1e-3"), delay, 64, 0)
            runs.add(replace(run, points=[[64, 9.0, 3.0]]))  # of another setting, before
            runs.add(replace(run, points=[[64, own, 2.0]], pace=0.005))
    run = Invented(Here(), "none", "").run(RACE, "t", task, "blend", Setting(8, "1e-3"), 0.05, 64, 0)
    runs.add(replace(run, points=[[64, 1.0, 2.1]]))  # it never came there
    found = rows("t", task, runs, records)
    assert [(row.samples, row.first) for row in found] == [(0.0, SYNC), (20.0, "local")]
    shown = tables("t", task, runs, records)
    assert "| `local` | 2.0 (0.50 ×) | 2.0 (2.00 ×) |" in shown and "| `blend` | – | not reached |" in shown
    assert "| first | `sync` | `local` |" in shown
    names = {plot.name: plot.panels for plot in plots("t", task, runs, records)}
    assert list(names["t-loss"]) == ["0 ms one way", "50 ms one way"]
    assert names["t-map"]["t"]["local"] == ([0.0, 2.5], [0.5, 2.0])


@pytest.mark.processes
def test_a_real_race_has_a_curve(task: Task, text: str) -> None:
    run = Course(Here(), "none", text).run(RACE, "t", task, "local", Setting(8, "1e-2"), 0.0, 192, 0)
    samples = [samples for samples, _, _ in run.points]  # of several evaluations within a line of metrics, the last
    assert set(samples) <= {64, 128, 192} and samples == sorted(samples) and samples[-1] == 192
    seconds = [at for _, at, _ in run.points]
    assert seconds == sorted(seconds) and seconds[0] > 0 and run.pace > 0
    assert run.command.startswith(f"dnipipe train {task.config} --rule.name local ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--delays", "10"], "--links none: its link is as it is; --delays need emulated ones"),
        (["--tasks", "lm", "--text", ""], "where is the data? pass --text, or set DNIPIPE_TEXT"),
        (["--tasks", "mnist", "--mnist", "/nowhere"], "--mnist /nowhere: there is no such folder"),
    ],
)
def test_what_is_missing_is_told_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--out", str(tmp_path)])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_without_runs_there_is_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--table", "--out", str(tmp_path)]) == 0
    assert "Nothing has been raced yet." in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "map.json"]
