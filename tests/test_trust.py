"""Trust is lost below the threshold and comes back above it, with a margin between the two."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dnipipe import cli
from dnipipe.learner import Learner
from dnipipe.trust import MARGIN, MEMORY, MOST, READ, Trust


def pair(cosine: float, length: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(ĝ, g) of that likeness, ĝ so many times as long as g."""
    return length * torch.tensor([[cosine, (1 - cosine**2) ** 0.5]]), torch.tensor([[1.0, 0.0]])


def shown(trust: Trust, cosine: float, times: int, length: float = 3.0) -> bool:
    for _ in range(times):
        trust.observe(*pair(cosine, length))
    return trust.good


def test_it_trusts_until_it_has_seen() -> None:
    trust = Trust(0.3)
    assert trust.good
    assert shown(trust, -1.0, READ - 1)
    assert not shown(trust, -1.0, 1)


def test_it_is_lost_and_comes_back() -> None:
    trust = Trust(0.3)
    assert shown(trust, 0.8, 4 * MEMORY)
    assert trust.likeness == pytest.approx(0.8, abs=0.01)
    assert not shown(trust, -0.8, MEMORY)
    assert shown(trust, 0.8, 4 * MEMORY)


def test_what_is_just_above_the_threshold_is_kept_but_does_not_come_back() -> None:
    between = 0.3 + MARGIN / 2
    steady, fallen = Trust(0.3), Trust(0.3)
    assert shown(steady, between, 8 * MEMORY)
    shown(fallen, 0.0, 4 * MEMORY)
    assert not shown(fallen, between, 16 * MEMORY)


def test_what_is_too_long_is_not_trusted_however_well_it_points() -> None:
    trust = Trust(longest=2.0)
    assert shown(trust, 0.9, 4 * MEMORY, length=1.5) and trust.length == pytest.approx(1.5)
    assert not shown(trust, 0.9, MEMORY, length=8.0)
    assert shown(trust, 0.9, 4 * MEMORY, length=1.5)


def test_without_a_threshold_of_its_own_the_cosine_may_be_anything() -> None:
    trust = Trust(longest=2.0)
    assert not shown(trust, -1.0, MEMORY, length=8.0)
    assert shown(trust, -1.0, 4 * MEMORY, length=1.0)


def test_a_length_just_below_the_longest_is_kept_but_does_not_come_back() -> None:
    between = 2.0 * (1 - MARGIN / 2)
    steady, fallen = Trust(longest=2.0), Trust(longest=2.0)
    assert shown(steady, 0.9, 8 * MEMORY, between)
    shown(fallen, 0.9, 4 * MEMORY, 4.0)
    assert not shown(fallen, 0.9, 16 * MEMORY, between)


def test_both_thresholds_must_be_met() -> None:
    trust = Trust(0.3, longest=2.0)
    assert not shown(trust, 0.1, 4 * MEMORY, length=1.0)
    assert not shown(trust, 0.9, 8 * MEMORY, length=4.0)
    assert shown(trust, 0.9, 8 * MEMORY, length=1.0)


def test_the_part_of_a_long_prediction_is_no_longer_than_what_arrives() -> None:
    short, long = Trust(0.9), Trust(0.9)
    shown(short, 0.5, READ, length=0.5)
    shown(long, 0.5, READ, length=4.0)
    assert (short.part, long.part) == (pytest.approx(0.5), pytest.approx(0.125))


def test_one_prediction_that_is_off_the_scale_does_not_outweigh_all_others() -> None:
    trust = Trust(longest=2.0)
    shown(trust, 0.9, 4 * MEMORY, length=1.0)
    shown(trust, 0.9, 1, length=1e30)
    shown(trust, 0.9, READ, length=1.0)
    assert trust.good and 1.0 < trust.length < MOST ** (1 / MEMORY)


def test_a_gradient_of_zero_says_nothing() -> None:
    trust = Trust(0.3, longest=2.0)
    for _ in range(2 * READ):
        trust.observe(torch.ones(2, 3), torch.zeros(2, 3))
    assert trust.good and trust.likeness is None


@pytest.mark.parametrize("threshold", [{"threshold": 0.0}, {"longest": 2.0}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_deserves_no_trust(bad: float, threshold: dict[str, float]) -> None:
    trust = Trust(**threshold)
    for _ in range(2 * READ):
        trust.observe(torch.full((2, 3), bad), torch.ones(2, 3))
    assert not trust.good


def test_a_prediction_of_zero_is_like_nothing() -> None:
    trust = Trust(0.1)
    for _ in range(READ):
        trust.observe(torch.zeros(2, 3), torch.ones(2, 3))
    assert trust.likeness == 0.0 and not trust.good


def test_minus_one_trusts_always_and_measures_nothing() -> None:
    trust = Trust(-1.0)
    assert shown(trust, -1.0, 3 * MEMORY) and trust.likeness is None


# -- in a run ----------------------------------------------------------------------------------------------------


class Poison:
    """Multiplies what stage 1's predictor says of batches 200 to 399. The stages have threads of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, factor: float = -1.0) -> None:
        self.asked, self.factor = 0, factor
        self.guess = Learner.guess
        monkeypatch.setattr(Learner, "guess", lambda *given: self.poisoned(*given))

    def poisoned(self, learner: Learner, h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        predicted = self.guess(learner, h, y)
        if threading.current_thread().name != "stage 1":
            return predicted
        self.asked += 1
        return predicted * self.factor if 200 <= self.asked < 400 else predicted


def run(folder: Path, trust: float = -1.0, length: float = 0.0) -> dict[str, Any]:
    settings = {
        "transport.kind": "local",
        "transport.delay": 1,
        "data.limit": 200_000,
        "data.validation": 0.05,
        "model.width": 16,
        "model.heads": 2,
        "model.layers": 3,
        "pipeline.stages": 3,
        "pipeline.boundaries": "2,3",  # a block each
        "train.batches": 900,
        "eval.sample": 0,
        "checkpoint.every": 0,
        "eval.every": 400,
        "output.quiet": True,
        "rule.trust": trust,
        "rule.trust_length": length,
        "rule.warmup_rule": "zero",
    }
    words = [f"--{name}={value}" for name, value in settings.items()]
    assert cli.main(["train", f"--output.run={folder}", *words]) == 0
    told: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics" / "stage-0.jsonl").read_text().splitlines()]
    told["at"] = {line["eval.batch"]: line["eval.loss"] for line in lines if "eval.loss" in line}
    return told


@pytest.mark.slow
@pytest.mark.timeout(300)  # three runs, a minute of processor time
def test_a_run_with_a_poisoned_predictor_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With trust it ends within 2 % of the untouched run, and the stage says how long it went without.

    Without trust the poison costs a fifth while it lasts (3.59 nats instead of 2.97 right behind it), and more than
    that 2 % at the end (3.47 instead of 2.87).
    """
    untouched = run(tmp_path / "untouched", trust=0.0)
    with monkeypatch.context() as patch:
        Poison(patch)
        poisoned = run(tmp_path / "poisoned", trust=0.0)
    Poison(monkeypatch)
    credulous = run(tmp_path / "credulous", trust=-1.0)
    for name, told in (("untouched", untouched), ("poisoned", poisoned), ("credulous", credulous)):
        print(f"{name}: {told['at'][400]:.2f} at batch 400, {told['eval']['loss']:.2f} at the end")
    assert poisoned["eval"]["loss"] < 1.02 * untouched["eval"]["loss"]
    assert credulous["at"][400] > 1.1 * untouched["at"][400]  # right behind the last poisoned batch
    assert credulous["eval"]["loss"] > 1.02 * untouched["eval"]["loss"]
    used = [stage["at_once"] for stage in poisoned["stage"]]
    assert 0.5 < used[1] < 0.85 and used[2] == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_predictor_that_says_too_much_is_left_until_it_says_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirty times too long, for 200 batches. Adam divides by the size, so without trust this costs little too."""
    untouched = run(tmp_path / "untouched")
    found = {}
    for name, length in (("poisoned", 4.0), ("credulous", 0.0)):
        with monkeypatch.context() as patch:
            Poison(patch, 30.0)
            found[name] = run(tmp_path / name, length=length)
    for name, told in (("untouched", untouched), *found.items()):
        print(f"{name}: {told['at'][400]:.3f} at batch 400, {told['eval']['loss']:.3f} at the end")
    assert found["poisoned"]["eval"]["loss"] < 1.02 * untouched["eval"]["loss"]
    used = {name: [stage["at_once"] for stage in told["stage"]] for name, told in found.items()}
    assert used["credulous"] == [1, 1, 1]
    assert used["poisoned"][0] == used["poisoned"][2] == 1 and 0.5 < used["poisoned"][1] < 0.85
