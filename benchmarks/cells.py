"""A cell of a grid is one `dnipipe train` command; its record is what came of it, one line of JSON.

A record belongs to a cell if it was made with the same settings, all of them, whatever command gave them: so a cell is
run again when a default or a TOML file has changed, and two cells that mean the same run share its record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from dnipipe.config import Config, describe, flat, load, shared_settings

ROOT = Path(__file__).parents[1]  # the clone, where commands are run
DATA = {"mnist": "PATH", "cifar10": "PATH", "text": "FILE"}  # data.name -> what data.root must name


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        table: the table that it was defined for; its record is kept in TABLE.jsonl.
        labels: what a person tells it by, e.g. {"rule": "local", "seed": 0}.
        config: a TOML file, as seen from the clone's root.
        words: `--section.key value` pairs on top of it.
        waits: it depends on other cells' results which settings it means, and they are not there yet.
    """

    table: str
    labels: Mapping[str, object]
    config: str
    words: tuple[str, ...]
    waits: bool = False

    def __str__(self) -> str:
        return " ".join([self.table, *(f"{name}={value}" for name, value in self.labels.items())])

    @property
    def loaded(self) -> Config:
        """Raises ConfigError if this is no valid run."""
        return _loaded(self.config, self.words)

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting that decides the result: all but paths and display."""
        return _settings(self.config, self.words)

    @property
    def key(self) -> str:
        return _key(self.config, self.words)

    def command(self, root: str = "") -> list[str]:
        """What a person would type to make the same run. `root` is data.root."""
        data = DATA.get(self.loaded.data.name)
        where = [] if data is None else ["--data.root", root or data]
        return ["dnipipe", "train", self.config, *where, *self.words]


@cache
def _loaded(config: str, words: tuple[str, ...]) -> Config:
    return load(ROOT / config, words)


@cache
def _settings(config: str, words: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in flat(_loaded(config, words)) if name in _decisive()}


@cache
def _key(config: str, words: tuple[str, ...]) -> str:
    return key_of(_settings(config, words))


def key_of(settings: Mapping[str, Any]) -> str:
    """What two records of the same run have in common. A setting that was not there yet stood at its default."""
    known = {name: settings.get(name, default) for name, _, default, _ in describe()}
    return json.dumps({name: value for name, value in known.items() if name in _decisive()})


@cache
def _decisive() -> frozenset[str]:
    return frozenset(line.partition("=")[0] for line in shared_settings(Config()))


@dataclass(frozen=True)
class Record:
    """What came of a run. Names and units are those of docs/files.md; batches are counted from 1."""

    cell: str  # what it was called when it was run
    command: str
    settings: dict[str, Any]
    loss: float | None  # of the evaluation at the end; None if it diverged
    accuracy: float | None
    diverged: int | None  # the batch whose loss was not finite
    seconds: float  # wall-clock time of the process, its start included
    evaluations: list[list[float]]  # [batch, loss, accuracy]
    training: list[list[float]]  # [batch, mean loss of the batches since the line before]
    cosine: list[list[list[float]]]  # by stage: [batch, mean cosine of ĝ with g since the line before]
    stage: list[dict[str, Any]]  # by stage, means of the whole run: cosine, norm_ratio, staleness, at_once
    torch: str
    date: str
    processor: str  # or the GPU

    @property
    def error(self) -> float | None:
        """Error in percent."""
        return None if self.accuracy is None else 100 * (1 - self.accuracy)


class Records:
    """All records of a folder, in files of JSON lines; a new one is on disk as soon as it is added."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records = {
            key_of(record.settings): record for path in sorted(folder.glob("*.jsonl")) for record in _read(path)
        }

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def of(self, cell: Cell) -> Record | None:
        return None if cell.waits else self._records.get(cell.key)

    def add(self, cell: Cell, record: Record) -> None:
        self._records[cell.key] = record
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{cell.table}.jsonl"
        torn = path.exists() and not path.read_bytes().endswith(b"\n")  # its writer was killed in the middle of a line
        with path.open("a") as file:
            file.write("\n" * torn + json.dumps(asdict(record), allow_nan=False) + "\n")


def _read(path: Path) -> Iterator[Record]:
    """The records of a file. A line that was cut short is none: its cell is run again."""
    names = {item.name for item in fields(Record)}
    for line in path.read_text().splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if names <= values.keys():
            yield Record(**{name: values[name] for name in names})
