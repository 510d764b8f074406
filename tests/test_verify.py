"""verify: what is equal is called so, and of what is not, the first name.

reference   a 1.0   b 2.0   c 3.0
weights     a 1.0   b 2.1   c 4.0      first b, by 0.1; largest 1.0, in c
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from dnipipe import cli, verify
from dnipipe.config import load
from dnipipe.data import Task
from dnipipe.jobs import job_of
from tests.test_processes import start, words

NAN = float("nan")


@pytest.mark.parametrize(
    ("found", "first", "by", "where"),
    [
        ([1.0, 2.0, 3.0], "", 0.0, ""),
        ([1.0, 2.0, 3.0 + 1e-12], "", 0.0, "c"),
        ([1.0, 2.1, 4.0], "b", 0.1, "c"),
        ([NAN, 2.0, 3.0], "a", float("inf"), "a"),
    ],
    ids=["equal", "rounding", "two", "nan"],
)
def test_a_difference_is_told_by_its_first_name_and_its_size(
    found: list[float], first: str, by: float, where: str
) -> None:
    told = verify.difference(named(found), named([1.0, 2.0, 3.0]))
    assert (told.first, told.where) == (first, where)
    assert told.by == pytest.approx(by, rel=1e-5)


def named(values: list[float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([value], dtype=torch.float64) for name, value in zip("abc", values, strict=True)}


def test_what_differs_by_nature_is_taken_away(tmp_path: Path) -> None:
    """Dropout, clipping, float32, evaluations, batches of other shapes; for BatchNorm micro-batches."""
    job = job_of(load(None, words(rule__name="blend", model__dropout=0.5, optimizer__clip=1.0, eval__every=5)))
    ragged = [(torch.randn(n, 2), torch.randint(3, (n,))) for n in (4, 4, 3, 4)]
    job = verify.replace(
        job,
        model=lambda: nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)),
        task=lambda: Task(ragged, ragged, None, "", None, None),
    )
    made = verify.prepared(job, 9, tmp_path / "run")
    settings, task = made.config, made.task()
    assert (settings.rule.name, settings.rule.stash) == ("sync", False)
    assert (settings.optimizer.clip, settings.eval.every) == (0, 0)
    assert (settings.sync.schedule, settings.sync.microbatches, settings.train.batches) == ("gpipe", 1, 9)
    assert task.validation is None and [len(x) for x, _ in task.train] == [4, 4, 4]
    assert all(x.dtype is torch.float64 and y.dtype is torch.int64 for x, y in task.train)
    model = made.model()
    assert isinstance(model, nn.Sequential) and isinstance(model[2], nn.Dropout)
    assert model[2].p == 0 and model[0].weight.dtype is torch.float64


class Recurrent(nn.Module):
    """An LSTM's output alone: an edge carries one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.LSTM(8, 8, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = self.layers(x)[0]
        return h


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),  # three dropout layers, and attention's own
        lambda: nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True),
        Recurrent,
    ],
    ids=["encoder", "attention", "lstm"],
)
def test_no_layer_drops_anything(layer: Callable[[], nn.Module], tmp_path: Path) -> None:
    """While the user's own model stays as it is."""
    theirs = layer()
    job = verify.replace(job_of(load(None, words())), model=lambda: theirs)
    ours = verify.prepared(job, 9, tmp_path / "run").model().train()
    x = torch.randn(4, 5, 8, dtype=torch.float64)
    inputs = (x, x, x) if isinstance(ours, nn.MultiheadAttention) else (x,)
    outputs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found = ours(*inputs)
        outputs.append(found[0] if isinstance(found, tuple) else found)
    assert torch.equal(*outputs)
    dropping = [m for m in theirs.modules() if getattr(m, "dropout", None) in (0.1, 0.5) or getattr(m, "p", 0.0) == 0.1]
    assert dropping and next(theirs.parameters()).dtype is torch.float32


def test_the_wire_is_as_it_begins_and_that_is_said(tmp_path: Path) -> None:
    rounded = job_of(load(None, words(wire__activations="int8", wire__gradients="bfloat16")))
    made = verify.prepared(rounded, 9, tmp_path / "run")
    assert not made.config.wire.changed
    assert made.aside == ("wire.activations = int8", "wire.gradients = bfloat16")
    assert verify.prepared(job_of(load(None, words())), 9, tmp_path / "run").aside == ()


@pytest.mark.parametrize("words", [["--batches", "0"], ["--batches", "few"]])
def test_a_number_of_batches_is_one(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["verify", *words])
    assert "expected a whole number, at least 1" in capsys.readouterr().err


@pytest.mark.processes
@pytest.mark.timeout(180)
def test_the_built_in_model_is_verified_on_the_command_line() -> None:
    """Whatever the file's rule is, and with Adam; and whatever goes by the wire, which would be the wire's rounding."""
    wire = {"rule__name": "synthetic", "wire__activations": "int8", "wire__gradient_every": 4}
    process = start("verify", *words(model__dropout=0.1, pipeline__stages=2, **wire), "--batches", "10")
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, out + err
    head, aside, wait, sync = out.splitlines()
    assert head == "verify  10 batches in float64, without dropout and optimizer.clip"
    assert aside.startswith("        left aside: wire.activations = int8, wire.gradient_every = 4; what is rounded")
    assert wait.startswith("wait    2 stages in one process: equal to one process; largest difference 0.0e+00")
    assert sync.startswith("sync    2 processes, 1f1b: equal to one process; largest difference ") and err == ""


SCRIPT = """
import dnipipe, torch, torch.nn as nn, torch.nn.functional as F

class Counting(nn.Module):
    calls = 0
    def forward(self, x):
        self.calls += self.training
        return x * (1 + 0.01 * self.calls)

class Two(nn.Module):
    def forward(self, x):
        return x, x > 0

class One(nn.Module):
    def forward(self, pair):
        return pair[0] * pair[1]

batches = [(torch.randn(12, 8), torch.randint(3, (12,))) for _ in range(4)]   # other ones in each process: no seed
equal = []
nets = [
    ((nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3)), batches),
    ((nn.Linear(8, 16), nn.BatchNorm1d(16), Counting(), nn.Linear(16, 3)), batches),
    ((One(), nn.Linear(8, 16), Two(), One(), nn.Linear(16, 3)), [((x, x > 0), y) for x, y in batches]),
]
for layers, data in nets:
    model = nn.Sequential(*layers)
    run = dnipipe.Run(model, stages=[3], loss=F.cross_entropy, optimizer=lambda p: torch.optim.Adam(p, 1e-2))
    equal.append(run.verify(data, 6))
print("equal", equal, next(model.parameters()).dtype)   # here comes the launching process alone
"""


@pytest.mark.processes
@pytest.mark.timeout(180)
def test_a_layer_with_a_hidden_state_is_found_out(tmp_path: Path) -> None:
    """A user's own model; BatchNorm in it is said, and does not hide it. Nor does what goes along an edge."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    process = start(str(script), program=())
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    lines = out.splitlines()
    assert lines[-1] == "equal [True, False, True] torch.float32"
    assert sum("1 is a BatchNorm, which sees one micro-batch at a time under sync" in line for line in lines) == 2
    (told,) = [line for line in lines if "NOT equal" in line]
    assert told.startswith("wait    2 stages in one process: NOT equal to one process: first 0.weight, by ")
    assert "a batch's forward is run twice" in lines[lines.index(told) + 1]
