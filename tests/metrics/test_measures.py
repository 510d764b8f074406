"""Likenesses that are right in every precision, and lines that tell of their interval."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dnipipe.metrics import FOLD
from dnipipe.metrics.measures import COMPARED
from tests.metrics.conftest import Time, measured


@pytest.fixture
def each_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dnipipe.metrics.measures.COMPARED", 1)


@pytest.mark.usefixtures("each_compared")
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


@pytest.mark.usefixtures("each_compared")
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


@pytest.mark.usefixtures("each_compared")
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


def test_one_gradient_in_some_is_compared_the_first_one_too() -> None:
    metrics, g = measured(), torch.ones(2, 3)
    for k in range(2 * COMPARED):
        metrics.received(g if k % COMPARED == 0 else 9 * g, g, k)
    numbers = metrics.numbers(0, 1)
    assert numbers["norm_ratio"] == 1 and numbers["staleness"] == (2 * COMPARED - 1) / 2  # of all of them
    metrics.received(5 * g, g, 0)  # the reading has not moved whose turn it is
    assert metrics.numbers(0, 1)["norm_ratio"] == 5


@pytest.mark.usefixtures("each_compared")
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
    with metrics.clock.span("wait_input"):
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
    metrics.evaluated(40, 2.5, 0.25)
    assert metrics.numbers(0, 1).items() >= {"eval.batch": 40, "eval.loss": 2.5, "eval.accuracy": 0.25}.items()
    assert "eval.loss" not in metrics.numbers(0, 1)
    metrics.evaluated(50, 2.25, None)
    metrics.evaluated(60, 2.0, None)
    assert [metrics.unread, metrics.numbers(0, 1)["eval.batch"]] == [2, 50]
    assert [metrics.unread, metrics.numbers(0, 1)["eval.batch"], metrics.unread] == [1, 60, 0]
    metrics.evaluated(40, float("nan"), None)
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


def test_an_input_is_guessed_as_well_as_the_share_of_its_variance_says() -> None:
    """0.5 of 2 features: one constant and guessed, one that varies by 2 around 7 and is missed by 1."""
    metrics = measured()
    h = torch.tensor([[3.0, 5.0], [3.0, 9.0]])
    metrics.input_guessed(h.clone(), h)
    metrics.input_guessed(h + torch.tensor([0.0, 1.0]), h)
    metrics.input_guessed(torch.zeros(2, 2), torch.ones(2, 2))  # nothing varies: there is no share
    assert metrics.numbers(0, 1)["input_error"] == (0 + (1 + 1) / (4 + 4)) / 2
    metrics.input_guessed(h.mean(0).expand(2, 2), h)
    assert metrics.numbers(0, 1)["input_error"] == 1 and metrics.totals()["input_error"] == (0 + 0.25 + 1) / 3
    assert "input_error" not in metrics.numbers(0, 1) and "input_error" not in measured().totals()


def test_how_many_batches_were_updated_on_at_once() -> None:
    metrics = measured()
    for batch in range(1, 5):
        metrics.trained(batch, 8, at_once=batch > 3)
    assert metrics.numbers(0, 1)["at_once"] == 0.25
    metrics.trained(5, 8)
    assert metrics.numbers(0, 1)["at_once"] == 1 and metrics.totals()["at_once"] == 0.4


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say it there")
def test_a_line_says_how_much_memory_the_process_has() -> None:
    before = measured().numbers(0, 1)["memory"]
    held = torch.ones(2**24)  # 64 MiB
    assert 2**25 < measured().numbers(0, 1)["memory"] - before < 2**27
    del held


def test_training_ends_with_the_last_batch_and_evaluations_are_no_part_of_it() -> None:
    """b: a second of a batch, e: of an evaluation's forward, .: of a wait within it.    b b e . e b e e e"""
    time = Time()
    metrics = measured(time)
    metrics.begin()
    for what in "bbe.ebeee":
        if what == "e":
            with metrics.evaluating():
                time.passes(1)
            continue
        time.passes(1)
        if what == "b":
            metrics.trained(1, 8)
    totals = metrics.totals()
    assert (totals["training_seconds"], totals["seconds.evaluation"], totals["seconds"]) == (3, 5, 9)
