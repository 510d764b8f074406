"""One rank of dnipipe, as `dnipipe train` starts it; what it did is read from the files that every run writes."""

from __future__ import annotations

import bisect
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

from benchmarks.figures import OVERHEAD
from benchmarks.throughput.window import Measured, Sample, between, sample
from benchmarks.throughput.workload import Workload
from dnipipe.process import guarded

WARM_UP = 50  # batches that are not counted: the window's automatic size is found in them
EVERY = 0.1  # seconds between two lines of metrics


def train(workload: Workload, words: tuple[str, ...], batches: int, folder: Path) -> Measured:
    """Train WARM_UP + `batches` batches with these settings. Raises SystemExit if that fails."""
    with Sampler() as sampler:
        folder = run(workload, (*words, "--output.every", str(EVERY)), WARM_UP + batches, folder)
    rank = int(os.environ["RANK"])
    lines = [json.loads(line) for line in (folder / "metrics" / f"stage-{rank}.jsonl").read_text().splitlines()]
    return measured(lines, sampler, WARM_UP + batches)


def run(workload: Workload, words: tuple[str, ...], batches: int, folder: Path) -> Path:
    """This rank's part in a run of so many batches; returns its folder. Raises SystemExit if it fails."""
    output = ("--output.run", str(folder), "--output.quiet", "true")
    status, folder = guarded(workload.job(workload.config(*words, "--train.batches", str(batches), *output)))
    if status:
        raise SystemExit(status)
    return folder


def measured(lines: list[dict[str, float]], sampler: Sampler, total: int) -> Measured:
    """From the line behind the warm-up to the last one that still has a batch to come."""
    counted = [line for line in lines if WARM_UP <= line["batch"] < total]
    if len(counted) < 2:
        raise SystemExit(f"too short to be measured: {len(counted)} lines of metrics behind the warm-up")
    first, last = counted[0], counted[-1]
    late = [line for line in counted[1:] if "staleness" in line and line["batches"]]
    batches = sum(line["batches"] for line in late)
    stale = sum(line["staleness"] * line["batches"] for line in late) / batches if batches else None
    ends = sampler.at(first["time"]), sampler.at(last["time"])
    whole = between(*ends, samples=sum(line["samples"] for line in counted[1:]))
    return replace(whole, staleness=stale, overhead=overhead(counted[1:]))


def overhead(lines: list[dict[str, float]]) -> float:
    """Seconds of the processor a batch, over these lines of metrics, that the stage's thread did not give the model."""
    spent = sum(line[f"processor.{label}"] for line in lines for label in OVERHEAD)
    return spent / sum(line["batches"] for line in lines)


class Sampler:
    """Notes a Sample every EVERY seconds, in a thread, to be asked for the one nearest to a time."""

    def __init__(self) -> None:
        self._times: list[float] = []  # seconds since 1970, as the metrics have it
        self._samples: list[Sample] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._note, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def at(self, time: float) -> Sample:
        return self._samples[min(bisect.bisect_left(self._times, time), len(self._samples) - 1)]

    def _note(self) -> None:
        while not self._ended.wait(EVERY / 2):
            now = sample()
            self._times.append(now.clock)
            self._samples.append(now)


__all__ = ["overhead", "run", "train"]
