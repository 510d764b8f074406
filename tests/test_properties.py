"""What holds for any value, not for examples only: Hypothesis makes values up, and shrinks one that breaks the rule.

bytes, almost a message, a file or a command line  ──► read ──► the value, or the one error that its reader promises
any message, any settings                          ──► written ──► read ──► the same
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgpack
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.fuzz import guided
from benchmarks.fuzz.targets import TARGETS, alike, header, join, manifest, message
from dnipipe import codec
from dnipipe.config import build, flat, load
from dnipipe.errors import ConfigError
from dnipipe.folders import write_config
from dnipipe.messages import PROTOCOL, Message
from dnipipe.wire import FORMS

# the same values in every run, and no folder of its own; how long one takes decides nothing
PLAIN = settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

TEXT = st.text(max_size=40)
WHOLE = st.integers(-(2**63), 2**63 - 1)
PLAIN_VALUES = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | TEXT
VALUES = st.recursive(
    PLAIN_VALUES | st.binary(max_size=8),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(TEXT, inside, max_size=4),
    max_leaves=12,
)
JSON = st.recursive(
    PLAIN_VALUES, lambda inside: st.lists(inside, max_size=4) | st.dictionaries(TEXT, inside, max_size=4), max_leaves=12
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Of any dtype and a small shape, bits as they fall (a bool is 0 or 1)."""
    dtype = draw(st.sampled_from(sorted(codec.DTYPES.values(), key=str)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    count = torch.Size(shape).numel()
    data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype is torch.bool:
        data = bytes(byte & 1 for byte in data)
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)


def values_of(hint: Any, name: str) -> st.SearchStrategy[Any]:
    """Of a message's field."""
    if name == "protocol":
        return st.just(PROTOCOL)
    if get_origin(hint) in (Union, type(int | None)):
        return st.one_of(*(values_of(option, name) for option in get_args(hint)))
    if get_origin(hint) is tuple:
        return st.lists(values_of(get_args(hint)[0], name), max_size=4).map(tuple)
    if get_origin(hint) is dict:
        return st.dictionaries(TEXT, st.floats(), max_size=4)
    return {int: WHOLE, bool: st.booleans(), str: TEXT, Tensor: tensors(), type(None): st.none()}[hint]


@st.composite
def messages(draw: st.DrawFn) -> Message:
    kind = draw(st.sampled_from(get_args(Message)))
    hints = get_type_hints(kind)
    found: Message = kind(**{item.name: draw(values_of(hints[item.name], item.name)) for item in fields(kind)})
    return found


@st.composite
def almost(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One of the seeds, with some bytes of it replaced by others, fewer or more."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 3))):
        begin = draw(st.integers(0, len(data)))
        end = draw(st.integers(begin, min(len(data), begin + 8)))
        data = data[:begin] + draw(st.binary(max_size=8) | TEXT.map(str.encode)) + data[end:]
    return data


# -- whatever comes, nothing escapes -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_bytes_are_read_or_refused(name: str) -> None:
    target = TARGETS[name]

    @PLAIN
    @given(st.binary(max_size=300) | almost(target.seeds()))
    def holds(data: bytes) -> None:
        target.run(data)

    holds()


@PLAIN
@given(st.integers(0, 2**63 - 1), WHOLE, st.sampled_from([kind.__name__ for kind in get_args(Message)]), VALUES, VALUES)
def test_a_header_may_hold_any_value(seq: int, batch: int, kind: str, run: Any, inside: Any) -> None:
    text = msgpack.packb({"protocol": PROTOCOL, "run": run, "type": kind, "fields": inside})
    frame = seq.to_bytes(8, "little") + batch.to_bytes(8, "little", signed=True) + text
    header(frame)
    message(join([frame]) if len(frame) < 2**16 else b"")


@PLAIN
@given(JSON, JSON)
def test_a_manifest_may_hold_any_value(settings: Any, part: Any) -> None:
    whole = {"format": 1, "batch": 1, "stages": 1, "settings": settings, "parts": [part]}
    manifest(json.dumps(whole).encode())


@PLAIN
@given(st.dictionaries(st.sampled_from(["model", "rule", "data", "pipeline", "x"]), JSON, max_size=3))
def test_settings_may_hold_any_value(values: dict[str, Any]) -> None:
    try:
        build(values)
    except ConfigError as error:
        assert str(error)


@PLAIN
@given(st.data())
def test_a_setting_may_have_any_value(data: st.DataObject) -> None:
    """Each by its name, so that what refuses it is its own check."""
    name = data.draw(st.sampled_from([name for name, _ in flat(load(None))]))
    section, _, key = name.partition(".")
    try:
        build({section: {key: data.draw(JSON)}})
    except ConfigError as error:
        assert str(error)


@pytest.mark.parametrize(
    "name, data",
    [
        ("ledger", b'{"begun": 1e999, "time": 0}\n'),
        ("ledger", b"[" * 100_000 + b"\n"),
        ("config", b"x = " + b"[" * 100_000),
        ("config", b"\xff"),
        ("manifest", b"[" * 100_000),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_chance_seldom_makes(name: str, data: bytes) -> None:
    TARGETS[name].run(data)


# -- what is written is read as it was -----------------------------------------------------------------------------


@PLAIN
@given(messages(), TEXT, st.integers(0, 2**63 - 1))
def test_any_message_arrives_as_it_was(sent: Message, run: str, seq: int) -> None:
    frames = [memoryview(bytearray(frame)) for frame in codec.encode(sent, run, seq)]
    *numbers, came = codec.decode(frames)
    assert numbers == [run, seq] and alike(sent, came)


@PLAIN
@given(
    root=TEXT, lr=st.floats(0, allow_nan=False), clip=st.floats(0, allow_nan=False), form=st.sampled_from(sorted(FORMS))
)
def test_any_settings_are_read_as_they_were_written(
    root: str, lr: float, clip: float, form: str, tmp_path: Path
) -> None:
    try:
        config = build({"data": {"root": root}, "optimizer": {"lr": lr, "clip": clip}, "wire": {"activations": form}})
    except ConfigError:
        assume(False)
    again = load(write_config(tmp_path, config))
    assert [pair for pair in flat(again) if pair[0] != "output.run"] == [
        pair for pair in flat(config) if pair[0] != "output.run"
    ]


def test_a_path_that_is_not_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.root = 'a\\udcff' is not UTF-8"):
        write_config(tmp_path, build({"data": {"root": "a\udcff"}}))


# -- guided by coverage --------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed: no guided fuzzing")
@pytest.mark.parametrize("name", TARGETS)
def test_the_guided_fuzzer_finds_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And leaves nothing. In short; `python -m benchmarks.fuzz.guided --seconds 600` in full."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert guided.main([name, "--seconds", "2"]) == 0
    said = capfd.readouterr().out
    assert f"{name}: " in said and "nothing found" in said
    assert list(tmp_path.iterdir()) == []
