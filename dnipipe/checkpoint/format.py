"""What a part of a checkpoint holds: a stage's state, the ids of its tensors and numbers, the checks of what is read.

StageState ──flatten──► {"optimizer/3.weight/exp_avg": tensor, …} and numbers, described by a Part
                            section / name / key
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

from torch import Tensor

from dnipipe.errors import CheckpointError

FORMAT = 1
SECTIONS = ("weights", "gradients", "optimizer", "predictor", "predictor_optimizer", "inputs", "inputs_optimizer")

Number = Union[int, float, bool, None]


@dataclass(frozen=True, eq=False)
class StageState:
    """All that a stage must have to go on as if it had never stopped. Optimizer states are by parameter, then key."""

    weights: dict[str, Tensor]  # parameters and buffers, by the whole model's names
    optimizer: dict[str, dict[str, Any]]  # tensors and numbers
    boundary: str  # the stage's last layer, where its predictor sits; "" for the last stage, which has none
    predictor: dict[str, Tensor]
    predictor_optimizer: dict[str, dict[str, Any]]
    counters: dict[str, int | float]
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the weights, where an update is still incomplete
    inputs: dict[str, Tensor] = field(default_factory=dict)  # of the model that guesses the input of LAYER: LAYER.name
    inputs_optimizer: dict[str, dict[str, Any]] = field(default_factory=dict)
    optimizer_name: str = ""  # its class; "": not known


@dataclass(frozen=True)
class Part:
    """One stage's file, as stage-k.json and the manifest describe it, by ids: section/name or section/name/key."""

    boundary: str
    bytes: int
    crc32: int
    tensors: dict[str, tuple[str, tuple[int, ...]]]  # dtype, shape
    numbers: dict[str, Number]  # of the optimizers
    counters: dict[str, int | float]
    optimizer: str = ""  # its class; "": saved before this was noted


# -- a state and its ids -----------------------------------------------------------------------------------------


def flatten(state: StageState) -> tuple[dict[str, Tensor], dict[str, Number]]:
    """The state's tensors and numbers, each by its id."""
    for of, optimizer in (
        (state.weights, state.optimizer),
        (state.predictor, state.predictor_optimizer),
        (state.inputs, state.inputs_optimizer),
    ):
        if extra := sorted(optimizer.keys() - of.keys()):
            raise CheckpointError(f"there is optimizer state of {extra[0]}, but no such weight is saved with it")
    values: dict[str, Any] = {}
    for section in SECTIONS:
        for name, value in getattr(state, section).items():
            keyed = value.items() if section.endswith("optimizer") else [("", value)]
            for key, item in keyed:
                id = "/".join(filter(None, (section, name, key)))
                need(split_id(id) == (section, name, key), f"the name {name!r} or the key {key!r} cannot be saved")
                values[id] = item
    tensors = {id: value for id, value in values.items() if isinstance(value, Tensor)}
    return tensors, {id: value for id, value in values.items() if id not in tensors}


def split_id(id: str) -> tuple[str, str, str]:
    """section, name and key of an id; the key is "" where the section has none."""
    section, _, name = id.partition("/")
    need(section in SECTIONS, f"no section has {id[:80]!r}")
    key = ""
    if section.endswith("optimizer"):
        name, _, key = name.rpartition("/")
        need(key.isidentifier(), f"{id[:80]!r} has no key")
    need(0 < len(name) <= 512 and name.isprintable(), f"{id[:80]!r} has no usable name")
    return section, name, key


def belongs(id: str, wanted: Mapping[str, Tensor], same: bool, first: str) -> bool:
    """Whether a stage takes it: `wanted` are the stage's weights, `same` says that the part has the same boundary, and
    `first` is the stage's first layer."""
    section, name, _ = split_id(id)
    if section.startswith("inputs"):
        return name.partition(".")[0] == first
    return same if section.startswith("predictor") else name in wanted


def owners_of(parts: Iterable[Part]) -> dict[str, int]:
    """Name of a weight -> the part that has it. Raises CheckpointError if two parts of it are not from one cut."""
    owners: dict[str, int] = {}
    boundaries: dict[str, int] = {}
    for k, part in enumerate(parts):
        names = [split_id(id)[1] for id in part.tensors if id.startswith("weights/")]
        for claims, claimed in ((owners, names), (boundaries, [part.boundary])):
            for name in claimed:
                other = claims.setdefault(name, k)
                need(other == k, f"stages {other} and {k} both saved {name!r}: their parts are not from one run")
    return owners


def form_of(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


# -- what comes from a file --------------------------------------------------------------------------------------


def need(true: object, reason: str) -> None:
    if not true:
        raise CheckpointError(reason)


@contextlib.contextmanager
def checked(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not valid: {error}") from None


def parse_part(value: Any) -> Part:
    """Raises CheckpointError unless every field is what it must be."""
    need(isinstance(value, dict), "a part is not a table")
    boundary, size, crc32 = (value.get(key) for key in ("boundary", "bytes", "crc32"))
    need(isinstance(boundary, str) and boundary.isprintable(), "a part's boundary is not a name")
    optimizer = value.get("optimizer", "")
    need(isinstance(optimizer, str) and optimizer.isprintable(), "a part's optimizer is not a name")
    need(type(size) is int and size > 0 and type(crc32) is int, "a part's size or checksum is not a number")
    tables = {key: value.get(key) for key in ("tensors", "numbers", "counters")}
    for key, table in tables.items():
        need(isinstance(table, dict), f"a part's {key} are not a table")
    tensors = {id: _parse_form(id, form) for id, form in tables["tensors"].items()}
    for id, form in tensors.items():
        section, _, name = id.partition("/")
        need(section != "gradients" or tensors.get(f"weights/{name}") == form, f"{id[:80]!r} is no weight's gradient")
    for id, number in tables["numbers"].items():
        need(split_id(id)[2] and type(number) in (int, float, bool, type(None)), f"{id[:80]!r} is not a number")
    for name, count in tables["counters"].items():
        need(type(count) in (int, float), f"counter {name[:80]!r} is not a number")
    return Part(boundary, size, crc32, tensors, tables["numbers"], tables["counters"], optimizer)


def _parse_form(id: str, form: Any) -> tuple[str, tuple[int, ...]]:
    split_id(id)
    need(isinstance(form, list) and len(form) == 2, f"{id[:80]!r} has no dtype and shape")
    dtype, shape = form
    need(isinstance(dtype, str) and isinstance(shape, list), f"{id[:80]!r} has no dtype and shape")
    need(all(type(size) is int and size >= 0 for size in shape), f"{id[:80]!r} has a shape that is none")
    return dtype, tuple(shape)
