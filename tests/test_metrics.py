"""Seconds that add up, likenesses that are right in every precision, and files that any JSON reader accepts."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dnipipe import codec, messages
from dnipipe.errors import ConfigError
from dnipipe.metrics import FOLD, LABELS, Clock, JsonLines, StageMetrics, TensorBoard, summary, write_json


class Time:
    """A clock that stands until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


def strict(text: str) -> Any:
    """As JSON is defined: no NaN, no Infinity, which Python's reader would let pass."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def measured(time: Time | None = None) -> StageMetrics:
    time = time or Time()
    return StageMetrics(1, 4, Clock(time, time))


# -- the clock ---------------------------------------------------------------------------------------------------


def test_an_inner_span_suspends_the_outer_one() -> None:
    time = Time()
    clock = Clock(time, time)
    time.passes(1)
    with clock.span("forward"):
        time.passes(2)
        with clock.span("send"):
            time.passes(4)
            with clock.span("forward"):  # the same label again: spans are made once and shared
                time.passes(8)
            time.passes(16)
        time.passes(32)
    time.passes(64)
    expected = {"overhead": 1.0 + 64, "forward": 2.0 + 8 + 32, "send": 4.0 + 16}
    assert {label: spent for label, spent in clock.seconds().items() if spent} == expected


def test_every_second_has_one_owner_also_while_a_span_is_open() -> None:
    time = Time()
    clock = Clock(time, time)
    for label in LABELS:
        with clock.span(label):
            time.passes(0.5)
            assert sum(clock.seconds().values()) == time.now - 100  # halves: exact
        time.passes(0.25)
    assert sum(clock.seconds().values()) == time.now - 100
    assert clock.seconds()["idle"] == 0.5 and clock.seconds()["overhead"] == 0.5 + 0.25 * len(LABELS)


def test_an_exception_ends_its_span() -> None:
    time = Time()
    clock = Clock(time, time)
    with pytest.raises(KeyError), clock.span("backward"):
        time.passes(1)
        raise KeyError
    time.passes(2)
    assert clock.seconds()["backward"] == 1 and clock.seconds()["overhead"] == 2


def test_a_span_that_was_set_aside_has_not_worked() -> None:
    """Ten seconds in a send of which the thread had a processor for one."""
    wall, worked = Time(), Time()
    clock = Clock(wall, worked)
    with clock.span("send"):
        wall.passes(10)
        worked.passes(1)
    assert clock.seconds()["send"] == 10 and clock.processor()["send"] == 1


# -- what a stage measures ---------------------------------------------------------------------------------------


def test_cosine_and_norm_ratio_are_those_of_the_whole_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 5, 3, 7, generator=generator) for _ in range(4)]
    metrics, cosines, ratios = measured(), [], []
    for predicted, g in pairs:
        metrics.received(predicted, g, 2)
        cosines.append(torch.nn.functional.cosine_similarity(predicted.flatten(), g.flatten(), dim=0).item())
        ratios.append((predicted.norm() / g.norm()).item())
    numbers = metrics.numbers(3, 4)
    assert numbers["cosine"] == pytest.approx(sum(cosines) / 4, rel=1e-5)
    assert numbers["norm_ratio"] == pytest.approx(sum(ratios) / 4, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_neither_underflows_nor_stops_growing(dtype: torch.dtype) -> None:
    """The square of 1e-5 is zero in float16; a sum of ones stops at 256 in bfloat16."""
    g = torch.full((4, 16), 1e-5, dtype=dtype)
    metrics = measured()
    for _ in range(2 * FOLD + 1):
        metrics.received(g / 2, g, 1)
        metrics.loss(torch.tensor(1.0, dtype=dtype), 1)
    numbers = metrics.numbers(0, 1)
    assert numbers["cosine"] == pytest.approx(1, abs=1e-3) and numbers["norm_ratio"] == pytest.approx(0.5, abs=1e-2)
    assert numbers["loss"] == 1


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_gradient_without_a_likeness_spoils_no_mean(bad: float) -> None:
    """A dead layer sends back zeros, a diverging one NaN: the line is written, and the others' mean is right."""
    metrics, g = measured(), torch.tensor([[3.0, 4.0]])
    metrics.received(g, torch.full((1, 2), bad), 1)
    only_bad = metrics.numbers(0, 1)
    assert "cosine" not in only_bad and "norm_ratio" not in only_bad and only_bad["staleness"] == 1
    metrics.received(g, torch.full((1, 2), bad), 1)
    metrics.received(2 * g, g, 3)
    numbers = metrics.numbers(0, 1)
    assert numbers["cosine"] == pytest.approx(1) and (numbers["norm_ratio"], numbers["staleness"]) == (2, 2)
    assert metrics.totals()["norm_ratio"] == 2


def test_a_prediction_of_zero_is_measured_as_such() -> None:
    metrics = measured()
    metrics.received(torch.zeros(2, 3), torch.ones(2, 3), 0)
    numbers = metrics.numbers(0, 1)
    assert numbers["cosine"] == 0 and numbers["norm_ratio"] == 0


def test_without_a_prediction_only_the_staleness_is_known() -> None:
    metrics = measured()
    metrics.received(None, torch.ones(2, 3), 5)
    numbers = metrics.numbers(1, 2)
    assert numbers["staleness"] == 5 and "cosine" not in numbers and "norm_ratio" not in numbers


def test_what_is_measured_holds_no_graph_and_reads_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two readings nothing may turn a tensor into a number: on a GPU that waits for it."""

    def refuse(*_: object) -> None:
        raise AssertionError("a device was waited for")

    metrics, g = measured(), torch.ones(2, 3, requires_grad=True)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__", "__bool__", "__int__", "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, refuse)
        for _ in range(FOLD + 1):
            metrics.received(g * 2, g, 1)
            metrics.loss(torch.tensor(0.5), 4)
            metrics.trained(1, 2)
    assert isinstance(metrics._likeness, torch.Tensor) and not metrics._likeness.requires_grad
    assert metrics.numbers(0, 1)["norm_ratio"] == 2


def test_a_line_tells_of_its_interval_and_the_totals_of_the_run() -> None:
    time = Time()
    metrics = measured(time)
    with metrics.clock.span("forward"):
        time.passes(3)
    with metrics.clock.span("idle"):
        time.passes(1)
    metrics.trained(1, 8)
    metrics.loss(torch.tensor(4.0), 10)
    first = metrics.numbers(pending=2, window=4)
    assert (first["stage"], first["batches"], first["samples"], first["loss"]) == (1, 1, 8, 4)
    assert (first["seconds"], first["samples_per_second"], first["idle"]) == (4, 2, 0.25)
    assert (first["in_flight"], first["window"], first["seconds.forward"]) == (2, 4, 3)

    with metrics.clock.span("send"):
        time.passes(2)
    metrics.trained(2, 8)
    metrics.loss(torch.tensor(1.0), 30)
    metrics.skip("no gradient came")
    second = metrics.numbers(1, 4)
    assert (second["batches"], second["loss"], second["seconds"], second["idle"]) == (1, 1, 2, 0)
    assert (second["seconds.forward"], second["skipped"], second["overhead"]) == (0, 1, 1)

    metrics.trained(3, 8)  # since the last line: the totals have it all the same, and reading them changes nothing
    for totals in (metrics.totals(), metrics.totals()):
        assert (totals["batches"], totals["samples"], totals["seconds"]) == (3, 24, 6)
        assert totals["loss"] == (4 * 10 + 1 * 30) / 40  # weighted by terms
        assert (totals["busy_seconds"], totals["idle_seconds"], totals["skipped.no gradient came"]) == (5, 1, 1)
        assert totals["overhead"] == pytest.approx(2 / 6)  # the send, of the stage's whole time
        assert totals["overhead_of_work"] == pytest.approx((2 + 1) / 6)  # and what the processor did in the wait
    assert metrics.numbers(0, 4)["batches"] == 1


def test_nothing_measured_is_absent_and_nothing_divides_by_zero() -> None:
    numbers = measured().numbers(0, 1)
    assert not {"loss", "cosine", "norm_ratio", "staleness", "eval.loss"} & set(numbers)
    assert (numbers["samples_per_second"], numbers["idle"], numbers["overhead"]) == (0, 0, 0)


def test_the_seconds_before_the_run_are_nobodys() -> None:
    time = Time()
    metrics = measured(time)
    time.passes(50)
    metrics.begin()
    time.passes(2)
    assert metrics.totals()["seconds"] == 2 and metrics.numbers(0, 1)["seconds"] == 2


def test_an_evaluation_stands_in_one_line() -> None:
    metrics = measured()
    metrics.evaluated(2.5, 0.25)
    assert metrics.numbers(0, 1).items() >= {"eval.loss": 2.5, "eval.accuracy": 0.25}.items()
    assert "eval.loss" not in metrics.numbers(0, 1)
    metrics.evaluated(float("nan"), None)
    assert not {"eval.loss", "eval.accuracy"} & set(metrics.numbers(0, 1))


def test_a_long_run_does_not_lose_its_late_losses() -> None:
    """In float32, 2^38 and a loss of 4,096 terms is still 2^38."""
    metrics = measured()
    metrics.loss(torch.tensor(2.0), 2**37)
    metrics.numbers(0, 1)
    for _ in range(100):
        metrics.loss(torch.tensor(1.0), 4096)
        metrics.numbers(0, 1)
    assert metrics.totals()["loss"] == (2**38 + 409_600) / (2**37 + 409_600)


# -- files -------------------------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_with_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "stage-1.jsonl"
    for batch in (10, 20):
        log = JsonLines(path)
        log.write(batch, measured().numbers(2, 4))
        assert path.read_text().endswith("\n")  # a line is there as soon as it is written, not when the file is closed
        log.close()
    lines = [strict(line) for line in path.read_text().splitlines()]
    assert [line["batch"] for line in lines] == [10, 20]
    assert all(line["stage"] == 1 and line["time"] > 1e9 and line["window"] == 4 for line in lines)


def over_the_wire(numbers: dict[str, float]) -> dict[str, float]:
    """A final report as stage 0 receives it: every number is a float."""
    _, _, got = codec.decode(codec.encode(messages.Report(1, 7, numbers, final=True), "run", 0))
    assert isinstance(got, messages.Report)
    return got.numbers


def test_the_summary_has_its_fixed_shape(tmp_path: Path) -> None:
    time = Time()
    metrics = measured(time)
    with metrics.clock.span("idle"):
        time.passes(1)
    time.passes(3)
    metrics.trained(1, 8)
    metrics.received(torch.ones(1, 2), torch.ones(1, 2), 2)
    metrics.skip("loss not finite")
    last = StageMetrics(2, 3, Clock(time, time)).totals()
    made = summary("synthetic", 2.0, (1.5, None), [over_the_wire(metrics.totals()), over_the_wire(last)])
    write_json(tmp_path / "summary.json", made)
    told = strict((tmp_path / "summary.json").read_text())
    assert set(told) == {"stages", "rule", "train", "eval", "stage", "versions"}
    assert told["train"] == {"batches": 1, "samples": 8, "seconds": 2.0, "samples_per_second": 4.0}
    assert told["eval"] == {"loss": 1.5, "accuracy": None}
    first, second = told["stage"]
    assert (first["index"], first["batches"], first["busy_seconds"], first["idle_seconds"]) == (0, 1, 3, 1)
    assert (first["cosine"], first["norm_ratio"], first["staleness"]) == (pytest.approx(1), 1, 2)
    assert (first["skipped"], first["reasons"]) == (1, {"loss not finite": 1})
    assert first["seconds"]["overhead"] == 3 and set(first["seconds"]) == set(first["processor"]) == set(LABELS)
    assert (second["cosine"], second["norm_ratio"], second["staleness"], second["skipped"]) == (None, None, None, 0)
    counts = [first["batches"], first["samples"], first["skipped"], *first["reasons"].values(), *told["train"].values()]
    assert [type(count) for count in counts[:6]] == [int] * 6  # 1, not 1.0
    assert set(told["versions"]) == {"dnipipe", "torch", "python", "pyzmq"}
    assert told["versions"]["torch"] == torch.__version__ and told["versions"]["pyzmq"][0].isdigit()


def test_a_diverged_or_unevaluated_run_has_a_summary_too(tmp_path: Path) -> None:
    totals = [measured().totals()]
    diverged = summary("wait", 0.0, (float("nan"), float("inf")), totals)
    assert diverged["eval"] == summary("wait", 0.0, None, totals)["eval"] == {"loss": None, "accuracy": None}
    assert diverged["train"]["samples_per_second"] == 0
    write_json(tmp_path / "summary.json", diverged)
    strict((tmp_path / "summary.json").read_text())


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"run": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"run": float("nan")})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"run": 2})
    assert strict(path.read_text()) == {"run": 1} and [each.name for each in tmp_path.iterdir()] == ["summary.json"]


def test_without_tensorboard_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ModuleNotFoundError("No module named 'tensorboard'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"^output.tensorboard = true needs the extra: pip install 'dnipipe\[tensorb"):
        TensorBoard(tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra dnipipe[tensorboard] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    board = TensorBoard(tmp_path / "board")
    for batch in (10, 20):
        board.write(1, batch, {"loss": batch / 4, "seconds.forward": 1.0})
    board.close()
    read = EventAccumulator(str(tmp_path / "board"))
    read.Reload()
    assert sorted(read.Tags()["scalars"]) == ["loss/stage-1", "seconds.forward/stage-1"]
    assert [(event.step, event.value) for event in read.Scalars("loss/stage-1")] == [(10, 2.5), (20, 5.0)]
