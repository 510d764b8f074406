"""The image and the compose files on a real engine: DNIPIPE_DOCKER=1, and DOCKER_HOST where it is not the local one.

DNIPIPE_DOCKER_BUILD: more arguments of `docker build`, as `--network host`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.launch.conftest import ROOT, WORDS

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(os.environ.get("DNIPIPE_DOCKER") != "1", reason="DNIPIPE_DOCKER=1 is not set: no engine"),
]
Compose = Callable[..., str]


def done(*command: str, **environment: str) -> str:
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}, timeout=1000
    )
    assert ended.returncode == 0, f"{shlex.join(command)}\n{ended.stdout[-4000:]}\n{ended.stderr[-4000:]}"
    return ended.stdout


@pytest.fixture(scope="module")
def image() -> str:
    more = shlex.split(os.environ.get("DNIPIPE_DOCKER_BUILD", ""))
    done("docker", "build", "-f", "docker/Dockerfile", "-t", "dnipipe", *more, ".")
    return "dnipipe"


@pytest.fixture
def compose() -> Iterator[Compose]:
    """`compose FILE WORDS`, as a project of its own, of which nothing stays."""
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
    project = f"dnipipe-test-{os.getpid()}"
    files: set[str] = set()

    def run(file: str, *words: str, **environment: str) -> str:
        files.add(file)
        program = ["docker", "compose"] if plugin else ["docker-compose"]
        return done(*program, "-p", project, "-f", f"docker/{file}", *words, **environment)

    yield run
    for file in files:
        run(file, "down", "--volumes", "--timeout", "5")


def test_a_container_is_not_root_and_may_write_its_run(image: str) -> None:
    said = done("docker", "run", "--rm", image, "sh", "-c", "id -u && touch /runs/x && dnipipe settings | head -n 1")
    assert said.split()[0] == "1000" and "--model.name" in said


@pytest.mark.parametrize("file", ["compose.torchrun.yaml", "compose.yaml"])
def test_four_containers_train_to_the_evaluation(image: str, compose: Compose, file: str) -> None:
    said = compose(file, "up", "--no-color", SETTINGS=shlex.join(WORDS))
    assert len(re.findall(r"validation loss [\d.]+ nats per byte", said)) == 1, said
    containers = compose(file, "ps", "--all", "-q").split()  # without --all compose 2 has only who runs
    assert len(containers) >= 4
    for container in containers:
        state = json.loads(done("docker", "inspect", "-f", "{{json .State}}", container))
        assert state["Status"] == "exited" and state["ExitCode"] == 0
