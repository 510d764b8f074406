"""compare: what counts of a run's metrics, and what is advised.

           loss no higher      alike            higher
faster     the rule            the rule         time or samples
alike      the rule            a draw           sync
slower     samples or time     sync             sync
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dnipipe
from dnipipe import cli, compare
from dnipipe.compare import Side
from dnipipe.config import load
from dnipipe.errors import ConfigError, UsageError
from dnipipe.started import ALONE, Alone
from tests.test_processes import start, words

MIB = 2**20
ROOT = Path(__file__).parents[1]


def line(batch: int, batches: int, seconds: float, samples: int | None = None) -> dict[str, float]:
    return {
        "batch": batch,
        "batches": batches,
        "seconds": seconds,
        "samples": 10 * batches if samples is None else samples,
    }


def test_what_it_says_of_other_links_is_what_was_measured() -> None:
    measured = json.loads((ROOT / "benchmarks" / "time_to_loss" / "results" / "map.json").read_text())
    found: dict[str, list[tuple[int, str]]] = {}
    for row in measured:
        named = row["first"].replace("delayed-4", "delayed, rule.accumulate 4")  # as a person would set it
        found.setdefault(row["task"], []).append((round(row["samples"]), named))
    assert {task: list(links) for task, links in compare.FIRST.items()} == found
    said = list(compare.elsewhere(3.4))
    assert said[0].startswith("a gradient came 3 samples later") and len(said) == 1 + len(found)


def test_the_rate_leaves_out_the_warm_up_and_the_end() -> None:
    lines = [
        line(10, 10, 5.0),  # slow at first
        line(25, 15, 3.0),  # begins within the first fifth
        line(60, 35, 1.0),
        line(90, 30, 1.0),
        line(100, 10, 9.0),  # the evaluation is in it
        line(100, 0, 1.0),
    ]
    assert compare.rate(lines, 100) == (350 + 300) / 2.0
    assert compare.rate(lines[:2], 100) is None and compare.rate([], 100) is None


@pytest.mark.parametrize(
    ("rate", "loss", "says"),
    [
        (
            200.0,
            1.9,
            "choose blend: blend trains 2.00 times as many samples a second, and after 50 batches its loss is",
        ),
        (200.0, 2.01, "choose blend: "),
        (200.0, 2.2, "choose blend where time counts and sync where samples do: "),
        (102.0, 1.8, "choose blend: "),
        (102.0, 2.01, "a draw, and sync is the simpler: blend trains 1.02 times as many samples a second, and after"),
        (102.0, 2.2, "choose sync: "),
        (50.0, 1.8, "choose sync where time counts and blend where samples do: "),
        (50.0, 2.01, "choose sync: "),
        (
            50.0,
            2.2,
            "choose sync: blend trains 0.50 times as many samples a second, and after 50 batches its loss is 10.0",
        ),
        (200.0, None, "choose blend: blend trains 2.00 times as many samples a second"),
    ],
)
def test_the_advice_is_by_rate_and_loss(rate: float, loss: float | None, says: str) -> None:
    own, sync = Side("blend", rate, loss, (1,)), Side("sync", 100.0, 2.0, (1,))
    assert compare.advice(own, sync, 50).startswith(says)


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    lines = [line(10 * n, 10, 1.0) for n in range(1, 11)]
    (tmp_path / "metrics" / "stage-1.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    told = {
        "rule": "blend",
        "train": {"batches": 100, "samples": 1000, "samples_per_second": 7.0},
        "eval": {"loss": 2.0, "accuracy": None},
        "stage": [{"peak_memory": 5 * MIB, "staleness": 2.5}, {"peak_memory": 6 * MIB, "staleness": None}],
    }
    (tmp_path / "summary.json").write_text(json.dumps(told))
    assert compare.side(tmp_path, 1) == Side("blend", 100.0, 2.0, (5 * MIB, 6 * MIB), 25.0)
    assert compare.side(tmp_path, 4).late == 100.0  # staleness counts updates, and each is one of four batches
    (tmp_path / "metrics" / "stage-1.jsonl").write_text("")
    assert compare.side(tmp_path, 1).rate == 7.0  # too short to tell a part of it apart


@pytest.mark.parametrize("settings", [["--rule.name=sync"], ["--transport.kind=local"]])
def test_what_cannot_be_compared_is_refused(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *settings]) == 2
    assert "compare measures a rule over processes beside sync" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"sync__microbatches": 3},
            "sync.microbatches = 3 with sync.schedule = 1f1b, 4 stages and batches of 8",
        ),
        ({"data__batch": 2}, "it must divide the batch and be at least 4; use larger batches, or gpipe"),
        ({"transport__address": "192.0.2.1"}, "can be reached by other machines"),
    ],
)
def test_what_sync_cannot_do_is_said_before_anything_is_trained(
    settings: dict[str, object], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "launched", lambda *arguments: pytest.fail("something was trained"))
    assert cli.main(["compare", *words(**settings)]) == 2
    shown = capsys.readouterr()
    assert says in shown.err and len(shown.err.splitlines()) == 1 and shown.out == ""


def test_both_are_trained_on_the_same_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU, and nobody has asked for it, that is the CPU, and it is said."""
    monkeypatch.setattr(compare, "device_of", lambda config: torch.device("cuda", 0))
    both, said = compare.sides(load(None, words()), 40, 16)
    assert {name: (one.rule.name, one.pipeline.device) for name, one in both.items()} == {
        "as-it-is": ("blend", "cpu"),
        "sync": ("sync", "cpu"),
    }
    assert said == ["both on the CPU, for sync sends from the main memory alone (gloo): this says nothing of a GPU"]
    with pytest.raises(ConfigError, match=r"pipeline.device = cuda: compare trains under sync too.*device = cpu"):
        compare.sides(load(None, words(pipeline__device="cuda")), 40, 16)


def test_what_the_wire_does_to_one_side_alone_is_said() -> None:
    both, said = compare.sides(load(None, words(rule__name="synthetic", wire__gradient_every=4)), 40, 16)
    assert said == ["sync without wire.gradient_every = 4: torch sends each tensor as it is, and all"]
    assert both["as-it-is"].wire.gradient_every == 4 and not both["sync"].wire.changed
    assert compare.sides(load(None, words()), 40, 16)[1] == []


@pytest.mark.processes
@pytest.mark.timeout(180)
def test_both_runs_stand_side_by_side(tmp_path: Path) -> None:
    process = start("compare", *words(output__dir=tmp_path, pipeline__stages=2), "--batches", "40")
    out, err = process.communicate(timeout=170)
    assert process.returncode == 0, out + err
    head, rate, loss, *memory, advice, late, text, images = out.splitlines()[-9:]
    assert head.split() == ["blend", "sync"]
    assert rate.startswith("samples/s ") and rate.endswith(" times") and loss.startswith("loss at the end ")
    assert [one.split()[:4] for one in memory] == [["peak", "memory,", "stage", str(k)] for k in range(2)]
    assert all(float(one.split()[4]) > 50 for one in memory)  # MiB: torch alone takes more
    assert "times as many samples a second, and after 40 batches its loss is" in advice
    assert late.startswith("a gradient came ") and [one.split()[0] for one in (text, images)] == ["lm", "mnist"]
    told = both_of(tmp_path, "compare-default-*")
    assert [one["rule"] for one in told] == ["blend", "sync"] and all(one["train"]["batches"] == 40 for one in told)


def both_of(folder: Path, name: str) -> list[dict[str, Any]]:
    (run,) = folder.glob(name)
    return [json.loads((run / side / "summary.json").read_text()) for side in ("as-it-is", "sync")]


SCRIPT = """
import dnipipe, torch, torch.nn as nn, torch.nn.functional as F

torch.manual_seed(0)
batches = [(torch.randn(12, 8), torch.randint(3, (12,))) for _ in range(8)]
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
adam = lambda parameters: torch.optim.Adam(parameters, 1e-2)
run = dnipipe.Run(model, [1], loss=F.cross_entropy, optimizer=adam, rule="local")
before = model[0].weight.clone()
run.compare(batches, batches[:2], 24)
print("unchanged", torch.equal(before, model[0].weight))   # here comes the launching process alone
"""


@pytest.mark.processes
@pytest.mark.timeout(180)
def test_a_scripts_own_model_is_compared(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    process = start(str(script), program=(), cwd=tmp_path)
    out, err = process.communicate(timeout=170)
    assert process.returncode == 0, out + err
    lines = out.splitlines()
    assert [line for line in lines if "24 batches, rule" in line] == [
        "as-it-is: 24 batches, rule local",
        "sync: 24 batches, rule sync",
    ]
    assert sum(line.split() == ["local", "sync"] for line in lines) == 1 and lines[-1] == "unchanged True"
    assert "and after 24 batches its loss is" in out
    told = both_of(tmp_path / "runs", "compare-*")
    assert [one["rule"] for one in told] == ["local", "sync"] and all(one["train"]["batches"] == 24 for one in told)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "starts its processes itself: run the script without torchrun"),
        (
            {ALONE: Alone(0, "run", 1, ()).to_json()},
            "not for one stage by itself: run the script without dnipipe stage",
        ),
    ],
)
def test_who_was_started_by_somebody_else_compares_nothing(
    environment: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = dnipipe.Run(
        torch.nn.Sequential(torch.nn.Linear(2, 2)),
        1,
        loss=torch.nn.functional.mse_loss,
        optimizer=lambda p: torch.optim.SGD(p),
    )
    with pytest.raises(UsageError, match=says):
        run.compare([])
