"""Independent stages as processes: they find one another, and each may die and come back while the others go on."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dnipipe.service.ledger import unexplained
from dnipipe.service.place import unhealthy
from tests.service.conftest import Services

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

Make = Callable[..., Services]
FENCED = re.compile("has taken its place|a newer process writes")  # what it looks at first is chance


def exact(run: Services) -> None:
    """Each id at most once at each stage, and every gap between two stages has its reason in a ledger."""
    passed = run.account(2).last  # of a run that goes on: what is still under way is not counted
    accounts = [run.account(k) for k in range(3)]
    for stage, account in enumerate(accounts):
        assert list(account.violations()) == [], stage
    for before, after in itertools.pairwise(accounts):
        assert [batch for batch in unexplained(before, after) if batch <= passed] == []


def test_stages_start_in_any_order_and_train_every_batch(services: Make) -> None:
    run = services(60)
    run.start(2)
    time.sleep(1)
    run.start(1)
    run.start(0)
    assert run.statuses() == [0, 0, 0]
    exact(run)
    for stage in range(3):
        account = run.account(stage)
        assert account.begun == list(range(1, 61)) and account.ended and account.alone == set()
    assert 1 < run.loss() < 6
    stages = json.loads((run.run / "summary.json").read_text())["stage"]
    assert all(stage["seconds"]["serialize"] > 0 for stage in stages)


def test_a_stage_that_waits_at_its_start_is_alive_and_ends_with_its_supervisor(services: Make) -> None:
    run = services(60)
    for stage in (0, 1):  # who decides waits for the next stage, who does not for what was decided
        run.start(stage)
        run.until("it waits, and is alive", lambda stage=stage: not unhealthy(run.run, stage, 60.0))  # type: ignore[misc]
        pid = run.pid(stage)
        os.kill(run.supervisors[stage].pid, signal.SIGKILL)
        run.until("it ends", lambda pid=pid: not Path(f"/proc/{pid}").exists())  # type: ignore[misc]


def test_the_others_go_on_while_a_stage_is_dead_and_it_comes_back(services: Make) -> None:
    run = services(1500, "unguided_batches = 100000")
    run.start(0, 1, 2)
    run.until_trained(2, 100)
    run.until("stage 1 saves", lambda: any((run.run / "stage-1" / "checkpoints").glob("*/manifest.json")))
    os.kill(run.supervisors[1].pid, signal.SIGSTOP)  # or stage 1 is back before stage 0 has trained as many alone
    run.kill(1)
    run.until("stage 0 trains alone", lambda: len(run.account(0).alone) >= 20)
    os.kill(run.supervisors[1].pid, signal.SIGCONT)
    assert run.statuses() == [0, 0, 0]
    exact(run)
    back = run.account(1)
    assert len(back.starts) == 2 and 0 < back.starts[1]["from"] <= back.starts[1]["before"]
    assert run.account(0).begun == list(range(1, 1501))
    assert max(back.begun) > back.starts[1]["before"]
    assert "killed by SIGKILL; started again" in run.said[1].read_text()
    assert 1 < run.loss() < 6


GUESSES = 'unguided_batches = 40\n[rule]\nname = "synthetic"\nforward_unlock = true'


def test_the_stage_behind_a_dead_one_goes_on_with_guesses(services: Make) -> None:
    run = services(900, GUESSES)
    run.start(0, 1, 2)
    run.until_trained(2, 100)
    os.kill(run.supervisors[1].pid, signal.SIGSTOP)  # or stage 1 is back before stage 2 has drawn as many
    run.kill(1)
    run.until("stages 0 and 2 go on as long as they may", lambda: min(len(run.account(0).alone), drawn(run)) == 40)
    last = [run.account(stage).last for stage in (0, 2)]
    time.sleep(2)
    assert [run.account(stage).last for stage in (0, 2)] == last and drawn(run) == 40
    os.kill(run.supervisors[1].pid, signal.SIGCONT)
    assert run.statuses() == [0, 0, 0]
    exact(run)
    assert run.account(2).last == 900 and len(run.account(2).begun) > 800
    said = run.said[2].read_text()
    assert "going on with 40 batches that are drawn here" in said and "40 batches were drawn here meanwhile" in said
    assert 1 < run.loss() < 6


def drawn(run: Services) -> int:
    return len(run.account(2).drawn)


def test_with_stage_0_dead_the_others_go_on_with_guesses(services: Make) -> None:
    run = services(900, GUESSES)
    run.start(0, 1, 2)
    run.until_trained(2, 100)
    os.kill(run.supervisors[0].pid, signal.SIGSTOP)
    run.kill(0)
    run.until("stage 1 draws what it may", lambda: len(run.account(1).drawn) == 40)
    run.until("stage 2 trains it, too", lambda: run.account(2).last == run.account(1).last)
    os.kill(run.supervisors[0].pid, signal.SIGCONT)
    assert run.statuses() == [0, 0, 0]
    exact(run)
    assert run.account(2).drawn == set() and run.account(0).last == run.account(2).last == 900
    own = run.account(1).drawn  # stage 0 does not repeat them; one may be drawn while the two greet one another
    assert len(own & set(run.account(0).begun)) <= 1


def test_a_stage_waits_when_it_has_trained_its_batches_alone(services: Make) -> None:
    run = services(100_000, "unguided_batches = 7")
    run.start(0, 1, 2)
    run.until_trained(2, 30)
    os.kill(run.supervisors[1].pid, signal.SIGKILL)  # nobody starts it again
    run.kill(1)
    run.until("stage 0 trains alone", lambda: len(run.account(0).alone) == 7)
    last = run.account(0).last
    time.sleep(2)
    assert run.account(0).last == last
    run.start(1)
    run.until_trained(2, last + 1)
    exact(run)


def test_stage_0_comes_back_behind_what_the_others_have_trained(services: Make) -> None:
    run = services(1200)
    run.start(0, 1, 2)
    run.until_trained(2, 100)
    run.kill(0)
    assert run.statuses() == [0, 0, 0]
    exact(run)
    assert len(run.account(0).starts) == 2
    assert run.account(2).begun == sorted(set(run.account(2).begun))
    assert run.account(0).last == 1200


def test_a_hung_stage_is_missed_and_ends_itself(services: Make) -> None:
    run = services(100_000, "unguided_batches = 100000\nhung = 4.0\nsilence = 1.0")
    run.start(0, 1, 2)
    run.until_trained(2, 50)
    run.kill(1, signal.SIGSTOP)
    run.until("stage 0 misses it", lambda: bool(run.account(0).alone))
    run.until("so does stage 2", lambda: "stage 1 has said nothing for" in run.said[2].read_text())
    run.kill(1, signal.SIGCONT)
    before = run.account(2).last
    run.until_trained(2, before + 50)
    exact(run)


def test_one_that_is_asked_to_end_saves_and_ends_alone(services: Make) -> None:
    run = services(100_000, "unguided_batches = 100000")
    run.start(0, 1, 2)
    run.until_trained(2, 50)
    run.supervisors[1].terminate()
    run.until("stage 1 ends", lambda: run.supervisors[1].poll() is not None)
    assert run.supervisors[1].returncode == 0
    assert "asked to end: saved at batch" in run.said[1].read_text()
    assert run.supervisors[0].poll() is None and run.supervisors[2].poll() is None
    run.start(1)
    run.until_trained(2, run.account(1).last + 20)
    exact(run)
    assert run.account(1).undone == 0


def test_a_stage_whose_folder_was_removed_begins_anew_in_the_same_run(services: Make) -> None:
    run = services(100_000, "unguided_batches = 100000")
    run.start(0, 1, 2)
    run.until_trained(2, 50)
    run.kill(1)
    run.until("stage 1 comes back", lambda: len(run.account(1).starts) == 2)  # so its neighbours have heard of two
    run.until_trained(2, run.account(1).last + 20)
    run.supervisors[1].terminate()
    run.until("stage 1 ends", lambda: run.supervisors[1].poll() is not None)
    shutil.rmtree(run.run / "stage-1")
    before = run.account(2).last
    run.start(1)
    run.until_trained(2, before + 20)
    anew = run.account(1)
    assert len(anew.starts) == 1 and min(anew.begun) > before
    assert list(anew.violations()) == [] and list(run.account(2).violations()) == []
    assert [run.supervisors[k].poll() for k in range(3)] == [None] * 3


def test_a_second_process_takes_the_place_of_the_first_at_a_socket_file_and_of_one_that_is_stopped(
    services: Make,
) -> None:
    """The last stage listens nowhere, so that a newer process can begin while an older one still has its connection."""
    run = services(100_000, "unguided_batches = 100000", files=True)
    run.start(0, 1, 2)
    run.until_trained(2, 50)
    older = run.supervisors[-1] = run.supervisors.pop(1)
    run.start(1)
    run.until("the older process ends", lambda: older.poll() is not None)
    assert older.returncode == 0 and "has taken its place" in run.said[1].read_text()
    run.until_trained(2, run.account(1).last + 20)
    assert run.supervisors[1].poll() is None
    stopped, older = run.pid(2), run.supervisors.pop(2)
    run.supervisors[-2] = older
    os.kill(stopped, signal.SIGSTOP)
    before = run.account(2).last
    run.start(2)
    run.until_trained(2, before + 20)
    assert not FENCED.search(run.said[2].read_text())
    os.kill(stopped, signal.SIGCONT)
    run.until("the one that was stopped ends", lambda: older.poll() is not None)
    assert older.returncode == 0 and FENCED.search(run.said[2].read_text())
    run.until_trained(2, run.account(1).last + 20)
    exact(run)
    assert run.supervisors[2].poll() is None
