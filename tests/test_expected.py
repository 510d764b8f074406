"""What may come by an edge: kinds of messages by side, and tensors as the plan has them."""

from __future__ import annotations

import pytest
import torch

from dnipipe.config import WireSettings
from dnipipe.errors import MessageError
from dnipipe.expected import expected
from dnipipe.messages import Activation, Checkpoint, Gradient, Hello, Input, Message, Report, Saved, Stop
from dnipipe.split import Plan
from dnipipe.transport import Side

PLAN = Plan(
    layers=("0", "1", "2"),
    boundaries=(1, 2),
    seconds=(1.0, 1.0, 1.0),
    parameters=(1, 1, 1),
    shapes=((8, 5, 4), (8, 6), (8, 3)),
    dtypes=("float32", "bfloat16", "float32"),
    x=(8, 5),
    x_dtype="int64",
    y=(8,),
    classes=3,
)
Y = torch.zeros(8, dtype=torch.int64)
check = expected(PLAN, WireSettings(), 1)


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (Side.PREVIOUS, Activation(1, torch.zeros(8, 5, 4), Y)),
        (Side.PREVIOUS, Activation(1, torch.zeros(3, 7, 4), Y[:3])),  # sizes may change
        (Side.PREVIOUS, Input(1, torch.zeros(8, 5), Y)),
        (Side.PREVIOUS, Checkpoint(1)),
        (Side.NEXT, Gradient(1, torch.zeros(8, 6, dtype=torch.bfloat16))),
        (Side.NEXT, Gradient(1, None)),
        (Side.NEXT, Saved(1, 2)),
        (Side.NEXT, Stop(-1)),
        (Side.PREVIOUS, Stop(1)),
        (Side.NEXT, Hello("run", 2, 3, 0)),
    ],
)
def test_what_belongs_there_passes(side: Side, message: Message) -> None:
    check(side, message)


@pytest.mark.parametrize(
    ("side", "message", "says"),
    [
        (Side.PREVIOUS, Activation(7, torch.zeros(8, 5, 4).double(), Y), r"x of batch 7: torch\.float64 with 3 dim"),
        (Side.PREVIOUS, Activation(7, torch.zeros(8, 20), Y), "this edge carries torch.float32 with 3"),
        (Side.NEXT, Gradient(7, torch.zeros(8, 6)), r"g of batch 7: torch\.float32 .* carries torch.bfloat16 with 2"),
        (Side.NEXT, Activation(7, torch.zeros(8, 5, 4), Y), "an? Activation does not come from the next stage"),
        (Side.NEXT, Checkpoint(7), "Checkpoint does not come from the next"),
        (Side.PREVIOUS, Gradient(7, None), "Gradient does not come from the previous"),
        (Side.PREVIOUS, Report(0, 7), "Report does not come from the previous"),
    ],
)
def test_what_does_not_is_refused(side: Side, message: Message, says: str) -> None:
    with pytest.raises(MessageError, match=says) as raised:
        check(side, message)
    assert raised.value.reason == "not as agreed"


def test_what_travels_rounded_is_held_to_its_form() -> None:
    rounded = expected(PLAN, WireSettings(activations="int8"), 1)
    rounded(Side.PREVIOUS, Activation(1, torch.zeros(8, 5, 4, dtype=torch.int8), Y))
    with pytest.raises(MessageError, match=r"carries torch.int8"):
        rounded(Side.PREVIOUS, Activation(1, torch.zeros(8, 5, 4), Y))
