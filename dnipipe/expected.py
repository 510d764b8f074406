"""What may come by an edge: messages that belong on that side, with tensors as the plan has them.

dtype, number of dimensions     always as planned
sizes                           those that the stage's own parameters demand; the others may change with the batch
labels                          whole numbers in [0, classes), or ignored, where the plan knows the classes
rows' scales                    where the settings round, and only there
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, get_args

import torch
import torch.nn as nn
from torch import Tensor

from dnipipe.config import WireSettings
from dnipipe.errors import MessageError
from dnipipe.labels import IGNORED, outside
from dnipipe.messages import (
    Activation,
    Agreed,
    Downward,
    Evaluation,
    Farewell,
    Gradient,
    Hello,
    Input,
    Labels,
    Link,
    Message,
    Received,
    Stop,
    Upward,
)
from dnipipe.pairs import joined
from dnipipe.split import Plan
from dnipipe.transport import Side
from dnipipe.wire import form_of, scale_fits

WRONG = "not as agreed"  # what such messages are counted under
BOTH_WAYS = (Hello, Link, Received, Stop)
FROM = {
    Side.PREVIOUS: (*BOTH_WAYS, *get_args(Downward), Agreed, Farewell),
    Side.NEXT: (*BOTH_WAYS, *get_args(Upward)),
}
Sizes = Mapping[int, int]  # dimension, as an index of shape -> its size


def expected(plan: Plan, wire: WireSettings, stage: int, sizes: Sizes | None = None) -> Callable[[Side, Message], None]:
    """A check for stage `stage`, of (where a message came from, the message), which raises MessageError.

    The sizes of a batch may change from one to the next, but for `sizes` (`demanded`); the dtype of what an edge
    carries and its number of dimensions may not. A gradient's shape is held against its batch's by the stage itself.
    """

    def check(side: Side, message: Message) -> None:
        if not isinstance(message, FROM[side]):
            raise MessageError(f"a {type(message).__name__} does not come from the {side.value} stage", WRONG)
        if isinstance(message, (Activation, Evaluation)):
            form = wire.activations if isinstance(message, Activation) else "as is"
            where = f"{type(message).__name__}.x of batch {message.batch}"
            _like(plan, stage - 1, form, message.x, getattr(message, "scale", None), where)
            _of_sizes(message.x, sizes or {}, where)
            _along(plan, stage - 1, message, where.replace(".x of", ".along of"))
        elif isinstance(message, Gradient) and message.g is not None:
            _like(plan, stage, wire.gradients, message.g, message.scale, f"Gradient.g of batch {message.batch}")
        if isinstance(message, (Activation, Evaluation, Input, Labels)) and message.y is not None:
            _in_classes(message.y, plan.classes, f"{type(message).__name__}.y of batch {message.batch}")

    return check


def _like(plan: Plan, lower: int, setting: str, tensor: Tensor, scale: Tensor | None, where: str) -> None:
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
    if not scale_fits(tensor, scale, form):
        came = "no scale" if scale is None else f"a scale {scale.dtype} {tuple(scale.shape)}"
        raise MessageError(f"{where}: {came} came for {dtype} {tuple(tensor.shape)}", WRONG)


def _along(plan: Plan, lower: int, message: Activation | Evaluation, where: str) -> None:
    """What travels with h (pairs.py)."""
    planned, along = plan.along(lower), message.along
    wanted = planned and (planned[0], len(planned[1]))
    came = None if along is None else (str(along.dtype).removeprefix("torch."), along.dim())
    if came != wanted:
        said = ["nothing" if each is None else f"{each[0]} with {each[1]} dimensions" for each in (came, wanted)]
        raise MessageError(f"{where}: {said[0]} came, this edge carries {said[1]} with each activation", WRONG)
    if along is not None and along.shape[0] != message.x.shape[0]:
        raise MessageError(
            f"{where}: of {along.shape[0]} samples, and the activation is of {message.x.shape[0]}", WRONG
        )


def _of_sizes(tensor: Tensor, sizes: Sizes, where: str) -> None:
    for dimension, size in sizes.items():
        if tensor.shape[dimension] != size:
            raise MessageError(
                f"{where}: the shape {tuple(tensor.shape)} came, and this stage's layers take {size} in dimension "
                f"{dimension} only",
                WRONG,
            )


def _in_classes(y: Tensor, classes: int | None, where: str) -> None:
    """As stage 0 has checked each batch (data/task.py). Not on a GPU, for which one would have to wait."""
    if classes is None or y.is_cuda:
        return
    if y.is_floating_point() or y.is_complex():
        raise MessageError(f"{where}: labels are {y.dtype}, expected whole numbers in [0, {classes})", WRONG)
    if not y.numel():
        raise MessageError(f"{where}: there is no label", WRONG)
    low, high = map(int, torch.aminmax(y.long()))  # not every dtype can be compared
    if high == IGNORED:
        raise MessageError(f"{where}: every label is {IGNORED}, which the loss ignores", WRONG)
    if (low < 0 or high >= classes) and bool(outside(y, classes).any()):
        raise MessageError(f"{where}: a label is outside [0, {classes})", WRONG)


# -- what a stage's parameters demand ------------------------------------------------------------------------------


def _trailing(layer: Any) -> dict[int, int]:
    return dict(enumerate(layer.normalized_shape, start=-len(layer.normalized_shape)))


def _channels(layer: Any) -> dict[int, int]:
    return {1: layer.num_features} if layer.affine or layer.track_running_stats else {}


# of torch's own layers, and not of what is derived from them, which may take what it likes
DEMANDS: dict[type[nn.Module], Callable[[Any], dict[int, int]]] = {
    nn.Linear: lambda layer: {-1: layer.in_features},
    nn.LayerNorm: _trailing,
    nn.RMSNorm: _trailing,
    nn.MultiheadAttention: lambda layer: {-1: layer.embed_dim},
    **dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU), lambda layer: {-1: layer.input_size}),
    **dict.fromkeys((nn.Conv1d, nn.ConvTranspose1d), lambda layer: {-2: layer.in_channels}),
    **dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d), lambda layer: {-3: layer.in_channels}),
    **dict.fromkeys((nn.Conv3d, nn.ConvTranspose3d), lambda layer: {-4: layer.in_channels}),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _channels),
    nn.GroupNorm: lambda layer: {1: layer.num_channels} if layer.affine else {},
}


def demanded(
    module: nn.Module, dtype: str, shape: Sequence[int], along: tuple[str, tuple[int, ...]] | None = None
) -> dict[int, int]:
    """The sizes that the module's input must have, whatever the batch, for a batch of this dtype and shape.

    Those that the parameters of a layer demand, the first that takes the input as it came. Found with a copy whose
    tensors hold no data (torch's meta device), so that nothing is computed and the module stays as it is; and no
    further than to that layer, for torch imports its compiler to know what many a layer makes of such a tensor, which
    takes seconds. {} if nobody knows.
    """
    found: dict[int, int] = {}
    x, beside = _empty(dtype, shape), _empty(*along) if along else None

    def look(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and inputs[0] is x:
            found.update(DEMANDS[type(layer)](layer))
            if found:
                raise _Found

    try:
        twin = _without_data(module)
        for layer in twin.modules():
            if type(layer) in DEMANDS:
                layer.register_forward_pre_hook(look)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            twin(joined(x, beside))
    except Exception:  # found; or layers that want numbers, or a device
        return found
    return found


def _empty(dtype: str, shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device="meta")


class _Found(Exception):
    """What was looked for: no more need be run."""


def _without_data(module: nn.Module) -> nn.Module:
    """A copy that takes no memory."""
    known: dict[int, Any] = {}
    for tensor in chain(module.parameters(), module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        known[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, known)


__all__ = ["WRONG", "demanded", "expected"]
