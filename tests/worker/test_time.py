"""Where a worker's time goes: each wait is put down to what it was for, each message to a send and a receive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dnipipe.messages import Checkpoint, Evaluation, Gradient, Report, Stop
from dnipipe.metrics import WAITS
from dnipipe.tracing import merged, read, writer
from dnipipe.tracing.chrome import events
from dnipipe.transport import Side
from tests.metrics.conftest import Time
from tests.tracing.test_merging import assert_valid
from tests.worker.bench import Bench, Crew, Script, batches, synthetic

Make = Callable[..., Bench]


def test_every_wait_has_its_reason(bench: Make) -> None:
    one, time = bench(rule=synthetic, window=1), Time()
    clock = one.worker.metrics.clock
    clock.now = clock.worked = time

    def after(seconds: float, then: Callable[[], object]) -> Callable[[], None]:
        def waiting() -> None:
            time.passes(seconds)
            then()

        return waiting

    one.wire.late.append(after(1, lambda: one.previous(*batches(1, 2), Stop(2))))
    one.wire.late.append(after(2, lambda: one.next(Gradient(1, torch.zeros(4, 8)))))  # the window holds one
    one.wire.late.append(after(4, lambda: one.next(Gradient(2, torch.zeros(4, 8)))))  # and batch 2 fills it
    one.wire.late.append(after(8, lambda: one.next(Report(2, 2, final=True))))
    one.wire.before_send = lambda side, message: time.passes(0.25 if side is Side.NEXT else 0)
    one.worker.run()
    seconds = clock.seconds()
    assert {label: seconds[label] for label in WAITS} == {
        "wait_input": 1,
        "wait_window": 2 + 4,
        "wait_send": 0,
        "wait_end": 8,
    }
    assert seconds["send"] == 0.25 * 3 and sum(seconds.values()) == 15.75


@pytest.mark.parametrize("stages", [1, 3])
def test_what_the_workers_write_down_is_one_timeline(tmp_path: Path, stages: int) -> None:
    """Of a run in threads: nothing overlaps, every message has both its ends, every batch is named where it passed."""
    x, y = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)
    script = Script([*batches(1, 6), Evaluation(1, x, y), Checkpoint(6)])
    assert Crew(tmp_path, script, stages, synthetic, window=3, traced=True).run() == [None] * stages
    timeline = merged(read(tmp_path))
    assert_valid(events(timeline), stages)
    assert list(timeline.notes()) == []
    passed = Counter((flow.kind, flow.sender, flow.receiver) for flow in timeline.flows)
    for k in range(stages - 1):
        assert passed["Activation", k, k + 1] == passed["Gradient", k + 1, k] == 6
        assert passed["Evaluation", k, k + 1] == passed["Answer", k + 1, k] == passed["Checkpoint", k, k + 1] == 1
    for trace in timeline.stages:
        named = {(span.name, span.batch) for span in trace.spans}
        assert (
            {("forward", n) for n in range(1, 7)} < named and ("evaluation", 0) in named and ("checkpoint", 6) in named
        )


def test_a_full_trace_is_told_with_the_last_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "LIMIT", 40)
    script = Script(batches(1, 6))
    assert Crew(tmp_path, script, 2, synthetic, window=3, traced=True).run() == [None] * 2
    final = [message for message in script.taken if isinstance(message, Report) and message.final]
    assert len(final) == 2 and all(message.numbers["untraced"] > 0 for message in final)
    assert all(trace.dropped > 0 and len(trace.spans) + len(trace.messages) == 40 for trace in read(tmp_path))
