"""Tensors that take fewer bytes on the wire than in a stage: rounded when sent, restored when received.

    stage k ── x float32 ──► Wire ── x int8, a scale a row ──► any transport ──► Wire ── x float32 ──► stage k+1
            ◄── g float32 ── Wire ◄── g bfloat16 ───────────── any transport ◄── Wire ◄── g float32 ──

    bfloat16   2 bytes an element    off by 2^-8 of the element at most
    float16    2, and 4 a row        off by 2^-11 of the element, or by 2^-40 of its row's largest if that is more
    int8       1, and 4 a row        off by 1/254 of its row's largest

A row is one slice of the last dimension. Its scale brings its largest element near the largest of the form: so nothing
overflows, and gradients, which a mean over many loss terms makes small, do not vanish in float16. A row with a NaN or
an infinity arrives as NaN throughout, so that it is noticed; in bfloat16 each stays what it was. A row whose largest is
below 1e-33 may arrive as zeros; one of float64 beyond float32's range as NaN, or in bfloat16 as infinities.

Of a gradient that only teaches, a share of the samples may be all that travels: drawn by seed and batch, and named in
its message. What the receiver learns from is exactly those.

Only the activations and gradients of training are rounded. Labels, inputs and answers are not, nor tensors of whole
numbers or no larger than the form, nor evaluations: they measure the model that is exported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dnipipe.beside import NOWHERE, Beside
from dnipipe.config import WireSettings
from dnipipe.errors import MessageError
from dnipipe.messages import Activation, Gradient, Message
from dnipipe.randomness import generator
from dnipipe.transport import AT_EASE, Side, Transport


@dataclass(frozen=True)
class Form:
    """How a tensor travels."""

    dtype: torch.dtype
    largest: float | None  # what a row's largest element becomes; None: rows have no scale

    def size(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of this shape on the wire."""
        whole = torch.Size(shape)
        rows = _scales(whole).numel() if self.largest else 0
        return whole.numel() * self.dtype.itemsize + rows * torch.float32.itemsize


FORMS = {
    "bfloat16": Form(torch.bfloat16, None),
    "float16": Form(torch.float16, 2.0**15),
    "int8": Form(torch.int8, 127.0),
}
LEAST = torch.finfo(torch.float32).tiny  # a scale: the scale of a row of zeros must divide it


def form_of(setting: str, dtype: torch.dtype) -> Form | None:
    """How tensors of this dtype travel; None: as they are."""
    form = FORMS.get(setting)
    return form if form and dtype.is_floating_point and form.dtype.itemsize < dtype.itemsize else None


def pack(x: Tensor, form: Form) -> tuple[Tensor, Tensor | None]:
    """(values of the form's dtype, shaped like x; the rows' scales (…, 1) float32, or None)."""
    x = x.detach()
    if form.largest is None:
        return x.to(form.dtype), None
    if x.numel() == 0:
        return x.to(form.dtype), x.new_ones(_scales(x.shape), dtype=torch.float32)
    scale = (x.abs().amax(-1, keepdim=True).float() / form.largest).clamp_min(LEAST)
    scaled = x / scale
    return (scaled if form.dtype.is_floating_point else scaled.round_()).to(form.dtype), scale


def unpack(values: Tensor, scale: Tensor | None, form: Form | None, dtype: torch.dtype, where: str) -> Tensor:
    """About what `pack` was given, in `dtype`. Raises MessageError, which begins with `where`, if the form is another.

    Nothing is reserved before that; then at most eight times the bytes that came.
    """
    if form and values.dtype != form.dtype:
        raise MessageError(f"{where}: {values.dtype} came, the settings in [wire] make it {form.dtype}")
    if not scale_fits(values, scale, form):
        came = "no scale" if scale is None else f"a scale {scale.dtype} {tuple(scale.shape)}"
        raise MessageError(f"{where}: {came} came for {values.dtype} {tuple(values.shape)}")
    if form is None:
        return values
    if scale is None:
        return values.to(dtype)
    return values.to(torch.promote_types(dtype, torch.float32)).mul_(scale).to(dtype)


def scale_fits(values: Tensor, scale: Tensor | None, form: Form | None) -> bool:
    """Whether values of this form came with the scales that they need, and with none if they need none."""
    if form is None or form.largest is None:
        return scale is None
    return scale is not None and scale.dtype == torch.float32 and scale.shape == _scales(values.shape)


def _scales(shape: torch.Size) -> torch.Size:
    """One a row; a tensor without dimensions is a row of its own."""
    return torch.Size([*shape[:-1], 1]) if shape else shape


def some(g: Tensor, share: float, seed: int, batch: int) -> tuple[Tensor, Tensor | None]:
    """A share of the samples of g (B, D...): (n, D...), of the mean loss over these n, and which (n,) they are."""
    samples = g.shape[0]
    taken = math.ceil(share * samples)
    if taken == samples:
        return g, None
    chosen = torch.randperm(samples, generator=generator(seed, "gradient", batch))[:taken].sort().values
    return g.detach()[chosen.to(g.device)] * (samples / taken), chosen


class Wire:
    """A Transport (see there) that rounds what its owner sends, and restores what it receives.

    Args:
        inner: what carries the messages.
        settings: the forms, and which gradients are carried at all, and how much of them.
        dtypes: of the tensors on each of the stage's edges, as the stages on both of its ends have them.
        seed: decides, with the batch, which samples' gradients are carried.
        beside: where what came is restored: on a GPU, to which it is brought in its smaller form.
    """

    def __init__(
        self,
        inner: Transport,
        settings: WireSettings,
        dtypes: Mapping[Side, torch.dtype],
        seed: int = 0,
        beside: Beside = NOWHERE,
    ) -> None:
        self.inner, self.dtypes, self.seed, self.beside = inner, dtypes, seed, beside
        self.every, self.rows = settings.gradient_every, settings.gradient_rows
        self._activations = {side: form_of(settings.activations, dtype) for side, dtype in dtypes.items()}
        self._gradients = {side: form_of(settings.gradients, dtype) for side, dtype in dtypes.items()}

    def send(self, side: Side, message: Message) -> None:
        self.inner.send(side, self._packed(side, message))

    def _packed(self, side: Side, message: Message) -> Message:
        if isinstance(message, Activation) and (form := self._activations[side]):
            x, scale = pack(message.x, form)
            return replace(message, x=x, scale=scale)
        if isinstance(message, Gradient) and message.g is not None:
            if message.batch % self.every:
                return replace(message, g=None)
            g, scale = message.g, None
            g, samples = some(g, self.rows, self.seed, message.batch) if self.rows < 1 else (g, None)
            if form := self._gradients[side]:
                g, scale = pack(g, form)
            return replace(message, g=g, scale=scale, samples=samples)
        return message

    def receive(
        self, sides: Sequence[Side], timeout: float, waiting: AbstractContextManager[object] = AT_EASE
    ) -> tuple[Side, Message] | None:
        """Raises MessageError, besides the inner transport's errors, for a tensor that is not of the agreed form."""
        got = self.inner.receive(sides, timeout, waiting)
        return got and (got[0], self._restored(*got))

    def _restored(self, side: Side, message: Message) -> Message:
        if isinstance(message, Activation):
            form, where = self._activations[side], f"Activation.x of batch {message.batch}"
            return replace(message, x=self._unpacked(side, message.x, message.scale, form, where), scale=None)
        if isinstance(message, Gradient) and message.g is not None:
            form, where = self._gradients[side], f"Gradient.g of batch {message.batch}"
            return replace(message, g=self._unpacked(side, message.g, message.scale, form, where), scale=None)
        return message

    def _unpacked(self, side: Side, values: Tensor, scale: Tensor | None, form: Form | None, where: str) -> Tensor:
        if form is None:
            return unpack(values, scale, form, self.dtypes[side], where)
        values, scale = self.beside.bring(values), None if scale is None else self.beside.bring(scale)
        with self.beside:
            restored = unpack(values, scale, form, self.dtypes[side], where)
        return self.beside.for_compute(restored)

    def wake(self) -> None:
        self.inner.wake()

    def close(self) -> None:
        self.inner.close()


__all__ = ["FORMS", "Form", "Wire", "form_of", "pack", "scale_fits", "some", "unpack"]
