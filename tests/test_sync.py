"""Synchronous training: one stage in this process, and whole runs over real processes and gloo.

stage 0 ──Labels 1──► stage 1 ──Labels 1──► stage 2        and micro-batches both ways, by torch's own schedule
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dnipipe import checkpoint, cli, gloo, models, split
from dnipipe.beside import NOWHERE, Beside
from dnipipe.config import Sync, load
from dnipipe.errors import ConfigError, DataError, MessageError, NonFiniteLoss
from dnipipe.gradient_rules import RULES
from dnipipe.labels import IGNORED
from dnipipe.messages import Activation, Labels
from dnipipe.metrics import StageMetrics
from dnipipe.optim import Descent
from dnipipe.randomness import reseed
from dnipipe.sync import SMALLER, SyncStage, microbatches
from tests.test_processes import ENDLESS, plain, processes_of, start, summary, train, until_training, words
from tests.test_rendezvous import Meet, meet, store

__all__ = ["meet", "store"]  # fixtures

SGD = {"rule__name": "sync", "optimizer__name": "sgd", "optimizer__lr": 0.1}  # Adam makes a step of what is only noise


# -- micro-batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "asked", "stages", "samples", "found"),
    [
        ("1f1b", 0, 4, 32, 8),  # 2 K
        ("1f1b", 0, 3, 32, 4),  # 6 does not divide it, 5 neither
        ("1f1b", 0, 4, 9, 9),  # 3 would be fewer than K
        ("1f1b", 0, 1, 7, 1),
        ("1f1b", 16, 4, 32, 16),
        ("gpipe", 0, 4, 9, 3),
        ("gpipe", 2, 4, 32, 2),
        ("gpipe", 0, 4, 11, 1),
    ],
)
def test_a_batch_is_cut_into_equal_parts(schedule: str, asked: int, stages: int, samples: int, found: int) -> None:
    assert microbatches(Sync(schedule, asked), stages, samples) == found  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schedule", "asked", "samples", "message"),
    [
        ("1f1b", 5, 32, "sync.microbatches = 5 .* batches of 32 samples: .* use one of 4, 8, 16, 32"),
        ("1f1b", 2, 32, "at least 4; use one of 4, 8"),
        ("1f1b", 0, 3, "at least 4; use larger batches, or gpipe"),
        ("gpipe", 64, 32, "use one of 1, 2, 4"),
    ],
)
def test_what_does_not_divide_the_batch_is_refused(schedule: str, asked: int, samples: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        microbatches(Sync(schedule, asked), 4, samples)  # type: ignore[arg-type]


# -- one stage, the whole model ----------------------------------------------------------------------------------


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))


def batch(number: int, samples: int = 12, features: int = 8) -> Activation:
    torch.manual_seed(number)
    return Activation(number, torch.randn(samples, features), torch.randint(3, (samples,)))


def stage_of(
    module: nn.Sequential, loss: Callable[..., Tensor] = F.cross_entropy, beside: Beside = NOWHERE
) -> SyncStage:
    first = batch(1)
    plan, measured = split.plan(module, 1, (), first.x, first.y, 3), StageMetrics(0, 1)
    rule = RULES["sync"].build(load(None, ["--rule.name=sync"]), lambda: pytest.fail("it predicts nothing"))
    descent = Descent(torch.optim.SGD(module.parameters(), 0.1))
    return SyncStage(
        Sync(microbatches=3), plan, 0, 1, module, rule, descent, measured, loss=loss, seed=7, beside=beside
    )


@pytest.fixture
def joined(meet: Meet) -> Iterator[Callable[..., SyncStage]]:
    """Stages in a process group of this process alone."""

    @contextmanager
    def group() -> Iterator[Callable[..., SyncStage]]:
        with gloo.joined(meet(world=1, timeout=20.0), "run", ""):

            def one(**options: object) -> SyncStage:
                stage = stage_of(model(), **options)  # type: ignore[arg-type]
                stage.join(20.0)
                return stage

            yield one

    with group() as made:
        yield made


def test_a_step_is_that_of_the_micro_batches_in_turn(joined: Callable[..., SyncStage]) -> None:
    """Dropout's masks too: they are drawn anew for each batch, from seed, layer and batch id."""
    stage, alone = joined(), model()
    optimizer = torch.optim.SGD(alone.parameters(), 0.1)
    for number in (1, 2):
        seen = batch(number)
        assert list(stage.handle(seen)) == []
        optimizer.zero_grad()
        reseed(7, 0, number)
        for x, y in zip(seen.x.chunk(3), seen.y.chunk(3), strict=True):
            (F.cross_entropy(alone(x), y) / 3).backward()
        optimizer.step()
    for ours, plainly in zip(stage.module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, plainly)
    assert stage.updates == 2 and stage.metrics.totals()["samples"] == 24


def test_ignored_labels_weigh_nothing_in_whichever_micro_batch_they_are(joined: Callable[..., SyncStage]) -> None:
    """Of three of four samples each: four labels count, then one, then none."""
    stage, alone, seen = joined(), model(), batch(1)
    alone[2].p = stage.module[2].p = 0.0  # whose mask a micro-batch draws for itself
    seen.y[5:] = IGNORED
    list(stage.handle(seen))
    F.cross_entropy(alone(seen.x), seen.y).backward()
    torch.optim.SGD(alone.parameters(), 0.1).step()
    for ours, plainly in zip(stage.module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, plainly)


def test_a_smaller_batch_is_left_out_and_counted(joined: Callable[..., SyncStage]) -> None:
    stage = joined()
    before = [p.clone() for p in stage.module.parameters()]
    list(stage.handle(batch(1, samples=8)))
    assert all(torch.equal(p, was) for p, was in zip(stage.module.parameters(), before, strict=True))
    assert stage.last_batch == 1 and stage.updates == 0
    assert stage.metrics.totals()[f"skipped.{SMALLER}"] == 1 and stage.metrics.totals()["samples"] == 0


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (batch(4, samples=13), r"batch 4 is int64 \[13\], and the first was int64 \[12\]: rule.name = sync has static"),
        (batch(4, features=9), r"batch 4 is float32 \[12, 9\], and the first was float32 \[12, 8\]"),
        (Activation(4, batch(4).x.double(), batch(4).y), r"batch 4 is float64 \[12, 8\], and the first was float32"),
    ],
    ids=["samples", "features", "dtype"],
)
def test_a_batch_of_another_shape_is_refused_by_name(odd: Activation, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(stage_of(model()).handle(odd))


def test_a_loss_that_is_not_finite_stops_before_any_update(joined: Callable[..., SyncStage]) -> None:
    stage = joined(loss=lambda h, y: F.cross_entropy(h, y) / 0)
    with pytest.raises(NonFiniteLoss, match=r"the loss is inf at batch 1: lower optimizer.lr"):
        list(stage.handle(batch(1)))
    assert stage.updates == 0


def test_an_error_of_the_model_stays_what_it_was(joined: Callable[..., SyncStage]) -> None:
    """It is a RuntimeError, as gloo's are, and no neighbour is to blame."""
    stage = joined(loss=lambda h, y: F.cross_entropy(h @ h, y))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        list(stage.handle(batch(1)))


def test_a_device_that_gloo_cannot_send_from_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pipeline.device = cuda with rule.name = sync"):
        stage_of(model(), beside=Beside(torch.device("cuda"), lines=False))


def test_order_and_kind_of_what_comes_are_held(joined: Callable[..., SyncStage]) -> None:
    stage = joined()
    list(stage.handle(batch(2)))
    with pytest.raises(MessageError, match="received batch 2 after batch 2"):
        list(stage.handle(batch(2)))
    stage.index = 1
    with pytest.raises(MessageError, match=r"stage 1 cannot handle a Activation with rule.name = sync"):
        list(stage.handle(batch(3)))
    with pytest.raises(MessageError, match="received batch 1"):
        list(stage.handle(Labels(1, batch(1).y)))


def test_a_group_that_is_there_already_is_not_taken(joined: Callable[..., SyncStage], meet: Meet) -> None:
    with pytest.raises(ConfigError, match="destroy it before"), gloo.joined(meet(world=1), "other", ""):
        pass


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("0.0.0.0", "all interfaces"),
        ("::", "all interfaces"),
        ("192.0.2.1", "can be reached by other machines.*another rule.*security.private_network"),
    ],
)
def test_addresses_that_are_refused(meet: Meet, address: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says), gloo.joined(meet(world=1), "run", address):
        pass


def test_on_a_private_network_the_address_must_still_be_one_of_this_machine(meet: Meet) -> None:
    says = r"cannot listen on 192\.0\.2\.1"
    with pytest.raises(ConfigError, match=says), gloo.joined(meet(world=1), "run", "192.0.2.1", private=True):
        pass


# -- whole runs --------------------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "settings",
    [{"pipeline__stages": 4}, {"pipeline__stages": 2, "sync__schedule": "gpipe", "sync__microbatches": 4}],
    ids=["1f1b", "gpipe"],
)
def test_sync_over_processes_is_plain_autograd(tmp_path: Path, settings: dict[str, object]) -> None:
    """And leaves what every run leaves: a summary, metrics, checkpoints to export."""
    run = tmp_path / "run"
    status, out, err = train(run, **SGD, **settings, eval__every=20, checkpoint__every=20)
    assert status == 0, err
    close(checkpoint.weights(run), plain(50, **SGD))
    told = summary(run)
    assert told["rule"] == "sync" and told["train"]["samples"] == 400  # type: ignore[index]
    assert told["eval"]["loss"] < 5.4  # type: ignore[index]
    stages = told["stage"]
    assert isinstance(stages, list)
    assert all(s["batches"] == 50 and s["seconds"]["forward"] > 0 and s["seconds"]["backward"] > 0 for s in stages)
    assert "evaluation at batch 20" in out and "rule sync" in out and "sample" in out
    assert all((run / "metrics" / f"stage-{k}.jsonl").read_text() for k in range(len(stages)))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["00000020", "00000040", "00000050"]
    assert cli.main(["export", str(run), "-o", str(tmp_path / "model.safetensors")]) == 0
    models.build(load(None, words())).load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")


@pytest.mark.processes
@pytest.mark.timeout(180)
def test_a_run_goes_on_with_another_number_of_stages_and_under_another_rule(tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, _, err = train(run, **SGD, train__batches=15, pipeline__stages=3)
    assert status == 0, err
    for end, changed in ((30, ["--pipeline.stages=2"]), (50, ["--rule.name=wait"])):
        process = start("train", "--resume", str(run), f"--train.batches={end}", *changed)
        _, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
    close(checkpoint.weights(run), plain(50, **SGD))


@pytest.mark.processes
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("number", "says"),
    [(signal.SIGKILL, "stage 1 (rank 1, pid {pid}): killed by SIGKILL"), (signal.SIGSTOP, "WaitTimeout: stage")],
)
def test_a_stage_that_is_gone_ends_the_run_and_nobody_waits_for_ever(
    tmp_path: Path, number: signal.Signals, says: str
) -> None:
    """Stages listen on 127.0.0.1 only, and a wait within a step has the limit of all waits."""
    run = tmp_path / "run"
    process = start("train", *words(output__run=run, **{**SGD, **ENDLESS}, transport__timeout=20))
    until_training(run, stages=3)
    pids = processes_of(run)
    assert {address for pid in pids.values() for address in listening(pid)} == {"0100007F"}
    os.kill(pids[1], number)
    while number is signal.SIGSTOP and processes_of(run).keys() != {1}:  # all others end by themselves
        time.sleep(0.1)
    if number is signal.SIGSTOP:
        os.kill(pids[1], signal.SIGCONT)  # and the launcher ends this one
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("dnipipe: first failure: ") and says.format(pid=pids[1]) in last, err
    assert not processes_of(run)


def listening(pid: int) -> set[str]:
    """Addresses on which the process listens for tcp, as /proc has them."""
    links = [link for link in Path(f"/proc/{pid}/fd").iterdir() if link.exists() or link.is_symlink()]
    inodes = {os.readlink(link).removeprefix("socket:[").removesuffix("]") for link in links}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


SCRIPT = """
import os, sys, time, torch, torch.nn as nn, torch.nn.functional as F
import dnipipe
time.sleep(1.1 * int(os.environ.get("RANK", 0)))  # under torchrun: a new folder's name is another one a second later
torch.manual_seed(0)
relu = nn.ReLU(inplace=True)                                             # where two of the stages begin
model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), relu, nn.Linear(16, 16), relu, nn.Linear(16, 3))
x = torch.randn(90, 8); y = x[:, :3].argmax(1)
loader = [(x[i:i + 32], y[i:i + 32]) for i in range(0, 90, 32)]          # the last batch is ragged
run = dnipipe.Run(model, stages=[2, 4], loss=F.cross_entropy, optimizer=lambda p: torch.optim.Adam(p, 1e-2),
                  rule="sync", output={"dir": sys.argv[1], "quiet": True}, train={"seed": 3})
summary = run.fit(loader, loader, epochs=20)
loss = F.cross_entropy(run.model().eval()(x), y).item()
same = abs(loss - summary["eval"]["loss"]) < 1e-5
skipped = [stage["reasons"] for stage in summary["stage"]]
sys.stdout.write(f"after {summary['train']['samples']} {same} {loss < 0.9} {skipped}\\n")  # in one piece: others write
"""


@pytest.mark.processes
@pytest.mark.timeout(180)
@pytest.mark.parametrize("launcher", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3")])
def test_a_users_own_model_trains_synchronously(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    """Evaluations take the ragged batch, training leaves it out."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    process = start(str(script), str(tmp_path / "runs"), program=launcher)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    skipped = [{SMALLER: 20}] * 3
    assert out.count(f"after 1280 True True {skipped}") == (3 if launcher else 1), out + err
    assert f"skipped 20 batches in stage 1: {SMALLER}" in out
