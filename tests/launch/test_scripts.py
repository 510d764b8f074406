"""Shell scripts of launch/ and docker/ as bash and shellcheck read them, each with its use on its second line."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT

SCRIPTS = [*sorted((ROOT / "launch").glob("*.s[hb]*")), *sorted((ROOT / "docker").glob("*.sh"))]


def test_there_are_scripts_to_check() -> None:
    assert {"torchrun.sh", "multinode.sh", "slurm.sbatch"} <= {path.name for path in SCRIPTS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_and_shellcheck_find_nothing(path: Path) -> None:
    for command in (["bash", "-n"], ["shellcheck"]):
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed: {path.name} was not checked with it")
        done = subprocess.run([*command, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_use_stands_at_the_top(path: Path) -> None:
    first, use = path.read_text().splitlines()[:2]
    assert first == "#!/usr/bin/env bash"
    assert re.match(rf"# .*:  .*{re.escape(path.name)}", use)


@pytest.mark.parametrize("name", ["torchrun.sh", "multinode.sh"])
def test_what_is_started_by_name_may_be(name: str) -> None:
    assert (ROOT / "launch" / name).stat().st_mode & 0o111 == 0o111
