"""An optimizer's state goes by the names of its parameters, and a restored run goes on bitwise as the uncut one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn as nn

from dnipipe import checkpoint
from dnipipe.errors import CheckpointError
from tests.checkpoint.states import OPTIMIZERS, adam, groups, model, plain, save, stage_states, train


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_run_goes_on_bitwise_as_the_uncut_one(tmp_path: Path, name: str) -> None:
    whole = model()
    uncut = OPTIMIZERS[name](groups(whole))
    train(whole, uncut, range(6))

    first = model()
    optimizer = OPTIMIZERS[name](groups(first))
    train(first, optimizer, range(3))
    save(tmp_path, 3, stage_states(first, optimizer, 4))
    second = model(seed=1)
    train(second, OPTIMIZERS[name](groups(second)), range(9, 11))
    again = OPTIMIZERS[name](groups(second))
    state = checkpoint.newest(tmp_path).state_for(second.state_dict(), "")
    before = plain(vars(state))
    second.load_state_dict(state.weights)
    checkpoint.load_optimizer_state(again, dict(second.named_parameters()), state.optimizer)
    train(second, again, range(3, 6))
    assert plain(dict(second.state_dict())) == plain(dict(whole.state_dict()))
    assert plain(again.state_dict()["state"]) == plain(uncut.state_dict()["state"])
    assert plain(vars(state)) == before  # the optimizer works on its own copies


def test_state_goes_by_the_name_of_its_own_parameter() -> None:
    net = model()
    optimizer = adam(groups(net))
    train(net, optimizer, range(2))
    named = dict(net.named_parameters())
    state = checkpoint.optimizer_state(optimizer, named)
    assert state.keys() == named.keys()
    assert all(state[name]["exp_avg"] is optimizer.state[parameter]["exp_avg"] for name, parameter in named.items())


def test_options_come_from_the_configuration_and_casting_is_torchs() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = torch.optim.Adam([weight], lr=0.25)
    state = {"w": {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}}
    checkpoint.load_optimizer_state(optimizer, {"w": weight}, state)
    assert optimizer.param_groups[0]["lr"] == 0.25
    kept = optimizer.state[weight]
    assert kept["exp_avg"].dtype == torch.bfloat16 and kept["step"].dtype == torch.float32


def test_optimizer_state_that_cannot_be_placed_or_saved_is_refused() -> None:
    layer = nn.Linear(2, 2)
    named = dict(layer.named_parameters())
    with pytest.raises(CheckpointError, match=r"state of 4\.gone"):
        checkpoint.load_optimizer_state(adam(layer.parameters()), named, {"4.gone": {}})
    with pytest.raises(ValueError, match="no name"):
        checkpoint.optimizer_state(adam(layer.parameters()), {"weight": layer.weight})
    lbfgs = torch.optim.LBFGS(layer.parameters())
    lbfgs.state[layer.weight]["old"] = [1, 2]
    with pytest.raises(CheckpointError, match="LBFGS keeps old of weight as a list"):
        checkpoint.optimizer_state(lbfgs, named)
    optimizer = adam(layer.parameters())
    optimizer.state["everything"] = 3  # type: ignore[index]
    with pytest.raises(CheckpointError, match="'everything', which belongs to no parameter"):
        checkpoint.optimizer_state(optimizer, named)
