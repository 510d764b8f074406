"""States to save: a model with buffers of every awkward kind, cut into stages, and stages of one weight each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from dnipipe import checkpoint
from dnipipe.checkpoint import StageState

CUTS = {
    1: (0, 8),
    2: (0, 5, 8),
    3: (0, 2, 4, 8),
    4: (0, 2, 4, 7, 8),
}  # stages -> where the 8 layers are cut; 5 is in no other


class Odd(nn.Module):
    """Buffers of every awkward kind."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))  # zero-dim
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("brain", torch.tensor([1.0, float("nan"), -0.0], dtype=torch.bfloat16))
        self.register_buffer("mask", torch.tensor([[True, False]]))
        self.register_buffer("turned", torch.arange(12.0).reshape(3, 4).t()[1:])  # part of a storage, transposed

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 6), tied, nn.Linear(6, 6), Odd(), nn.Linear(6, 3)
    )


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": adam,
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters),  # states of other shapes than the weight's
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=0.1),  # no state at all
}


def groups(net: nn.Module) -> list[dict[str, Any]]:
    """Biases in a group of their own, so the optimizer's order is not the model's."""
    biases = [p for name, p in net.named_parameters() if name.endswith("bias")]
    return [{"params": biases}, {"params": [p for name, p in net.named_parameters() if not name.endswith("bias")]}]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        net(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()


def stage_states(net: nn.Sequential, optimizer: torch.optim.Optimizer, stages: int, batch: int = 0) -> list[StageState]:
    """The whole model's state as `stages` stages would have it."""
    whole = checkpoint.optimizer_state(optimizer, dict(net.named_parameters()))
    states = []
    for k in range(stages):
        part = cut(net, stages, k)
        last = k == stages - 1
        torch.manual_seed(CUTS[stages][k + 1])
        states.append(
            StageState(
                weights=dict(part.state_dict()),
                optimizer={name: whole[name] for name, _ in part.named_parameters() if name in whole},
                boundary="" if last else str(CUTS[stages][k + 1] - 1),
                predictor={} if last else {"weight": torch.randn(3, 2), "bias": torch.randn(3)},
                predictor_optimizer={} if last else {"weight": {"exp_avg": torch.randn(3, 2), "step": 7}},
                counters={"batch": batch, "share": 0.1 + k},
                gradients={name: p.grad for name, p in part.named_parameters() if p.grad is not None},
            )
        )
    return states


def cut(net: nn.Sequential, stages: int, k: int) -> nn.Sequential:
    children = list(net.named_children())
    return nn.Sequential(OrderedDict(children[CUTS[stages][k] : CUTS[stages][k + 1]]))


def save(run: Path, batch: int, states: list[StageState], keep: int = 9) -> Path:
    for k, state in enumerate(states):
        checkpoint.save_part(run, batch, k, state)
    return checkpoint.complete(run, batch, len(states), {"seed": batch}, keep)


def small(batch: int, stages: int = 2) -> list[StageState]:
    """Stages of one weight each, whose value tells the batch."""
    return [
        StageState(
            {f"{k}.w": torch.full((3,), float(batch + k))}, {}, str(k) if k + 1 < stages else "", {}, {}, {"n": batch}
        )
        for k in range(stages)
    ]


def folders(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    dense = tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensor.dtype, tuple(tensor.shape), bytes(dense.reshape(-1).view(torch.uint8).tolist())


def plain(value: Any) -> Any:
    """Something == can compare: tensors become their bits."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return bits(value) if isinstance(value, Tensor) else (type(value), value)
