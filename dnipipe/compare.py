"""`dnipipe compare`, `Run.compare`: a run as it is and the same under sync, what each came to, and which to choose.

        ┌─► RUN/as-it-is/  ─► Side ─┐
sides ──┤                           ├─► samples/s, loss and peak memory side by side; a sentence
        └─► RUN/sync/      ─► Side ─┘

What one of the two cannot do is said before either has trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnipipe import gloo
from dnipipe.building import device_of
from dnipipe.config import Config, replace, under
from dnipipe.errors import ConfigError
from dnipipe.loopback import LOOPBACK
from dnipipe.sync import microbatches

NEAR_RATE = 0.05  # of two rates, and
NEAR_LOSS = 0.01  # of two losses: a smaller difference may be chance
WARM_UP = 0.2  # part of a run before its rate counts

# Who was first to the same loss: (samples that a stage trains in a round trip, settings), link by link, task by task.
# From benchmarks/time_to_loss/results/map.json, which a test holds this to.
FIRST: dict[str, tuple[tuple[int, str], ...]] = {
    "lm": ((0, "local"), (16, "local"), (78, "local")),
    "mnist": ((0, "delayed, rule.accumulate 4"), (379, "delayed, rule.accumulate 4"), (1292, "local")),
}


@dataclass(frozen=True)
class Side:
    """What one run came to."""

    rule: str
    rate: float  # samples/s in the last stage, after the warm-up
    loss: float | None  # of the evaluation at the end
    memory: tuple[int, ...]  # bytes at most, stage by stage
    late: float | None = None  # samples, mean, that the last stage but one trains until g comes; None: none did


def sides(config: Config, batches: int, samples: int) -> tuple[dict[str, Config], list[str]]:
    """What is to be trained, by the name of its folder, and lines that say what was changed for it.

    batches: to train. samples: of a batch. Raises ConfigError for what sync could not do: else a person would hear of
    it when the first run is over.
    """
    if config.rule.name == "sync" or config.transport.kind == "local":
        raise ConfigError(
            f"rule.name = {config.rule.name}, transport.kind = {config.transport.kind}: compare measures a rule over "
            "processes beside sync; name another rule, and leave transport.kind at zmq"
        )
    config = replace(
        config,
        train={"batches": batches},
        eval={"every": 0, "sample": 0},
        checkpoint={"every": 0},
        output={"every": 0.2, "quiet": True},
    )
    said = []
    if device_of(config).type != "cpu":
        config = _on_the_cpu(config)
        said.append("both on the CPU, for sync sends from the main memory alone (gloo): this says nothing of a GPU")
    if wire := config.wire.changed:
        without = ", ".join(f"{name} = {value}" for name, value in wire.items())
        said.append(f"sync without {without}: torch sends each tensor as it is, and all")
    sync = under(config, "sync")
    microbatches(sync.sync, sync.pipeline.stages, samples)
    gloo.device(sync.transport.address or LOOPBACK, sync.security.private_network)
    return {"as-it-is": config, "sync": sync}, said


def _on_the_cpu(config: Config) -> Config:
    """Both sides of it: a GPU beside a CPU is no comparison. Who asked for the GPU is not given another device."""
    if config.pipeline.device != "auto":
        raise ConfigError(
            f"pipeline.device = {config.pipeline.device}: compare trains under sync too, which sends from the main "
            "memory alone (gloo); use pipeline.device = cpu"
        )
    return replace(config, pipeline={"device": "cpu"})


def side(run: Path, accumulate: int) -> Side:
    """What the run in this folder came to, where a stage updates once in `accumulate` batches."""
    told: dict[str, Any] = json.loads((run / "summary.json").read_text())
    stages = told["stage"]
    text = (run / "metrics" / f"stage-{len(stages) - 1}.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    measured = rate(lines, told["train"]["batches"]) or told["train"]["samples_per_second"]
    updates = stages[-2]["staleness"] if len(stages) > 1 else None
    an_update = accumulate * told["train"]["samples"] / told["train"]["batches"]  # samples
    late = None if updates is None else updates * an_update
    return Side(told["rule"], measured, told["eval"]["loss"], tuple(stage["peak_memory"] for stage in stages), late)


def rate(lines: Sequence[dict[str, float]], batches: int) -> float | None:
    """Samples/s by a stage's lines of metrics, from the first behind the warm-up to the last but one that trained.

    The last one ends somewhere in the evaluation. None: there are too few lines.
    """
    trained = [line for line in lines if line["batches"]][:-1]
    counted = [line for line in trained if line["batch"] - line["batches"] >= WARM_UP * batches]
    seconds = sum(line["seconds"] for line in counted)
    return sum(line["samples"] for line in counted) / seconds if seconds else None


def report(own: Side, sync: Side, batches: int) -> Iterator[str]:
    """Both side by side, and the sentence."""
    yield f"{'':20}{own.rule:>12}{sync.rule:>12}"
    yield f"{'samples/s':20}{own.rate:12.1f}{sync.rate:12.1f}    {own.rate / sync.rate:.2f} times"
    if own.loss is not None and sync.loss is not None:
        yield f"{'loss at the end':20}{own.loss:12.4f}{sync.loss:12.4f}    {_gap(own, sync):+.1%}"
    for k, (ours, theirs) in enumerate(zip(own.memory, sync.memory, strict=True)):
        label = f"peak memory, stage {k}"
        yield f"{label:20}{ours / 2**20:8.0f} MiB{theirs / 2**20:8.0f} MiB"
    yield advice(own, sync, batches)
    if own.late is not None:
        yield from elsewhere(own.late)


def elsewhere(late: float) -> Iterator[str]:
    """Who was first to the same loss on links of several lengths: what a run of some batches cannot tell."""
    yield f"a gradient came {late:.0f} samples later. First to one loss (docs/performance.md), with a round trip of"
    for task, links in FIRST.items():
        yield f"  {task:8}" + "; ".join(f"{trip} samples: {rule}" for trip, rule in links)


def advice(own: Side, sync: Side, batches: int) -> str:
    """Which to choose, and why, in one sentence. The gap of the losses counts only where both have one."""
    ratio, gap = own.rate / sync.rate, _gap(own, sync)
    faster = 1 if ratio > 1 + NEAR_RATE else -1 if ratio < 1 / (1 + NEAR_RATE) else 0
    better = 1 if gap < -NEAR_LOSS else -1 if gap > NEAR_LOSS else 0
    why = f"{own.rule} trains {ratio:.2f} times as many samples a second"
    if own.loss is not None and sync.loss is not None:
        why += f", and after {batches} batches its loss is {abs(gap):.1%} {'higher' if gap > 0 else 'lower'}"
    if faster * better < 0:
        quick, good = (own.rule, sync.rule) if faster > 0 else (sync.rule, own.rule)
        return f"choose {quick} where time counts and {good} where samples do: {why}"
    if faster or better:
        return f"choose {own.rule if faster + better > 0 else sync.rule}: {why}"
    return f"a draw, and sync is the simpler: {why}"


def _gap(own: Side, sync: Side) -> float:
    """By how much the loss is higher than under sync, relative to that."""
    if own.loss is None or not sync.loss:
        return 0.0
    return (own.loss - sync.loss) / abs(sync.loss)


__all__ = ["Side", "advice", "rate", "report", "side", "sides"]
