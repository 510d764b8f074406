"""Checkpoints: what every stage was right after its update on batch n, and how a run goes on from there.

A marker travels down behind batch n, so the parts saved under one n are one consistent cut through the pipeline.

    RUN/checkpoints/00000300/stage-0.safetensors   tensors: weights/3.weight, optimizer/3.weight/exp_avg, predictor/…
                             stage-0.json          dtypes, shapes, numbers, counters; size and crc32 of that file
                             …                     one such pair from each stage: save_part
                             manifest.json         all of that, and the settings; only then is it a checkpoint: complete

Every file is written under another name, synced and renamed, and the manifest comes last. So a run that is killed at
any moment leaves its older checkpoint whole, and an unfinished folder without a manifest, which `newest` passes over.
Names are those of the whole model, never "stage k's": a run may go on with another number of stages.

torch.save and torch.distributed.checkpoint unpickle what they read, which runs whatever code a file brings along; so
safetensors and JSON, and what is read is checked like anything else from outside; no file name is taken from a file.
The checksums find damage, not malice: who may write the folder may change the weights.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dnipipe.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
LARGEST_JSON = 1 << 28  # bytes; some two million tensors
SECTIONS = ("weights", "optimizer", "predictor", "predictor_optimizer")

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


@dataclass(frozen=True)
class Part:
    """One stage's file, as stage-k.json and the manifest describe it, by ids: section/name or section/name/key."""

    boundary: str
    bytes: int
    crc32: int
    tensors: dict[str, tuple[str, tuple[int, ...]]]  # dtype, shape
    numbers: dict[str, Number]  # of the optimizers
    counters: dict[str, int | float]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. Its files are read, and held against their checksums, only as far as they are needed."""

    folder: Path
    batch: int
    settings: dict[str, Any]  # plain values, as JSON has them: a tuple has become a list
    parts: tuple[Part, ...]  # parts[k] describes stage-k.safetensors
    skipped: tuple[str, ...] = ()  # newer folders that `newest` passed over, and why

    @property
    def stages(self) -> int:
        return len(self.parts)

    def check_model(self, model: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError unless this is a checkpoint of the model with that state_dict, the whole of it."""
        owners = _owners(self.parts)
        self._check(model, owners)
        if extra := sorted(owners.keys() - model.keys()):
            raise CheckpointError(f"{self.folder} has {extra[0]}, and the model has not: it belongs to another model")

    def state_for(self, wanted: Mapping[str, Tensor], boundary: str) -> StageState:
        """What a stage with the state_dict `wanted` (only shapes and dtypes are looked at) starts from, on the CPU.

        Weights and optimizer states come from whichever parts have them. Predictor and counters come from the stage
        that ended at the same boundary; if there was none they are empty, and the predictor starts anew.
        Raises CheckpointError if a weight is missing, or has another shape or dtype, or a file is damaged.
        """
        self._check(wanted, _owners(self.parts))
        found: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        counters: dict[str, int | float] = {}
        for k, part in enumerate(self.parts):
            same = part.boundary == boundary
            counters = dict(part.counters) if same else counters
            ids = [id for id in (*part.tensors, *part.numbers) if _belongs(id, wanted, same)]
            loaded: dict[str, Any] = _load(self.folder, k, part, [id for id in ids if id in part.tensors])
            for id in ids:
                section, name, key = _split(id)
                value = loaded[id] if id in loaded else part.numbers[id]
                if key:
                    found[section].setdefault(name, {})[key] = value
                else:
                    found[section][name] = value
        return StageState(boundary=boundary, counters=counters, **found)

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers of the whole model, on the CPU."""
        gathered: dict[str, Tensor] = {}
        for k, part in enumerate(self.parts):
            loaded = _load(self.folder, k, part, [id for id in part.tensors if id.startswith("weights/")])
            gathered.update((_split(id)[1], tensor) for id, tensor in loaded.items())
        return gathered

    def _check(self, wanted: Mapping[str, Tensor], owners: Mapping[str, int]) -> None:
        for name, tensor in wanted.items():
            if name not in owners:
                raise CheckpointError(f"{self.folder} has no {name}, which the model has: it belongs to another model")
            saved, own = self.parts[owners[name]].tensors[f"weights/{name}"], _form(tensor)
            if saved != own:
                raise CheckpointError(
                    f"{name} is {saved[0]} {list(saved[1])} in {self.folder} and {own[0]} {list(own[1])} in the model: "
                    "it belongs to another model"
                )


# -- writing -----------------------------------------------------------------------------------------------------


def save_part(run: Path, batch: int, stage: int, state: StageState) -> None:
    """Write stage k's part of the checkpoint of `batch`; on return it is on disk.

    Not for a batch whose checkpoint is complete already: it would be without a valid manifest until `complete` ends.
    Raises CheckpointError if the state holds what cannot be saved, OSError (disk full, no permission) if writing fails.
    """
    tensors, numbers = _flatten(state)
    forms = {id: _form(tensor) for id, tensor in tensors.items()}
    part = Part(state.boundary, 1, 0, forms, numbers, dict(state.counters))
    _parse_part(json.loads(json.dumps(asdict(part), default=str)))  # what could not be read back must not be saved
    folder = _folder(run, batch)
    path, record = folder / _tensors_file(stage), folder / _record_file(stage)
    with _explained(f"cannot save stage {stage} at batch {batch}"):
        folder.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)  # left by a start that was killed; it describes the file that goes now
        copies = {id: _copy(tensor) for id, tensor in tensors.items()}
        _write(path, lambda temporary: save_file(copies, temporary))
        size, crc32 = _measure(path)
        _write_json(record, {"batch": batch, "stage": stage, **asdict(replace(part, bytes=size, crc32=crc32))})


def complete(run: Path, batch: int, stages: int, settings: Mapping[str, Any], keep: int) -> Path:
    """Make the parts a checkpoint, once each stage has said Saved; then let go of what is no longer needed.

    That is: complete checkpoints older than the newest `keep` and unfinished folders older than this one.
    Raises CheckpointError if a part is missing or does not fit the others, OSError if writing fails.
    """
    folder = _folder(run, batch)
    files = [name(stage) for stage in range(stages) for name in (_tensors_file, _record_file)]
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}: every stage must have saved, and see the same folder (output.dir)"
        )
    parts = tuple(_read_part(folder, batch, stage) for stage in range(stages))
    _owners(parts)
    manifest = {"format": FORMAT, "batch": batch, "stages": stages, "settings": dict(settings)}
    with _explained(f"cannot complete checkpoint {batch}"):
        _write_json(folder / MANIFEST, {**manifest, "parts": [asdict(part) for part in parts]})
        _sync(folder.parent)
        _sync(run)
    with _explained(f"checkpoint {batch} is complete, but what is no longer needed cannot be removed"):
        _tidy(folder, {*files, MANIFEST})
        _prune(run, batch, keep)
    return folder


def export(run: Path, out: Path) -> int:
    """Write the whole model's weights to one safetensors file; returns the number of tensors.

    A plain model takes them by load_state_dict(safetensors.torch.load_file(out)).
    """
    gathered = weights(run)
    with _explained(f"cannot write {out}"):
        _write(out, lambda temporary: save_file(gathered, temporary))
    return len(gathered)


# -- reading -----------------------------------------------------------------------------------------------------


def newest(run: Path) -> Checkpoint:
    """The newest complete checkpoint, every byte of it read and found as it was written.

    `skipped` names the newer folders that were passed over, and why. Raises CheckpointError if there is none.
    """
    skipped: list[str] = []
    for batch in sorted(_batches(run), reverse=True):
        try:
            found = at(run, batch)
            for k, part in enumerate(found.parts):
                _verify(found.folder / _tensors_file(k), part)
            return replace(found, skipped=tuple(skipped))
        except CheckpointError as error:
            skipped.append(str(error))
    passed = f" (passed over: {'; '.join(skipped)})" if skipped else ""
    raise CheckpointError(
        f"no complete checkpoint in {run / 'checkpoints'}{passed}: name a run that has one, or start a new run"
    )


def at(run: Path, batch: int) -> Checkpoint:
    """The checkpoint of `batch`, the manifest checked now, each file when it is read.

    For the stages that are told which one `newest` found, so that all agree. Raises CheckpointError if it is not there.
    """
    folder = _folder(run, batch)
    manifest = _read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has format {manifest.get('format')!r}, this dnipipe reads {FORMAT}: use the one that wrote it"
        )
    listed: Any = manifest.get("parts")
    settings: Any = manifest.get("settings")
    with _of(folder / MANIFEST):
        _need(type(manifest.get("batch")) is int and manifest["batch"] == batch, "its batch is not its folder's")
        _need(isinstance(settings, dict), "its settings are not a table")
        _need(isinstance(listed, list) and listed and manifest.get("stages") == len(listed), "its parts are not K")
        parts = tuple(_parse_part(part) for part in listed)
        _owners(parts)
    return Checkpoint(folder, batch, settings, parts)


def weights(run: Path) -> dict[str, Tensor]:
    """Parameters and buffers of the whole model, from the newest complete checkpoint, on the CPU."""
    return newest(run).weights()


# -- optimizers --------------------------------------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """State of each parameter by its name; the tensors are the optimizer's own, as in its state_dict.

    Raises CheckpointError if there is state that is neither a tensor nor a number (LBFGS has lists).
    """
    names = _numbered(optimizer, named)
    by_name: dict[str, dict[str, Any]] = {}
    for number, values in optimizer.state_dict()["state"].items():
        if number not in names:
            raise CheckpointError(
                f"{type(optimizer).__name__} keeps {number!r}, which belongs to no parameter, and only parameters' "
                "state can be saved: use another optimizer"
            )
        name = names[number]
        for key, value in values.items():
            if not isinstance(value, (Tensor, int, float, type(None))):
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps {key} of {name} as a {type(value).__name__}, and only tensors "
                    "and numbers can be saved: use another optimizer"
                )
        if values:
            by_name[name] = dict(values)
    return by_name


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Put saved state in the place of the optimizer's own, on the device and in the dtype that torch wants it.

    The options of its groups (lr, …) stay: they come from the configuration. Raises CheckpointError if there is state
    of a parameter that the optimizer does not have.
    """
    numbers = {name: number for number, name in _numbered(optimizer, named).items()}
    if extra := sorted(state.keys() - numbers.keys()):
        raise CheckpointError(
            f"saved state of {extra[0]}, which the optimizer does not have: it belongs to another model"
        )
    # torch keeps a tensor as it is if device and dtype fit, and would then update the caller's in place
    copies = {
        numbers[name]: {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}
        for name, values in state.items()
    }
    optimizer.load_state_dict({"state": copies, "param_groups": optimizer.state_dict()["param_groups"]})


def _numbered(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> dict[Any, str]:
    """The number by which the optimizer's state_dict knows a parameter -> its name."""
    names = {id(parameter): name for name, parameter in named.items()}
    numbers = [number for group in optimizer.state_dict()["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(id(parameter) not in names for parameter in parameters):
        raise ValueError("the optimizer has a parameter that has no name in `named`")
    return {number: names[id(parameter)] for number, parameter in zip(numbers, parameters, strict=True)}


# -- a state and its ids -----------------------------------------------------------------------------------------


def _flatten(state: StageState) -> tuple[dict[str, Tensor], dict[str, Number]]:
    """The state's tensors and numbers, each by its id."""
    for of, optimizer in ((state.weights, state.optimizer), (state.predictor, state.predictor_optimizer)):
        if extra := sorted(optimizer.keys() - of.keys()):
            raise CheckpointError(f"there is optimizer state of {extra[0]}, but no such weight is saved with it")
    values: dict[str, Any] = {}
    for section in SECTIONS:
        for name, value in getattr(state, section).items():
            keyed = value.items() if section.endswith("optimizer") else [("", value)]
            for key, item in keyed:
                id = "/".join(filter(None, (section, name, key)))
                _need(_split(id) == (section, name, key), f"the name {name!r} or the key {key!r} cannot be saved")
                values[id] = item
    tensors = {id: value for id, value in values.items() if isinstance(value, Tensor)}
    return tensors, {id: value for id, value in values.items() if id not in tensors}


def _split(id: str) -> tuple[str, str, str]:
    """section, name and key of an id; the key is "" where the section has none."""
    section, _, name = id.partition("/")
    _need(section in SECTIONS, f"no section has {id[:80]!r}")
    key = ""
    if section.endswith("optimizer"):
        name, _, key = name.rpartition("/")
        _need(key.isidentifier(), f"{id[:80]!r} has no key")
    _need(0 < len(name) <= 512 and name.isprintable(), f"{id[:80]!r} has no usable name")
    return section, name, key


def _belongs(id: str, wanted: Mapping[str, Tensor], same: bool) -> bool:
    """Whether a stage takes it: `wanted` are the stage's weights, `same` says that the part has the same boundary."""
    section, name, _ = _split(id)
    return same if section.startswith("predictor") else name in wanted


def _owners(parts: Iterable[Part]) -> dict[str, int]:
    """Name of a weight -> the part that has it. Raises CheckpointError if two parts of it are not from one cut."""
    owners: dict[str, int] = {}
    boundaries: dict[str, int] = {}
    for k, part in enumerate(parts):
        names = [_split(id)[1] for id in part.tensors if id.startswith("weights/")]
        for claims, claimed in ((owners, names), (boundaries, [part.boundary])):
            for name in claimed:
                other = claims.setdefault(name, k)
                _need(other == k, f"stages {other} and {k} both saved {name!r}: their parts are not from one run")
    return owners


def _form(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _copy(tensor: Tensor) -> Tensor:
    """On the CPU, dense and alone in its memory, as safetensors wants it; tied weights are saved once for each name."""
    return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(tensor.detach())


# -- what comes from a file --------------------------------------------------------------------------------------


def _need(true: object, reason: str) -> None:
    if not true:
        raise CheckpointError(reason)


def _parse_part(value: Any) -> Part:
    """Raises CheckpointError unless every field is what it must be."""
    _need(isinstance(value, dict), "a part is not a table")
    boundary, size, crc32 = (value.get(key) for key in ("boundary", "bytes", "crc32"))
    _need(isinstance(boundary, str) and boundary.isprintable(), "a part's boundary is not a name")
    _need(type(size) is int and size > 0 and type(crc32) is int, "a part's size or checksum is not a number")
    tables = {key: value.get(key) for key in ("tensors", "numbers", "counters")}
    for key, table in tables.items():
        _need(isinstance(table, dict), f"a part's {key} are not a table")
    tensors = {id: _parse_form(id, form) for id, form in tables["tensors"].items()}
    for id, number in tables["numbers"].items():
        _need(_split(id)[2] and type(number) in (int, float, bool, type(None)), f"{id[:80]!r} is not a number")
    for name, count in tables["counters"].items():
        _need(type(count) in (int, float), f"counter {name[:80]!r} is not a number")
    return Part(boundary, size, crc32, tensors, tables["numbers"], tables["counters"])


def _parse_form(id: str, form: Any) -> tuple[str, tuple[int, ...]]:
    _split(id)
    _need(isinstance(form, list) and len(form) == 2, f"{id[:80]!r} has no dtype and shape")
    dtype, shape = form
    _need(isinstance(dtype, str) and isinstance(shape, list), f"{id[:80]!r} has no dtype and shape")
    _need(all(type(size) is int and size >= 0 for size in shape), f"{id[:80]!r} has a shape that is none")
    return dtype, tuple(shape)


def _read_part(folder: Path, batch: int, stage: int) -> Part:
    path = folder / _record_file(stage)
    record = _read_json(path)
    with _of(path):
        _need((record.get("batch"), record.get("stage")) == (batch, stage), "it is of another batch or stage")
        part = _parse_part(record)
    _check_size(folder / _tensors_file(stage), part)
    return part


@contextlib.contextmanager
def _of(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not valid: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    """The table that _write_json put there. Raises CheckpointError if it is not there, or not as it was written."""
    try:
        _need(0 < _size(path) <= LARGEST_JSON, f"{path} is empty or too large")
        outer = json.loads(path.read_text(encoding="utf-8"))
        body = outer["content"]
        _need(outer["crc32"] == zlib.crc32(_canonical(body)), f"{path} is damaged: its checksum does not fit")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not there: this checkpoint was never completed") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    _need(isinstance(body, dict), f"{path} is damaged: no table")
    return dict(body)


def _check_size(path: Path, part: Part) -> None:
    try:
        size = _size(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    _need(size == part.bytes, f"{path} has {size} bytes instead of {part.bytes}: it was cut short or replaced")


def _verify(path: Path, part: Part) -> None:
    _check_size(path, part)
    try:
        _need(_measure(path) == (part.bytes, part.crc32), f"{path} is damaged: its checksum does not fit")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _load(folder: Path, k: int, part: Part, ids: list[str]) -> dict[str, Tensor]:
    """Tensors of stage k's file by their ids, if the whole file is as it was written."""
    if not ids:
        return {}
    path = folder / _tensors_file(k)
    _verify(path, part)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {id: file.get_tensor(id).clone() for id in ids}  # a clone outlives the file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    for id, tensor in tensors.items():
        _need(_form(tensor) == part.tensors[id], f"{path} is damaged: {id} is not as the manifest has it")
    return tensors


# -- files -------------------------------------------------------------------------------------------------------


def _folder(run: Path, batch: int) -> Path:
    return run / "checkpoints" / f"{batch:08d}"


def _tensors_file(stage: int) -> str:
    return f"stage-{stage}.safetensors"


def _record_file(stage: int) -> str:
    return f"stage-{stage}.json"


def _batches(run: Path) -> list[int]:
    """Batch ids that have a folder, complete or not. Links and anything else are not ours."""
    above = run / "checkpoints"
    if not above.is_dir():
        return []
    names = [path.name for path in above.iterdir() if path.is_dir() and not path.is_symlink()]
    return [int(name) for name in names if re.fullmatch("[0-9]{8,18}", name) and name == _folder(run, int(name)).name]


def _tidy(folder: Path, keep: set[str]) -> None:
    """Remove what an earlier start left of this batch: parts of a cut into more stages, files half written."""
    for path in folder.iterdir():
        if path.name not in keep and re.fullmatch(
            r"(stage-[0-9]+\.(safetensors|json)|manifest\.json)(\.tmp)?", path.name
        ):
            path.unlink()


def _prune(run: Path, batch: int, keep: int) -> None:
    older = sorted((n for n in _batches(run) if n < batch), reverse=True)
    whole = [n for n in older if (_folder(run, n) / MANIFEST).is_file()]
    for n in older:
        if n not in whole[: keep - 1]:
            (_folder(run, n) / MANIFEST).unlink(missing_ok=True)  # first, so that a folder half gone is no checkpoint
            shutil.rmtree(_folder(run, n))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    # read back once, so that the checksum is of what a reader gets: a tuple becomes a list, a key a string
    body = json.loads(json.dumps(content))
    text = json.dumps({"crc32": zlib.crc32(_canonical(body)), "content": body}, indent=1)
    _write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """All of it or nothing: written beside, synced, renamed; the rename synced too."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()  # a full disk needs the room
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    """Bytes of a regular file: what a link or a pipe leads to is not ours to read. Raises OSError."""
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return status.st_size


def _measure(path: Path) -> tuple[int, int]:
    """Bytes and crc32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return size, crc


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Give an error from the disk its one line, and what safetensors raises its errno."""
    untouched = "older checkpoints are untouched"
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error ([0-9]+)\)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, f"{what}: {error}; {untouched}") from error
    except OSError as error:
        reason = f"{what}: {error.strerror or error}; {untouched}"
        raise OSError(error.errno or errno.EIO, reason, error.filename) from error
    except KeyError as error:  # from safetensors' table of dtypes
        raise CheckpointError(f"{what}: safetensors cannot hold {error}") from error
