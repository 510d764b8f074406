"""Models of a stage's input: for which nets there is one, what it is made of, and that it learns.

x (B, F...) ─► (B, D)        x (B, C, H, W) ─► (B, C', H', W')        x (B, T) ─► (B, T, D)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dnipipe import inputs, models
from dnipipe.config import Predictor
from dnipipe.errors import ConfigError, MessageError
from dnipipe.inputs import Inputs
from dnipipe.predictors import Edge
from dnipipe.split import Plan, plan
from tests.test_models import batch_for, configured

NETS = ["mlp", "cnn", "transformer"]


def planned(name: str) -> tuple[nn.Sequential, Plan, Tensor]:
    torch.manual_seed(0)
    model = models.build(configured(name))
    x, y = batch_for(name)
    return model, plan(model, 3, (1, 2), x, y, 256 if name == "transformer" else 10), x


def made(of: Plan, k: int, **settings: Any) -> Inputs:
    torch.manual_seed(1)
    return inputs.build(Predictor(**settings), of.x, of.x_dtype, of.edge(k - 1))


@pytest.mark.parametrize("name", NETS)
def test_every_built_in_net_has_one_at_every_stage_and_it_learns_what_comes(name: str) -> None:
    """The activations of a net that stands still, guessed from one batch."""
    model, cut, x = planned(name)
    for k in (1, 2):
        one, h = made(cut, k), model[:k](x).detach()
        assert one.guess(x).shape == h.shape and not one.guess(x).requires_grad
        errors = [(one.learn(x, h) - h).square().sum().item() for _ in range(60)]
        assert errors[-1] < 0.3 * errors[0]
        assert all(p.grad is None for p in one.net.parameters())


@pytest.mark.parametrize("name", NETS)
def test_samples_are_guessed_unlike_from_the_start(name: str) -> None:
    """Batch norm of samples that are all alike would send back gradients hundreds of times too large."""
    _, cut, x = planned(name)
    assert made(cut, 1).guess(x).std(0).mean() > 0.01


def test_a_step_is_one_on_the_squared_distance_of_a_sample() -> None:
    """(1/B) Σ (I(x) − h)², by hand; and what is returned is the guess before the step."""
    _, cut, x = planned("mlp")
    one, twin = made(cut, 1), made(cut, 1)
    h = torch.randn(4, 8)
    guessed = twin.net(x)
    (((guessed - h) ** 2).sum() / 4).backward()
    torch.optim.Adam(twin.net.parameters(), 3e-3, fused=True).step()
    assert torch.equal(one.learn(x, h), guessed)
    assert all(torch.equal(p, q) for p, q in zip(one.net.parameters(), twin.net.parameters(), strict=True))


def test_one_hidden_layer_like_the_papers_synthetic_gradient() -> None:
    kinds = [type(part) for part in made(planned("mlp")[1], 1).net.modules() if not isinstance(part, nn.Sequential)]
    assert kinds == [nn.Flatten, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    kinds = [type(part) for part in made(planned("cnn")[1], 1).net.children()]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Conv2d]
    wide = made(planned("mlp")[1], 1, width=50, lr=0.07)
    assert wide.optimizer.param_groups[0]["lr"] == 0.07
    assert {p.shape[0] for p in wide.net.parameters()} == {50, 8}
    assert {p.shape[0] for p in made(planned("mlp")[1], 1).net.parameters()} == {32, 8}


def test_a_token_is_guessed_by_what_it_is_and_where_it_stands() -> None:
    _, cut, x = planned("transformer")
    net = made(cut, 1).net.eval()
    x[0], x[1] = 7, 8
    guessed = net(x)
    assert not torch.allclose(guessed[0, 0], guessed[0, 1]) and not torch.allclose(guessed[0, 0], guessed[1, 0])
    changed = x.clone()
    changed[:, 3] += 1
    rest = [t for t in range(10) if t != 3]
    torch.testing.assert_close(net(changed)[:, rest], guessed[:, rest])


@pytest.mark.parametrize(
    ("x", "dtype", "h", "y", "classes"),
    [
        ((4, 10), "int64", (4, 8), (4,), 3),  # tokens that became one vector
        ((4, 10), "int64", (4, 10, 8), (4,), 3),  # tokens without labels of their own
        ((4, 10), "int64", (4, 10, 8), (4, 10), None),
        ((4, 20), "int64", (4, 10, 8), (4, 10), 3),  # twice as many of them
        ((4, 10), "float32", (4, 10, 8), (4, 10), 3),
        ((4, 784), "float32", (4, 8, 5, 5), (4,), 3),  # an image out of a vector
        ((4, 1, 9), "float32", (4, 3, 8), (4,), 3),
    ],
)
def test_where_there_is_none_the_shapes_are_named(
    x: tuple[int, ...], dtype: str, h: tuple[int, ...], y: tuple[int, ...], classes: int | None
) -> None:
    with pytest.raises(ConfigError) as caught:
        inputs.build(Predictor(), x, dtype, Edge(h, y, (4, 3), classes))
    assert f"an activation {h} from the network's input, {dtype} {x}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("mlp", lambda x: x.double(), "is float64 .*, and float32 .* was planned"),
        ("mlp", lambda x: x[:, :, 1:], r"is float32 \[4, 1, 27, 28\], and float32 \[4, 1, 28, 28\] was planned"),
        ("mlp", lambda x: x.flatten(), r"is float32 \[3136\]"),
        ("cnn", lambda x: torch.cat([x, x], 1), r"is float32 \[4, 2, 28, 28\]"),
        ("transformer", lambda x: x.int(), "is int32"),
        ("transformer", lambda x: F.pad(x, (0, 1)), r"is int64 \[4, 11\], and int64 \[4, 10\] was planned"),
        ("transformer", lambda x: x + 256, r"a token outside \[0, 256\)"),
        ("transformer", lambda x: x - 256, r"a token outside \[0, 256\)"),
    ],
)
def test_an_input_that_was_not_planned_is_refused(name: str, spoil: Any, message: str) -> None:
    _, cut, x = planned(name)
    one = made(cut, 1)
    one.check(x)
    one.check(x[:2])  # the last batch of an epoch
    with pytest.raises(MessageError, match=message):
        one.check(spoil(x))


def test_a_shorter_text_is_fine_and_an_activation_of_another_shape_is_not() -> None:
    _, cut, x = planned("transformer")
    one = made(cut, 1)
    one.check(x[:, :4])
    assert one.guess(x[:, :4]).shape == (4, 4, 8)
    with pytest.raises(MessageError, match=r"an activation \[4, 10, 8\] came, where \[4, 4, 8\] was guessed"):
        one.learn(x[:, :4], torch.zeros(4, 10, 8))
