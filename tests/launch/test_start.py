"""What launch/ starts really trains: one host, two (two agents on loopback), Slurm's job, the TrainJob's command."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT, WORDS, Together, environment, free_port, trained

LAUNCH = ROOT / "launch"
pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]


def test_one_host(tmp_path: Path, together: Together) -> None:
    command = [str(LAUNCH / "torchrun.sh"), *WORDS, f"--output.run={tmp_path}/run"]
    together(command, environment(STAGES="3"))
    trained(tmp_path / "run", stages=3)


def test_two_hosts(tmp_path: Path, together: Together) -> None:
    command = [str(LAUNCH / "multinode.sh"), *WORDS, f"--output.run={tmp_path}/run"]
    host = environment(HEAD=f"127.0.0.1:{free_port()}", NODES="2", STAGES_PER_NODE="2", ADDRESS="127.0.0.1")
    said = together(command, host, host)
    trained(tmp_path / "run", stages=4)
    assert sum("validation loss" in text for text in said) == 1  # the host of stage 0 says it


@pytest.mark.parametrize("missing", ["HEAD", "NODES"])
def test_what_a_host_must_be_told(missing: str) -> None:
    told = {"HEAD": "127.0.0.1:1", "NODES": "2", missing: ""}
    done = subprocess.run([LAUNCH / "multinode.sh"], env=environment(**told), capture_output=True, text=True)
    assert done.returncode != 0 and f"{missing}=" in done.stderr


def test_a_job_of_slurm(tmp_path: Path, together: Together) -> None:
    """With stand-ins for scontrol, which lists the hosts, and srun, which starts a task on each of the two."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    script(stand_ins / "scontrol", '[ "$*" = "show hostnames 127.0.0.[1-2]" ] && printf "127.0.0.1\\n127.0.0.2\\n"')
    script(stand_ins / "srun", 'shift; ADDRESS=127.0.0.1 "$@" & first=$!; ADDRESS=127.0.0.1 "$@" && wait $first')
    slurm = environment(
        SLURM_JOB_NODELIST="127.0.0.[1-2]",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_ID=str(os.getpid()),  # makes the port, below those that the system gives out
        SLURM_GPUS_ON_NODE="1",
        SLURM_SUBMIT_DIR=str(ROOT),
    )
    slurm["PATH"] = f"{stand_ins}:{slurm['PATH']}"
    copy = tmp_path / "slurm_script"  # as slurmd does
    copy.write_bytes((LAUNCH / "slurm.sbatch").read_bytes())
    together(["bash", str(copy), *WORDS, f"--output.run={tmp_path}/run"], slurm)
    trained(tmp_path / "run", stages=2)


def test_the_command_of_the_trainjob(tmp_path: Path, together: Together) -> None:
    """Under what Kubeflow's Trainer puts into the environment of each pod."""
    yaml = pytest.importorskip("yaml")
    trainer = yaml.safe_load((LAUNCH / "trainjob.yaml").read_text())["spec"]["trainer"]
    words = [*trainer["command"], *trainer["args"], f"--output.run={tmp_path}/run", *WORDS]
    port = str(free_port())
    pods = [
        environment(
            PET_NNODES=str(trainer["numNodes"]),
            PET_NPROC_PER_NODE=str(trainer["numProcPerNode"]),
            PET_NODE_RANK=str(rank),
            PET_MASTER_ADDR="127.0.0.1",
            PET_MASTER_PORT=port,
        )
        for rank in range(trainer["numNodes"])
    ]
    together(words, *pods)
    trained(tmp_path / "run", stages=4)


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\nset -eu\n{text}\n")
    path.chmod(0o755)
