"""The study: which tasks, and the ways to send less. All else is alike, the learning rate too.

form       every tensor rounded, both ways
every n    gradients of one batch in n
rows r     gradients of a share of each batch's samples
all        int8 both ways, one batch in 8, an eighth of the samples
none       no gradient at all: what gradients are worth
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.cells import Cell, Record, Records
from dnipipe.config import Config
from dnipipe.wire import FORMS, form_of

FORM, EVERY, ROWS, ALL, NONE = "form", "every n-th", "rows", "all of these", "no gradients"
WAYS: dict[str, dict[str, tuple[str, ...]]] = {
    FORM: {form: ("--wire.activations", form, "--wire.gradients", form) for form in ("as is", *FORMS)},
    EVERY: {str(n): ("--wire.gradient_every", str(n)) for n in (2, 4, 8)},
    ROWS: {share: ("--wire.gradient_rows", share) for share in ("0.5", "0.25", "0.125")},
    ALL: {
        "int8, 8, 0.125": (
            *("--wire.activations", "int8", "--wire.gradients", "int8"),
            *("--wire.gradient_every", "8", "--wire.gradient_rows", "0.125"),
        )
    },
}


@dataclass(frozen=True)
class Task:
    """Args:
    config, words: what all its cells have in common. figure: "loss", or "error" in percent.
    ways: of WAYS, those that its rule can go. none: settings under which nothing is learnt from a gradient.
    """

    config: str
    words: tuple[str, ...]
    figure: str
    ways: tuple[str, ...] = tuple(WAYS)
    none: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1)


LM = (
    *("--model.width", "64", "--data.batch", "16", "--train.batches", "600", "--eval.every", "0"),
    *("--pipeline.stages", "4", "--transport.delay", "2", "--predictor.hidden", "1", "--optimizer.lr", "2e-3"),
)
MNIST = (
    *("--train.batches", "700", "--eval.every", "0", "--pipeline.stages", "4", "--transport.delay", "2"),
    *("--rule.name", "synthetic", "--predictor.name", "linear", "--optimizer.lr", "1e-3"),
)
TASKS = {
    "lm-blend": Task("benchmarks/learning/lm.toml", (*LM, "--rule.name", "blend"), "loss", (FORM,), seeds=(0,)),
    "lm-synthetic": Task(
        "benchmarks/learning/lm.toml",
        (*LM, "--rule.name", "synthetic"),
        "loss",
        none=("--rule.name", "local"),
        seeds=(0,),
    ),
    "mnist-linear": Task(
        "benchmarks/learning/mnist-mlp.toml",
        MNIST,
        "error",
        none=("--rule.warmup", "1000000", "--rule.warmup_rule", "zero"),
    ),
}


@dataclass(frozen=True)
class WireCells:
    """Args:
    wanted: names of the tasks that are run.
    """

    wanted: tuple[str, ...] = tuple(TASKS)

    def cells(self, records: Records) -> list[Cell]:
        return [cell for task in self.wanted for way, value in self.rows(task) for cell in self.seeds(task, way, value)]

    def rows(self, task: str) -> list[tuple[str, str]]:
        """(way, its value) of each line of the task's table."""
        found = [(way, value) for way in TASKS[task].ways for value in WAYS[way]]
        return [*found, (NONE, "")] if TASKS[task].none else found

    def seeds(self, task: str, way: str, value: str) -> list[Cell]:
        words = TASKS[task].none if way == NONE else WAYS[way][value]
        return [
            Cell(
                task,
                {"way": way, "value": value, "seed": seed},
                TASKS[task].config,
                (*TASKS[task].words, *words, "--train.seed", str(seed)),
            )
            for seed in TASKS[task].seeds
        ]

    def found(self, task: str, way: str, value: str, records: Records) -> list[Record | None]:
        return [records.of(cell) for cell in self.seeds(task, way, value)]


def carried(config: Config) -> tuple[float, float]:
    """Bytes of activations, and of gradients, that cross an edge for a batch; the labels not among them."""
    batch, width = config.data.batch, config.model.width
    token = (config.data.context, width) if config.model.name == "transformer" else (width,)
    samples = -(-batch * config.wire.gradient_rows // 1)
    down, up = (
        _size(setting, (int(count), *token))
        for setting, count in ((config.wire.activations, batch), (config.wire.gradients, samples))
    )
    return down, up / config.wire.gradient_every


def _size(setting: str, shape: tuple[int, ...]) -> int:
    form = form_of(setting, torch.float32)
    return form.size(shape) if form else torch.Size(shape).numel() * torch.float32.itemsize
