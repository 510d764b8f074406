"""What docker/ must hold to without an engine: the image's user and size, and what docker-compose 1.29 can read."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dnipipe.keys import KeyRing
from tests.launch.conftest import ROOT, environment

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (extra: dev): the compose files were not checked")

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCKER = ROOT / "docker"
COMPOSE = sorted(path.name for path in DOCKER.glob("compose*.yaml"))
# of a service; what docker-compose 1.29 does not know, it refuses
SERVICE = (
    "build cap_add command depends_on dns_opt entrypoint environment healthcheck hostname image init networks ports "
    "profiles restart stop_grace_period user volumes"
)


def read(name: str) -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text())
    return made


@pytest.mark.parametrize("name", COMPOSE)
def test_old_and_new_compose_can_read_it(name: str) -> None:
    top = read(name)
    assert {key for key in top if not key.startswith("x-")} <= {"services", "networks", "volumes"}
    for service in top["services"].values():
        assert set(service) <= set(SERVICE.split())


@pytest.mark.parametrize("name", COMPOSE)
def test_nothing_is_open_to_other_hosts(name: str) -> None:
    for service in read(name)["services"].values():
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))
        assert service.get("networks") in (["pipeline"], ["screen"])
        assert service["networks"] == ["pipeline"] or "dnipipe stage" not in str(service.get("command"))


@pytest.mark.parametrize("name", COMPOSE)
def test_the_use_stands_at_the_top(name: str) -> None:
    use = rf"# .*:  docker compose -f docker/{re.escape(name)} up( .*)?\n"
    assert re.match(use, (DOCKER / name).read_text())


def test_torchrun_starts_a_node_for_each_stage() -> None:
    nodes = read("compose.torchrun.yaml")["services"]
    for name, node in nodes.items():
        assert node["hostname"] == name  # what the others look for
        assert f"--nnodes {len(nodes)} --nproc-per-node 1" in node["command"]
        assert "--rdzv-endpoint node0:" in node["command"] and node["init"]


def test_each_stage_is_a_container_that_comes_back_and_is_looked_after() -> None:
    settings = tomllib.loads((DOCKER / "demo.toml").read_text())
    top = read("compose.yaml")
    stages = {name: one for name, one in top["services"].items() if name.startswith("stage")}
    assert list(stages) == [f"stage{k}" for k in range(settings["pipeline"]["stages"])]
    assert settings["service"]["addresses"] == [f"{name}:7000" for name in list(stages)[:-1]]
    for index, one in enumerate(stages.values()):
        assert f"dnipipe stage --index {index} --no-restart /demo.toml" in one["command"]
        assert one["restart"] == "on-failure" and one["init"] and one["networks"] == ["pipeline"]
        assert f"--healthy --index {index}" in one["healthcheck"]["test"]
    assert top["networks"]["pipeline"]["internal"]


def test_the_keys_are_there_before_any_stage_and_no_stage_can_change_them() -> None:
    settings = tomllib.loads((DOCKER / "demo.toml").read_text())
    services = read("compose.yaml")["services"]
    where, count = settings["security"]["keys"], settings["pipeline"]["stages"]
    for k in range(count):
        made, stage = services[f"keys{k}"], services[f"stage{k}"]
        assert f"dnipipe keys new {where} --stage $$STAGE" in made["command"] and made["environment"] == {"STAGE": k}
        assert made["volumes"] == [f"public:{where}/public", f"secret{k}:{where}/secret"]
        assert [each for each in stage["volumes"] if where in each] == [f"{each}:ro" for each in made["volumes"]]
        assert set(stage["depends_on"]) == {f"keys{j}" for j in range(count)}
        assert all(each == {"condition": "service_completed_successfully"} for each in stage["depends_on"].values())


@pytest.mark.parametrize("stage", range(4))
def test_a_secret_key_is_seen_by_its_own_stage_and_who_makes_it_alone(stage: int) -> None:
    top = read("compose.yaml")
    volumes = {name: {each.split(":")[0] for each in one.get("volumes", ())} for name, one in top["services"].items()}
    assert {name for name, seen in volumes.items() if f"secret{stage}" in seen} == {f"keys{stage}", f"stage{stage}"}
    assert volumes[f"stage{stage}"] == {"runs", "./demo.toml", "public", f"secret{stage}"}
    assert f"secret{stage}" in top["volumes"]


def test_a_pair_is_made_once_for_each_stage(tmp_path: Path) -> None:
    """The command of the services, where the folders stand that they have mounted, and then once more."""
    services = read("compose.yaml")["services"]
    (tmp_path / "public").mkdir()
    for k in 2 * [0, 1]:
        (tmp_path / f"{k}").mkdir(exist_ok=True)
        if not (tmp_path / f"{k}" / "public").exists():
            (tmp_path / f"{k}" / "public").symlink_to(tmp_path / "public")
        command = services[f"keys{k}"]["command"].replace("$$", "$").replace("/keys", str(tmp_path / f"{k}"))
        subprocess.run(shlex.split(command), env=environment(STAGE=str(k)), check=True, timeout=60)
    assert sorted(path.name for path in (tmp_path / "public").iterdir()) == ["stage-0-1.key", "stage-1-1.key"]
    for k in (0, 1):
        (secret,) = (tmp_path / f"{k}" / "secret").iterdir()
        assert secret.name == f"stage-{k}-1.key" and secret.stat().st_mode & 0o777 == 0o600
    zero, one = KeyRing(tmp_path / "0", 0), KeyRing(tmp_path / "1", 1)
    assert zero.keys(1) == [one.public] and one.keys(0) == [zero.public]


def test_what_a_volume_of_keys_is_mounted_on_is_the_users_own() -> None:
    """A new volume takes its owner from there, and the user could not write into root's."""
    text = (DOCKER / "Dockerfile").read_text()
    assert "install -d -o dnipipe -g dnipipe -m 0700 /runs /keys /keys/public /keys/secret\n" in text


def test_the_faults_hit_each_stage() -> None:
    text = (DOCKER / "chaos.sh").read_text()
    faults = re.findall(r'"(kill|pause|cut|slow) (\d)"', text[text.index("for each in") :])
    assert len(faults) >= 6 and {stage for _, stage in faults} == {"0", "1", "2", "3"}
    last = re.findall(r'last="(\w+) (\d)"', text)  # where a link can be delayed, or else
    assert sorted(last) == [("delay", "2"), ("kill", "2")] and '"$last"; do' in text
    for kind, _ in [*faults, *last]:
        assert f"{kind}_stage() {{" in text


def test_the_image_runs_as_nobody_special_and_knows_no_index_by_itself() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    assert re.findall(r"^USER (.*)", text, re.MULTILINE) == ["dnipipe"]
    assert "ARG BASE=python:3.11-slim-bookworm" in text and "-c constraints.txt" in text
    assert not re.findall(r"https?://[^/\s]+", text) and "ARG TORCH_INDEX=\n" in text


def test_what_the_image_is_made_of_is_sent_to_the_engine() -> None:
    words = set((ROOT / ".dockerignore").read_text().split("\n"))
    copied = re.findall(r"^COPY (.*) \S+$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    for word in " ".join(copied).split():
        assert f"!{word}" in words and (ROOT / word).exists()
