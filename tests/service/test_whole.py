"""The whole model of independent stages: the checkpoint that all saved in one folder, or each one's own newer state.

RUN/checkpoints/N        a cut through all stages ─┐
RUN/stage-0, stage-1     each its own newest      ─┴─► whichever is newer
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dnipipe.agreement import Agreement
from dnipipe.checkpoint.files import folder_of, tensors_file
from dnipipe.errors import CheckpointError
from dnipipe.service.place import Place
from dnipipe.service.whole import notes, parts, weights
from dnipipe.split import Plan
from tests.checkpoint.states import save, small

PLAN = Plan(("0", "1"), (1,), (1.0, 1.0), (3, 3), ((2, 3),) * 2, ("float32",) * 2, (2, 3), "float32", (2,), 3)


def told(run: Path) -> list[float]:
    """The value of each stage's one weight: the batch that it is of, and its number."""
    return [tensor[0].item() for _, tensor in sorted(weights(parts(run)).items())]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Stage 0 has saved batches 10 and 30 by itself, stage 1 batch 20; stage 1 has not heard what it is part of."""
    for k, batches in enumerate([(10, 30), (20,)]):
        place = Place.taken(tmp_path, k)
        if k == 0:
            place.joined(Agreement("id", str(tmp_path), 40, 0, (), PLAN).to_json())
        for batch in batches:
            save(place.folder, batch, [small(batch)[k]])
    return tmp_path


def test_without_a_cut_it_is_made_of_the_newest_of_each(run: Path) -> None:
    assert told(run) == [30, 21]


@pytest.mark.parametrize(("cut", "found"), [(20, [30, 21]), (30, [30, 31]), (40, [40, 41])])
def test_the_newer_one_counts(cut: int, found: list[float], run: Path) -> None:
    save(run, cut, small(cut))
    assert told(run) == found


def test_a_cut_is_enough_where_a_stage_has_nothing_of_its_own(run: Path) -> None:
    shutil.rmtree(run / "stage-1")
    save(run, 30, small(30))
    assert told(run) == [30, 31]


def test_a_stage_that_is_missing_is_named(run: Path) -> None:
    shutil.rmtree(run / "stage-1" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"has no state of stage 1: copy .*stage-K here .* ran on$"):
        parts(run)


def test_it_says_what_it_is_made_of_and_what_was_passed_over(run: Path) -> None:
    damaged = folder_of(run / "stage-0", 30) / tensors_file(0)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    passed, made = notes(parts(run))
    assert passed.startswith("passed over: ") and str(damaged) in passed and "cut short" in passed
    assert made == "saved behind batch 10, 20 (by stage)"
    save(run, 30, small(30))
    assert list(notes(parts(run))) == ["saved behind batch 30"]


def test_a_stage_whose_every_state_is_damaged_is_named_with_its_damage(run: Path) -> None:
    (folder_of(run / "stage-1", 20) / tensors_file(0)).unlink()
    with pytest.raises(
        CheckpointError, match=r"no state of stage 1: .*\(damaged: .*stage-0.safetensors cannot be read"
    ):
        parts(run)


def test_stages_that_have_not_heard_what_they_are_part_of_have_nothing(tmp_path: Path) -> None:
    Place.taken(tmp_path, 0)
    with pytest.raises(CheckpointError, match="no complete checkpoint in"):
        parts(tmp_path)


def test_any_other_run_has_its_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 7, small(7))
    assert told(tmp_path) == [7, 8]
    with pytest.raises(CheckpointError, match="no complete checkpoint in"):
        parts(tmp_path / "nowhere")
