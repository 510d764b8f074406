"""What may come by an edge: kinds of messages by side, and tensors as the plan has them, of sizes that the stage's
layers can take.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn as nn

from dnipipe import models
from dnipipe.config import WireSettings, build
from dnipipe.errors import MessageError
from dnipipe.expected import demanded, expected
from dnipipe.messages import (
    Activation,
    Checkpoint,
    Evaluation,
    Gradient,
    Hello,
    Input,
    Labels,
    Message,
    Report,
    Saved,
    Stop,
)
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
H, MASK = torch.zeros(8, 5, 4), torch.zeros(8, 5, dtype=torch.bool)
paired = expected(replace(PLAN, alongs=(("bool", (8, 5)), None, None)), WireSettings(), 1)


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (Side.PREVIOUS, Activation(1, torch.zeros(8, 5, 4), Y)),
        (Side.PREVIOUS, Activation(1, torch.zeros(3, 7, 4), Y[:3])),  # sizes may change
        (Side.PREVIOUS, Activation(1, torch.zeros(8, 5, 4), torch.full((8,), 2, dtype=torch.uint8))),
        (Side.PREVIOUS, Evaluation(1, torch.zeros(3, 7, 4), Y[:3])),
        (Side.PREVIOUS, Evaluation(1, torch.zeros(1, 5, 4), None)),
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


@pytest.mark.parametrize("kind", [Activation, Evaluation])
def test_what_travels_along_with_an_activation_is_as_planned_too(kind: type[Activation] | type[Evaluation]) -> None:
    paired(Side.PREVIOUS, kind(7, H, Y, along=MASK))
    paired(Side.PREVIOUS, kind(7, H[:3], Y[:3], along=MASK[:3, :2]))  # sizes may change
    for along, says in (
        (None, "nothing came, this edge carries bool with 2 dimensions"),
        (MASK.float(), "float32 with 2 dimensions came, this edge carries bool with 2"),
        (MASK[..., None], "bool with 3 dimensions came"),
        (MASK[:7], "of 7 samples, and the activation is of 8"),
    ):
        with pytest.raises(MessageError, match=rf"{kind.__name__}\.along of batch 7: {says}"):
            paired(Side.PREVIOUS, kind(7, H, Y, along=along))
    with pytest.raises(MessageError, match="bool with 2 dimensions came, this edge carries nothing"):
        check(Side.PREVIOUS, kind(7, H, Y, along=MASK))


@pytest.mark.parametrize(
    ("side", "message", "says"),
    [
        (Side.PREVIOUS, Activation(7, torch.zeros(8, 5, 4).double(), Y), r"x of batch 7: torch\.float64 with 3 dim"),
        (Side.PREVIOUS, Activation(7, torch.zeros(8, 20), Y), "this edge carries torch.float32 with 3"),
        (
            Side.PREVIOUS,
            Evaluation(7, torch.zeros(8, 20), Y),
            r"Evaluation.x of batch 7: .* carries torch.float32 with 3",
        ),
        (Side.PREVIOUS, Activation(7, torch.zeros(8, 5, 4), Y + 3), r"Activation.y of batch 7: .* outside \[0, 3\)"),
        (Side.PREVIOUS, Activation(7, torch.zeros(8, 5, 4), Y - 1), r"a label is outside"),
        (Side.PREVIOUS, Activation(7, torch.zeros(8, 5, 4), Y[:0]), r"there is no label"),
        (Side.PREVIOUS, Activation(7, torch.zeros(8, 5, 4), Y.float()), r"labels are torch.float32"),
        (Side.PREVIOUS, Activation(7, torch.zeros(8, 5, 4), (Y + 3).to(torch.uint16)), r"a label is outside"),
        (Side.PREVIOUS, Evaluation(7, torch.zeros(8, 5, 4), Y + 3), r"Evaluation.y of batch 7: a label is outside"),
        (Side.PREVIOUS, Input(7, torch.zeros(8, 5), Y + 3), r"Input.y of batch 7: a label is outside"),
        (Side.PREVIOUS, Labels(7, Y + 3), r"Labels.y of batch 7: a label is outside"),
        (
            Side.PREVIOUS,
            Activation(7, torch.zeros(8, 5, 4), Y, torch.ones(8, 5, 1)),
            r"x of batch 7: a scale .* came for",
        ),
        (
            Side.NEXT,
            Gradient(7, torch.zeros(8, 6, dtype=torch.bfloat16), scale=torch.ones(1)),
            r"g .*: a scale .* came",
        ),
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
    values = torch.zeros(8, 5, 4, dtype=torch.int8)
    rounded(Side.PREVIOUS, Activation(1, values, Y, torch.ones(8, 5, 1)))
    for scale in (None, torch.ones(8, 5), torch.ones(8, 5, 1).double()):
        with pytest.raises(MessageError, match=r"Activation.x of batch 1: .* scale .*came"):
            rounded(Side.PREVIOUS, Activation(1, values, Y, scale))
    rounded(Side.PREVIOUS, Evaluation(1, torch.zeros(8, 5, 4), Y))  # never rounded
    with pytest.raises(MessageError, match=r"carries torch.int8"):
        rounded(Side.PREVIOUS, Activation(1, torch.zeros(8, 5, 4), Y))


# -- sizes -------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """As a transformer's block: the input goes into a layer, and beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.norm, self.out = nn.Linear(3, 3), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = x + self.out(self.norm(x))
        return h


class Fickle(nn.Module):
    """What it does depends on numbers, and it keeps something of what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.seen = nn.Linear(4, 4), list[torch.Tensor]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        h: torch.Tensor = self.out(x)
        return h if h.sum().item() > 0 else -h


@pytest.mark.parametrize(
    ("module", "shape", "sizes"),
    [
        (nn.Sequential(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), nn.Linear(2, 2)), (8, 4), {-1: 4}),
        (Residual(), (8, 5, 4), {-1: 4}),
        (Fickle(), (8, 4), {-1: 4}),
        (nn.LayerNorm((5, 4)), (8, 5, 4), {-2: 5, -1: 4}),
        (nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1)), (8, 3, 9, 9), {-3: 3}),  # of any height and width
        (nn.Conv1d(3, 2, 3), (8, 3, 50), {-2: 3}),
        (nn.BatchNorm1d(4), (8, 4), {1: 4}),
        (nn.BatchNorm1d(4, affine=False, track_running_stats=False), (8, 4), {}),
        (nn.ReLU(), (8, 4), {}),
        (nn.Sequential(nn.Flatten(), nn.Linear(20, 2)), (8, 5, 4), {}),  # 20 may be made in several ways
        (nn.Sequential(nn.AdaptiveAvgPool1d(4), nn.Linear(4, 2)), (8, 5), {}),
    ],
)
def test_what_the_layers_demand_whatever_the_batch(
    module: nn.Module, shape: tuple[int, ...], sizes: dict[int, int]
) -> None:
    before = torch.get_rng_state()
    assert demanded(module, "float32", shape) == sizes
    assert torch.equal(torch.get_rng_state(), before)
    assert all(not tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    assert getattr(module, "seen", []) == []
    module.train()(torch.zeros(2, *shape[1:]))  # as if nothing had been


@pytest.mark.parametrize(
    ("name", "data", "shape", "sizes"),
    [
        ("transformer", "stdlib", (8, 16, 32), {-1: 32}),
        ("mlp", "mnist", (8, 32), {-1: 32}),
        ("cnn", "mnist", (8, 32, 14, 14), {-3: 32}),
    ],
)
def test_built_in_models_demand_their_width(
    name: str, data: str, shape: tuple[int, ...], sizes: dict[int, int]
) -> None:
    named = {"data": {"name": data, "root": "nowhere"} if data == "mnist" else {"name": data}}
    model = models.build(build({"model": {"name": name, "width": 32, "heads": 2}, "pipeline": {"stages": 2}} | named))
    assert demanded(model[1:], "float32", shape) == sizes


def test_nobody_has_to_wait_for_torchs_compiler_meanwhile() -> None:
    """To import it takes longer than all else that an independent stage does at its start."""
    code = (
        "import sys, torch.nn as nn; from dnipipe.expected import demanded; "
        "demanded(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), 'float32', (8, 4)); "
        "print('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_other_sizes_than_those_may_change() -> None:
    sized = expected(PLAN, WireSettings(), 1, {-1: 4})
    sized(Side.PREVIOUS, Activation(1, torch.zeros(3, 7, 4), Y[:3]))
    for message in (Activation(7, torch.zeros(8, 5, 3), Y), Evaluation(7, torch.zeros(8, 5, 3), Y)):
        with pytest.raises(MessageError, match=r"x of batch 7: the shape \(8, 5, 3\) came, .* take 4 in dimension -1"):
            sized(Side.PREVIOUS, message)
