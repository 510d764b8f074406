"""Writing a checkpoint: each stage its part, then stage 0 the manifest, and then what is no longer needed goes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnipipe.checkpoint.files import (
    MANIFEST,
    batches_of,
    check_size,
    explained,
    folder_of,
    measure,
    read_json,
    record_file,
    sync,
    tensors_file,
    write_json,
    write_tensors,
)
from dnipipe.checkpoint.format import FORMAT, Part, StageState, checked, flatten, form_of, need, owners_of, parse_part
from dnipipe.errors import CheckpointError


def save_part(run: Path, batch: int, stage: int, state: StageState) -> None:
    """Write stage k's part of the checkpoint of `batch`; on return it is on disk.

    Not for a batch whose checkpoint is complete already: it would be without a valid manifest until `complete` ends.
    Raises CheckpointError if the state holds what cannot be saved, OSError (disk full, no permission) if writing fails.
    """
    tensors, numbers = flatten(state)
    forms = {id: form_of(tensor) for id, tensor in tensors.items()}
    part = Part(state.boundary, 1, 0, forms, numbers, dict(state.counters), state.optimizer_name)
    parse_part(json.loads(json.dumps(asdict(part), default=str)))  # what could not be read back must not be saved
    folder = folder_of(run, batch)
    path, record = folder / tensors_file(stage), folder / record_file(stage)
    with explained(f"cannot save stage {stage} at batch {batch}"):
        folder.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)  # left by a start that was killed; it describes the file that goes now
        write_tensors(path, {id: _copy(tensor) for id, tensor in tensors.items()})
        size, crc32 = measure(path)
        write_json(record, {"batch": batch, "stage": stage, **asdict(replace(part, bytes=size, crc32=crc32))})


def complete(run: Path, batch: int, stages: int, settings: Mapping[str, Any], keep: int) -> Path:
    """Make the parts a checkpoint, once each stage has said Saved; then let go of what is no longer needed.

    That is: complete checkpoints older than the newest `keep` and unfinished folders older than this one.
    Raises CheckpointError if a part is missing or does not fit the others, OSError if writing fails.
    """
    folder = folder_of(run, batch)
    files = [name(stage) for stage in range(stages) for name in (tensors_file, record_file)]
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}: every stage must have saved, and see the same folder (output.dir)"
        )
    parts = tuple(_read_part(folder, batch, stage) for stage in range(stages))
    owners_of(parts)
    manifest = {"format": FORMAT, "batch": batch, "stages": stages, "settings": dict(settings)}
    with explained(f"cannot complete checkpoint {batch}"):
        write_json(folder / MANIFEST, {**manifest, "parts": [asdict(part) for part in parts]})
        sync(folder.parent)
        sync(run)
    with explained(f"checkpoint {batch} is complete, but what is no longer needed cannot be removed"):
        _tidy(folder, {*files, MANIFEST})
        _prune(run, batch, keep)
    return folder


def _copy(tensor: Tensor) -> Tensor:
    """On the CPU, dense and alone in its memory, as safetensors wants it; tied weights are saved once for each name."""
    return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(tensor.detach())


def _read_part(folder: Path, batch: int, stage: int) -> Part:
    path = folder / record_file(stage)
    record = read_json(path)
    with checked(path):
        need((record.get("batch"), record.get("stage")) == (batch, stage), "it is of another batch or stage")
        part = parse_part(record)
    check_size(folder / tensors_file(stage), part)
    return part


def _tidy(folder: Path, keep: set[str]) -> None:
    """Remove what an earlier start left of this batch: parts of a cut into more stages, files half written."""
    for path in folder.iterdir():
        if path.name not in keep and re.fullmatch(
            r"(stage-[0-9]+\.(safetensors|json)|manifest\.json)(\.tmp)?", path.name
        ):
            path.unlink()


def _prune(run: Path, batch: int, keep: int) -> None:
    older = sorted((n for n in batches_of(run) if n < batch), reverse=True)
    whole = [n for n in older if (folder_of(run, n) / MANIFEST).is_file()]
    for n in older:
        if n not in whole[: keep - 1]:
            (folder_of(run, n) / MANIFEST).unlink(missing_ok=True)  # first, so that a folder half gone is no checkpoint
            shutil.rmtree(folder_of(run, n))
