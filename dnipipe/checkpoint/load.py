"""Reading a checkpoint: the newest one that is whole, a stage's state out of it under any cut, the model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dnipipe.checkpoint.files import (
    MANIFEST,
    batches_of,
    explained,
    folder_of,
    read_json,
    read_tensors,
    tensors_file,
    verify,
    write_tensors,
)
from dnipipe.checkpoint.format import (
    FORMAT,
    SECTIONS,
    Part,
    StageState,
    belongs,
    checked,
    form_of,
    need,
    owners_of,
    parse_part,
    split_id,
)
from dnipipe.errors import CheckpointError


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
        owners = owners_of(self.parts)
        self._check(model, owners)
        if extra := sorted(owners.keys() - model.keys()):
            raise CheckpointError(f"{self.folder} has {extra[0]}, and the model has not: it belongs to another model")

    def state_for(self, wanted: Mapping[str, Tensor], boundary: str, first: str = "") -> StageState:
        """What a stage with the state_dict `wanted` (only shapes and dtypes are looked at) starts from, on the CPU.

        Weights and optimizer states come from whichever parts have them. Predictor and counters come from the stage
        that ended at the same boundary; if there was none they are empty, and the predictor starts anew. What guesses
        the stage's input comes from the stage that began with the same layer, `first`.
        Raises CheckpointError if a weight is missing, or has another shape or dtype, or a file is damaged.
        """
        self._check(wanted, owners_of(self.parts))
        found: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        counters: dict[str, int | float] = {}
        for k, part in enumerate(self.parts):
            same = part.boundary == boundary
            counters = dict(part.counters) if same else counters
            ids = [id for id in (*part.tensors, *part.numbers) if belongs(id, wanted, same, first)]
            loaded: dict[str, Any] = read_tensors(
                self.folder / tensors_file(k), part, [id for id in ids if id in part.tensors]
            )
            for id in ids:
                section, name, key = split_id(id)
                value = loaded[id] if id in loaded else part.numbers[id]
                if key:
                    found[section].setdefault(name, {})[key] = value
                else:
                    found[section][name] = value
        return StageState(boundary=boundary, counters=counters, optimizer_name=self.parts[0].optimizer, **found)

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers of the whole model, on the CPU."""
        gathered: dict[str, Tensor] = {}
        for k, part in enumerate(self.parts):
            loaded = read_tensors(
                self.folder / tensors_file(k), part, [id for id in part.tensors if id.startswith("weights/")]
            )
            gathered.update((split_id(id)[1], tensor) for id, tensor in loaded.items())
        return gathered

    def _check(self, wanted: Mapping[str, Tensor], owners: Mapping[str, int]) -> None:
        for name, tensor in wanted.items():
            if name not in owners:
                raise CheckpointError(f"{self.folder} has no {name}, which the model has: it belongs to another model")
            saved, own = self.parts[owners[name]].tensors[f"weights/{name}"], form_of(tensor)
            if saved != own:
                raise CheckpointError(
                    f"{name} is {saved[0]} {list(saved[1])} in {self.folder} and {own[0]} {list(own[1])} in the model: "
                    "it belongs to another model"
                )


def newest(run: Path) -> Checkpoint:
    """The newest complete checkpoint, every byte of it read and found as it was written.

    `skipped` names the newer folders that were passed over, and why. Raises CheckpointError if there is none.
    """
    found, skipped = search(run)
    if found:
        return found
    passed = f" (passed over: {'; '.join(skipped)})" if skipped else ""
    raise CheckpointError(
        f"no complete checkpoint in {run / 'checkpoints'}{passed}: name a run that has one, or start a new run"
    )


def search(run: Path) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """The newest complete checkpoint, as above, if there is one; what is newer, or was all there was, and why not."""
    skipped: list[str] = []
    for batch in sorted(batches_of(run), reverse=True):
        try:
            found = at(run, batch)
            for k, part in enumerate(found.parts):
                verify(found.folder / tensors_file(k), part)
            return replace(found, skipped=tuple(skipped)), tuple(skipped)
        except CheckpointError as error:
            skipped.append(str(error))
    return None, tuple(skipped)


def at(run: Path, batch: int) -> Checkpoint:
    """The checkpoint of `batch`, the manifest checked now, each file when it is read.

    For the stages that are told which one `newest` found, so that all agree. Raises CheckpointError if it is not there.
    """
    folder = folder_of(run, batch)
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has format {manifest.get('format')!r}, this dnipipe reads {FORMAT}: use the one that wrote it"
        )
    listed: Any = manifest.get("parts")
    settings: Any = manifest.get("settings")
    with checked(folder / MANIFEST):
        need(type(manifest.get("batch")) is int and manifest["batch"] == batch, "its batch is not its folder's")
        need(isinstance(settings, dict), "its settings are not a table")
        need(isinstance(listed, list) and listed and manifest.get("stages") == len(listed), "its parts are not K")
        parts = tuple(parse_part(part) for part in listed)
        owners_of(parts)
    return Checkpoint(folder, batch, settings, parts)


def weights(run: Path) -> dict[str, Tensor]:
    """Parameters and buffers of the whole model, from the newest complete checkpoint, on the CPU."""
    return newest(run).weights()


def export(weights: dict[str, Tensor], out: Path) -> None:
    """Write them to one safetensors file: a plain model takes it by load_state_dict(safetensors.torch.load_file(out)).

    Raises OSError if it cannot be written.
    """
    with explained(f"cannot write {out}", "name another file"):
        write_tensors(out, weights)
