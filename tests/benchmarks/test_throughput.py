"""The throughput study with a place that invents figures; and one real run of a schedule and of dnipipe, very short.

Study ─► orders ─► Place (here: made up) ─► records ─► limit, best number of micro-batches, tables
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cells import ROOT
from benchmarks.emulator import Link
from benchmarks.figures import OVERHEAD
from benchmarks.relay import free_port
from benchmarks.throughput import study
from benchmarks.throughput.__main__ import main
from benchmarks.throughput.decoupled import overhead
from benchmarks.throughput.places import Here, RunFailed
from benchmarks.throughput.rank import Order
from benchmarks.throughput.report import tables
from benchmarks.throughput.study import RULES, Condition, Record, Study, limit, load
from benchmarks.throughput.window import Measured
from dnipipe.metrics import LABELS


class Invented:
    """Samples a second by system; a schedule is best with 8 micro-batches. Stage 1 is slower than stage 0."""

    reports = True

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, float]] = []

    def run(self, orders: Sequence[Order], link: Link) -> list[Measured]:
        order = orders[0]
        self.seen.append((order.system, order.microbatches, link.delay))
        rate = {"alone": 100.0, "dnipipe": 90.0}.get(
            order.system, 50.0 - abs(order.microbatches - 8) - 100 * link.delay
        )
        own = 0.001 + link.delay / 100 if order.system == "dnipipe" else None
        return [
            Measured(rate * 2, 2.0 * (1 + 0.25 * each.stage), 1.5, 4096.0 * rate, 400.0, 2.5, own) for each in orders
        ]


CONDITIONS = (Condition(2), Condition(2, Link(delay=0.1)))
STUDY = Study(CONDITIONS, ("1f1b", "plain", "local"), (4, 8, 16), repeats=2, seconds=1.0)


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "cores", lambda: [0, 1])


def test_the_best_number_of_microbatches_is_searched_once_a_condition(two_cores: None) -> None:
    place, found = Invented(), []
    STUDY.carry_out(place, found, lambda record: None)
    searched = [(r.microbatches, r.condition.link.delay) for r in found if r.repeat < 0]
    assert searched == [(n, delay) for delay in (0.0, 0.1) for n in (4, 8, 16)]
    assert {r.microbatches for r in found if r.system == "1f1b" and r.repeat >= 0} == {8}
    assert {r.microbatches for r in found if r.system in ("plain", "local")} == {1}


def test_each_repeat_begins_with_another_system_and_the_limit_without_a_link_has_its_turn(two_cores: None) -> None:
    place, found = Invented(), []
    STUDY.carry_out(place, found, lambda record: None)
    order = [r.system for r in found if r.repeat >= 0 and r.condition == CONDITIONS[1]]
    assert order == ["alone", "1f1b", "plain", "local", "1f1b", "plain", "local", "alone"]
    assert [delay for system, _, delay in place.seen if system == "alone"] == [0.0] * 4


def test_a_limit_is_that_of_the_same_link_or_where_there_is_none_that_of_no_link(two_cores: None) -> None:
    records = [
        Record("alone", condition, 1, 0, [Measured(rate, 1.0, 1.0, None, 1.0)] * 2, "emulated", "today")
        for condition, rate in zip(CONDITIONS, (100.0, 80.0), strict=True)
    ]
    assert [limit(records, condition) for condition in CONDITIONS] == [100.0, 80.0]
    assert limit(records[:1], CONDITIONS[1]) == 100.0  # records of before 2026-11-27


def test_what_was_measured_is_not_measured_again(two_cores: None, tmp_path: Path) -> None:
    found: list[Record] = []
    kept: list[str] = []
    STUDY.carry_out(Invented(), found, lambda record: kept.append(record.to_json()))
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(kept) + "\n")
    again = load(path)
    assert again == found
    place = Invented()
    STUDY.carry_out(place, again, lambda record: None)
    assert place.seen == []


def test_the_limit_is_the_slowest_stages_or_that_of_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [Measured(100.0, seconds, 1.0, None, 1.0) for seconds in (1.0, 2.0, 1.0, 1.0)]
    record = Record("alone", Condition(4), 1, 0, ranks, "none", "today")
    for here, expected in ((8, 50.0), (2, 40.0)):  # a sample takes 50 ms of cores in all
        monkeypatch.setattr(study, "cores", lambda here=here: list(range(here)))
        assert limit([record], Condition(4, Link(delay=0.1))) == pytest.approx(expected)


def test_the_tables_have_shares_ratios_and_costs(two_cores: None) -> None:
    found: list[Record] = []
    STUDY.carry_out(Invented(), found, lambda record: None)
    text = tables(found)
    assert "| the limit | 80.0 | 80.0 |" in text  # stage 1 takes a quarter longer
    assert "| `1f1b` | 50.0 ± 0.0 (0.62), M = 8 | 40.0 ± 0.0 (0.50), M = 8 |" in text
    assert "| `local` : best schedule | 1.80 × | 2.25 × |" in text
    assert "| `local` | 25, 25 | 2, 2 | 400, 400 | 2.5, 2.5 |" in text
    assert "| overhead by stage, ms a batch | 0 ms | 100 ms |" in text
    assert "| `local` | 1.00, 1.00 | 2.00, 2.00 |" in text and "`1f1b` | –" not in text


def test_overhead_is_a_batchs_and_all_that_is_not_the_models() -> None:
    lines = [{"batches": n, **{f"processor.{label}": n * 1e-4 for label in LABELS}} for n in (1.0, 3.0)]
    assert overhead(lines) == pytest.approx(1e-4 * len(OVERHEAD))


def test_a_link_between_real_hosts_is_not_said_to_have_no_delay(two_cores: None) -> None:
    found: list[Record] = []
    replace(STUDY, links="hosts", conditions=CONDITIONS[:1]).carry_out(Invented(), found, lambda record: None)
    assert "|  | the link as it is |" in tables(found) and "0 ms" not in tables(found)


@pytest.mark.parametrize("words", [["--delays", "10"], ["--rates", "100"], ["--jitter", "2"]])
@pytest.mark.parametrize("links", ["none", "hosts"])
def test_what_only_emulated_links_have_is_refused_elsewhere(
    links: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--links", links, *words, "--table"])
    assert ended.value.code == 2
    assert f"--links {links}: its links are as they are" in capsys.readouterr().err


def test_what_was_measured_over_other_links_is_not_taken_for_these(
    two_cores: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "records.jsonl").open("w") as file:
        STUDY.carry_out(Invented(), [], lambda record: print(record.to_json(), file=file))
    assert STUDY.links == "none"
    with pytest.raises(SystemExit) as ended:
        main(["--links", "emulated", "--out", str(tmp_path)])
    assert ended.value.code == 2 and "holds what was measured over links none" in capsys.readouterr().err
    assert main(["--links", "emulated", "--out", str(tmp_path), "--table"]) == 0


def test_what_only_emulated_computation_has_is_refused_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--features", "128", "--table"])
    assert ended.value.code == 2 and "--features 128: real stages have their own" in capsys.readouterr().err


def test_a_condition_is_read_as_it_was_written_and_one_of_old_has_no_features(tmp_path: Path) -> None:
    condition = Condition(2, Link(delay=0.1), 0.02, ((1, 2.0),), 128)
    assert str(condition) == "K = 2, 100 ms, compute sleep=20ms, stage 1 2 x slower, 128 features"
    text = Record("local", condition, 1, 0, [], "emulated", "today").to_json()
    assert Record.from_json(text).condition == condition
    assert Record.from_json(text.replace(', "features": 128', "")).condition == replace(condition, features=64)


def test_a_table_of_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--table", "--out", str(tmp_path / "new")]) == 0
    assert "Nothing has been measured yet." in capsys.readouterr().out


def test_a_rank_that_fails_ends_all_and_says_why() -> None:
    with pytest.raises(RunFailed, match=r"rank \d: .*no such schedule"):
        Here().run([Order("no such schedule", 2, sleep=0.001, seconds=0.1)] * 2, Link())


@pytest.mark.parametrize(
    "systems",
    [["1f1b", "local"], pytest.param(["gpipe", "interleaved", "plain", "synthetic-int8"], marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_real_ranks_of_schedules_and_of_dnipipe(
    systems: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--systems", *systems, "--microbatches", "4", "--compute", "sleep=3ms", "--repeats", "1"]
    assert main([*words, "--seconds", "0.5", "--out", str(tmp_path)]) == 0
    records = load(tmp_path / "records.jsonl")
    assert [(r.system, len(r.ranks)) for r in records] == [(system, 2) for system in ("alone", *systems)]
    assert all(rank.samples > 0 and rank.memory > 50 for r in records for rank in r.ranks)
    assert all((rank.overhead or 0) > 0 for r in records if r.system in RULES for rank in r.ranks)
    assert "compute sleep=3ms" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.processes
def test_on_hosts_that_torchrun_has_started_it_on(tmp_path: Path) -> None:
    """As two agents of one machine: each starts a rank of every system, and the first one writes down all."""
    words = ["--links", "hosts", "--systems", "local", "--compute", "sleep=3ms", "--repeats", "1", "--seconds", "0.5"]
    meeting = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, "-m", "benchmarks.throughput", *words]
    agents = [subprocess.Popen([*command, "--out", str(tmp_path / str(k))], cwd=ROOT) for k in range(2)]
    try:
        assert [agent.wait(110) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.kill()
    records = [load(path) for path in tmp_path.glob("*/records.jsonl")]
    assert [[(r.system, r.links, len(r.ranks)) for r in found] for found in records if found] == [
        [("alone", "hosts", 2), ("local", "hosts", 2)]
    ]
    assert all(rank.samples > 0 for found in records for r in found for rank in r.ranks)
