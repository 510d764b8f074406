"""Rounded on the wire: how far off, what is never lost without a trace, and what is left as it is.

x ──► pack ──► codec ──► unpack ──► about x, in x's dtype
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dnipipe import codec
from dnipipe.config import WireSettings
from dnipipe.errors import MessageError
from dnipipe.messages import Activation, Answer, Evaluation, Gradient, Input, Message
from dnipipe.transport import Side
from dnipipe.transport.local import LocalTransport, pipeline
from dnipipe.wire import FORMS, Wire, form_of, pack, some, unpack

Y = torch.tensor([1, 0, 2])
SHAPES = [(), (1,), (7,), (0,), (3, 0), (0, 3), (3, 0, 2), (4, 5), (2, 3, 16), (2, 1, 3, 5)]
ACROSS = {"bfloat16": (2**-8, 0.0), "float16": (2**-11, 2**-40), "int8": (0.0, 1 / 254)}  # of the element, of its row


def through(x: Tensor, name: str) -> Tensor:
    """As the receiver gets it: by way of the frames of a message, each in memory of its own."""
    values, scale = pack(x, FORMS[name])
    frames = codec.encode(Activation(1, values, Y, scale), "run", 0)
    message = codec.decode([memoryview(bytearray(frame)) for frame in frames])[2]
    assert isinstance(message, Activation)
    assert sum(map(len, frames[1:])) == FORMS[name].size(x.shape) + 24
    return unpack(message.x, message.scale, FORMS[name], x.dtype, "x")


def cases(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """Rows of every size a float32 may have, some of one element only, alike or not within a row."""
    draw = torch.Generator().manual_seed(0)
    for turn, power in enumerate(range(-30, 38, 4)):
        spread = 10.0 ** torch.randint(-8 * (turn % 2), 1, shape, generator=draw).double()
        x = torch.randn(shape, generator=draw, dtype=torch.float64).clamp(-5, 5) * spread * 10.0**power
        yield (x * (torch.rand(shape, generator=draw) < 0.8)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_nothing_is_further_off_than_promised(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    of_element, of_row = ACROSS[name]
    for x in cases(shape, dtype):
        back = through(x, name)
        assert back.dtype == dtype and back.shape == x.shape
        if x.numel():
            bound = (of_element * x.abs()).maximum(of_row * x.abs().amax(-1, keepdim=True))
            assert ((back - x).abs() <= bound * (1 + 1e-4) + 1e-36).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_stage_in_half_precision_sends_bytes(dtype: torch.dtype) -> None:
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).to(dtype) * 100
    back = through(x, "int8")
    off = (back.float() - x.float()).abs() / x.float().abs().amax(-1, keepdim=True)
    assert back.dtype == dtype and off.max() < 1 / 254 + 2**-8


@pytest.mark.parametrize("name", FORMS)
def test_zeros_stay_zeros_beside_any_other_row(name: str) -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [1e30, 0.0, -1e30], [0.0, 0.0, -0.0]])
    back = through(x, name)
    assert not back[[0, 2]].any() and back[1, 1] == 0


@pytest.mark.parametrize("name", FORMS)
def test_what_is_large_never_becomes_infinite_and_what_is_small_does_not_vanish(name: str) -> None:
    """A float16 of its own ends at 65504 and at 6e-8; a gradient per element of a mean is often smaller."""
    x = torch.tensor([[3e38, -1e38], [1e-30, -9e-31], [65505.0, 3e4], [2e-8, 1e-8]])
    torch.testing.assert_close(through(x, name), x, rtol=0.01 if name != "int8" else 0.5, atol=0.0)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_noticed_and_stays_in_its_row(name: str, poison: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = poison
    back = through(x, name)
    assert not back[1, 2].isfinite() and torch.equal(back[[0, 2]], x[[0, 2]])


def test_beyond_float32_is_noticed() -> None:
    for name in FORMS:
        assert not through(torch.tensor([1e300, 1.0], dtype=torch.float64), name)[0].isfinite()


@pytest.mark.parametrize(
    ("setting", "dtype", "travels"),
    [
        ("as is", torch.float32, None),
        ("int8", torch.int64, None),
        ("int8", torch.bfloat16, "int8"),
        ("float16", torch.bfloat16, None),
        ("bfloat16", torch.float16, None),
        ("bfloat16", torch.float64, "bfloat16"),
    ],
)
def test_only_what_gets_smaller_is_rounded(setting: str, dtype: torch.dtype, travels: str | None) -> None:
    assert form_of(setting, dtype) == (FORMS[travels] if travels else None)


# -- around a transport --------------------------------------------------------------------------------------------


def pair(**settings: Any) -> tuple[Wire, Wire, LocalTransport, LocalTransport]:
    """Two neighbours with a Wire each; and, to see what travels and to forge it, their transports."""
    a, b = pipeline(2)
    rules = WireSettings(**settings)
    return Wire(a, rules, {Side.NEXT: torch.float32}), Wire(b, rules, {Side.PREVIOUS: torch.float32}), a, b


def take(transport: Wire | LocalTransport, side: Side) -> Any:
    got = transport.receive([side], 5.0)
    assert got is not None and got[0] is side
    return got[1]


@pytest.mark.parametrize(("down", "up"), list(itertools.permutations(["as is", *FORMS], 2)))
def test_activations_and_gradients_apart(down: str, up: str) -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    a, b, raw_a, raw_b = pair(activations=down, gradients=up)
    for seen in (False, True):  # what the neighbour makes of it; and what travels
        a.send(Side.NEXT, Activation(1, x, Y))
        b.send(Side.PREVIOUS, Gradient(1, x, starved=True))
        got = [take(raw_b if seen else b, Side.PREVIOUS), take(raw_a if seen else a, Side.NEXT)]
        for message, tensor, name in zip(got, (got[0].x, got[1].g), (down, up), strict=True):
            form = FORMS.get(name)
            if seen:
                assert tensor.dtype == (form.dtype if form else torch.float32)
                assert (message.scale is not None) == bool(form and form.largest)
            else:
                assert torch.equal(tensor, through(x, name) if form else x) and message.scale is None
        assert torch.equal(got[0].y, Y) and got[1].starved


def test_labels_inputs_evaluations_and_answers_go_as_they_are() -> None:
    a, b, *_ = pair(activations="int8", gradients="int8")
    x, y = torch.randn(3, 8), torch.randn(3, 2)
    down: list[Message] = [Input(1, x, y), Evaluation(1, x, y), Activation(1, x, y)]
    for message in down:
        a.send(Side.NEXT, message)
    for sent in down[:2]:
        assert torch.equal(take(b, Side.PREVIOUS).x, sent.x)  # type: ignore[union-attr]
    assert torch.equal(take(b, Side.PREVIOUS).y, y)
    b.send(Side.PREVIOUS, Answer(1, x))
    assert torch.equal(take(a, Side.NEXT).h, x)


def test_whole_numbers_go_as_they_are() -> None:
    a, b = (
        Wire(end, WireSettings(activations="int8"), {side: torch.int64})
        for end, side in zip(pipeline(2), (Side.NEXT, Side.PREVIOUS), strict=True)
    )
    a.send(Side.NEXT, Activation(1, torch.tensor([2**40, -1]), Y))
    assert torch.equal(take(b, Side.PREVIOUS).x, torch.tensor([2**40, -1]))


def test_each_third_gradient_is_carried_and_the_others_are_answers_nonetheless() -> None:
    a, b, *_ = pair(gradient_every=3)
    for batch in range(1, 8):
        b.send(Side.PREVIOUS, Gradient(batch, torch.ones(2), starved=batch == 1))
    got = [take(a, Side.NEXT) for _ in range(7)]
    assert [message.g is not None for message in got] == [False, False, True, False, False, True, False]
    assert [message.starved for message in got] == [True] + [False] * 6


@pytest.mark.parametrize("form", ["as is", "int8"])
@pytest.mark.parametrize(("share", "taken"), [(0.25, 2), (0.01, 1), (0.9, 8)])
def test_a_share_of_the_samples_is_carried_the_same_wherever_it_is_drawn(form: str, share: float, taken: int) -> None:
    """In the unit of a batch of so many; all of them within some batches."""
    g = torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(4))
    seen: set[int] = set()
    for batch in range(1, 200):
        a, b, *_ = pair(gradients=form, gradient_rows=share)
        b.send(Side.PREVIOUS, Gradient(batch, g, starved=True))
        got = take(a, Side.NEXT)
        if taken == 8:
            assert got.samples is None and got.g.shape == g.shape
            continue
        assert (
            got.starved and got.g.shape == (taken, 3, 4) and got.samples.tolist() == sorted(set(got.samples.tolist()))
        )
        torch.testing.assert_close(got.g, g[got.samples] * (8 / taken), rtol=0, atol=0 if form == "as is" else 0.2)
        assert torch.equal(got.samples, some(g, share, 0, batch)[1])  # type: ignore[arg-type]
        seen |= set(got.samples.tolist())
    assert seen == (set(range(8)) if taken < 8 else set())


BYTES, ONES = torch.ones(3, 4, dtype=torch.int8), torch.ones(3, 1)


@pytest.mark.parametrize(
    ("setting", "x", "scale", "says"),
    [
        ("int8", ONES, None, r"torch\.float32 came, the settings in \[wire\] make it torch\.int8"),
        ("int8", BYTES, None, r"no scale came for torch\.int8 \(3, 4\)"),
        ("int8", BYTES, ONES.double(), r"a scale torch\.float64 \(3, 1\) came"),
        ("int8", BYTES, torch.ones(3), r"a scale torch\.float32 \(3,\) came"),
        ("int8", BYTES, torch.ones(10**3, 3, 1), r"a scale torch\.float32 \(1000, 3, 1\) came"),
        ("bfloat16", BYTES.bfloat16(), ONES, r"a scale torch\.float32 \(3, 1\) came for torch\.bfloat16"),
        ("as is", BYTES, ONES, r"a scale torch\.float32 \(3, 1\) came for torch\.int8"),
    ],
)
def test_what_is_not_of_the_agreed_form_is_refused(setting: str, x: Tensor, scale: Tensor | None, says: str) -> None:
    a, b, raw_a, raw_b = pair(activations=setting, gradients=setting, gradient_every=2)
    raw_a.send(Side.NEXT, Activation(4, x, Y, scale))
    with pytest.raises(MessageError, match=rf"^Activation\.x of batch 4: {says}"):
        take(b, Side.PREVIOUS)
    raw_b.send(Side.PREVIOUS, Gradient(4, x, scale=scale))
    with pytest.raises(MessageError, match=rf"^Gradient\.g of batch 4: {says}"):
        take(a, Side.NEXT)
