"""An optimizer's state by the names of its parameters, so that it can be cut like the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dnipipe.errors import CheckpointError


def optimizer_state(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """State of each parameter by its name; the tensors are the optimizer's own, as in its state_dict.

    Raises CheckpointError if there is state that is neither a tensor nor a number (LBFGS has lists).
    """
    names = _numbered(optimizer, named)
    by_name: dict[str, dict[str, Any]] = {}
    for number, values in optimizer.state_dict()["state"].items():
        if number not in names:
            raise CheckpointError(
                f"{type(optimizer).__name__} keeps {number!r}, which belongs to no parameter, and only parameters' "
                "state can be saved: use another optimizer"
            )
        name = names[number]
        for key, value in values.items():
            if not isinstance(value, (Tensor, int, float, type(None))):
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps {key} of {name} as a {type(value).__name__}, and only tensors "
                    "and numbers can be saved: use another optimizer"
                )
        if values:
            by_name[name] = dict(values)
    return by_name


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Put saved state in the place of the optimizer's own, on the device and in the dtype that torch wants it.

    The options of its groups (lr, …) stay: they come from the configuration. Raises CheckpointError if there is state
    of a parameter that the optimizer does not have.
    """
    numbers = {name: number for number, name in _numbered(optimizer, named).items()}
    if extra := sorted(state.keys() - numbers.keys()):
        raise CheckpointError(
            f"saved state of {extra[0]}, which the optimizer does not have: it belongs to another model"
        )
    # torch keeps a tensor as it is if device and dtype fit, and would then update the caller's in place
    copies = {
        numbers[name]: {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}
        for name, values in state.items()
    }
    optimizer.load_state_dict({"state": copies, "param_groups": optimizer.state_dict()["param_groups"]})


def _numbered(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[Any, str]:
    """The number by which the optimizer's state_dict knows a parameter -> its name."""
    names = {id(parameter): name for name, parameter in named.items()}
    numbers = [number for group in optimizer.state_dict()["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(id(parameter) not in names for parameter in parameters):
        raise ValueError("the optimizer has a parameter that has no name in `named`")
    return {number: names[id(parameter)] for number, parameter in zip(numbers, parameters, strict=True)}
