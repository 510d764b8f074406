"""docker/chaos.sh as bash runs it, with stand-ins for the engine and for what it takes to delay a link.

They write down what they are told to do. The engine's stages have trained all their batches, and so each fault is due.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT

ENGINE = """
case "$*" in
    *" ps -q "* | *" ps -aq "*) echo "id-${*: -1}" ;;
    "inspect -f {{.State.Pid}} "*) echo "pid-${*: -1}" ;;
    "inspect "*) echo "exited 0" ;;
    "exec "*" tail "*) echo '{"begun": 2000, "time": 1.0}' ;;
    "exec "*) echo "docker $*" >>told; exit 137 ;;
    *"cat >/runs/disturbed/faults.jsonl") cat >faults.jsonl ;;
    *"python - /runs/disturbed /runs/undisturbed") cmp - report.py && echo "| kill |" && exit "$STATUS" ;;
    compose*) ;;
    *) echo "docker $*" >>told ;;
esac
"""
STANDS_IN = {
    "docker": ENGINE,
    "sleep": 'echo "sleep $*" >>told',
    "nsenter": 'echo "nsenter $*" >>told',
    "tc": "",
    "modprobe": "[ $2 = sch_netem ]",
    "id": "echo 0",
    "nproc": "echo 2",
}
TOOLS = ["bash", "cat", "cmp", "date", "dirname", "mktemp", "rm", "sed", "tail", "tee"]
DELAY = [
    "nsenter --net --target pid-id-stage2 tc qdisc add dev eth0 root netem delay 50ms",
    "sleep 3",
    "nsenter --net --target pid-id-stage2 tc qdisc del dev eth0 root",
]
KILL = ["docker exec id-stage2 sh -c kill -9 -1"]


class Chaos:
    """A copy of docker/, and a host that has the stand-ins and nothing else of what the script could want."""

    def __init__(self, folder: Path) -> None:
        self.docker, self.host = folder / "docker", folder / "host"
        shutil.copytree(ROOT / "docker", self.docker)
        self.host.mkdir()
        for name in TOOLS:
            (self.host / name).symlink_to(str(shutil.which(name)))
        for name, text in STANDS_IN.items():
            self.stands_in(name, text)

    def stands_in(self, name: str, text: str) -> None:
        (self.host / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
        (self.host / name).chmod(0o755)

    def run(self, status: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.host), "LONG": "3", "STATUS": str(status)}
        command = [str(self.host / "bash"), str(self.docker / "chaos.sh")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)

    def told(self) -> list[str]:
        """Without the waits until a fault is due."""
        return [line for line in (self.docker / "told").read_text().splitlines() if line != "sleep 1"]


@pytest.fixture
def chaos(tmp_path: Path) -> Chaos:
    return Chaos(tmp_path)


def test_it_makes_eight_faults_and_takes_each_back(chaos: Chaos) -> None:
    done = chaos.run()
    assert done.returncode == 0, done.stderr
    network = "dnipipe-chaos_pipeline"
    assert chaos.told() == [
        "docker exec id-stage1 sh -c kill -9 -1",
        *["docker pause id-stage2", "sleep 3", "docker unpause id-stage2"],
        f"docker network disconnect {network} id-stage3",
        "sleep 3",
        f"docker network connect --alias stage3 {network} id-stage3",
        *["docker update --cpus 0.1 id-stage0", "sleep 3", "docker update --cpus 2 id-stage0"],
        "docker exec id-stage3 sh -c kill -9 -1",
        "docker exec id-stage0 sh -c kill -9 -1",
        *["docker pause id-stage1", "sleep 3", "docker unpause id-stage1"],
        *DELAY,
    ]
    faults = [json.loads(line) for line in (chaos.docker / "faults.jsonl").read_text().splitlines()]
    assert [f"{each['fault']} {each['stage']}" for each in faults] == [
        *["kill 1", "pause 2", "cut 3", "slow 0", "kill 3", "kill 0", "pause 1", "delay 2"]
    ]
    assert all(each["begin"] <= each["end"] for each in faults)


@pytest.mark.parametrize(("lacks", "instead"), [("tc", None), ("modprobe", "exit 1"), ("id", "echo 1000")])
def test_where_the_host_cannot_delay_a_link_the_stage_is_killed(chaos: Chaos, lacks: str, instead: str | None) -> None:
    """No tool, no module of the kernel, not root."""
    (chaos.host / lacks).unlink()
    if instead:
        chaos.stands_in(lacks, instead)
    done = chaos.run()
    assert done.returncode == 0 and "delay: not on this host" in done.stdout
    assert chaos.told()[-1:] == KILL and not [line for line in chaos.told() if "nsenter" in line]
    assert '{"fault": "kill", "stage": 2,' in (chaos.docker / "faults.jsonl").read_text()


def test_the_report_is_kept_and_its_status_is_the_scripts(chaos: Chaos) -> None:
    done = chaos.run(status=1)
    assert done.returncode == 1
    assert (chaos.docker / "chaos.md").read_text() == "| kill |\n" and "| kill |\n" in done.stdout
