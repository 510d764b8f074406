"""How processes find one another: threads with the environment of processes, and a real c10d store on 127.0.0.1.

rank 0 ─┐
rank 1 ─┼──► the launcher's store (LoopbackRendezvous)         each test has a store of its own, on a free port
rank 2 ─┘
"""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.rendezvous import RendezvousParameters

from dnipipe import rendezvous
from dnipipe.errors import ConfigError, PeerStopped, WaitTimeout
from dnipipe.loopback import BACKEND, LOOPBACK, LoopbackRendezvous
from dnipipe.rendezvous import Rendezvous, socket_folder

Meet = Callable[..., Rendezvous]


@pytest.fixture
def store() -> Iterator[LoopbackRendezvous]:
    """The launcher's, with one agent."""
    handler = LoopbackRendezvous(RendezvousParameters(BACKEND, LOOPBACK, "test", 1, 1))
    yield handler
    assert handler.shutdown()


def port_of(store: LoopbackRendezvous) -> int:
    info = store.next_rendezvous().bootstrap_store_info
    assert info is not None
    return int(info.master_port)


@pytest.fixture
def meet(store: LoopbackRendezvous, monkeypatch: pytest.MonkeyPatch) -> Meet:
    """Rank `rank` of `world`, as if in a process of its own; other variables on top, None takes one away."""

    def one(rank: int = 0, world: int = 2, timeout: float = 60.0, **others: str | None) -> Rendezvous:
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "GROUP_WORLD_SIZE": "1",
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": str(port_of(store)),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            **others,
        }
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)
            return Rendezvous(timeout)

    return one


def all_at_once(meetings: list[Rendezvous], step: Callable[[Rendezvous], Any]) -> list[Any]:
    """What each one's step returned or raised, by rank; each in a thread of its own."""
    ends: list[Any] = [None] * len(meetings)

    def run(meeting: Rendezvous) -> None:
        try:
            ends[meeting.rank] = step(meeting)
        except BaseException as error:
            ends[meeting.rank] = error

    threads = [threading.Thread(target=run, args=(meeting,), daemon=True) for meeting in meetings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return ends


# -- one's place -------------------------------------------------------------------------------------------------


def test_a_process_knows_its_place_from_its_environment(meet: Meet) -> None:
    meeting = meet(1, 3, GROUP_WORLD_SIZE="2", TORCHELASTIC_RESTART_COUNT="4")
    assert (meeting.rank, meeting.world, meeting.machines, meeting.incarnation) == (1, 3, 2, 4)
    plain = meet(1, 3, GROUP_WORLD_SIZE=None, TORCHELASTIC_RESTART_COUNT=None)
    assert (plain.machines, plain.incarnation) == (1, 0)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_started_in_another_way_is_said(meet: Meet, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"not started by torchrun or dnipipe train: '{name}' is missing"):
        meet(**{name: None})


def test_a_number_that_is_none_is_said(meet: Meet) -> None:
    with pytest.raises(ConfigError, match=r"not started by torchrun.*'first'"):
        meet(RANK="first")


def test_a_store_that_nobody_made_is_a_timeout(meet: Meet) -> None:
    with socket.socket() as unused:
        unused.bind((LOOPBACK, 0))  # bound and not listening: nobody else can have the port meanwhile
        with pytest.raises(WaitTimeout, match=r"rank 1 waited 0\.3 s for the store of the launcher"):
            meet(1, timeout=0.3, MASTER_PORT=str(unused.getsockname()[1]))


def test_another_one_hears_nothing_of_the_one_before(meet: Meet) -> None:
    """Two fits of a script under torchrun."""
    both = meet(0), meet(1)
    both[0].publish("word", "hello")
    later = [meeting.another(0.3) for meeting in both]
    with pytest.raises(WaitTimeout):
        later[1].get("word", "stage 0")
    later[0].publish("word", "again")
    assert (later[1].get("word", "stage 0"), both[1].get("word", "stage 0")) == ("again", "hello")


def test_without_an_agents_store_rank_0_makes_it(meet: Meet) -> None:
    """As under torchrun's static rendezvous."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = str(probe.getsockname()[1])
    own = {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": None}
    first, second = meet(0, **own), meet(1, **own)
    first.publish("word", "hello")
    assert second.get("word", "stage 0") == "hello"


# -- the store ---------------------------------------------------------------------------------------------------


def test_who_serves_the_store_is_the_last_to_go(meet: Meet) -> None:
    with socket.create_server((LOOPBACK, 0)) as free:
        port = str(free.getsockname()[1])
    own = {"TORCHELASTIC_USE_AGENT_STORE": None, "MASTER_PORT": port}
    meetings = [meet(0, **own), meet(1, **own)]
    left: list[int] = []
    first = threading.Thread(target=lambda: (meetings[0].leave(), left.append(0)), daemon=True)
    first.start()
    first.join(0.3)
    assert first.is_alive()
    left.append(1)  # before it leaves: the other may be gone before this thread has its next turn
    meetings[1].leave()
    first.join(60)
    assert left == [1, 0]


def test_with_an_agents_store_nobody_waits_to_go(meet: Meet) -> None:
    meet(0, timeout=0.1).leave()


def test_the_launchers_store_listens_on_loopback_only(store: LoopbackRendezvous) -> None:
    """All of 127.0.0.0/8 is this machine: a store on every interface would answer at 127.0.0.2."""
    with socket.create_connection((LOOPBACK, port_of(store)), timeout=10):
        pass
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port_of(store)), timeout=10)


def test_what_is_published_is_found_and_an_earlier_start_is_not(meet: Meet) -> None:
    """After a restart, the keys of the processes before it are still in the agent's store."""
    meet(0).publish("endpoint/0", "ipc:///λ/0")
    assert meet(1).get("endpoint/0", "stage 0") == "ipc:///λ/0"
    with pytest.raises(WaitTimeout):
        meet(1, timeout=0.1, TORCHELASTIC_RESTART_COUNT="1").get("endpoint/0", "stage 0")


def test_a_get_that_waits_too_long_says_for_whom_and_what(meet: Meet) -> None:
    with pytest.raises(WaitTimeout) as raised:
        meet(2, timeout=0.1).get("endpoint/1", "stage 1")
    assert str(raised.value) == "stage 2 waited 0.1 s for stage 1 to publish its endpoint/1 (transport.timeout)"


# -- agreement ---------------------------------------------------------------------------------------------------


def test_what_stage_0_makes_is_for_all(meet: Meet) -> None:
    ends = all_at_once([meet(k, 3) for k in range(3)], lambda one: one.agree(lambda: f"plan of {one.rank}\nλ"))
    assert ends == ["plan of 0\nλ"] * 3


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConfigError("no such folder"), "stage 0: no such folder"),
        (KeyError("x"), "stage 0: KeyError: 'x'"),
        (KeyboardInterrupt(), "stage 0: KeyboardInterrupt"),
    ],
)
def test_if_stage_0_fails_the_others_know_why(meet: Meet, error: BaseException, told: str) -> None:
    def fails() -> str:
        raise error

    ends = all_at_once([meet(k, 3) for k in range(3)], lambda one: one.agree(fails))
    assert ends[0] is error
    assert [(type(end), str(end)) for end in ends[1:]] == [(PeerStopped, told)] * 2


def test_a_word_of_stage_0_that_begins_like_a_failure_is_none(meet: Meet) -> None:
    ends = all_at_once([meet(k) for k in range(2)], lambda one: one.agree(lambda: "failed stage 0: not really"))
    assert ends == ["failed stage 0: not really"] * 2


def test_what_an_earlier_start_agreed_on_is_known_to_a_later_one(meet: Meet) -> None:
    """The newest of those that agreed: one that failed first has decided nothing."""

    def fails() -> str:
        raise ConfigError("no such folder")

    assert meet(0).earlier("agreement") is None
    meet(0).agree(lambda: "first of all")
    assert [meet(k).earlier("agreement") for k in range(2)] == [None, None]
    again = [meet(k, TORCHELASTIC_RESTART_COUNT="1") for k in range(2)]
    assert [one.earlier("agreement") for one in again] == ["first of all"] * 2
    with pytest.raises(ConfigError):
        again[0].agree(fails)
    assert meet(0, TORCHELASTIC_RESTART_COUNT="2").earlier("agreement") == "first of all"
    meet(0, TORCHELASTIC_RESTART_COUNT="2").agree(lambda: "third")
    assert meet(1, TORCHELASTIC_RESTART_COUNT="3").earlier("agreement") == "third"


def test_agents_that_count_differently_come_to_one_start(meet: Meet) -> None:
    """On several machines: who was ended because another died was not restarted, its own agent says."""
    for start in range(3):
        meetings = [meet(k, 3, TORCHELASTIC_RESTART_COUNT=str(start * (k == 1))) for k in range(3)]
        assert all_at_once(meetings, lambda one: one._counted()) == [start] * 3


def test_one_that_knocked_and_died_is_not_taken_for_the_one_in_its_place(
    meet: Meet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "AGAIN", 0.1)
    first, second = meet(0), meet(1)
    second._all.set("knock/1", "of one that is dead")
    assert all_at_once([first], lambda one: _end(one, timeout=0.2)) == [
        "stage 0 waited 0.2 s for stage 1 to come (transport.timeout)"
    ]
    assert all_at_once([meet(0), second], lambda one: one._counted()) == [1, 1]


def _end(one: Rendezvous, timeout: float) -> str:
    one.timeout = timeout
    with pytest.raises(WaitTimeout) as raised:
        one._counted()
    return str(raised.value)


@pytest.mark.parametrize(("machines", "restarts", "counts"), [("2", "1", True), ("1", "1", False), ("2", "0", False)])
def test_it_is_counted_where_several_agents_may_start_all_again(
    meet: Meet, monkeypatch: pytest.MonkeyPatch, machines: str, restarts: str, counts: bool
) -> None:
    monkeypatch.setattr(Rendezvous, "_counted", lambda one: 7)
    found = meet(0, GROUP_WORLD_SIZE=machines, TORCHELASTIC_MAX_RESTARTS=restarts)
    assert found.incarnation == (7 if counts else 0)
    found.publish("word", "hello")
    assert found._of(found.incarnation).get("word") == b"hello"


# -- together ----------------------------------------------------------------------------------------------------


def test_none_goes_on_before_all_are_there(meet: Meet) -> None:
    passed = threading.Event()
    early: list[bool] = []

    def step(one: Rendezvous) -> None:
        with one.together("built"):
            if one.rank == 2:
                for rank in (0, 1):
                    one.get(f"built/{rank}", f"stage {rank}")  # both stand behind their step
                early.append(passed.wait(0.2))
        passed.set()

    assert all_at_once([meet(k, 3) for k in range(3)], step) == [None] * 3
    assert early == [False] and passed.is_set()


def test_if_one_fails_all_end_and_name_it(meet: Meet) -> None:
    error = OSError("no room")

    def step(one: Rendezvous) -> None:
        with one.together("built"):
            if one.rank == 1:
                raise error

    ends = all_at_once([meet(k, 3) for k in range(3)], step)
    assert ends[1] is error
    assert [(type(end), str(end)) for end in (ends[0], ends[2])] == [(PeerStopped, "stage 1: OSError: no room")] * 2


def test_who_waits_for_a_promise_learns_of_the_failure(meet: Meet) -> None:
    def step(one: Rendezvous) -> None:
        with one.together("built", f"endpoint/{one.rank}"):
            if one.rank == 0:
                raise OSError("no address")
            one.made("endpoint/0", 0)

    ends = all_at_once([meet(k) for k in range(2)], step)
    assert isinstance(ends[1], PeerStopped) and str(ends[1]) == "stage 0: OSError: no address"


def test_steps_have_names_of_their_own(meet: Meet) -> None:
    """Having been built is not having finished."""

    def step(one: Rendezvous) -> None:
        with one.together("built"):
            pass
        if one.rank == 0:
            one.timeout = 0.1
            with one.together("finished"):
                pass

    ends = all_at_once([meet(k) for k in range(2)], step)
    assert isinstance(ends[0], WaitTimeout) and "for stage 1 to publish its finished/1" in str(ends[0])
    assert ends[1] is None


# -- addresses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machines", "scheme", "chosen", "expected"),
    [
        ("1", "auto", "", "ipc:///sockets/3"),
        ("1", "ipc", "", "ipc:///sockets/3"),
        ("1", "tcp", "", "tcp://127.0.0.1:*"),
        ("1", "tcp", "192.0.2.7", "tcp://192.0.2.7:*"),
        ("2", "auto", "192.0.2.7", "tcp://192.0.2.7:*"),
        ("2", "auto", "fd00::7", "tcp://[fd00::7]:*"),
        ("2", "auto", "", "tcp://127.0.0.1:*"),  # the master is 127.0.0.1 itself: two agents on one machine
    ],
)
def test_where_a_stage_listens(meet: Meet, machines: str, scheme: str, chosen: str, expected: str) -> None:
    meeting = meet(3, 4, GROUP_WORLD_SIZE=machines)
    assert meeting.address(scheme, chosen, Path("/sockets")) == expected


class Probe:
    """A socket that has a route: from `own` to whatever it connects to."""

    own = ""
    connected: tuple[Any, ...] = ()

    def __init__(self, *kind: int) -> None:
        assert kind[1] == socket.SOCK_DGRAM  # so that connecting sends nothing

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def connect(self, target: tuple[Any, ...]) -> None:
        Probe.connected = target

    def getsockname(self) -> tuple[str, int]:
        return (self.own, 40000)


@pytest.mark.parametrize(
    ("master", "own", "expected"),
    [("192.0.2.1", "192.0.2.7", "tcp://192.0.2.7:*"), ("fd00::1", "fd00::7", "tcp://[fd00::7]:*")],
)
def test_on_several_machines_it_is_the_address_that_reaches_the_master(
    meet: Meet, monkeypatch: pytest.MonkeyPatch, master: str, own: str, expected: str
) -> None:
    meeting = meet(1, GROUP_WORLD_SIZE="2")
    meeting.master = master
    monkeypatch.setattr(Probe, "own", own)
    monkeypatch.setattr(socket, "socket", Probe)
    assert meeting.address("auto", "", Path("/sockets")) == expected
    assert Probe.connected[0] == master


def test_a_masters_name_that_means_loopback_here_is_refused(meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some systems write their own name behind 127.0.1.1 in /etc/hosts: on the master, its name leads nowhere else."""
    meeting = meet(0, GROUP_WORLD_SIZE="2")
    meeting.master = "trainer-0"
    found = (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.1.1", 9))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [found])
    with pytest.raises(ConfigError, match=r"trainer-0, the master's name, is 127\.0\.1\.1 here.*transport\.address"):
        meeting.address("auto", "", Path("/sockets"))
    assert meeting.address("auto", "192.0.2.7", Path("/sockets")) == "tcp://192.0.2.7:*"  # the way out


def test_only_this_user_may_enter_the_folder_of_the_sockets() -> None:
    before = os.umask(0)
    try:
        with socket_folder() as name:
            assert stat.S_IMODE(Path(name).stat().st_mode) == 0o700
    finally:
        os.umask(before)
    assert not Path(name).exists()
