"""Which record belongs to which cell, and what a damaged file still holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.cells import Records
from benchmarks.figures import computer, processor
from dnipipe.config import load
from dnipipe.errors import ConfigError
from tests.benchmarks.conftest import record, tiny


def test_a_record_belongs_to_the_settings_however_they_are_given(tmp_path: Path) -> None:
    records = Records(tmp_path / "out")
    cell = tiny(tmp_path, "--rule.name", "blend", name="a")
    records.add(cell, record(cell, 2.0))
    again = Records(tmp_path / "out")
    found = again.of(tiny(tmp_path, name="b"))  # blend is the default
    assert found is not None and found.loss == 2.0
    assert again.of(tiny(tmp_path, "--optimizer.lr", "0.5")) is None
    assert again.of(tiny(tmp_path, "--data.root", "elsewhere")) is not None  # a path decides nothing


def test_a_record_names_the_gpu_if_the_run_was_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    on = [load(None, ("--pipeline.device", device)) for device in ("auto", "cuda", "cpu")]
    assert [computer(settings) for settings in on] == ["a GPU", "a GPU", processor()] and processor() != "a GPU"


def test_a_changed_file_or_default_is_another_run(tmp_path: Path) -> None:
    records = Records(tmp_path / "out")
    cell = tiny(tmp_path)
    records.add(cell, record(cell, 2.0, settings={**cell.settings, "predictor.lr": 0.1}))
    assert Records(tmp_path / "out").of(cell) is None


def test_a_setting_that_was_not_there_yet_stood_at_its_default(tmp_path: Path) -> None:
    records = Records(tmp_path / "out")
    cell = tiny(tmp_path)
    older = {name: value for name, value in cell.settings.items() if name != "rule.reschedule"}
    records.add(cell, record(cell, 2.0, settings={**older, "rule.long_gone": 3}))
    assert Records(tmp_path / "out").of(cell) is not None
    assert Records(tmp_path / "out").of(tiny(tmp_path, "--rule.reschedule", "9", "--rule.name", "delayed")) is None


def test_a_line_cut_short_is_no_record_and_spoils_no_other(tmp_path: Path) -> None:
    records = Records(tmp_path)
    cells = [tiny(tmp_path, "--train.seed", str(seed)) for seed in range(3)]
    records.add(cells[0], record(cells[0], 2.0))
    path = tmp_path / "tiny.jsonl"
    path.write_text(path.read_text() + json.dumps({"cell": "half"})[:-3])
    records = Records(tmp_path)
    records.add(cells[1], record(cells[1], 3.0))
    found = [Records(tmp_path).of(cell) for cell in cells]
    assert [one and one.loss for one in found] == [2.0, 3.0, None]


def test_a_command_names_its_data_and_an_invalid_one_its_setting(tmp_path: Path) -> None:
    command = tiny(tmp_path, "--train.seed", "3").command("input.txt")
    assert command[:2] == ["dnipipe", "train"] and command[3:] == ["--data.root", "input.txt", "--train.seed", "3"]
    with pytest.raises(ConfigError, match=r"rule.nam "):
        _ = tiny(tmp_path, "--rule.nam", "wait").key
