"""A real run of processes with a trace, and `dnipipe trace` on its folder."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from dnipipe import cli
from tests.test_processes import start, train, words
from tests.tracing.test_merging import assert_valid

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]


def test_every_second_of_a_run_is_accounted_for_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, began = tmp_path / "run", time.monotonic()
    status, out, err = train(run, pipeline__stages=3, eval__every=20, output__trace="true")
    wall = time.monotonic() - began
    assert status == 0, err
    assert "unaccounted" in out and "trace   of stage" not in out
    told = json.loads((run / "summary.json").read_text())
    for stage in told["stage"]:
        seconds, shares = stage["seconds"], stage["shares"]
        assert sum(shares.values()) == pytest.approx(1, abs=1e-9) and stage["untraced"] == 0
        assert sum(seconds.values()) == pytest.approx(stage["busy_seconds"] + stage["idle_seconds"], rel=1e-9)
        assert sum(seconds.values()) <= wall
        assert all(
            shares[label] > 0 for label in ("forward", "optimizer", "evaluation", "serialize", "send", "receive")
        )
        assert (shares["loss"] > 0) == (stage["index"] == 2) and (shares["data"] > 0) == (stage["index"] == 0)
        assert (shares["wait_input"] > 0) or stage["index"] == 0
    assert told["train"]["seconds"] <= sum(told["stage"][0]["seconds"].values())

    assert cli.main(["trace", str(run)]) == 0
    assert str(run / "trace" / "trace.json") in capsys.readouterr().out
    events = json.loads((run / "trace" / "trace.json").read_text())["traceEvents"]
    assert_valid(events, stages=3)
    spans = [event for event in events if event["ph"] == "X"]
    for stage in told["stage"]:  # what is drawn is what was counted
        seen = sum(event["dur"] for event in spans if event["pid"] == stage["index"]) / 1e6
        counted = sum(stage["seconds"].values()) - stage["seconds"]["unaccounted"] - stage["seconds"]["loop"]
        assert counted - 1e-6 <= seen <= wall  # the last report's own sending is drawn, too
    arrows = [(event["name"], event["pid"]) for event in events if event["ph"] == "s"]
    assert arrows.count(("Activation", 0)) == arrows.count(("Gradient", 2)) == 50

    pytest.importorskip("matplotlib")
    png, part = tmp_path / "t.png", tmp_path / "part.json"
    assert cli.main(["trace", str(run), "-o", str(part), "--png", str(png), "--from", "10", "--to", "30"]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert 0 < part.stat().st_size < (run / "trace" / "trace.json").stat().st_size


def test_a_resumed_run_begins_its_trace_anew(tmp_path: Path) -> None:
    """Here in one process; over several, below."""
    run, ours = tmp_path / "run", words(transport__kind="local", output__trace="true", output__quiet="true")
    two = ["--pipeline.stages=2", "--train.batches=10", f"--output.run={run}"]
    assert cli.main(["train", *ours, *two]) == 0
    assert cli.main(["train", "--resume", str(run), *ours, "--pipeline.stages=1", "--train.batches=15"]) == 0
    assert [path.name for path in (run / "trace").iterdir()] == ["stage-0.jsonl"]
    assert cli.main(["trace", str(run)]) == 0
    events = json.loads((run / "trace" / "trace.json").read_text())["traceEvents"]
    trained = {event["args"].get("batch", 0) for event in events if event["ph"] == "X"}
    assert trained == {0, *range(11, 16)}


def test_a_resumed_run_has_the_traces_of_all_its_stages(tmp_path: Path) -> None:
    """And of none that is no more. None begins to write before the old ones are gone."""
    run = tmp_path / "run"
    assert train(run, pipeline__stages=3, output__trace="true", train__batches=5)[0] == 0
    ours: dict[str, object] = {"pipeline__stages": 2, "output__trace": "true"}
    for batches in (10, 15):
        process = start("train", "--resume", str(run), *words(**ours, train__batches=batches))
        _, err = process.communicate(timeout=150)
        assert process.returncode == 0, err
        assert sorted(path.name for path in (run / "trace").iterdir()) == ["stage-0.jsonl", "stage-1.jsonl"]


def test_without_a_trace_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    ours = words(transport__kind="local", pipeline__stages=1, train__batches=5, output__run=run)
    assert cli.main(["train", *ours]) == 0 and not (run / "trace").exists()
    assert cli.main(["trace", str(run)]) == 2
    assert f"{run} holds no trace: train with --output.trace true" in capsys.readouterr().err
