"""What stages say to one another. Frozen values; tensors never require a gradient.

           Activation, Input, Labels, Evaluation, Checkpoint, Stop, Farewell
    stage k ────────────────────────────────────────────────► stage k+1
            ◄────────────────────────────────────────────────
           Gradient, Answer, Saved, Report, Stop

Hello goes both ways, first; so does Received, of which no stage hears. Between stages that come and go on their own
(service/) Link stands in the place of Hello, and Agreed follows it downwards. Within one direction order is kept, so a
marker (Checkpoint, Stop) stands exactly behind the batch that it follows. Shapes: B samples, D... the dimensions of one
activation, whatever their number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Union

from torch import Tensor

PROTOCOL = 7


@dataclass(frozen=True, eq=False)
class Hello:
    """First message on an edge, both ways. A field that differs from the neighbour's own refuses the connection."""

    run: str  # the run's id, unguessable: also fences off messages of another run
    stage: int  # who speaks
    stages: int  # K
    incarnation: int  # which start of this stage in this run
    settings: tuple[str, ...] = ()  # "section.key=value", all that must agree between stages
    shape: tuple[int, ...] = ()  # of the activation on this edge, for one batch of the plan
    dtype: str = ""  # of that activation
    protocol: int = PROTOCOL


@dataclass(frozen=True, eq=False)
class Activation:
    """A training batch on its way down: what the stage before made of it, and the labels."""

    batch: int  # batch id, strictly increasing, given by stage 0
    x: Tensor  # (B, D...) the receiver's input
    y: Tensor  # (B, ...) labels
    scale: Tensor | None = None  # (B, ..., 1) of x's rows while it travels rounded (wire.py); no stage sees one
    along: Tensor | None = None  # the second of a pair that the layers before gave (pairs.py); never rounded


@dataclass(frozen=True, eq=False)
class Input:
    """A training batch as the network got it, for stages that guess their own input from it (unlocked.py)."""

    batch: int  # as in Activation, which follows if the sender trains on this batch
    x: Tensor  # (B, ...) the network's input
    y: Tensor  # (B, ...) labels


@dataclass(frozen=True, eq=False)
class Labels:
    """A training batch whose activations and gradients travel by a way of their own (sync.py)."""

    batch: int  # as in Activation
    y: Tensor  # (B, ...) labels


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A batch that is only looked at, in evaluation mode: no update follows."""

    batch: int
    x: Tensor  # (B, D...)
    y: Tensor | None  # (B, ...) labels; None asks for the model's output instead of its loss
    along: Tensor | None = None  # as in Activation


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Marker: save what you are right after your update on this batch."""

    batch: int


@dataclass(frozen=True, eq=False)
class Stop:
    """Marker: nothing follows. With a reason, the sender ends because something went wrong."""

    batch: int  # the last batch id before it
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Gradient:
    """What the next stage says of an activation it received: its gradient, and so also that there is room again."""

    batch: int
    g: Tensor | None  # (B, D...) d(mean loss over the batch)/d(element of h); None: none was made for this batch
    starved: bool = False  # the sender had been idle, waiting for this very activation
    scale: Tensor | None = None  # (B, ..., 1) of g's rows, as in Activation
    samples: Tensor | None = None  # (n,) int64: g (n, D...) is of these samples only, and of their mean loss
    full: bool = False  # g was left out because the link was full, and newer ones waited (transport/backlog.py)


@dataclass(frozen=True, eq=False)
class Answer:
    """The last stage's answer to an Evaluation, handed up to stage 0."""

    batch: int
    h: Tensor  # (4,) float64: sum of losses, correct, loss terms, samples; or the output (B, ...) if y was None


@dataclass(frozen=True, eq=False)
class Saved:
    """Stage `stage` has its part of the checkpoint of `batch` on disk."""

    batch: int
    stage: int


@dataclass(frozen=True, eq=False)
class Report:
    """How stage `stage` is doing, handed up to stage 0. The last one of a run is final."""

    stage: int
    batch: int  # the last batch id it trained
    numbers: dict[str, float] = field(default_factory=dict)
    final: bool = False


@dataclass(frozen=True, eq=False)
class Received:
    """From transport to transport: the tensors of a message, which travelled apart from it, are here (gloo.py)."""

    seq: int  # that message's number on the edge


@dataclass(frozen=True, eq=False)
class Link:
    """Independent stages: what both say first when a connection is made, and every half second (service/links.py)."""

    stage: int  # who speaks
    stages: int  # K
    incarnation: int  # which start of this stage; a lower one than was heard before is refused
    run: str  # the run's id; "" as long as it does not know any
    settings: tuple[str, ...]  # as in Hello
    last: int  # the last batch id that it trained, in any incarnation
    nonce: str  # of this connection, made by the speaker
    seen: str  # the listener's nonce, if the speaker has heard it
    refused: str = ""  # why the speaker will not have the listener
    sent: int = 0  # messages that the speaker has sent on this connection
    protocol: int = PROTOCOL


@dataclass(frozen=True, eq=False)
class Agreed:
    """Independent stages: what stage 0 has decided for all, handed down."""

    x: Tensor  # (n,) uint8, JSON


@dataclass(frozen=True, eq=False)
class Farewell:
    """Independent stages: stage 0 has every last report, so that nobody need stay."""

    batch: int  # the last one of the run


Downward = Union[Activation, Input, Labels, Evaluation, Checkpoint]
Upward = Union[Gradient, Answer, Saved, Report]
Message = Union[Hello, Downward, Upward, Stop, Received, Link, Agreed, Farewell]
