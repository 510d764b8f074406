"""What may come by an edge: messages that belong on that side, with tensors as the plan has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from dnipipe.config import WireSettings
from dnipipe.errors import MessageError
from dnipipe.messages import (
    Activation,
    Agreed,
    Downward,
    Farewell,
    Gradient,
    Hello,
    Link,
    Message,
    Received,
    Stop,
    Upward,
)
from dnipipe.split import Plan
from dnipipe.transport import Side
from dnipipe.wire import form_of

WRONG = "not as agreed"  # what such messages are counted under
BOTH_WAYS = (Hello, Link, Received, Stop)
FROM = {
    Side.PREVIOUS: (*BOTH_WAYS, *get_args(Downward), Agreed, Farewell),
    Side.NEXT: (*BOTH_WAYS, *get_args(Upward)),
}


def expected(plan: Plan, wire: WireSettings, stage: int) -> Callable[[Side, Message], None]:
    """A check for stage `stage`, of (where a message came from, the message), which raises MessageError.

    The sizes of a batch may change from one to the next, the dtype of what an edge carries and its number of dimensions
    may not. A gradient's shape is held against its batch's by the stage itself.
    """

    def check(side: Side, message: Message) -> None:
        if not isinstance(message, FROM[side]):
            raise MessageError(f"a {type(message).__name__} does not come from the {side.value} stage", WRONG)
        if isinstance(message, Activation):
            _like(plan, stage - 1, wire.activations, message.x, f"Activation.x of batch {message.batch}")
        elif isinstance(message, Gradient) and message.g is not None:
            _like(plan, stage, wire.gradients, message.g, f"Gradient.g of batch {message.batch}")

    return check


def _like(plan: Plan, lower: int, setting: str, tensor: Tensor, where: str) -> None:
    """The edge is the one behind stage `lower`."""
    name, shape = plan.h(lower)
    planned: torch.dtype = getattr(torch, name)
    form = form_of(setting, planned)
    dtype = form.dtype if form else planned
    if tensor.dtype != dtype or tensor.dim() != len(shape):
        raise MessageError(
            f"{where}: {tensor.dtype} with {tensor.dim()} dimensions came, this edge carries {dtype} with {len(shape)}",
            WRONG,
        )


__all__ = ["expected"]
