"""A message as frames, and back: one small msgpack header, then the raw bytes of each tensor.

    frame 0   {"protocol": 2, "run": …, "seq": …, "type": "Activation",
               "fields": {"batch": 7, "x": ["int8", [32, 128]], "y": ["int64", [32]], "scale": ["float32", [32, 1]]}}
    frame 1   the bytes of x                    frame 2   the bytes of y                  frame 3   those of scale

Frame 0 has at most 4096 bytes; the bytes of tensors are little-endian, in C order. A tensor that is None (here a scale,
if x travels as it is) has no frame.

No pickle, and no copy of a tensor that lies contiguous in the main memory: a frame is a view of it, and a decoded
tensor is a view of its frame. What comes in is checked field by field before it is used, and before memory is reserved
for it; what does not fit is a MessageError that names the field. The tables come from the dataclasses of messages.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgpack
import torch
from torch import Tensor

from dnipipe.errors import MessageError, told
from dnipipe.messages import PROTOCOL, Message

HEADER_LIMIT = 4096  # bytes of the header
FRAME_LIMIT = 5  # frames of a message: the header and at most so many tensors less one
NDIM_LIMIT = 8
TENSOR_LIMIT = 256 * 2**20  # bytes of one tensor, where the caller names no other limit

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CASTABLE = {torch.float32, torch.float64, torch.int64}  # a memoryview knows these: no half precision

Frame = Union[bytes, memoryview]


@dataclass(frozen=True)
class Header:
    """The first frame, checked but for the fields of its message type."""

    run: str
    seq: int
    type: str
    fields: dict[str, Any]


def encode(message: Message, run: str, seq: int) -> list[Frame]:
    """The header frame and one frame a tensor, which shares the tensor's memory: write nothing to it afterwards.

    Raises MessageError if the header does not fit (a very long text, too many settings) or a dtype is not in DTYPES.
    """
    kind = type(message).__name__
    fields: dict[str, Any] = {}
    frames: list[Frame] = [b""]
    for name, (check, where) in _TABLES[kind].items():
        value = getattr(message, name)
        if check is _tensor and value is not None:
            fields[name] = [_name_of(value.dtype, where), tuple(value.shape)]
            frames.append(_bytes_of(value))
        else:
            fields[name] = value
    header = {"protocol": PROTOCOL, "run": run, "seq": seq, "type": kind, "fields": fields}
    try:
        frames[0] = msgpack.packb(header)
    except (TypeError, ValueError, OverflowError) as error:
        raise MessageError(f"{kind} cannot be written as a header: {error}") from None
    if len(frames[0]) > HEADER_LIMIT:
        largest = max(fields, key=lambda name: len(msgpack.packb(fields[name])))
        raise MessageError(
            f"{kind} needs a header of {len(frames[0])} bytes, the limit is {HEADER_LIMIT}: shorten its {largest}"
        )
    return frames


def decode(frames: Sequence[Frame], limit: int = TENSOR_LIMIT) -> tuple[str, int, Message]:
    """(run, seq, message) of frames; the tensors share the frames' memory, none is larger than `limit` bytes.

    Raises MessageError, with the name of the field that does not fit.
    """
    if not frames:
        raise MessageError("a message without frames: its header is missing")
    header = read_header(frames[0])
    return header.run, header.seq, read_body(header, frames[1:], limit)


def read_header(frame: Frame) -> Header:
    """The header without its message's own fields: enough to tell whether the rest is worth a look."""
    if len(frame) > HEADER_LIMIT:
        raise MessageError(f"header: {len(frame)} bytes, the limit is {HEADER_LIMIT}")
    try:
        header = msgpack.unpackb(
            frame,
            object_pairs_hook=_map,
            strict_map_key=True,
            max_array_len=256,
            max_map_len=256,
            max_bin_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise MessageError(f"header: not msgpack as we write it ({told(error)})") from None
    _same_names(header, _HEADER, "header")
    for name, (check, where) in _HEADER.items():
        check(header[name], where)
    if header["protocol"] != PROTOCOL:
        raise MessageError(f"header.protocol: {header['protocol']}, this is {PROTOCOL}; run one version of dnipipe")
    if header["seq"] < 0:
        raise MessageError(f"header.seq: {header['seq']} is negative")
    if header["type"] not in _TYPES:
        raise MessageError(f"header.type: unknown message {_short(header['type'])}")
    return Header(header["run"], header["seq"], header["type"], header["fields"])


def read_body(header: Header, frames: Sequence[Frame], limit: int = TENSOR_LIMIT) -> Message:
    """The message of a header and the frames of its tensors (without the header's own)."""
    kind, table, fields = header.type, _TABLES[header.type], header.fields
    _same_names(fields, table, kind)
    values: dict[str, Any] = {}
    used = 0
    for name, (check, where) in table.items():
        value = fields[name]
        if check is not _tensor:
            values[name] = check(value, where)
        elif value is None and name in _OPTIONAL[kind]:
            values[name] = None
        elif used == len(frames):
            raise MessageError(f"{where}: its frame is missing, the message has {used} tensor frames")
        else:
            values[name] = _tensor_of(value, frames[used], limit, where)
            used += 1
    if used != len(frames):
        raise MessageError(f"{kind}: {len(frames)} tensor frames, its fields use {used}")
    message: Message = _TYPES[kind](**values)
    return message


def sizes(header: Header, limit: int = TENSOR_LIMIT) -> list[int]:
    """Bytes of each tensor that the header announces: checked, so what a receiver may reserve. Raises MessageError."""
    table, fields = _TABLES[header.type], header.fields
    _same_names(fields, table, header.type)
    announced = [(fields[name], where) for name, (check, where) in table.items() if check is _tensor and fields[name]]
    return [_layout(spec, limit, where)[2] for spec, where in announced]


# -- tensors -----------------------------------------------------------------------------------------------------


def _name_of(dtype: torch.dtype, where: str) -> str:
    try:
        return _NAMES[dtype]
    except KeyError:
        raise MessageError(f"{where}: {dtype} cannot be sent; one of {', '.join(DTYPES)} can") from None


def _bytes_of(tensor: Tensor) -> Frame:
    if tensor.numel() == 0:
        return b""
    if (
        tensor.requires_grad or not tensor.is_cpu or not tensor.is_contiguous()
    ):  # each of the calls costs, if it need not
        tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype in _CASTABLE:
        return tensor.numpy().data.cast("B")  # half the time of the way below, which works for all
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _layout(spec: Any, limit: int, where: str) -> tuple[str, list[int], int]:
    """(dtype, shape, bytes). Raises MessageError before anything is reserved: Python's numbers do not overflow."""
    if type(spec) is not list or len(spec) != 2:
        raise MessageError(f"{where}: {_short(spec)} is not [dtype, shape]")
    name, shape = spec
    if type(name) is not str or name not in DTYPES:
        raise MessageError(f"{where}: unknown dtype {_short(name)}")
    if type(shape) is not list or len(shape) > NDIM_LIMIT:
        raise MessageError(f"{where}: shape {_short(shape)} is not a list of at most {NDIM_LIMIT} sizes")
    room = 1  # as if empty dimensions had one element, so that no stride can overflow either
    for size in shape:
        if type(size) is not int or size < 0:
            raise MessageError(f"{where}: shape {_short(shape)} holds {_short(size)}, which is no size")
        room *= size or 1
    itemsize = DTYPES[name].itemsize
    if room * itemsize > limit:
        raise MessageError(f"{where}: {name} {shape} takes {room * itemsize} bytes, the limit is {limit}")
    return name, shape, math.prod(shape) * itemsize


def _tensor_of(spec: Any, frame: Frame, limit: int, where: str) -> Tensor:
    name, shape, wanted = _layout(spec, limit, where)
    dtype = DTYPES[name]
    if wanted != len(frame):
        raise MessageError(f"{where}: {name} {shape} takes {wanted} bytes, its frame has {len(frame)}")
    if wanted == 0:
        return torch.empty(shape, dtype=dtype)
    if dtype is torch.bool and int(torch.frombuffer(frame, dtype=torch.uint8).max()) > 1:
        raise MessageError(f"{where}: a bool that is neither 0 nor 1")
    tensor = torch.frombuffer(frame, dtype=dtype)
    return tensor if len(shape) == 1 else tensor.view(shape)


# -- plain fields ------------------------------------------------------------------------------------------------

Check = Callable[[Any, str], Any]  # (value, name of the field) -> the value as the dataclass has it, or MessageError


def _tensor(value: Any, where: str) -> Any:
    """Marks a tensor in the tables; read_body takes its frame."""
    raise AssertionError(where)


def _exactly(wanted: type, what: str) -> Check:
    """type(), not isinstance: a bool is no int, and 1 is no float."""

    def check(value: Any, where: str) -> Any:
        if type(value) is not wanted:
            raise MessageError(f"{where}: {_short(value)} is not {what}")
        return value

    return check


def _whole(value: Any, where: str) -> Any:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise MessageError(f"{where}: {_short(value)} is not a whole number of 64 bits")
    return value


def _tuple_of(check: Check) -> Check:
    def each(value: Any, where: str) -> Any:
        if type(value) is not list:
            raise MessageError(f"{where}: {_short(value)} is not a list")
        return tuple([check(element, where) for element in value])

    return each


def _numbers(value: Any, where: str) -> Any:
    """dict[str, float]. NaN and infinity may pass: they are what a report must be able to say."""
    if type(value) is not dict:
        raise MessageError(f"{where}: {_short(value)} is not a map")
    for key, number in value.items():
        _text(key, f"{where}: key")
        if type(number) is not float and type(number) is not int:
            raise MessageError(f"{where}[{_short(key)}]: {_short(number)} is not a number")
    return {key: float(number) for key, number in value.items()}


_text = _exactly(str, "text")
_CHECKS: dict[Any, Check] = {
    str: _text,
    bool: _exactly(bool, "true or false"),
    int: _whole,
    tuple[str, ...]: _tuple_of(_text),
    tuple[int, ...]: _tuple_of(_whole),
    dict[str, float]: _numbers,
    Tensor: _tensor,
}
Table = dict[str, tuple[Check, str]]  # field -> its check, and what an error calls the field


def _table(kind: str, checks: dict[str, Check]) -> Table:
    return {name: (check, f"{kind}.{name}") for name, check in checks.items()}


_HEADER = _table(
    "header",
    {"protocol": _whole, "run": _text, "seq": _whole, "type": _text, "fields": _exactly(dict, "a map")},
)


def _same_names(value: Any, table: Table, where: str) -> None:
    if type(value) is not dict:
        raise MessageError(f"{where}: {_short(value)} is not a map")
    if value.keys() != table.keys():
        missing = [name for name in table if name not in value]
        unknown = [name for name in value if name not in table]
        raise MessageError(f"{where}: missing {_short(missing)}, unknown {_short(unknown)}")


def _map(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key appears twice in a map")
    return made


def _short(value: Any) -> str:
    """Part of an error's one line: what others sent must neither flood nor break it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


# -- the tables, made once ---------------------------------------------------------------------------------------


def _is_optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType) and type(None) in get_args(hint)


_TYPES: dict[str, Any] = {kind.__name__: kind for kind in get_args(Message)}
_HINTS = {name: get_type_hints(kind) for name, kind in _TYPES.items()}
_OPTIONAL = {name: {key for key, hint in hints.items() if _is_optional(hint)} for name, hints in _HINTS.items()}
_TABLES = {
    name: _table(name, {key: _CHECKS[get_args(hint)[0] if _is_optional(hint) else hint] for key, hint in hints.items()})
    for name, hints in _HINTS.items()
}
