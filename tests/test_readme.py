"""What the README shows runs as it stands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dnipipe import cli
from dnipipe.config import load

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES = [line for path in TEXTS for line in path.read_text(encoding="utf-8").splitlines()]
COMMANDS = [line.strip() for line in LINES if re.match(r" {4,6}(dnipipe|torchrun .* dnipipe) train ", line)]
ROWS = sorted({settings for line in LINES for settings in re.findall(r"^\|.*\| `(--[^`]+)` \|", line)})


@pytest.mark.processes
@pytest.mark.timeout(180)
def test_the_example_of_ones_own_model(tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "train.py").write_text(snippet + "print(sum(p.numel() for p in trained.parameters()))\n")
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    error = re.search(r"validation loss .*, error ([\d.]+) %", done.stdout)
    assert error and float(error[1]) < 40, done.stdout  # of four classes: 75 % is guessing
    assert done.stdout.splitlines()[-1] == "7972"


def test_a_clone_beside_a_script_is_not_taken_for_the_package(tmp_path: Path) -> None:
    """`git clone`, `pip install -e dnipipe`, and train.py in the same folder: Python finds that folder first."""
    (tmp_path / "dnipipe").mkdir()
    (tmp_path / "train.py").write_text("import dnipipe\nprint(dnipipe.Run.__name__)\n")
    command, alone = [sys.executable, "train.py"], {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=60)
    assert done.stdout == "Run\n", done.stderr


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 3 and len(ROWS) >= 3


@pytest.mark.parametrize("command", [*COMMANDS, *(f"dnipipe train examples/mnist.toml {row}" for row in ROWS)])
def test_the_settings_of_a_command_exist(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `dnipipe train` in README and docs: its file is there, its settings are known and fit together."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.split("train ", 1)[1], comments=True)
    files, settings = cli.separate(words)
    load(next((word for word in files if word.endswith(".toml")), None), settings)
