"""A message as frames, and back: one small header, then the raw bytes of each tensor.

    frame 0   seq, batch   8 bytes each: what differs from one message to the next
              then msgpack {"protocol": 7, "run": …, "type": "Activation",
                            "fields": {"x": ["int8", [32, 128]], "y": ["int64", [32]], "scale": ["float32", [32, 1]],
                                       "along": None}}
    frame 1   the bytes of x                    frame 2   the bytes of y                  frame 3   those of scale

Frame 0 has at most 4096 bytes; numbers and the bytes of tensors are little-endian, tensors in C order. A tensor that is
None (here what could travel along) has no frame; the batch of a message that has none is 0. Over tcp without
keys a last frame follows: the checksum of all (transport/edge.py).

No pickle, and no copy of a tensor that lies contiguous in the main memory: a frame is a view of it, and a decoded
tensor is a view of its frame. What comes in is checked field by field before it is used, and before memory is reserved
for it; what does not fit is a MessageError that names the field. What is the same in one message after another, all
behind the two numbers, is written and checked once, and remembered (KNOWN). The tables of fields are in
fields.py.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Union

import msgpack
import torch
import xxhash
from torch import Tensor

from dnipipe.errors import MessageError, told
from dnipipe.fields import FRESH, HEADER, OF_A_BATCH, OPTIONAL, TABLES, TYPES, a_tensor, same_names, short, unique
from dnipipe.messages import PROTOCOL, Message

HEADER_LIMIT = 4096  # bytes of the header
FRAME_LIMIT = 6  # frames of a message: the header and at most so many tensors less one
NDIM_LIMIT = 8
KNOWN = 64  # headers that are remembered, of a process: a few KB
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


_NUMBERS = struct.Struct("<qq")  # seq, batch


class Header(NamedTuple):
    """The first frame, checked but for the fields of its message type."""

    run: str
    seq: int
    type: str
    batch: int  # 0: of a message that has none
    text: bytes  # all behind the numbers


def encode(message: Message, run: str, seq: int) -> list[Frame]:
    """The header frame and one frame a tensor, which shares the tensor's memory: write nothing to it afterwards.

    Raises MessageError if the header does not fit (a very long text, too many settings) or a dtype is not in DTYPES.
    """
    header, tensors = announce(message, run, seq)
    return [header, *map(_bytes_of, tensors)]


def announce(message: Message, run: str, seq: int) -> tuple[bytes, list[Tensor]]:
    """The header frame, and the tensors whose bytes are to follow. Raises MessageError as `encode` does."""
    kind = type(message).__name__
    tensors: list[Tensor] = []
    said: list[Any] = []
    for name, (check, _) in TABLES[kind].items():
        value = getattr(message, name)
        if check is a_tensor and value is not None:
            said.append((value.dtype, value.shape))
            tensors.append(value)
        else:
            said.append(value)
    text = (_text_of if kind in FRESH else _known_text_of)(kind, run, *said)
    try:
        return _NUMBERS.pack(seq, getattr(message, "batch", 0)) + text, tensors
    except struct.error as error:
        raise MessageError(f"{kind} cannot be written as a header: {error}") from None


def _text_of(kind: str, run: str, *said: Any) -> bytes:
    """What a header has behind its numbers. `said`: a value a field, of a tensor its dtype and shape."""
    fields = {}
    for (name, (check, where)), value in zip(TABLES[kind].items(), said, strict=True):
        fields[name] = [_name_of(value[0], where), tuple(value[1])] if check is a_tensor and value else value
    try:
        text: bytes = msgpack.packb({"protocol": PROTOCOL, "run": run, "type": kind, "fields": fields})
    except (TypeError, ValueError, OverflowError) as error:
        raise MessageError(f"{kind} cannot be written as a header: {error}") from None
    if (length := _NUMBERS.size + len(text)) > HEADER_LIMIT:
        largest = max(fields, key=lambda name: len(msgpack.packb(fields[name])))
        raise MessageError(
            f"{kind} needs a header of {length} bytes, the limit is {HEADER_LIMIT}: shorten its {largest}"
        )
    return text


_known_text_of = lru_cache(KNOWN, typed=True)(_text_of)


def checksum(frames: Sequence[Frame]) -> bytes:
    """XXH3 of all frames, 8 bytes: a last frame of its own where nothing else would notice a flipped bit."""
    hashed = xxhash.xxh3_64()
    for frame in frames:
        hashed.update(frame)
    return hashed.digest()


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
    if not _NUMBERS.size <= len(frame) <= HEADER_LIMIT:
        limits = f"the limit is {HEADER_LIMIT}" if len(frame) > HEADER_LIMIT else f"it has {_NUMBERS.size} at least"
        raise MessageError(f"header: {len(frame)} bytes, {limits}")
    seq, batch = _NUMBERS.unpack_from(frame)
    text = bytes(frame[_NUMBERS.size :])
    run, kind, _ = _known_header(text)
    if seq < 0:
        raise MessageError(f"header.seq: {seq} is negative")
    return Header(run, seq, kind, batch, text)


def read_body(header: Header, frames: Sequence[Frame | Tensor], limit: int = TENSOR_LIMIT) -> Message:
    """The message of a header and its tensors' frames, or their bytes (n,) uint8 where these came apart."""
    plain, layouts, batched = _known_fields(header.text)
    if len(frames) < len(layouts):
        where = layouts[len(frames)].where
        raise MessageError(f"{where}: its frame is missing, the message has {len(frames)} tensor frames")
    if len(frames) > len(layouts):
        raise MessageError(f"{header.type}: {len(frames)} tensor frames, its fields use {len(layouts)}")
    values = dict(plain)
    if batched:
        values["batch"] = header.batch
    elif header.batch:
        raise MessageError(f"{header.type}: batch {header.batch}, but it is of none")
    for layout, frame in zip(layouts, frames, strict=True):
        values[layout.name] = _tensor_of(layout, frame, limit)
    message: Message = TYPES[header.type](**values)
    return message


def sizes(header: Header, limit: int = TENSOR_LIMIT) -> list[int]:
    """Bytes of each tensor that the header announces: checked, so what a receiver may reserve. Raises MessageError."""
    layouts = _known_fields(header.text)[1]
    for layout in layouts:
        layout.check(limit)
    return [layout.size for layout in layouts]


@lru_cache(KNOWN)
def _known_header(text: bytes) -> tuple[str, str, dict[str, Any]]:
    """(run, type, fields not checked yet). Raises MessageError."""
    try:
        header = msgpack.unpackb(
            text,
            object_pairs_hook=unique,
            strict_map_key=True,
            max_array_len=256,
            max_map_len=256,
            max_bin_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise MessageError(f"header: not msgpack as we write it ({told(error)})") from None
    same_names(header, HEADER, "header")
    for name, (check, where) in HEADER.items():
        check(header[name], where)
    if header["protocol"] != PROTOCOL:
        raise MessageError(f"header.protocol: {header['protocol']}, this is {PROTOCOL}; run one version of dnipipe")
    if header["type"] not in TYPES:
        raise MessageError(f"header.type: unknown message {short(header['type'])}")
    return header["run"], header["type"], header["fields"]


@lru_cache(KNOWN)
def _known_fields(text: bytes) -> tuple[dict[str, Any], list[_Layout], bool]:
    """(plain fields, tensors in the order of their frames, whether it is of a batch), checked. Raises MessageError."""
    _, kind, fields = _known_header(text)
    table = TABLES[kind]
    same_names(fields, table, kind)
    plain: dict[str, Any] = {}
    layouts = []
    for name, (check, where) in table.items():
        value = fields[name]
        if check is not a_tensor:
            plain[name] = check(value, where)
        elif value is None and name in OPTIONAL[kind]:
            plain[name] = None
        else:
            layouts.append(_layout(name, value, where))
    return plain, layouts, kind in OF_A_BATCH


# -- tensors -----------------------------------------------------------------------------------------------------


def _name_of(dtype: torch.dtype, where: str) -> str:
    try:
        return _NAMES[dtype]
    except KeyError:
        raise MessageError(f"{where}: {dtype} cannot be sent; one of {', '.join(DTYPES)} can") from None


def _bytes_of(tensor: Tensor) -> Frame:
    if tensor.numel() == 0:
        return b""
    # each of the calls costs, if it need not
    if tensor.requires_grad or not tensor.is_cpu or not tensor.is_contiguous():
        tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype in _CASTABLE:
        return tensor.numpy().data.cast("B")  # half the time of the way below, which works for all
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class _Layout(NamedTuple):
    """A tensor as its header announces it."""

    name: str  # of the field
    where: str  # what an error calls that
    dtype: str
    shape: tuple[int, ...]
    size: int  # bytes
    room: int  # bytes as if empty dimensions had one element, so that no stride can overflow either

    def check(self, limit: int) -> None:
        """Before anything is reserved: Python's numbers do not overflow."""
        if self.room > limit:
            raise MessageError(
                f"{self.where}: {self.dtype} {list(self.shape)} takes {self.room} bytes, the limit is {limit}"
            )


def _layout(name: str, spec: Any, where: str) -> _Layout:
    """Raises MessageError."""
    if type(spec) is not list or len(spec) != 2:
        raise MessageError(f"{where}: {short(spec)} is not [dtype, shape]")
    dtype, shape = spec
    if type(dtype) is not str or dtype not in DTYPES:
        raise MessageError(f"{where}: unknown dtype {short(dtype)}")
    if type(shape) is not list or len(shape) > NDIM_LIMIT:
        raise MessageError(f"{where}: shape {short(shape)} is not a list of at most {NDIM_LIMIT} sizes")
    for size in shape:
        if type(size) is not int or size < 0:
            raise MessageError(f"{where}: shape {short(shape)} holds {short(size)}, which is no size")
    itemsize = DTYPES[dtype].itemsize
    room = math.prod(size or 1 for size in shape) * itemsize
    return _Layout(name, where, dtype, tuple(shape), math.prod(shape) * itemsize, room)


def _tensor_of(layout: _Layout, frame: Frame | Tensor, limit: int) -> Tensor:
    layout.check(limit)
    dtype, shape = DTYPES[layout.dtype], layout.shape
    if layout.size != len(frame):
        told_size = f"{layout.dtype} {list(shape)} takes {layout.size} bytes"
        raise MessageError(f"{layout.where}: {told_size}, its frame has {len(frame)}")
    if layout.size == 0:
        return torch.empty(shape, dtype=dtype)
    if dtype is torch.bool and int(_as(torch.uint8, frame).max()) > 1:
        raise MessageError(f"{layout.where}: a bool that is neither 0 nor 1")
    tensor = _as(dtype, frame)
    return tensor if len(shape) == 1 else tensor.view(shape)


def _as(dtype: torch.dtype, frame: Frame | Tensor) -> Tensor:
    return frame.view(dtype) if isinstance(frame, Tensor) else torch.frombuffer(frame, dtype=dtype)
