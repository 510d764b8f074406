"""python -m benchmarks.curve: what encrypted links cost, on the LM example over tcp, with keys and without in turn."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cells import ROOT
from benchmarks.figures import processor

WAYS = ("without keys", "with keys")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curve", description=__doc__)
    add = parser.add_argument
    add("--text", default=os.environ.get("DNIPIPE_TEXT"), metavar="FILE", help="data.root (default: DNIPIPE_TEXT)")
    add("--batches", type=int, default=200, help="of a run (default: %(default)s)")
    add("--repeats", type=int, default=5, help="runs of each kind (default: %(default)s)")
    add("words", nargs="*", help="settings of all runs, behind --")
    options = parser.parse_args(arguments)
    if not options.text:
        parser.error("--text FILE names the text to train on")
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _dnipipe("keys", "new", str(folder / "keys"), "--stages", "4")
        for repeat in range(options.repeats):
            for way in WAYS[:: 1 if repeat % 2 else -1]:  # neither is always the first
                locked = [f"--security.keys={folder / 'keys'}"] if way == "with keys" else []
                run = folder / f"{way.split()[0]}-{repeat}"
                rates[way].append(_rate(run, options.text, options.batches, [*locked, *options.words]))
                print(f"{way}: {rates[way][-1]:.1f} samples/s", flush=True)
    plain, locked_rate = (statistics.median(rates[way]) for way in WAYS)
    print(f"{time.strftime('%Y-%m-%d')}, {processor()}, load {os.getloadavg()[0]:.1f}")
    for way in WAYS:
        low, high = min(rates[way]), max(rates[way])
        print(f"{way}: median {statistics.median(rates[way]):.1f} samples/s, {low:.1f} to {high:.1f}")
    print(f"with keys {locked_rate / plain:.3f} of the throughput without")
    return 0


def _rate(run: Path, text: str, batches: int, words: list[str]) -> float:
    """Samples a second of a run of the LM example."""
    common = [f"--data.root={text}", f"--train.batches={batches}", "--eval.every=0", "--eval.sample=0"]
    where = ["--transport.scheme=tcp", f"--output.run={run}", "--output.quiet=true"]
    _dnipipe("train", str(ROOT / "examples" / "lm.toml"), *common, *where, *words)
    rate: float = json.loads((run / "summary.json").read_text())["train"]["samples_per_second"]
    return rate


def _dnipipe(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dnipipe", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"dnipipe {words[0]} ended with status {done.returncode}: {done.stderr.strip()}")


if __name__ == "__main__":
    raise SystemExit(main())
