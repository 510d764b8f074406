"""Real processes over ZeroMQ: training, exactness, a killed stage, a signal, a resume, torchrun."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dnipipe import checkpoint, cli, data, models, optim
from dnipipe.config import load
from tests.conftest import SMALL

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

OURS = {
    **SMALL,
    "train.batches": 50,
    "eval.every": 0,
    "eval.sample": 5,
    "checkpoint.every": 0,
}
ENDLESS = {"train__batches": 1_000_000, "output__every": 0.2, "pipeline__stages": 3}  # one has neighbours on both sides


def words(**settings: object) -> list[str]:
    named = {key.replace("__", "."): value for key, value in settings.items()}
    return [f"--{name}={value}" for name, value in {**OURS, **named}.items()]


def start(
    *arguments: str, program: tuple[str, ...] = ("-m", "dnipipe"), cwd: Path | None = None
) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=cwd,
        start_new_session=True,
    )


def train(run: Path, *arguments: str, **settings: object) -> tuple[int, str, str]:
    process = start("train", *arguments, *words(output__run=run, **settings))
    out, err = process.communicate(timeout=150)
    return process.returncode, out, err


def summary(run: Path) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((run / "summary.json").read_text())
    return loaded


def processes_of(run: Path) -> dict[int, int]:
    """rank -> pid of the stage processes that work for this run."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
            environment = (entry / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        rank = re.search(r"\0RANK=(\d+)", "\0" + environment)
        if str(run) in command and rank:
            found[int(rank[1])] = int(entry.name)
    return found


def until_training(run: Path, stages: int, batch: int = 1) -> None:
    """Wait until the last stage has reported that it trained so many batches."""
    log = run / "metrics" / f"stage-{stages - 1}.jsonl"
    for _ in range(600):
        if log.exists() and any(json.loads(line)["batch"] >= batch for line in log.read_text().splitlines()):
            return
        time.sleep(0.1)
    raise AssertionError(f"{run} did not reach batch {batch} within 60 s")


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Temporary files, sockets among them, go to a folder that must be empty in the end. Its path is short: a socket's
    may have 107 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield
        assert [path.name for path in Path(folder).glob("dnipipe-*")] == []


def plain(batches: int, **settings: object) -> dict[str, torch.Tensor]:
    """One process, plain autograd, on the batches that stage 0 would draw."""
    config = load(None, words(**settings))
    torch.manual_seed(config.train.seed)
    model = models.build(config)
    loss, task = models.loss_of(config), data.load(config)
    optimizer = optim.factory(config)(model.parameters())
    for _, x, y in data.drawn(task, config.train.seed, 0, batches):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return dict(model.state_dict())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_wait_over_processes_is_plain_autograd_bitwise(tmp_path: Path, stages: int) -> None:
    """Proof (b): K processes, 50 batches, dropout off."""
    run = tmp_path / "run"
    settings = {"rule__name": "wait", "pipeline__stages": stages, "optimizer__name": "adam"}
    status, _, err = train(run, **settings)
    assert status == 0, err
    assert same(checkpoint.weights(run), plain(50, **settings))
    assert summary(run)["stages"] == stages


def test_over_gloo_it_is_plain_autograd_too(tmp_path: Path) -> None:
    run, settings = tmp_path / "run", {"rule__name": "wait", "pipeline__stages": 3}
    status, _, err = train(run, transport__kind="gloo", **settings)
    assert status == 0, err
    assert same(checkpoint.weights(run), plain(50, **settings))


def test_the_wire_rounds_over_processes_as_in_the_laboratory(tmp_path: Path) -> None:
    settings = {"rule__name": "wait", "wire__activations": "float16", "wire__gradients": "int8"}
    settings |= {"pipeline__stages": 3, "pipeline__boundaries": "2,4"}
    for kind in ("zmq", "local"):
        status, _, err = train(tmp_path / kind, transport__kind=kind, **settings)
        assert status == 0, err
    assert same(*(checkpoint.weights(tmp_path / kind) for kind in ("zmq", "local")))
    assert not same(checkpoint.weights(tmp_path / "zmq"), plain(50, rule__name="wait"))


def test_a_run_says_and_leaves_what_it_should(tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, out, err = train(run, eval__every=20, checkpoint__every=20, transport__scheme="tcp")
    assert status == 0, err
    told = summary(run)
    assert set(told) == {"stages", "rule", "batch", "finished", "train", "eval", "stage", "versions"}
    assert told["train"]["batches"] == 50 and told["train"]["samples"] == 400  # type: ignore[index]
    assert told["eval"]["loss"] < 5.4 and 0 < told["eval"]["accuracy"] < 1  # type: ignore[index]
    stages = told["stage"]
    assert isinstance(stages, list)
    assert [s["index"] for s in stages] == [0, 1, 2, 3] and all(s["batches"] == 50 for s in stages)
    assert all(s["cosine"] is not None and s["staleness"] >= 1 for s in stages[:3]) and stages[3]["cosine"] is None
    assert "bigram model" in out and "sample" in out and str(run) in out and "dnipipe export" in out
    assert not (run / "trace").exists()  # nobody asked for one
    assert all(len((run / "metrics" / f"stage-{k}.jsonl").read_text().splitlines()) > 0 for k in range(4))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["00000020", "00000040", "00000050"]

    weights = tmp_path / "model.safetensors"
    assert cli.main(["export", str(run), "-o", str(weights)]) == 0
    model = models.build(load(None, words()))
    model.load_state_dict(safetensors.torch.load_file(weights))


def test_a_run_cut_in_the_middle_and_resumed_equals_the_uncut_one(tmp_path: Path) -> None:
    """On rule wait, bitwise; cut by SIGTERM to the launcher. The uncut one is the laboratory's: one process."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = {"rule__name": "wait", "train__batches": 300, "model__dropout": 0.1, "pipeline__boundaries": "2,3,4"}
    status, _, err = train(whole, transport__kind="local", **settings)
    assert status == 0, err
    process = start("train", *words(output__run=cut, output__every=0.1, **settings))
    until_training(cut, stages=4, batch=20)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=40)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "stopped at batch" in out and f"--resume {cut}" in out, out + err
    assert time.monotonic() - asked < 30 and not processes_of(cut)
    batch = checkpoint.newest(cut).batch
    assert 20 <= batch < 300
    process = start("train", "--resume", str(cut))
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    assert f"continued from batch {batch}" in out
    assert same(checkpoint.weights(cut), checkpoint.weights(whole))


def test_a_run_goes_on_with_another_number_of_stages(tmp_path: Path) -> None:
    """From four to two, and on to three."""
    run = tmp_path / "run"
    settings = {"rule__name": "wait", "optimizer__name": "adam"}
    status, _, err = train(run, **{**settings, "train__batches": 20})
    assert status == 0, err
    for stages, end in ((2, 35), (3, 50)):
        process = start("train", "--resume", str(run), f"--pipeline.stages={stages}", f"--train.batches={end}")
        _, err = process.communicate(timeout=150)
        assert process.returncode == 0, err
        assert summary(run)["stages"] == stages
        assert same(checkpoint.weights(run), plain(end, **settings))


@pytest.mark.parametrize(("victim", "kind"), [(0, "zmq"), (1, "zmq"), (1, "gloo")])
def test_a_killed_stage_ends_the_run_and_is_named_last(tmp_path: Path, victim: int, kind: str) -> None:
    run = tmp_path / "run"
    process = start("train", *words(output__run=run, transport__kind=kind, **ENDLESS))
    until_training(run, stages=3)
    pids = processes_of(run)
    assert sorted(pids) == [0, 1, 2]
    os.kill(pids[victim], signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - killed < 10
    assert process.returncode == 1
    assert err.strip().splitlines()[-1] == (
        f"dnipipe: first failure: stage {victim} (rank {victim}, pid {pids[victim]}): killed by SIGKILL"
    )
    assert not processes_of(run)


def test_an_interrupt_while_it_starts_leaves_no_traceback(tmp_path: Path) -> None:
    """As a terminal does it: to all processes at once, while the last of them still imports torch."""
    run = tmp_path / "run"
    process = start("train", *words(output__run=run, pipeline__stages=2))
    for _ in range(1200):
        if sum("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in processes_of(run).values()) == 2:
            break
        time.sleep(0.05)
    assert not (run / "metrics").exists()  # none has begun
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=40)
    assert process.returncode == 128 + signal.SIGINT
    assert err == "" and not processes_of(run)


@pytest.mark.parametrize("kind", ["zmq", "gloo"])
def test_interrupting_one_stage_ends_all_in_order(tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    process = start("train", *words(output__run=run, transport__kind=kind, **ENDLESS))
    until_training(run, stages=3)
    os.kill(processes_of(run)[1], signal.SIGINT)
    out, err = process.communicate(timeout=40)
    assert process.returncode == 0, err
    assert "stopped at batch" in out
    assert checkpoint.newest(run).batch >= 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--rule.nam=x"], 2, "unknown setting rule.nam (did you mean rule.name?)"),
        (["--pipeline.stages=9", "--pipeline.boundaries="], 2, "9 stages, but the model has only 6 layers"),
        (["--data.name=mnist", "--model.name=mlp", "--data.root=/nowhere"], 2, "--data.root"),
        (["--optimizer.name=sgd", "--optimizer.lr=1e30", "--pipeline.stages=2"], 1, "holds NaN or infinity in batch 2"),
    ],
    ids=["setting", "stages", "data", "nan"],
)
def test_what_goes_wrong_is_one_line(tmp_path: Path, arguments: list[str], status: int, message: str) -> None:
    process = start("train", *words(output__run=tmp_path / "run"), *arguments)
    _, err = process.communicate(timeout=100)
    assert process.returncode == status, err
    assert message in err
    assert "Traceback" not in err and len(err.strip().splitlines()) == 1, err
    assert (tmp_path / "run").exists() == (status == 1)  # a run that never began leaves nothing behind


def test_torchrun_starts_the_same_program(tmp_path: Path) -> None:
    """Into one new folder, which is stage 0's."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dnipipe")
    process = start("train", *words(output__dir=tmp_path / "runs", pipeline__stages=2), program=torchrun)
    _, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("default-") and set(summary(run)) == {
        "stages",
        "rule",
        "batch",
        "finished",
        "train",
        "eval",
        "stage",
        "versions",
    }


def test_stages_of_different_configuration_are_refused(tmp_path: Path) -> None:
    """Two torchruns of one process each, whose flags differ in one setting."""
    run = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [
        start(
            "train",
            *words(output__run=run, pipeline__stages=2, transport__timeout=60),
            f"--optimizer.lr={lr}",
            program=(
                *("-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1"),
                *("--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "dnipipe"),
            ),
        )
        for rank, lr in enumerate(("0.001", "0.002"))
    ]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert all(process.returncode for process in both)
    assert "different settings: optimizer.lr=0.002 here, optimizer.lr=0.001 there" in "".join(errors)


SCRIPT = """
import os, sys, time, torch, torch.nn as nn, torch.nn.functional as F
import dnipipe
time.sleep(1.1 * int(os.environ.get("RANK", 0)))  # under torchrun: a new folder's name is another one a second later
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
x = torch.randn(90, 8); y = x[:, :3].argmax(1)
loader = [(x[i:i + 32], y[i:i + 32]) for i in range(0, 90, 32)]          # the last batch is ragged
run = dnipipe.Run(model, stages=3, loss=F.cross_entropy, optimizer=lambda p: torch.optim.Adam(p, 1e-2),
                  rule="synthetic", output={"dir": sys.argv[1], "quiet": True}, train={"seed": 3})
summary = run.fit(loader, loader, epochs=20)
trained = run.model().eval()
loss = F.cross_entropy(trained(x), y).item()
same = abs(loss - summary["eval"]["loss"]) < 1e-5
train, first = summary["train"], run.folder
again = run.fit(loader, loader)["train"]["batches"]  # in a folder of its own, in the same processes or in new ones
other = run.folder != first
# in one piece, since others write too
sys.stdout.write(f"after {train['batches']} {train['samples']} {same} {loss < 0.9} {again} {other}\\n")
"""


@pytest.mark.parametrize("launcher", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3")])
def test_a_users_own_model_runs_as_a_script_and_under_torchrun(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    process = start(str(script), str(tmp_path / "runs"), program=launcher)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    assert out.count("after 60 1800 True True 3 True") == (3 if launcher else 1), out + err
    assert len(list((tmp_path / "runs").iterdir())) == 2


WANDERER = """
import os, sys, torch, torch.nn as nn, torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
import dnipipe
os.chdir(sys.argv[1])  # as hydra does
torch.manual_seed(0)
x = torch.randn(256, 8)
data = TensorDataset(x, x[:, :3].argmax(1))
loader = DataLoader(data, 32, shuffle=True, num_workers=1, persistent_workers=True)
run = dnipipe.Run(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), stages=[2], loss=F.cross_entropy,
                  optimizer=lambda p: torch.optim.Adam(p, 1e-2), output={"run": "run", "every": 0.2})
run.fit(loader, epochs=int(sys.argv[2]))
sys.stdout.write(f"in {os.path.basename(os.getcwd())}\\n")
"""


def test_a_script_may_move_to_another_folder_before_it_trains(tmp_path: Path) -> None:
    """Its copies begin where it began, and the run is where it was named."""
    script, other = tmp_path / "train.py", tmp_path / "other"
    script.write_text(WANDERER)
    other.mkdir()
    process = start("train.py", str(other), "2", program=(), cwd=tmp_path)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0 and "in other" in out, err
    assert (other / "run" / "summary.json").exists()


def test_the_workers_of_a_loader_live_until_an_interrupted_run_has_saved(tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to all processes; those that were forked for the first batch, too."""
    script = tmp_path / "train.py"
    script.write_text(WANDERER)
    process = start(str(script), str(tmp_path), "100000", program=())
    deadline = time.monotonic() + 100
    while not list((tmp_path / "run").glob("metrics/stage-1.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert "stopped at batch" in out and "Traceback" not in err, out + err
    assert list((tmp_path / "run").glob("checkpoints/*/manifest.json"))
