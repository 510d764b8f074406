"""What a process writes, how much at most, and what is said of a file that is not whole."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

from dnipipe.errors import DiskError, TraceError
from dnipipe.tracing import Trace, merged, read, writer
from dnipipe.tracing.writer import RECEIVED, SENT
from tests.checkpoint.disk import files_limited_to
from tests.tracing.conftest import Write


def test_what_is_written_is_read(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace" / "stage-0.jsonl", 0, 1)
    trace.span("forward", 5.0, 5.25, 17)
    trace.flush()
    trace.span("wait_input", 5.25, 6.0, 0)
    trace.close()
    (found,) = read(tmp_path)
    assert found.spans == [("forward", 5.0, 5.25, 17), ("wait_input", 5.25, 6.0, 0)]
    assert (found.stage, found.clock, found.ended, found.dropped) == (0, writer.clock_of_this_machine(), True, 0)


def test_a_file_takes_so_many_lines_and_the_rest_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "LIMIT", 3)
    trace = Trace(tmp_path / "trace" / "stage-0.jsonl", 0, 1)
    for n in range(4):
        trace.span("forward", n, n + 0.5, n)
        trace.message(SENT, 1, "Activation", n, n)
    size = (tmp_path / "trace" / "stage-0.jsonl").stat().st_size
    assert trace.dropped == 5 and len(trace._spans) + len(trace._messages) == 3
    trace.close()
    lines = (tmp_path / "trace" / "stage-0.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 3 + 1 and json.loads(lines[-1]) == {"spans": 2, "messages": 1, "dropped": 5} and size < 200
    assert [trace.dropped for trace in read(tmp_path)] == [5]
    assert "stage 0: 5 later spans and messages did not fit in and are missing" in list(merged(read(tmp_path)).notes())


def test_a_process_that_was_killed_leaves_what_it_had_written(tmp_path: Path, write: Write) -> None:
    """In the middle of a line, it may be."""
    run = write()
    path = run / "trace" / "stage-1.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:50]) + whole[50][:9])
    timeline = merged(read(run))
    assert len(timeline.stages[1].spans) + len(timeline.stages[1].messages) == 49
    assert "stage 1: its trace has no end, the process was killed or is still at work" in list(timeline.notes())
    assert timeline.alone > 0 and any("have no arrow" in note for note in timeline.notes())


def test_a_trace_that_the_disk_does_not_take_is_closed_without_another_word(tmp_path: Path) -> None:
    """The run ends for the first reason; what was written is read, to the last whole line."""
    path = tmp_path / "trace" / "stage-0.jsonl"
    trace = Trace(path, 0, 1)
    for n in range(100):
        trace.span("forward", n, n + 0.5, n)
    with files_limited_to(1000):
        with pytest.raises(DiskError, match=r"^cannot write .*stage-0.jsonl: File too large; .*without output.trace"):
            trace.flush()
        trace.close()
    (found,) = read(tmp_path)
    assert 0 < len(found.spans) < 100 and not found.ended
    assert 950 < path.stat().st_size <= 1000 and path.read_bytes().endswith(b"\n")


def test_a_trace_that_the_disk_takes_again_lacks_nothing(tmp_path: Path) -> None:
    """As a stage on its own goes on without its metrics until there is room."""
    trace = Trace(tmp_path / "trace" / "stage-0.jsonl", 0, 1)
    for n in range(100):
        trace.span("forward", n, n + 0.5, n)
        trace.message(SENT, 1, "Activation", n, n + 0.25)
    for room in (1000, 2001, 60_000):
        with files_limited_to(room), suppress(DiskError):
            trace.flush()
    trace.close()
    (found,) = read(tmp_path)
    assert [span.batch for span in found.spans] == [message.batch for message in found.messages] == list(range(100))
    assert found.ended


def test_a_run_without_a_trace(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"holds no trace: train with --output\.trace true"):
        read(tmp_path)


def test_a_stage_whose_file_is_missing(write: Write) -> None:
    run = write()
    (run / "trace" / "stage-2.jsonl").unlink()
    with pytest.raises(TraceError, match=r"cannot read the trace .*stage-2\.jsonl"):
        read(run)


@pytest.mark.parametrize(
    "line",
    [
        "not JSON",
        "[]",
        "7",
        "{}",
        '["forward", 1, "x", 2]',
        '["forward", 9, 3, 2]',  # ends before it begins
        '["forward", 1, 2, 2]',  # begins before the one ahead of it ended
        '[">", 3, "Activation", 2, 7]',  # not a neighbour
        '["forward", 1, 2]',
    ],
)
def test_a_damaged_line_is_named(write: Write, line: str) -> None:
    run = write()
    path = run / "trace" / "stage-1.jsonl"
    lines = path.read_text().splitlines()
    lines[20] = line
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(TraceError, match=r"stage-1\.jsonl is damaged: line 21 is"):
        read(run)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("", "cannot read the trace"),
        ("[1, 2]", "cannot read the trace"),
        ('{"trace": 1, "stage": 1}', "cannot read the trace"),
        ('{"trace": 2, "stage": 1, "stages": 3, "clock": "here"}', "does not begin as the trace of stage 1, format 1"),
        ('{"trace": 1, "stage": 0, "stages": 3, "clock": "here"}', "does not begin as the trace of stage 1, format 1"),
        (
            '{"trace": 1, "stage": 1, "stages": 4, "clock": "here"}',
            "is of a run of 4 stages, that of stage 0 of one of 3",
        ),
    ],
)
def test_a_file_that_begins_as_another_is_refused(write: Write, header: str, says: str) -> None:
    run = write()
    (run / "trace" / "stage-1.jsonl").write_text(header + "\n")
    with pytest.raises(TraceError, match=says):
        read(run)


def test_a_trace_of_nothing(tmp_path: Path) -> None:
    Trace(tmp_path / "trace" / "stage-0.jsonl", 0, 1).close()
    with pytest.raises(TraceError, match="the trace is empty"):
        merged(read(tmp_path))


def test_a_message_is_written_from_both_ends(write: Write) -> None:
    first, second, _ = read(write(batches=1))
    assert [message[:4] for message in first.messages] == [(SENT, 1, "Activation", 1), (RECEIVED, 1, "Gradient", 1)]
    assert second.messages[0][:4] == (RECEIVED, 0, "Activation", 1)
