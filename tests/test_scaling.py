"""Gradients through float16 layers, beside those through the same layers in float32.

g ─► × s ─► [ float16 ] ─► ÷ s ─► J^T g, weights' gradients        however small, however large, and twice
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from dnipipe.config import Pipeline, load
from dnipipe.errors import ConfigError
from dnipipe.execution import round_off, rounded

CPU = torch.device("cpu")
HALF = Pipeline(autocast="float16")


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 16))


def gradients(module: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    """Of the input and of each weight."""
    x = x.clone().requires_grad_()
    h = module(x)
    return list(torch.autograd.grad(h, [x, *module.parameters()], g))


def close(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """To what float16 can tell apart, as a share of the whole tensor's size."""
    return all((a - b).norm() <= 2e-3 * b.norm() and a.dtype == b.dtype for a, b in zip(found, wanted, strict=True))


X, G = torch.randn(64, 8), torch.randn(64, 16)


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1.0, 1e5, 1e30])
def test_gradients_of_any_size_go_back_as_in_float32(size: float) -> None:
    wanted = gradients(layers(), X, size * G)
    assert close(gradients(round_off(layers(), HALF, CPU), X, size * G), wanted)


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_unscaled_they_would_be_lost(size: float) -> None:
    """What scaling is for; if this fails, torch does it by itself."""
    net = layers()
    net.forward = rounded(net.forward, HALF, CPU)  # type: ignore[method-assign]
    assert not close(gradients(net, X, size * G), gradients(layers(), X, size * G))


def test_what_is_computed_in_float32_does_not_change_by_a_bit() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(0.1, 3, 8))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).sin()

    g = torch.randn(64, 8)
    found, wanted = gradients(round_off(Weighted(), HALF, CPU), X, g), gradients(Weighted(), X, g)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_graph_that_waits_goes_back_twice_each_time_with_its_own_scale() -> None:
    net, plain = round_off(layers(), HALF, CPU), layers()
    h, exact = net(X), plain(X)
    for size in (1e3, 1e-9):
        found = torch.autograd.grad(h, list(net.parameters()), size * G, retain_graph=True)
        wanted = torch.autograd.grad(exact, list(plain.parameters()), size * G, retain_graph=True)
        assert close(list(found), list(wanted))


def test_weights_in_the_place_of_the_modules_get_the_gradient() -> None:
    """As those that are kept for a batch under way (stash.py)."""
    net, plain = round_off(layers(), HALF, CPU), layers()
    kept = {name: (2 * p).detach().requires_grad_() for name, p in net.named_parameters()}
    functional_call(net, kept, (X,)).backward(1e-9 * G)
    plain.load_state_dict(kept)
    assert close([p.grad for p in kept.values()], gradients(plain, X, 1e-9 * G)[1:])  # type: ignore[misc]
    assert all(p.grad is None for p in net.parameters())


def test_a_gradient_of_a_gradient_is_refused_and_so_no_predictor_is_in_float16() -> None:
    h, y = X.clone().requires_grad_(), torch.arange(64) % 16

    def learnt(head: nn.Module) -> list[Tensor]:
        (guess,) = torch.autograd.grad(F.cross_entropy(head(h), y), h, create_graph=True)
        guess.square().sum().backward()  # type: ignore[no-untyped-call]
        return [p.grad for p in head.parameters() if p.grad is not None]

    with pytest.raises(RuntimeError, match="once_differentiable"):
        learnt(round_off(layers(), HALF, CPU))
    found, wanted = learnt(round_off(layers(), HALF, CPU, guesses=True)), learnt(layers())
    assert wanted and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_nothing_stays_nothing_and_what_is_not_finite_does_not_become_so() -> None:
    net = round_off(layers(), HALF, CPU)
    assert all(not g.any() for g in gradients(net, X, 0 * G))
    for bad in (float("inf"), float("nan")):
        g = G.clone()
        g[3, 5] = bad
        assert not gradients(net, X, g)[0][3].isfinite().all()


def test_names_and_evaluation_are_as_ever() -> None:
    net = round_off(layers(), HALF, CPU)
    with torch.no_grad():
        h = net(X)
    assert h.dtype == torch.float32 and torch.equal(h, net(X).detach())
    assert list(net.state_dict()) == list(layers().state_dict())
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in layers().named_parameters()]


def test_a_frozen_weight_and_whole_numbers_go_through() -> None:
    net = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 4))
    net[1].bias.requires_grad_(False)
    plain, tokens = copy.deepcopy(net), torch.tensor([[0, 4], [3, 3]])
    for one in (round_off(net, HALF, CPU), plain):
        one(tokens).backward(1e-9 * torch.ones(2, 2, 4))
    assert close([net[0].weight.grad, net[1].weight.grad], [plain[0].weight.grad, plain[1].weight.grad])
    assert net[1].bias.grad is None


def test_it_is_not_compiled() -> None:
    with pytest.raises(ConfigError, match=r"pipeline.compile = true with pipeline.autocast = float16: .* bfloat16"):
        load(None, ("--pipeline.autocast", "float16", "--pipeline.compile", "true"))
