"""The built-in models: shapes between layers, what decides their weights, and that they can learn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from dnipipe import models
from dnipipe.config import Config, build
from dnipipe.errors import ConfigError


def configured(name: str, data: dict[str, Any] | None = None, **model: Any) -> Config:
    source = "stdlib" if name == "transformer" else "mnist"
    small = {"width": 8, "layers": 3, "heads": 2}
    return build({"model": {"name": name, **small, **model}, "data": {"name": source, "context": 10, **(data or {})}})


def batch_for(name: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    if name == "transformer":
        text = torch.randint(256, (4, 11))
        return text[:, :-1], text[:, 1:]
    return torch.rand(4, 1, 28, 28), torch.randint(10, (4,))


def shapes(model: nn.Sequential, x: Tensor) -> list[tuple[str, tuple[int, ...]]]:
    made = []
    for name, layer in model.named_children():
        x = layer(x)
        made.append((name, tuple(x.shape)))
    return made


def test_layers_and_what_flows_between_them() -> None:
    x, _ = batch_for("mlp")
    assert shapes(models.build(configured("mlp")), x) == [("layer0", (4, 8)), ("layer1", (4, 8)), ("output", (4, 10))]
    assert shapes(models.build(configured("cnn")), x) == [
        ("layer0", (4, 8, 14, 14)),
        ("layer1", (4, 8, 7, 7)),
        ("layer2", (4, 8, 4, 4)),
        ("output", (4, 10)),
    ]
    x, _ = batch_for("transformer")
    assert shapes(models.build(configured("transformer")), x) == [
        ("embedding", (4, 10, 8)),
        ("block1", (4, 10, 8)),
        ("block2", (4, 10, 8)),
        ("block3", (4, 10, 8)),
        ("output", (4, 10, 256)),
    ]


def test_images_have_the_shape_of_their_data_set() -> None:
    colours = torch.rand(4, 3, 32, 32)
    mlp, cnn = (models.build(configured(name, {"name": "cifar10"})) for name in ("mlp", "cnn"))
    assert shapes(mlp, colours) == [("layer0", (4, 8)), ("layer1", (4, 8)), ("output", (4, 10))]
    assert mlp.get_parameter("layer0.linear.weight").shape == (8, 3 * 32 * 32)
    assert shapes(cnn, colours)[:3] == [(f"layer{i}", (4, 8, 16 >> i, 16 >> i)) for i in range(3)]
    assert cnn(colours).shape == (4, 10)


@pytest.mark.parametrize(("name", "layers"), [("mlp", 1), ("cnn", 1), ("cnn", 9), ("transformer", 1)])
def test_any_depth_fits(name: str, layers: int) -> None:
    x, y = batch_for(name)
    config = configured(name, layers=layers)
    loss = models.loss_of(config)(models.build(config)(x), y)
    assert torch.isfinite(loss)


@pytest.mark.parametrize(
    ("name", "data", "more"), [("mlp", "mnist", 0), ("cnn", "cifar10", 1), ("transformer", "text", 2)]
)
def test_layers_are_counted_without_a_weight(name: str, data: str, more: int) -> None:
    """A model of this width has terabytes of them."""
    before = torch.get_rng_state()
    sizes = {"name": name, "layers": 5, "width": 1_000_000}
    assert models.layers_of(build({"model": sizes, "data": {"name": data}})) == 5 + more
    assert torch.equal(torch.get_rng_state(), before)
    small = build({"model": {**sizes, "width": 8}, "data": {"name": data}})
    assert models.layers_of(small) == len(models.build(small))


def test_the_mlp_is_the_papers() -> None:
    """Linear, batch norm, ReLU in every hidden layer; parameters have readable names."""
    model = models.build(configured("mlp", layers=2))
    assert [type(part) for part in model.get_submodule("layer0").children()] == [
        nn.Flatten,
        nn.Linear,
        nn.BatchNorm1d,
        nn.ReLU,
    ]
    assert set(dict(model.named_parameters())) == {
        "layer0.linear.weight",
        "layer0.norm.weight",
        "layer0.norm.bias",
        "output.linear.weight",
        "output.linear.bias",
    }


def test_the_cnn_pools_max_first_and_mean_after() -> None:
    model = models.build(configured("cnn"))
    assert [type(model.get_submodule(f"layer{i}.pool")) for i in range(3)] == [nn.MaxPool2d, nn.AvgPool2d, nn.AvgPool2d]
    assert all(model.get_buffer(f"layer{i}.norm.num_batches_tracked").item() == 0 for i in range(3))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_the_seed_decides_every_weight(name: str) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return models.build(configured(name)).state_dict()

    one, same, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_dropout_acts_in_training_only(name: str) -> None:
    x, _ = batch_for(name)
    without, with_it = models.build(configured(name)), models.build(configured(name, dropout=0.5))
    twice = {key: [model.train(mode)(x) for _ in range(2)] for key, model, mode in (
        ("none", without, True), ("train", with_it, True), ("eval", with_it, False)
    )}  # fmt: skip
    assert torch.equal(*twice["none"])
    assert not torch.equal(*twice["train"])
    assert torch.equal(*twice["eval"])


def test_the_transformer_sees_no_later_byte() -> None:
    model = models.build(configured("transformer")).eval()
    x, _ = batch_for("transformer")
    changed = x.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 256
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_the_transformer_takes_shorter_inputs() -> None:
    model = models.build(configured("transformer")).eval()
    x, _ = batch_for("transformer")
    torch.testing.assert_close(model(x)[:, :3], model(x[:, :3]))


def test_the_transformer_starts_with_logits_of_size_one() -> None:
    """The first loss is half a nat, half their variance, above that of knowing nothing, ln 256; mean of 20 models."""
    config = configured("transformer", width=32)
    losses = []
    for seed in range(20):
        torch.manual_seed(seed)
        x, y = torch.randint(256, (8, 5)), torch.randint(256, (8, 5))
        losses.append(models.loss_of(config)(models.build(config)(x), y).item())
    assert sum(losses) / 20 == pytest.approx(math.log(256) + 0.5, abs=0.1)


def test_the_loss_is_a_mean_over_samples_or_tokens() -> None:
    loss = models.loss_of(configured("mlp"))
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    by_hand = torch.stack([F.cross_entropy(logits[b, t], labels[b, t]) for b in range(2) for t in range(5)])
    torch.testing.assert_close(loss(logits, labels), by_hand.mean())
    torch.testing.assert_close(loss(logits[0], labels[0]), by_hand[:5].mean())


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_it_learns_one_batch_by_heart(name: str) -> None:
    config = configured(name, width=16, layers=2)
    x, y = batch_for(name)
    torch.manual_seed(0)
    model, loss = models.build(config), models.loss_of(config)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        torch.autograd.backward(loss(model(x), y))
        optimizer.step()
    assert loss(model(x), y).item() < 0.2


@pytest.mark.parametrize(
    ("model", "data", "fitting"),
    [
        ("transformer", "mnist", "mlp or cnn"),
        ("transformer", "cifar10", "mlp or cnn"),
        ("mlp", "stdlib", "transformer"),
        ("cnn", "text", "transformer"),
    ],
)
def test_a_model_that_cannot_read_the_data_is_refused(model: str, data: str, fitting: str) -> None:
    config = build({"model": {"name": model}, "data": {"name": data}})
    with pytest.raises(ConfigError, match=f"model.name = {model} .* data.name = {data}: use model.name = {fitting}"):
        models.build(config)
