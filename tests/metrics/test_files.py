"""Files that any JSON reader accepts, and the same numbers for TensorBoard."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dnipipe import codec, messages
from dnipipe.errors import ConfigError, DiskError
from dnipipe.metrics import LABELS, Clock, JsonLines, StageMetrics, TensorBoard, summary, write_json
from tests.checkpoint.disk import files_limited_to
from tests.metrics.conftest import Time, measured


def strict(text: str) -> Any:
    """As JSON is defined: no NaN, no Infinity, which Python's reader would let pass."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


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


def test_a_line_that_the_disk_does_not_take_whole_is_not_there(tmp_path: Path) -> None:
    """The kernel refuses it half way. A resumed run goes on behind the last whole line."""
    path = tmp_path / "stage-0.jsonl"
    log = JsonLines(path)
    log.write(1, {"loss": 1.0})
    size = path.stat().st_size
    with files_limited_to(size + 20), pytest.raises(DiskError) as caught:
        log.write(2, {"loss": 2.0})
    assert str(caught.value) == f"cannot write {path}: File too large; make room there, and resume the run"
    assert path.stat().st_size == size
    log.write(3, {"loss": 3.0})
    log.close()
    assert [strict(line)["batch"] for line in path.read_text().splitlines()] == [1, 3]


def test_a_file_that_cannot_be_opened_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "afile").touch()
    with pytest.raises(
        ConfigError, match=r"cannot write .*/afile/stage-0.jsonl: .*name another folder with output.run"
    ):
        JsonLines(tmp_path / "afile" / "stage-0.jsonl")


def over_the_wire(numbers: dict[str, float]) -> dict[str, float]:
    """A final report as stage 0 receives it: every number is a float."""
    _, _, got = codec.decode(codec.encode(messages.Report(1, 7, numbers, final=True), "run", 0))
    assert isinstance(got, messages.Report)
    return got.numbers


def test_the_summary_has_its_fixed_shape(tmp_path: Path) -> None:
    time = Time()
    metrics = measured(time)
    metrics.begin()
    with metrics.clock.span("wait_input"):
        time.passes(1)
    time.passes(3)
    metrics.trained(1, 8)
    metrics.received(torch.ones(1, 2), torch.ones(1, 2), 2)
    metrics.skip("loss not finite")
    metrics.dropped["malformed"] += 2
    metrics.unlearnt = 5
    last = StageMetrics(2, 3, Clock(time, time)).totals()
    made = summary("synthetic", (1.5, None), [over_the_wire(metrics.totals()), over_the_wire(last)], 7, True)
    write_json(tmp_path / "summary.json", made)
    told = strict((tmp_path / "summary.json").read_text())
    assert set(told) == {"stages", "rule", "batch", "finished", "train", "eval", "stage", "versions"}
    assert (told["batch"], told["finished"]) == (7, True)
    assert told["train"] == {"batches": 1, "samples": 8, "seconds": 4.0, "samples_per_second": 2.0}
    assert told["eval"] == {"loss": 1.5, "accuracy": None}
    first, second = told["stage"]
    assert (first["index"], first["batches"], first["busy_seconds"], first["idle_seconds"]) == (0, 1, 3, 1)
    assert (first["cosine"], first["norm_ratio"], first["staleness"]) == (pytest.approx(1), 1, 2)
    assert (first["skipped"], first["reasons"]) == (1, {"loss not finite": 1})
    assert (first["dropped"], second["dropped"]) == ({"malformed": 2}, {})
    assert (first["unlearnt"], second["unlearnt"]) == (5, 0)
    assert first["seconds"]["unaccounted"] == 3
    assert set(first["seconds"]) == set(first["processor"]) == set(first["shares"]) == set(LABELS)
    assert first["shares"]["unaccounted"] == 0.75 and sum(first["shares"].values()) == 1
    assert first["untraced"] is None
    assert (second["cosine"], second["norm_ratio"], second["staleness"], second["skipped"]) == (None, None, None, 0)
    counts = [first["batches"], first["samples"], first["skipped"], *first["reasons"].values(), *told["train"].values()]
    assert [type(count) for count in counts[:6]] == [int] * 6  # 1, not 1.0
    assert set(told["versions"]) == {"dnipipe", "torch", "python", "pyzmq"}
    assert told["versions"]["torch"] == torch.__version__ and told["versions"]["pyzmq"][0].isdigit()


def test_a_batch_is_trained_when_its_last_stage_has_trained_it() -> None:
    """With a window of a hundred batches stage 0 is through long before; a stage of its own may be older than it."""
    first, slower = ({"batches": 90.0, "samples": 720.0, "training_seconds": seconds} for seconds in (1.0, 4.5))
    older = {"batches": 500.0, "samples": 4000.0, "training_seconds": 20.0}
    others = measured().totals()
    told = [
        summary("local", None, [others | stage for stage in run], 90, True)["train"]
        for run in ((first, slower), (first, older))
    ]
    assert [(train["seconds"], train["samples_per_second"]) for train in told] == [(4.5, 160), (1, 720)]


def test_a_diverged_or_unevaluated_run_has_a_summary_too(tmp_path: Path) -> None:
    totals = [measured().totals()]
    diverged = summary("wait", (float("nan"), float("inf")), totals, 3, False)
    assert diverged["eval"] == summary("wait", None, totals, 3, False)["eval"] == {"loss": None, "accuracy": None}
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
    with pytest.raises(DiskError, match=r"^cannot write .*summary.json: No space left on device; make room"):
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
