"""What a script can set of its run, dnipipe.Run: all that a file can, or it is refused where it stands."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import dnipipe
from dnipipe import checkpoint
from dnipipe.errors import ConfigError, SplitError, UsageError
from dnipipe.optim import Descent
from dnipipe.started import LAUNCHED

BATCHES = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(3)]


def a_run(optimizer: Any = lambda p: torch.optim.SGD(p, 0.1), **settings: Any) -> dnipipe.Run:
    """In the laboratory, if nothing else is said."""
    output = {"quiet": True, **settings.pop("output", {})}
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    here = {"transport": {"kind": "local"}, **settings}
    return dnipipe.Run(net, stages=[2], loss=F.cross_entropy, optimizer=optimizer, output=output, **here)


def settings_of(run: Path) -> dict[str, Any]:
    return checkpoint.newest(run).settings


def test_a_run_goes_into_the_folder_that_is_named(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    run = a_run(output={"run": str(mine), "dir": str(tmp_path / "runs")})
    told = run.fit(BATCHES)
    assert run.folder == mine and json.loads((mine / "summary.json").read_text()) == told
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(SystemExit) as end:  # in the laboratory as a stage of torchrun: with its status
        run.fit(BATCHES)
    assert end.value.code == 2
    run.fit(BATCHES, epochs=2, resume=mine)
    assert checkpoint.newest(mine).batch == 6


@pytest.mark.parametrize("rule", [{"name": "blend", "stash": False}, {"stash": False, "correction": 0.25}])
def test_a_rule_has_settings_of_its_own(rule: Mapping[str, Any], tmp_path: Path) -> None:
    """On top of what blend begins with."""
    a_run(rule=rule, output={"run": str(tmp_path / "run")}).fit(BATCHES)
    found = settings_of(tmp_path / "run")
    assert found["rule.name"] == "blend" and found["rule.stash"] is False and found["rule.lookahead"] == 10
    assert found["rule.correction"] == rule.get("correction", 0.5)


def test_a_schedule_of_the_scripts_own_is_no_constant_rate(tmp_path: Path) -> None:
    a_run(rule="blend", schedule=lambda batch: 1 / batch, output={"run": str(tmp_path / "run")}).fit(BATCHES)
    assert settings_of(tmp_path / "run")["rule.lookahead"] == 1


def test_a_limit_on_the_gradient_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []
    real = Descent.__init__

    def made(descent: Descent, optimizer: Any, schedule: Any, clip: float = 0.0, *rest: Any) -> None:
        limits.append(clip)
        real(descent, optimizer, schedule, clip, *rest)

    monkeypatch.setattr(Descent, "__init__", made)
    a_run(clip=1, rule="local", output={"run": str(tmp_path / "run")}).fit(BATCHES)
    assert set(limits) == {1.0} and settings_of(tmp_path / "run")["optimizer.clip"] == 1.0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rule": {"nam": "blend"}}, r"unknown setting rule\.nam"),
        ({"rule": {"name": "blend", "stash": 1}}, r"rule\.stash = 1: expected true or false"),
        ({"rule": 3}, r"rule\.name = 3"),
        ({"clip": -1.0}, r"optimizer\.clip = -1\.0: expected at least 0"),
        ({"optimizer": {"lr": 0.1}}, r"^optimizer is a dict: expected what makes one .*lambda.*clip=1\.0$"),
        (
            {"optimizer": torch.optim.SGD([torch.zeros(1)], 0.1)},
            r"^optimizer is a SGD: expected what makes one",
        ),
    ],
    ids=["name", "kind", "rule", "clip", "table", "optimizer"],
)
def test_what_does_not_fit_is_refused_at_once(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        a_run(**settings)


# -- in the launching process ------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The folders that the processes were told of, start by start; they do nothing but leave a summary."""
    told: list[list[str]] = []

    def launch(stages: int, command: Sequence[str], mark: str, where: str) -> int:
        told.append(json.loads(mark))
        assert stages == 2 and Path(told[-1][-1]).is_dir()
        Path(told[-1][-1], "summary.json").write_text("{}")
        return 0

    for name in ("RANK", "WORLD_SIZE", LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("dnipipe.run.launch", launch)
    monkeypatch.setattr("dnipipe.run._folders", [])
    monkeypatch.setattr("dnipipe.run._fits", 0)
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py"])
    return told


def test_the_processes_are_told_the_folder_that_is_named(
    launched: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is used already is refused before any starts; they then come through the same fit as it was here."""
    monkeypatch.setattr("time.strftime", lambda form: "20260101-120000")
    mine, runs = str(tmp_path / "mine"), str(tmp_path / "runs")
    named = a_run(transport={}, output={"run": mine})
    named.fit(BATCHES)
    with pytest.raises(ConfigError, match=f"output.run = {mine} holds a run already"):
        named.fit(BATCHES)
    for _ in range(2):
        a_run(transport={}, output={"dir": runs}).fit(BATCHES)
    stamp = f"{runs}/fit-20260101-120000"
    assert launched == [[mine], [mine, "", stamp], [mine, "", stamp, f"{stamp}-2"]]

    monkeypatch.setattr("dnipipe.run._fits", 0)
    monkeypatch.setenv(LAUNCHED, json.dumps(launched[-1]))
    assert named.fit(BATCHES) == {}
    with pytest.raises(UsageError, match="this fit was refused in the process that starts the others"):
        named.fit(BATCHES)
    assert len(launched) == 3


def test_more_stages_than_layers_are_refused_before_any_is_started(launched: list[list[str]], tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    run = dnipipe.Run(net, stages=3, loss=F.cross_entropy, optimizer=torch.optim.Adam, output={"dir": str(tmp_path)})
    with pytest.raises(SplitError, match="3 stages, but the model has only 2 layers"):
        run.fit(BATCHES)
    assert not launched and not list(tmp_path.iterdir())


# -- what a script's functions return ----------------------------------------------------------------------------


def with_a_scheduler(parameters: Any) -> Any:
    optimizer = torch.optim.SGD(parameters, 0.1)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1)


STRANGER = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("optimizer", "loss", "says"),
    [
        (with_a_scheduler, F.cross_entropy, "optimizer made a tuple: expected an optimizer"),
        (lambda p: torch.optim.LBFGS(p), F.cross_entropy, "optimizer made a LBFGS"),
        (lambda p: torch.optim.SGD(STRANGER.parameters(), 0.1), F.cross_entropy, "weights that are not this stage's"),
        (
            lambda p: torch.optim.SGD(p, 0.1),
            lambda h, y: F.cross_entropy(h, y, reduction="none"),
            "loss gave a tensor (8,) for an output (8, 3): expected one number",
        ),
        (lambda p: torch.optim.SGD(p, 0.1), lambda h, y: {"loss": F.cross_entropy(h, y)}, "loss gave a dict"),
    ],
)
def test_what_is_no_optimizer_and_no_loss_is_refused_in_a_line(
    optimizer: Any, loss: Any, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(optimizer, output={"dir": str(tmp_path)})
    run._loss = loss
    with pytest.raises(SystemExit) as end:
        run.fit(BATCHES)
    told = capsys.readouterr().err
    assert end.value.code == 2 and says in told and len(told.splitlines()) == 1


def test_a_section_that_a_script_has_no_use_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[data\] is for dnipipe train"):
        a_run(data={"batch": 7})


def test_a_setting_that_is_given_as_a_section_is_recognized() -> None:
    with pytest.raises(ConfigError, match=r"unknown section \[seed\] \(did you mean train\.seed\?\)"):
        a_run(seed=1)


# -- how long ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("said", "given", "passes"), [({}, None, 1), ({"epochs": 2}, None, 2), ({"epochs": 2}, 3, 3)])
def test_epochs_of_the_call_go_over_those_of_the_settings(
    said: dict[str, int], given: int | None, passes: int, tmp_path: Path
) -> None:
    told = a_run(train=said, output={"dir": str(tmp_path)}).fit(BATCHES, epochs=given)
    assert told["train"]["batches"] == passes * len(BATCHES)


class Stream:
    """Batches whose number nobody knows before they are drawn."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches, self.begun = batches, 0

    def __iter__(self) -> Any:
        self.begun += 1
        return iter(self.batches)


def test_a_stream_is_trained_on_for_as_many_batches_as_are_asked_for(tmp_path: Path) -> None:
    """Again from its start at its end; and a resumed run goes on where it stood."""
    stream: Any = Stream(BATCHES)
    cut = a_run(train={"batches": 4}, output={"run": str(tmp_path / "cut")})
    assert cut.fit(stream)["train"]["batches"] == 4
    again = a_run(train={"batches": 8})
    assert again.fit(stream, resume=tmp_path / "cut")["train"]["batches"] == 4
    whole = a_run(train={"batches": 8}, output={"run": str(tmp_path / "whole")})
    whole.fit(Stream(BATCHES))  # type: ignore[arg-type]
    found = [checkpoint.weights(tmp_path / name) for name in ("cut", "whole")]
    assert found[0].keys() == found[1].keys()


def test_a_stream_needs_an_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        a_run(output={"dir": str(tmp_path)}).fit(Stream(BATCHES))  # type: ignore[arg-type]
    assert end.value.code == 2 and "set train.batches" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        a_run(train={"batches": 5}, output={"dir": str(tmp_path)}).fit(iter(BATCHES))  # type: ignore[arg-type]
    assert end.value.code and "begins no second time" in capsys.readouterr().err


def test_the_processes_of_a_later_fit_hear_what_verify_has_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script may choose its rule by that, and all of its copies must choose the same."""
    monkeypatch.setattr("dnipipe.run._fits", 0)
    monkeypatch.setattr("dnipipe.run._folders", told := [])
    monkeypatch.setattr("dnipipe.run.launch", lambda *arguments, **options: 0)
    for equal in (True, False):
        monkeypatch.setattr("dnipipe.verify.read", lambda run, equal=equal: (equal, []))
        assert a_run(transport={}).verify(BATCHES) is equal
    monkeypatch.setenv(LAUNCHED, json.dumps([*told, "a later fit's"]))
    monkeypatch.setattr("dnipipe.run._fits", 0)
    assert [a_run(transport={}).verify(BATCHES) for _ in range(2)] == [True, False]
