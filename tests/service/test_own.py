"""A user's own script as independent stages: `dnipipe stage train.py --index K`, and the whole model at the end.

stage 0 ──► stage 1 (killed, started again) ──► stage 2        each runs train.py up to its fit
RUN/stage-0, RUN/stage-1, RUN/stage-2  ──► dnipipe export RUN ──► one plain model
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn as nn

from dnipipe import cli
from dnipipe.service.own import run_script
from dnipipe.started import ALONE, Alone, alone
from tests.service.conftest import Services
from tests.service.test_stages import exact

SCRIPT = """
import time
import dnipipe, torch, torch.nn as nn, torch.nn.functional as F

class Slow(nn.Module):
    def forward(self, x):
        time.sleep(0.004)
        return x

x, y = torch.randn(640, 12), torch.randint(3, (640,))
x[torch.arange(640), y] += 4.0
batches = list(zip(x.split(16), y.split(16)))
model = nn.Sequential(Slow(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
run = dnipipe.Run(
    model,
    stages=[3, 5],
    loss=F.cross_entropy,
    optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-2),
    service={"save_every": 0.3, "patience": 60.0},
    output={"every": 0.2},
)
run.fit(batches, batches[:10], epochs=9)
print("behind fit")
"""


def exported(run: Path, out: Path) -> nn.Module:
    assert cli.main(["export", str(run), "-o", str(out)]) == 0
    model = nn.Sequential(nn.Identity(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    model.load_state_dict(safetensors.torch.load_file(out))
    return model


def right(model: nn.Module) -> float:
    """Of new data like the script's."""
    x, y = torch.randn(600, 12), torch.randint(3, (600,))
    x[torch.arange(600), y] += 4.0
    return (model(x).argmax(1) == y).float().mean().item()


@pytest.mark.processes
@pytest.mark.timeout(240)
def test_a_stage_of_a_script_dies_and_comes_back_and_the_whole_model_is_exported(
    services: Callable[..., Services], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = services(0, script=SCRIPT)
    run.start(2, 0, 1)
    run.until_trained(1, 60)
    run.kill(1)
    assert run.statuses() == [0, 0, 0]
    assert not any("behind fit" in path.read_text() for path in run.said.values())
    exact(run)
    assert [run.account(k).last for k in range(3)] == [360] * 3
    assert "killed by SIGKILL; started again at once" in run.said[1].read_text()
    healthy = [sys.executable, "-m", "dnipipe", "stage", str(run.config), "--index", "1", "--healthy", *run.words]
    assert "stage 1" in subprocess.run(healthy, capture_output=True, text=True).stdout

    assert right(exported(run.run, tmp_path / "cut.safetensors")) > 0.9
    shutil.rmtree(run.run / "checkpoints")  # as on machines that share no folder
    assert right(exported(run.run, tmp_path / "own.safetensors")) > 0.9
    for k in (1, 2):
        shutil.rmtree(run.run / f"stage-{k}")
    capsys.readouterr()
    assert cli.main(["export", str(run.run), "-o", str(tmp_path / "none.safetensors")]) == 2
    assert "has no state of stages 1, 2: copy" in capsys.readouterr().err


REFUSED = {
    "runs/mine": ('output={"run": "runs/mine"}', "output.run = runs/mine in the script, RUN when it was started"),
    "restarts": ('service={"restarts": 3}', "--service.restarts 3"),
    "addresses": ('service={"patience": 9.0}', "service.addresses = [] with pipeline.stages = 2"),
    "one process": ('transport={"kind": "local"}, service={"addresses": ["h:1"]}', "need transport.kind = zmq"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_a_stage_by_itself_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said, refusal = REFUSED[name]
    assert started(f"run = dnipipe.Run(model, [1], {said}, **rest)\nrun.fit(batches)", tmp_path, monkeypatch) == 2
    told = capsys.readouterr().err
    assert refusal.replace("RUN", str(tmp_path / "run")) in told


HEAD = """
import dnipipe, torch, torch.nn as nn
model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
batches = [(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))]
rest = {"loss": nn.functional.cross_entropy, "optimizer": lambda p: torch.optim.SGD(p, 0.1)}
"""


def started(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Its exit status, as stage 1."""
    script = folder / "train.py"
    script.write_text(HEAD + text)
    for name, value in (("argv", []), ("path", [*sys.path])):
        monkeypatch.setattr(sys, name, value)
    monkeypatch.setenv(ALONE, "")  # what run_script sets goes again behind the test
    monkeypatch.chdir(folder)
    return run_script(script, Alone(1, str(folder / "run"), 20, ()), 0)


def test_a_resume_and_a_verify_are_not_for_one_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for call in ("fit(batches, resume='runs/old')", "verify(batches)"):
        with pytest.raises(Exception, match=r"leave it out|without dnipipe stage"):
            started(f"dnipipe.Run(model, [1], **rest).{call}", tmp_path, monkeypatch)


def test_a_script_that_comes_to_no_fit_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exception, match=r"came to its end without a Run\.fit\(\), in which it would have been stage 1"):
        started("", tmp_path, monkeypatch)
    assert started("import sys; sys.exit(3)", tmp_path, monkeypatch) == 3
    assert started("import sys; sys.exit('no')", tmp_path, monkeypatch) == 1
    with pytest.raises(Exception, match=r"cannot read nowhere\.py"):
        run_script(Path("nowhere.py"), Alone(0, "run", 20, ()), 0)


def test_every_stage_draws_the_same_initial_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for _ in range(2):
        torch.rand(3)
        text = "import pathlib; pathlib.Path('drawn').write_text(str(model[0].weight.tolist())); raise SystemExit(0)"
        assert started(text, tmp_path, monkeypatch) == 0
        drawn.append((tmp_path / "drawn").read_text())
    assert drawn[0] == drawn[1]


def test_how_a_script_was_started_is_known_in_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert alone() is None
    told = Alone(2, "runs/mine", 5, ("--train.seed", "3"))
    monkeypatch.setenv(ALONE, told.to_json())
    assert alone() == told and json.loads(os.environ[ALONE])["index"] == 2
