"""python -m benchmarks.transport: what dnipipe's transports cost on top of raw pyzmq and raw gloo."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from benchmarks.cells import ROOT
from benchmarks.figures import processor
from benchmarks.grid import cores
from benchmarks.transport.channels import NAMES
from benchmarks.transport.rank import Burst, Order
from benchmarks.transport.report import tables

RESULTS = ROOT / "benchmarks" / "transport" / "results"
SIZES = tuple(2**power for power in (12, 16, 18, 20, 22))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transport", description=__doc__)
    add = parser.add_argument
    add("--channels", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=" | ".join(NAMES))
    add("--sizes", nargs="+", type=int, default=SIZES, metavar="BYTES", help="of a tensor (default: %(default)s)")
    add("--repeats", type=int, default=15)
    add("--quick", action="store_true", help="twenty seconds, to see that it works")
    add("--out", type=Path, metavar="FOLDER", help="where records and tables go (default: the study's)")
    options = parser.parse_args(arguments)
    folder = options.out or (ROOT / "runs" / "transport-quick" if options.quick else RESULTS)
    repeats = 3 if options.quick else options.repeats
    bursts = list(measure(tuple(options.channels), tuple(options.sizes), repeats))
    about = {
        "torch": version("torch"),
        "pyzmq": version("pyzmq"),
        "processor": processor(),
        "cores": len(cores()),
        "date": time.strftime("%Y-%m-%d"),
        "load": round(os.getloadavg()[0], 1),
    }
    folder.mkdir(parents=True, exist_ok=True)
    found = {**about, "bursts": [asdict(burst) for burst in bursts]}
    (folder / "records.json").write_text(json.dumps(found, indent=0))
    text = tables(bursts, about)
    (folder / "README.md").write_text(text)
    print(text, end="")
    return 0


def measure(names: tuple[str, ...], sizes: tuple[int, ...], repeats: int) -> Iterator[Burst]:
    """Two processes, each bound to a core, do the turns. Raises SystemExit with the last words of one that failed."""
    with tempfile.TemporaryDirectory() as folder:
        order = Order(0, folder, names, sizes, repeats)
        processes = [_start(replace(order, rank=rank)) for rank in (0, 1)]
        try:
            assert processes[0].stdout is not None
            for line in processes[0].stdout:
                yield Burst(**json.loads(line))
            for rank, process in enumerate(processes):
                _, said = process.communicate(timeout=60)
                if process.returncode:
                    raise SystemExit(f"rank {rank} failed: {said.strip().splitlines()[-1:]}")
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _start(order: Order) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.transport.rank", json.dumps(asdict(order))],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    here = cores()
    core = here[order.rank % len(here)]
    if core is not None:
        os.sched_setaffinity(process.pid, {core})
    return process


if __name__ == "__main__":
    sys.exit(main())
