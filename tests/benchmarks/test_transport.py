"""The transport study, very short: every channel carries what it is given, and the tables show each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.transport.__main__ import main
from benchmarks.transport.channels import BASES, NAMES
from benchmarks.transport.rank import Burst
from benchmarks.transport.report import tables

ABOUT = {"date": "2026-01-01", "processor": "one", "cores": 2, "load": 0.5, "torch": "2", "pyzmq": "27"}


def test_every_channel_is_measured_at_every_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--repeats", "1", "--sizes", "4096", "262144", "--out", str(tmp_path)]) == 0
    bursts = [Burst(**one) for one in json.loads((tmp_path / "records.json").read_text())["bursts"]]
    assert {(one.channel, one.size) for one in bursts} == {(name, size) for name in NAMES for size in (4096, 262144)}
    assert all(min(one.rate, one.latency, one.sender, one.receiver) > 0 for one in bursts)
    assert capsys.readouterr().out == (tmp_path / "README.md").read_text()


def test_a_ratio_is_of_turns_of_the_same_repeat() -> None:
    rates = {"ipc": (1e9, 2e9, 4e9), "dnipipe-ipc": (0.5e9, 1e9, 2e9)}
    bursts = [
        Burst(name, 4096, repeat, rate, 1e-5, 1e-9, 1e-9)
        for name, row in rates.items()
        for repeat, rate in enumerate(row)
    ]
    text = tables(bursts, ABOUT)
    assert "| dnipipe-ipc : ipc | 0.50 ± 0.00 |" in text and "| ipc | 2.00 ± " in text


def test_every_transport_has_something_to_be_measured_against() -> None:
    assert set(BASES.values()) | set(BASES) == set(NAMES)
