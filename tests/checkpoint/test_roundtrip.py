"""What is saved comes back bit by bit, under any cut, and only into the model it is of."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from dnipipe import checkpoint
from dnipipe.checkpoint import StageState
from dnipipe.errors import CheckpointError
from tests.checkpoint.states import OPTIMIZERS, adam, cut, model, plain, save, small, stage_states, train


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_bit_of_every_stage_comes_back(tmp_path: Path, name: str) -> None:
    net = model()
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer, range(3))
    states = stage_states(net, optimizer, 4)
    assert save(tmp_path, 300, states) == tmp_path / "checkpoints" / "00000300"
    found = checkpoint.newest(tmp_path)
    assert (found.batch, found.stages, found.settings, found.skipped) == (300, 4, {"seed": 300}, ())
    found.check_model(net.state_dict())
    for k, state in enumerate(states):
        again = found.state_for(cut(net, 4, k).state_dict(), state.boundary)
        assert plain(vars(again)) == plain(vars(state))


def test_numbers_none_and_settings_keep_their_type(tmp_path: Path) -> None:
    kept = {"step": 3, "rate": 0.1, "on": True, "buffer": None, "limit": float("inf"), "moment": torch.ones(2)}
    state = StageState({"w": torch.ones(2)}, {"w": kept}, "", {}, {}, {"updates": 2**70, "share": 1 / 3})
    settings = {"a": 1, "b": 0.5, "c": "ĝ", "d": True, "e": None, "f": [1, 2], "g": {10: 1, 9: 2}}
    checkpoint.save_part(tmp_path, 1, 0, state)
    checkpoint.complete(tmp_path, 1, 1, settings, keep=1)
    found = checkpoint.newest(tmp_path)
    assert found.settings == {**settings, "g": {"10": 1, "9": 2}}
    assert plain(vars(found.state_for(state.weights, ""))) == plain(vars(state))


def test_what_is_loaded_outlives_the_files_and_owns_its_memory(tmp_path: Path) -> None:
    save(tmp_path, 1, small(5))
    loaded = checkpoint.newest(tmp_path).weights()
    for file in (tmp_path / "checkpoints").rglob("*.safetensors"):
        file.write_bytes(b"")
    shutil.rmtree(tmp_path / "checkpoints")
    loaded["0.w"] += 1
    assert loaded["0.w"].tolist() == [6.0] * 3 and loaded["1.w"].tolist() == [6.0] * 3


def test_the_parts_of_one_checkpoint_are_of_one_batch(tmp_path: Path) -> None:
    """Stages save batch 1 and 2 at different times; each checkpoint holds its own batch only."""
    one, two = small(100), small(200)
    checkpoint.save_part(tmp_path, 1, 0, one[0])
    checkpoint.save_part(tmp_path, 2, 0, two[0])
    checkpoint.save_part(tmp_path, 1, 1, one[1])
    checkpoint.complete(tmp_path, 1, 2, {}, keep=3)
    assert {name: w[0].item() for name, w in checkpoint.weights(tmp_path).items()} == {"0.w": 100, "1.w": 101}
    checkpoint.save_part(tmp_path, 2, 1, two[1])
    checkpoint.complete(tmp_path, 2, 2, {}, keep=3)
    assert {name: w[0].item() for name, w in checkpoint.weights(tmp_path).items()} == {"0.w": 200, "1.w": 201}


def test_an_export_loads_into_the_plain_model(tmp_path: Path) -> None:
    net = model()
    optimizer = adam(net.parameters())
    train(net, optimizer, range(2))
    save(tmp_path, 2, stage_states(net, optimizer, 4))
    out = tmp_path / "model.safetensors"
    checkpoint.export(checkpoint.weights(tmp_path), out)
    other = model(seed=5)
    other.load_state_dict(safetensors.torch.load_file(out), strict=True)
    assert plain(dict(other.state_dict())) == plain(dict(net.state_dict()))
    assert plain(checkpoint.weights(tmp_path)) == plain(dict(net.state_dict()))


# -- another cut -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_run_of_four_stages_goes_on_with_fewer(tmp_path: Path, stages: int) -> None:
    net = model()
    optimizer = adam(net.parameters())
    train(net, optimizer, range(3))
    old = {state.boundary: state for state in stage_states(net, optimizer, 4)}
    save(tmp_path, 300, list(old.values()))
    found = checkpoint.newest(tmp_path)
    for k, state in enumerate(stage_states(net, optimizer, stages)):
        again = found.state_for(state.weights, state.boundary)
        assert plain(again.weights) == plain(state.weights)
        assert plain(again.optimizer) == plain(state.optimizer)
        assert plain(again.gradients) == plain(state.gradients) and state.gradients
        before = old.get(state.boundary)  # the same boundary brings its predictor; a new one starts anew
        assert plain(again.predictor) == plain(before.predictor if before else {}), k
        assert plain(again.predictor_optimizer) == plain(before.predictor_optimizer if before else {})
        assert again.counters == (before.counters if before else {})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.update({"9.weight": torch.ones(1)}), "9.weight"),
        (lambda w: w.update({"0.weight": torch.ones(6, 5)}), r"0.weight is float32 \[6, 4\] .* float32 \[6, 5\]"),
        (lambda w: w.update({"0.bias": w["0.bias"].double()}), "0.bias is float32 .* float64"),
        (lambda w: w.pop("7.bias"), "7.bias"),
    ],
    ids=["missing", "shape", "dtype", "extra"],
)
def test_another_model_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], named: str
) -> None:
    net = model()
    save(tmp_path, 1, stage_states(net, adam(net.parameters()), 2))
    other = dict(net.state_dict())
    change(other)
    with pytest.raises(CheckpointError, match=named):
        checkpoint.newest(tmp_path).check_model(other)


def test_a_stage_asking_for_an_unknown_weight_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, small(1))
    with pytest.raises(CheckpointError, match=r"no 2\.w"):
        checkpoint.newest(tmp_path).state_for({"0.w": torch.ones(3), "2.w": torch.ones(3)}, "")
