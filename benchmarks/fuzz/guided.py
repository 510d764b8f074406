"""python -m benchmarks.fuzz.guided: mutate what dnipipe reads, guided by the code that it reaches (Atheris, libFuzzer).

Each target of targets.py runs in a process of its own (watched.py), which a finding ends; the bytes that made it are
printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cells import ROOT
from benchmarks.fuzz.targets import TARGETS

SLACK = 120  # seconds for a start and an end


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz.guided", description=__doc__)
    add = parser.add_argument
    add("targets", nargs="*", metavar="TARGET", help=f"{' | '.join(TARGETS)} (default: all of them)")
    add("--seconds", type=int, default=60, help="of each target (default: %(default)s)")
    add("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    if importlib.util.find_spec("atheris") is None:
        parser.error("it needs the extra: pip install 'dnipipe[fuzz]'")
    return 0 if all([_said(name, options.seconds, options.seed) for name in options.targets or TARGETS]) else 1


def _said(name: str, seconds: int, seed: int) -> bool:
    """Run one target and print what came of it. Returns whether nothing was found."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            process = subprocess.run(
                [sys.executable, "-m", "benchmarks.fuzz.watched", name, folder, str(seconds), str(seed)],
                cwd=ROOT,
                # libFuzzer ends the process without a word to Python, so what it leaves must lie in our folder
                env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": folder},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=seconds + SLACK,
            )
        except subprocess.TimeoutExpired:
            print(f"{name}: its process has not ended {SLACK} s after its time", flush=True)
            return False
        done = re.search(r"Done (\d+) runs", process.stdout)
        reached = re.findall(r"cov: (\d+)", process.stdout)
        if process.returncode == 0 and done and reached:
            more = f"places reached {reached[0]} with the seeds, {reached[-1]} in the end"
            print(f"{name}: {int(done[1]):,} inputs, nothing found; {more}", flush=True)
            return True
        print(f"{name}: found, or failed, exit status {process.returncode}\n{process.stdout[-3000:]}")
        for path in Path(folder).glob("crash-*"):
            print(f"by {path.read_bytes()!r}")
        return False


if __name__ == "__main__":
    raise SystemExit(main())
