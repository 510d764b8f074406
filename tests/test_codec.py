"""Messages survive the wire unchanged, and whatever is not a message becomes a MessageError that names the field."""

from __future__ import annotations

import random
from typing import Any, get_args

import msgpack
import pytest
import torch

from benchmarks.fuzz.targets import alike
from dnipipe import codec
from dnipipe.errors import MessageError
from dnipipe.messages import (
    PROTOCOL,
    Activation,
    Agreed,
    Answer,
    Checkpoint,
    Evaluation,
    Farewell,
    Gradient,
    Hello,
    Input,
    Labels,
    Link,
    Message,
    Received,
    Report,
    Saved,
    Stop,
)

X, Y = torch.arange(12.0).reshape(3, 4), torch.tensor([1, 0, 2])
EXAMPLES: list[Message] = [
    Hello("0123abcd", 1, 4, 2, ("model.width=96", "train.seed=λ"), (32, 64, 96), "float32"),
    Hello("r", 0, 1, 0),
    Activation(7, X, Y),
    Activation(7, X.to(torch.int8), Y, torch.ones(3, 1)),
    Activation(7, X, Y, along=X > 0),
    Activation(7, X.to(torch.int8), Y, torch.ones(3, 1), X > 0),
    Input(7, torch.arange(6, dtype=torch.int64).reshape(3, 2), Y),
    Labels(7, Y),
    Evaluation(8, X, Y),
    Evaluation(8, X, None),
    Evaluation(8, X, Y, X > 0),
    Checkpoint(9),
    Stop(10),
    Stop(-1, "stage 2: the loss is NaN"),
    Gradient(11, X),
    Gradient(11, X.to(torch.int8), scale=torch.ones(3, 1)),
    Gradient(11, None, starved=True),
    Gradient(11, X[:2], samples=torch.tensor([0, 2])),
    Gradient(11, None, full=True),
    Answer(12, torch.tensor([1.5, 2, 3, 4], dtype=torch.float64)),
    Saved(13, 3),
    Report(2, 14, {"loss": 1.25, "idle": float("inf")}, final=True),
    Report(2, 14),
    Received(15),
    Link(1, 4, 3, "0123abcd", ("model.width=96",), 40, "a1", "b2"),
    Link(1, 4, 3, "", (), 0, "a1", "", "incarnation 4 of stage 2 has taken its place"),
    Link(1, 4, 3, "0123abcd", (), 40, "a1", "b2", sent=7),
    Agreed(torch.tensor([123, 125], dtype=torch.uint8)),
    Farewell(40),
]


def wire(frames: list[Any]) -> list[Any]:
    """As if received: each frame in memory of its own."""
    return [memoryview(bytearray(frame)) for frame in frames]


def test_examples_cover_every_message() -> None:
    assert {type(message) for message in EXAMPLES} == set(get_args(Message))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_round_trip(message: Message) -> None:
    run, seq, back = codec.decode(wire(codec.encode(message, "run", 2**40)))
    assert (run, seq) == ("run", 2**40)
    assert alike(message, back)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3), (1,) * 8], ids=str)
@pytest.mark.parametrize("dtype", codec.DTYPES.values(), ids=str)
def test_every_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    message = Answer(1, (torch.randn(shape) * 3).abs().to(dtype))
    assert alike(message, codec.decode(wire(codec.encode(message, "r", 0)))[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_tensors_arrive_whole(dtype: torch.dtype) -> None:
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    for part in (whole.t(), whole[::2, 1:], whole[:1].expand(5, 6)):
        assert alike(Answer(1, part), codec.decode(wire(codec.encode(Answer(1, part), "r", 0)))[2])


def test_nothing_is_copied() -> None:
    for x in (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.bfloat16)):
        frames = codec.encode(Answer(1, x), "r", 0)
        back = codec.decode(frames)[2]
        assert isinstance(back, Answer)
        x[2, 1] = 5
        assert back.h[2, 1] == 5


def test_a_gradient_is_not_asked_of_the_wire() -> None:
    back = codec.decode(wire(codec.encode(Gradient(1, torch.ones(2, requires_grad=True) * 2), "r", 0)))[2]
    assert isinstance(back, Gradient) and back.g is not None and not back.g.requires_grad


def test_header_is_what_the_drawing_says() -> None:
    """The wire format is a promise to other versions; a change of it needs a new PROTOCOL."""
    frames = codec.encode(Activation(7, torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)), "run", 5)
    plain = {"x": ["float32", [2, 3]], "y": ["int64", [2]], "scale": None, "along": None}
    assert frames[0][:16] == bytes([5, *[0] * 7, 7, *[0] * 7])
    assert msgpack.unpackb(frames[0][16:]) == {"protocol": 7, "run": "run", "type": "Activation", "fields": plain}
    assert [len(frame) for frame in frames[1:]] == [24, 16]


def test_unaligned_frames_are_fine() -> None:
    frames = codec.encode(Answer(1, X), "r", 0)
    shifted = memoryview(bytearray(b"\0" + bytes(frames[1])))[1:]
    assert alike(Answer(1, X), codec.decode([frames[0], shifted])[2])


# -- refused when sending ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message, says",
    [
        (
            Hello("r", 0, 1, 0, tuple(f"section.key_{k}=value" for k in range(400))),
            "Hello needs a header of .* settings",
        ),
        (Stop(1, "x" * 5000), "Stop needs a header of .* reason"),
        (Answer(1, torch.zeros(2, dtype=torch.complex64)), "Answer.h: torch.complex64 cannot be sent"),
        (Checkpoint(2**70), "Checkpoint cannot be written"),
    ],
    ids=["settings", "reason", "dtype", "overflow"],
)
def test_what_cannot_be_sent(message: Message, says: str) -> None:
    with pytest.raises(MessageError, match=says):
        codec.encode(message, "r", 0)


# -- refused when receiving ----------------------------------------------------------------------------------------


def header(**changes: Any) -> dict[str, Any]:
    plain = {"x": ["float32", [3, 4]], "y": ["int64", [3]], "scale": None, "along": None}
    return {"protocol": PROTOCOL, "run": "r", "type": "Activation", "fields": plain} | changes


def activation(**changes: Any) -> dict[str, Any]:
    return header(fields=header()["fields"] | changes)


def of(kind: str, **plain: Any) -> dict[str, Any]:
    return header(type=kind, fields=plain)


def without(table: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != name}


NUMBERS = bytes(8) + (7).to_bytes(8, "little")  # seq, batch
MALFORMED: list[tuple[Any, str]] = [
    (without(header(), "run"), r"header: missing \['run'\]"),
    (header(more=1), r"header: missing \[\], unknown \['more'\]"),
    ([1, 2], "header: .* is not a map"),
    (header(protocol=PROTOCOL + 1), "header.protocol"),
    (header(protocol=True), "header.protocol"),
    (header(run=5), "header.run"),
    (header(run=b"r"), "header: "),  # bytes are not allowed at all
    (header(type="Object"), "header.type: unknown message 'Object'"),
    (header(type=["Stop"]), "header.type"),
    (header(fields=[]), "header.fields"),
    (header(fields=without(header()["fields"], "y")), r"Activation: missing \['y'\]"),
    (activation(batch=7), r"Activation: .*unknown \['batch'\]"),  # it is one of the numbers
    (activation(z=1), r"Activation: .*unknown \['z'\]"),
    (activation(x=None), "Activation.x"),  # only optional tensors may be missing
    (activation(x=["float32"]), "Activation.x"),
    (activation(x=["float31", [3, 4]]), "Activation.x: unknown dtype 'float31'"),
    (activation(x=[["float32"], [3, 4]]), "Activation.x: unknown dtype"),
    (activation(x=["float32", 12]), "Activation.x: shape 12"),
    (activation(x=["float32", [1] * 9]), "Activation.x: shape .* at most 8"),
    (activation(x=["float32", [-3, -4]]), "Activation.x: shape .* holds -3"),
    (activation(x=["float32", [3, True]]), "Activation.x: shape .* holds True"),
    (activation(x=["float32", [3.0, 4]]), "Activation.x: shape .* holds 3.0"),
    (activation(x=["float32", [3, 5]]), "Activation.x: .* takes 60 bytes, its frame has 48"),
    (activation(x=["float64", [3, 4]]), "Activation.x: .* takes 96 bytes, its frame has 48"),
    (activation(x=["float32", [2**62, 4]]), "Activation.x: .* the limit is"),  # 2**66 bytes: 0 if it overflowed
    (activation(x=["float32", [0, 2**62, 2**62]]), "Activation.x: .* the limit is"),  # its strides would overflow
    (activation(y=["int32", [3]]), "Activation.y: .* takes 12 bytes, its frame has 24"),
    (activation(scale=["float32", [3, 1]]), "Activation.scale: its frame is missing"),
    (
        of("Gradient", g=["int8", [48]], starved=False, scale=["float32", [7]], samples=None, full=False),
        "Gradient.scale: .* takes 28",
    ),
    (of("Checkpoint"), "Checkpoint: 2 tensor frames, its fields use 0"),
    (of("Evaluation", x=["float32", [3, 4]], y=None, along=None), "Evaluation: 2 tensor frames, its fields use 1"),
    (of("Input", x=["float32", [3, 4]]), r"Input: missing \['y'\]"),
    (of("Input", x=None, y=["int64", [3]]), r"Input.x: None is not \[dtype, shape\]"),
    (of("Input", x=["float32", [3, 5]], y=["int64", [3]]), "Input.x: .* takes 60 bytes, its frame has 48"),
    (of("Stop", reason=1), "Stop.reason"),
    (of("Gradient", g=None, starved=1, scale=None, samples=None, full=False), "Gradient.starved"),
    (of("Report", stage=1, numbers=[], final=False), "Report.numbers"),
    (of("Report", stage=1, numbers={"loss": "1"}, final=False), r"Report.numbers\['loss'\]"),
    (of("Report", stage=1, numbers={"loss": True}, final=False), r"Report.numbers\['loss'\]"),
    (of("Report", stage=1, numbers={1: 1.0}, final=False), "header: "),
    (header(fields=msgpack.ExtType(5, b"")), "header.fields"),
]


@pytest.mark.parametrize("head, says", MALFORMED, ids=[says for _, says in MALFORMED])
def test_malformed_header(head: Any, says: str) -> None:
    frames = [NUMBERS + msgpack.packb(head), *codec.encode(Activation(7, X, Y), "r", 0)[1:]]
    with pytest.raises(MessageError, match=says) as caught:
        codec.decode(frames)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "raw, says",
    [
        (b"", "header: "),
        (bytes(15), "header: 15 bytes, it has 16 at least"),
        (NUMBERS + b"\xc1", "header: "),
        (NUMBERS + b"\x93" * 4000, "header: "),
        (NUMBERS + b"\xdd\xff\xff\xff\xff", "header: "),
        (NUMBERS + b"\xdf\xff\xff\xff\xff", "header: "),
        (NUMBERS + b"\xa2\xff\xff", "header: "),
        (NUMBERS + b"\x82\xa1a\x01\xa1a\x02", "header: .*twice"),
        (NUMBERS + b"\x80\x80", "header: "),
        (b"\x80" * 4097, "header: 4097 bytes, the limit is 4096"),
    ],
    ids=lambda value: repr(value[-12:]),
)
def test_header_that_is_no_header(raw: bytes, says: str) -> None:
    with pytest.raises(MessageError, match=says):
        codec.decode([raw])


def test_numbers_that_do_not_fit() -> None:
    frames = codec.encode(Activation(7, X, Y), "r", 2**63 - 1)
    codec.decode(frames)
    with pytest.raises(MessageError, match=r"header\.seq: -1 is negative"):
        codec.decode([b"\xff" * 8 + bytes(frames[0])[8:], *frames[1:]])
    hello = codec.encode(Hello("r", 0, 1, 0), "r", 0)[0]
    with pytest.raises(MessageError, match="Hello: batch 7, but it is of none"):
        codec.decode([NUMBERS + bytes(hello)[16:]])


def test_what_is_remembered_of_one_message_is_not_in_the_next() -> None:
    """Headers alike but for their numbers; and a header that is known, with frames that do not fit it."""
    for turn in range(3):
        for message in EXAMPLES:
            run, seq, back = codec.decode(wire(codec.encode(message, "run", turn)))
            assert (run, seq) == ("run", turn)
            assert alike(message, back)
        for x, batch in ((X, 1), (X + 1, 2), (X[:2], 3), (X.double(), 4)):
            assert alike(Gradient(batch, x), codec.decode(wire(codec.encode(Gradient(batch, x), "run", turn)))[2])
        with pytest.raises(MessageError, match=r"Gradient.g: .* takes 48 bytes, its frame has 32"):
            codec.decode([codec.encode(Gradient(1, X), "run", turn)[0], bytes(32)])


def test_frames_missing_or_too_many() -> None:
    frames = codec.encode(Activation(7, X, Y), "r", 0)
    with pytest.raises(MessageError, match=r"Activation.y: its frame is missing"):
        codec.decode(frames[:2])
    with pytest.raises(MessageError, match="3 tensor frames, its fields use 2"):
        codec.decode([*frames, b""])
    with pytest.raises(MessageError, match="without frames"):
        codec.decode([])


def test_tensor_above_the_callers_limit() -> None:
    frames = codec.encode(Activation(7, X, Y), "r", 0)
    codec.decode(frames, limit=48)
    with pytest.raises(MessageError, match=r"Activation.x: .* takes 48 bytes, the limit is 47"):
        codec.decode(frames, limit=47)


def test_bool_bytes_are_bools() -> None:
    frames = codec.encode(Answer(1, torch.tensor([True, False])), "r", 0)
    with pytest.raises(MessageError, match=r"Answer.h: a bool"):
        codec.decode([frames[0], memoryview(bytearray(b"\x01\x02"))])


def test_mutated_messages_raise_nothing_but_message_errors() -> None:
    """Bytes changed, cut, inserted, frames dropped and repeated: a message or a MessageError, never anything else."""
    draw = random.Random(0)
    refused = 0
    for turn in range(3000):
        frames = [bytearray(frame) for frame in codec.encode(EXAMPLES[turn % len(EXAMPLES)], "run", turn)]
        for _ in range(draw.randint(1, 4)):
            _mutate(frames, draw)
        try:
            codec.decode([memoryview(frame) for frame in frames])
        except MessageError:
            refused += 1
    assert refused > 1000


def _mutate(frames: list[bytearray], draw: random.Random) -> None:
    frame = draw.choice(frames) if frames and draw.random() < 0.2 else (frames or [bytearray()])[0]
    place, what = draw.randrange(len(frame) + 1), draw.random()
    if what < 0.6 and place < len(frame):
        frame[place] = draw.randrange(256)
    elif what < 0.7:
        del frame[place : place + draw.randint(1, 4)]
    elif what < 0.9:
        frame[place:place] = draw.randbytes(draw.randint(1, 4))
    elif what < 0.95 and frames:
        frames.remove(draw.choice(frames))
    else:
        frames.append(bytearray(frame))
