"""Real runs of a second each: what is recorded is not run again, what was interrupted or failed is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.cells import ROOT, Cell, Records
from benchmarks.grid import Grid, distinct, left
from tests.benchmarks.conftest import record, tiny

pytestmark = pytest.mark.processes


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text"
    path.write_bytes(bytes(i * i % 251 for i in range(20_000)))
    return str(path)


def run(out: Path, text: str, cells: Sequence[Cell], **options: Any) -> tuple[bool, Grid, Records]:
    records = Records(out)
    grid = Grid(lambda _: cells, records, {"text": text}, 2, console=Console(quiet=True), **options)
    return grid.run(), grid, records


def test_cells_are_run_recorded_and_not_run_again(tmp_path: Path, text: str) -> None:
    cells = [tiny(tmp_path, "--train.seed", str(seed), seed=seed) for seed in range(2)]
    complete, _, records = run(tmp_path / "out", text, cells)
    assert complete and os.listdir(tmp_path / "out" / "runs") == []
    found = [records.of(cell) for cell in cells]
    for one in found:
        assert one is not None and one.loss is not None and one.diverged is None
        assert [batch for batch, _, _ in one.evaluations][-1] == 30
        assert one.evaluations[-1][1] == pytest.approx(one.loss, abs=1e-5)
        assert len(one.cosine) == 2 and one.cosine[0] and not one.cosine[1]
        assert one.training[-1][0] == 30 and one.stage[0]["staleness"] >= 1
        assert one.settings["train.batches"] == 30 and "data.root" not in one.settings
    kept = (tmp_path / "out" / "tiny.jsonl").read_text()
    assert run(tmp_path / "out", "no such file", cells)[0]
    assert (tmp_path / "out" / "tiny.jsonl").read_text() == kept


def test_the_command_of_a_record_repeats_its_figure(tmp_path: Path, text: str) -> None:
    cell = tiny(tmp_path)
    record = run(tmp_path / "out", text, [cell])[2].of(cell)
    assert record is not None
    command = record.command.replace("FILE", text).split()[1:]
    done = subprocess.run(
        [sys.executable, "-m", "dnipipe", *command, f"--output.run={tmp_path / 'run'}", "--quiet"],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["eval"]["loss"] == record.loss


def test_a_diverged_run_is_a_result(tmp_path: Path, text: str) -> None:
    wild = tiny(tmp_path, "--optimizer.name", "sgd", "--optimizer.lr", "1e30", "--rule.name", "wait")
    complete, _, records = run(tmp_path / "out", text, [wild])
    found = records.of(wild)
    assert complete and found is not None and found.loss is None and found.diverged and found.diverged < 30


def test_a_failed_run_is_told_and_run_again_the_next_time(tmp_path: Path, text: str) -> None:
    cell = tiny(tmp_path, "--data.limit", "30")
    complete, grid, records = run(tmp_path / "out", text, [cell])
    assert not complete and "30 bytes leave" in grid.failed[cell.key] and list(records) == []
    short = tiny(tmp_path)
    assert not run(tmp_path / "out", "no such file", [short])[0]
    assert run(tmp_path / "out", text, [short])[0]


def test_what_decides_a_waiting_cell_is_run_first(tmp_path: Path, text: str) -> None:
    first, second = tiny(tmp_path), tiny(tmp_path, "--train.seed", "1", number=2)

    def plan(records: Records) -> list[Cell]:
        return [replace(second, waits=records.of(first) is None), first]

    records = Records(tmp_path / "out")
    assert Grid(plan, records, {"text": text}, 2, console=Console(quiet=True)).run()
    assert [one.cell for one in records] == [str(first), str(second)]


def test_cells_that_mean_the_same_run_are_run_once(tmp_path: Path) -> None:
    same = [tiny(tmp_path, name="a"), tiny(tmp_path, "--train.seed", "0", name="b")]
    assert distinct([*same, tiny(tmp_path, "--train.seed", "1")])[0] == same[0]
    assert len(distinct(same)) == 1


def test_time_left_is_told_by_runs_of_the_same_kind(tmp_path: Path) -> None:
    cheap, dear = tiny(tmp_path), tiny(tmp_path, "--model.width", "32")
    done = [record(cheap, 2.0, seconds=30.0), record(dear, 2.0, seconds=3000.0)]
    assert left([], done, 1) == "" and left([cheap], [], 1) == ""
    assert left([tiny(tmp_path, "--train.seed", "8", "--train.batches", "3000")], done, 1) == "about 50 min left"
    assert left([replace(dear, words=(*dear.words, "--train.seed", "1"))] * 4, done, 1) == "about 3.3 h left"


def command_lines() -> Iterator[str]:
    """Of every process on this machine that has not ended meanwhile."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield path.read_text(errors="replace")


INTERRUPTED = """
import signal
import sys
from pathlib import Path
for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs begin with SIGINT ignored
    signal.signal(number, signal.default_int_handler)
from benchmarks.cells import Cell, Records
from benchmarks.grid import Grid
toml, out, text = sys.argv[1:]
cells = [Cell("tiny", {}, toml, ("--train.batches", "1000000", "--train.seed", str(seed))) for seed in range(3)]
Grid(lambda _: cells, Records(Path(out)), {"text": text}, 2).run()
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
def test_an_interrupt_leaves_no_process_and_no_record(tmp_path: Path, text: str) -> None:
    tiny(tmp_path)
    out = tmp_path / "out"
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "tiny.toml"), str(out), text]
    grid = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        while len(list(out.glob("runs/*/metrics/stage-1.jsonl"))) != 2:
            assert grid.poll() is None
            time.sleep(0.1)
        grid.send_signal(signal.SIGINT)
        _, said = grid.communicate(timeout=20)
    finally:
        grid.terminate()
        grid.communicate(timeout=20)
    assert said.strip().endswith("KeyboardInterrupt") and not list(out.glob("*.jsonl"))
    assert not [line for line in command_lines() if str(out) in line]
