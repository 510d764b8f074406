"""torchrun starts all ranks again when one has died, and they go on from the newest checkpoint that is complete.

dnipipe train, dnipipe.Run ─► killed behind a checkpoint ─► one more start, in the same folder, of the batches behind it
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import SMALL
from tests.launch.conftest import ROOT, environment, free_port

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

TOTAL, EVERY = 300, 20  # batches; a checkpoint every so many
ONE_HOST, SEVERAL = str(ROOT / "launch" / "torchrun.sh"), str(ROOT / "launch" / "multinode.sh")
OURS = {**SMALL, "pipeline.stages": 2, "train.batches": TOTAL, "eval.sample": 0, "transport.timeout": 30}
SCRIPT = """
import os, sys
import torch, torch.nn as nn, torch.nn.functional as F
import dnipipe
torch.manual_seed(0)
x, y = torch.randn(8 * {total}, 8), torch.randint(4, (8 * {total},))
model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4))
run = dnipipe.Run(model, stages=2, loss=F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, 0.1),
                  output={{"dir": sys.argv[1]}}, checkpoint={{"every": {every}}}, transport={{"timeout": 30.0}})
summary = run.fit(list(zip(x.split(8), y.split(8), strict=True)))
if {dies} and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    os.kill(os.getpid(), 9)
finite = sum(p.isfinite().all().item() for p in run.model().parameters())
sys.stdout.write(f"behind fit: {{finite}} tensors\\n")  # in one piece, since the other rank writes too
"""


class World:
    """Ranks under torchrun's agents, which may start them again once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, folder / "said"
        self.agents: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str, agents: int = 1, **more: str) -> None:
        """`command` becomes torchrun."""
        ours = environment(RESTARTS="1", STAGES="2", **more)
        with self.said.open("a") as said:
            self.agents = [
                subprocess.Popen(command, stdout=said, stderr=said, env=ours, start_new_session=True)
                for _ in range(agents)
            ]

    def until(self, what: str, happens: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not happens():
            all_there = all(agent.poll() is None for agent in self.agents)
            assert all_there and time.monotonic() < end, f"{what}: {self.said.read_text()[-2000:]}"
            time.sleep(0.01)

    def until_saved(self) -> None:
        self.until("a checkpoint", lambda: any(self.folder.rglob("manifest.json")))

    def run(self) -> Path:
        """The folder of the one run that there is."""
        (found,) = {path.parents[2] for path in self.folder.rglob("manifest.json")}.union(
            path.parent for path in self.folder.rglob("summary.json")
        )
        return found

    def kill(self, rank: int) -> None:
        agents = [agent.pid for agent in self.agents]
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                mine = parent in agents and f"\0RANK={rank}\0".encode() in (entry / "environ").read_bytes()
            except OSError:
                continue
            if mine:
                os.kill(int(entry.name), signal.SIGKILL)
                return
        raise AssertionError(f"no rank {rank}: {self.said.read_text()[-2000:]}")

    def statuses(self) -> set[int]:
        return {agent.wait(150) for agent in self.agents}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    for agent in made.agents:
        agent.terminate()  # it ends its ranks
    for agent in made.agents:
        agent.wait(60)


def words(**more: object) -> list[str]:
    named = {**OURS, "checkpoint.every": EVERY, **{name.replace("__", "."): value for name, value in more.items()}}
    return [f"--{name}={value}" for name, value in named.items()]


def script(world: World, dies: bool) -> list[str]:
    """One that trains; `dies`: rank 1 is killed behind its fit, once."""
    path = world.folder / "train.py"
    path.write_text(SCRIPT.format(total=TOTAL, every=EVERY, dies=dies))
    torchrun = ["torchrun", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    return [*torchrun, str(path), str(world.folder / "runs")]


def went_on(world: World) -> None:
    """The run came to its end, and its last start trained what was behind a checkpoint of the first."""
    assert world.statuses() == {0}, world.said.read_text()[-3000:]
    trained = json.loads((world.run() / "summary.json").read_text())["train"]["batches"]
    assert 0 < trained < TOTAL and (TOTAL - trained) % EVERY == 0


@pytest.mark.parametrize(("rank", "named"), [(0, True), (1, False)], ids=["output.run", "output.dir"])
def test_a_death_starts_all_ranks_again_from_the_newest_checkpoint(world: World, rank: int, named: bool) -> None:
    where = {"output__run": world.folder / "run"} if named else {"output__dir": world.folder / "runs"}
    world.start(ONE_HOST, *words(**where))
    world.until_saved()
    world.kill(rank)
    went_on(world)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_on_several_hosts_likewise(world: World, rank: int) -> None:
    """Two agents on loopback: each counts the deaths of its own ranks only."""
    hosts = {"HEAD": f"127.0.0.1:{free_port()}", "NODES": "2", "ADDRESS": "127.0.0.1"}
    world.start(SEVERAL, *words(output__dir=world.folder / "runs"), agents=2, **hosts)
    world.until_saved()
    world.kill(rank)
    went_on(world)


def test_a_script_goes_on_likewise_and_behind_its_fit(world: World) -> None:
    world.start(*script(world, dies=False))
    world.until_saved()
    world.kill(1)
    went_on(world)
    assert world.said.read_text().count("behind fit: 6 tensors") == 2  # in each of the ranks


def test_a_fit_that_had_come_to_its_end_is_not_made_again(world: World) -> None:
    """Its script died behind it."""
    world.start(*script(world, dies=True))
    assert world.statuses() == {0}, world.said.read_text()[-3000:]
    assert json.loads((world.run() / "summary.json").read_text())["train"]["batches"] == TOTAL
    said = world.said.read_text()
    assert said.count("data    the loader given to fit") == 1 and said.count("behind fit: 6 tensors") >= 2


def test_a_death_in_the_last_evaluation_is_made_good_by_that_alone(world: World) -> None:
    run = world.folder / "run"
    world.start(ONE_HOST, *words(output__run=run, checkpoint__every=0, train__batches=20))
    world.until_saved()
    world.kill(1)
    assert world.statuses() == {0}, world.said.read_text()[-3000:]
    told = json.loads((run / "summary.json").read_text())
    assert told["train"]["batches"] == 0 and told["batch"] == 20 and told["eval"]["loss"] > 0
    assert world.said.read_text().count("continued from batch 20") == 1


def test_a_death_before_the_first_checkpoint_begins_anew_in_the_same_folder(world: World) -> None:
    run = world.folder / "run"
    world.start(ONE_HOST, *words(output__run=run, checkpoint__every=0, train__batches=TOTAL))
    world.until("training begins", (run / "metrics" / "stage-1.jsonl").exists)
    world.kill(1)
    assert world.statuses() == {0}, world.said.read_text()[-3000:]
    assert json.loads((run / "summary.json").read_text())["train"]["batches"] == TOTAL


def test_a_folder_that_was_refused_is_not_resumed_by_the_restart(world: World) -> None:
    """It holds another run: that torchrun tries again makes it no run of this world."""
    run = world.folder / "run"
    world.start(ONE_HOST, *words(output__run=run, train__batches=20))
    assert world.statuses() == {0}
    before = (run / "summary.json").read_bytes()
    world.start(ONE_HOST, *words(output__run=run, train__batches=40))
    assert world.statuses() == {1}
    assert world.said.read_text().count(f"{run} holds a run already: continue it with --resume {run}") >= 2
    assert (run / "summary.json").read_bytes() == before
