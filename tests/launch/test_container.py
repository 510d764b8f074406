"""The command of kubernetes.yaml's container, as its shell runs it, with a stand-in for `dnipipe` that is told to end.

A container's process 1 gets the signals, here the shell. That the kernel spares a process 1 that has no handler is not
needed to see whether the stage hears of them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT, environment

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (extra: dev): the command was not checked")
pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

STAGE = """#!{python}
import pathlib, signal, sys
here = pathlib.Path({folder!r})
def told(*_):
    (here / "told").touch()
signal.signal(signal.SIGTERM, told)
(here / "words").write_text(" ".join(sys.argv[1:]))
(here / "words").rename(here / "began")  # whole, when it is there
if (here / "status").exists():
    sys.exit(int((here / "status").read_text()))
signal.pause()
while not (here / "may-end").exists():
    signal.sigtimedwait([], 0.01)
(here / "saved").touch()
"""


def command() -> list[str]:
    """Of the stage's container; only that what it touches is in the test's folder."""
    for each in yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text()):
        if each["kind"] == "StatefulSet":
            found: list[str] = each["spec"]["template"]["spec"]["containers"][0]["command"]
            return found
    raise AssertionError("no StatefulSet")


class Container:
    def __init__(self, folder: Path, shell: str) -> None:
        self.folder, self.shell = folder, shell
        self.process: subprocess.Popen[bytes] | None = None
        stage = folder / "dnipipe"
        stage.write_text(STAGE.format(python=sys.executable, folder=str(folder)))
        stage.chmod(0o755)

    def start(self) -> subprocess.Popen[bytes]:
        shell, *words = command()
        assert shell == "sh" and "/tmp/through" in words[-1]
        words[-1] = words[-1].replace("/tmp/through", f"{self.folder}/through")
        ours = environment(ORDINAL="2")
        ours["PATH"] = f"{self.folder}:{ours['PATH']}"
        self.process = subprocess.Popen([self.shell, *words], env=ours, start_new_session=True)
        return self.process

    def until(self, what: str, happens: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not happens():
            assert time.monotonic() < end, f"not within 60 s: {what}"
            time.sleep(0.02)

    def until_there(self, name: str) -> None:
        self.until(name, lambda: self.has(name))

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def others(self) -> list[int]:
        """Processes of the container that run, besides the shell."""
        assert self.process
        return [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if _of(pid, self.process.pid)]


def _of(pid: int, session: int) -> bool:
    try:  # behind its name, in brackets: state, parent, group, session
        state, _, _, its = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return False
    return pid != session and int(its) == session and state != "Z"


@pytest.fixture(params=["sh", "bash"])
def container(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Container]:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    made = Container(tmp_path, request.param)
    yield made
    if made.process:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(made.process.pid, signal.SIGKILL)
        made.process.wait()


def test_a_stage_that_is_told_to_end_saves_before_its_container_goes(container: Container) -> None:
    shell = container.start()
    container.until_there("began")
    assert (container.folder / "began").read_text() == "stage --index 2 /config/config.toml"
    shell.send_signal(signal.SIGTERM)
    container.until_there("told")
    assert shell.poll() is None
    (container.folder / "may-end").touch()
    shell.wait(60)
    assert container.has("saved") and not container.has("through")
    assert container.others() == []


def test_a_stage_that_is_through_rests_and_can_be_ended(container: Container) -> None:
    (container.folder / "status").write_text("0")
    shell = container.start()
    container.until_there("through")
    assert shell.poll() is None
    container.until("it rests", lambda: bool(container.others()))
    shell.send_signal(signal.SIGTERM)
    shell.wait(60)
    container.until("nothing is left", lambda: not container.others())


def test_who_is_told_to_end_before_it_rests_ends(container: Container) -> None:
    """While the shell still runs `touch`: the stage is gone, and what it will rest in not there yet."""
    (container.folder / "status").write_text("0")
    touch = container.folder / "touch"
    touch.write_text(f'#!/bin/sh\n{shutil.which("touch")} "$@"; sleep 0.5\n')
    touch.chmod(0o755)
    shell = container.start()
    container.until_there("through")
    shell.send_signal(signal.SIGTERM)
    shell.wait(60)
    container.until("nothing is left", lambda: not container.others())


def test_a_stage_that_fails_ends_its_container_with_its_status(container: Container) -> None:
    (container.folder / "status").write_text("3")
    assert container.start().wait(60) == 3
    assert not container.has("through")
