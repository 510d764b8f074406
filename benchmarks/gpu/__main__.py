"""python -m benchmarks.gpu: one short table of what the engine costs on this machine's GPUs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from statistics import median

import torch

from benchmarks.cells import ROOT
from benchmarks.gpu.loops import CONFIG, loop
from benchmarks.gpu.transfers import MIB, copies, sent
from benchmarks.tables import markdown

BATCHES = 300  # of a run; the first half is not counted
FORMS = {"float32": (), "bfloat16": ("--pipeline.autocast", "bfloat16")}
SYSTEMS = {
    "`local`": ("--rule.name", "local"),
    "`synthetic`": ("--rule.name", "synthetic", "--predictor.rows", "0.25"),
    "`blend`": ("--rule.name", "blend"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the table goes besides the screen")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here")
    parts = []
    for part in report(options.repeats):
        print(part, flush=True)
        parts.append(part + "\n")
    if options.out:
        options.out.write_text("".join(parts))
    return 0


def report(repeats: int) -> Iterator[str]:
    """The table, piece by piece, as it is measured."""
    count, name = torch.cuda.device_count(), torch.cuda.get_device_name(0)
    where = f"{count} x {name}, torch {torch.__version__}"
    yield f"# On a GPU\n\n{time.strftime('%Y-%m-%d')}, {where}; medians of {repeats}\n"
    yield "## Tensors, GB/s\n\n" + markdown(["", *(f"{size} MiB" for size in MIB)], []).rstrip()
    for way, rates in chain(copies(repeats), sent(repeats)):
        yield _row(way, *(f"{rate:.1f}" for rate in rates))
    yield "\n## Two stages\n\n" + markdown(["", "", "samples/s", "of the limit", "peak memory, MiB"], []).rstrip()
    for form, words in FORMS.items():
        whole, *parts = (loop(words, stage, repeats) for stage in (None, 0, 1))
        yield _row(form, "one process, plain autograd", f"{whole.rate:.0f}", "", f"{whole.memory:.0f}")
        shared = count == 1
        most = 1 / sum(1 / part.rate for part in parts) if shared else min(part.rate for part in parts)
        limit = "the limit: both stages' own work, on one GPU" if shared else "the limit: the slower stage"
        yield _row(form, limit, f"{most:.0f}", "1", " + ".join(f"{part.memory:.0f}" for part in parts))
        for system, more in SYSTEMS.items():
            rate, memory = _repeated((*words, *more), repeats)
            yield _row(form, system, f"{rate:.0f}", f"{rate / most:.2f}", memory)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _repeated(words: tuple[str, ...], repeats: int) -> tuple[float, str]:
    found = sorted(run(words) for _ in range(repeats))
    return median(rate for rate, _ in found), found[0][1]


def run(words: tuple[str, ...]) -> tuple[float, str]:
    """Samples/s of the slower stage in the second half of a run, and each stage's peak memory in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dnipipe", "train", str(CONFIG), *words]
        own = ["--train.batches", str(BATCHES), "--output.run", f"{folder}/run", "--output.every", "0.1"]
        ended = subprocess.run(
            [*command, *own, "--output.quiet", "true"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )
        if ended.returncode:
            raise SystemExit(f"{' '.join(words)}: {ended.stderr.strip().splitlines()[-1:]}")
        rates = [_rate(Path(folder) / "run" / "metrics" / f"stage-{k}.jsonl") for k in range(2)]
        stages = json.loads((Path(folder) / "run" / "summary.json").read_text())["stage"]
        return min(rates), " + ".join(f"{stage['peak_memory'] / 2**20:.0f}" for stage in stages)


def _rate(path: Path) -> float:
    lines = [line for line in map(json.loads, path.read_text().splitlines()) if line["batch"] >= BATCHES // 2]
    counted = [line for line in lines if line["batch"] < BATCHES]
    if len(counted) < 2:
        raise SystemExit(f"{path}: too few lines of metrics behind the middle of the run")
    samples: float = sum(line["samples"] for line in counted[1:])
    return samples / float(counted[-1]["time"] - counted[0]["time"])


if __name__ == "__main__":
    sys.exit(main())
