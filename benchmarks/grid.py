"""Runs the cells that have no record yet, several at once, each in a process of its own that is bound to a core.

What a finished cell found is on disk at once, so a grid can be stopped at any time: the same command goes on with what
is missing. A cell whose loss became NaN or infinite is finished too, and its record says so.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from hashlib import sha256
from pathlib import Path
from statistics import mean
from threading import Lock
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from benchmarks.cells import ROOT, Cell, Record, Records
from benchmarks.figures import read

# what a run says that NaN or infinity has stopped, in its loss or on the way there
DIVERGED = re.compile(r"(?:the loss is \S+ at|holds NaN or infinity in) batch (\d+)")
EVERY = 0.2  # seconds between two lines of metrics: what the curves of a record are made of
ALIKE = ("train.batches", "train.seed", "optimizer.lr", "transport.delay", "data.evaluate")  # not what a batch costs


class Grid:
    """A study's runs.

    Args:
        plan: the cells as they are known with these records; asked again whenever one has been added.
        roots: data.name -> its path.
        jobs: how many runs at once.
        keep: whether to keep the runs' folders, which hold checkpoints of several MB each.
    """

    def __init__(
        self,
        plan: Callable[[Records], Sequence[Cell]],
        records: Records,
        roots: Mapping[str, str],
        jobs: int,
        keep: bool = False,
        console: Console | None = None,
    ) -> None:
        self.plan, self.records, self.roots, self.jobs, self.keep = plan, records, roots, jobs, keep
        self.console = console or Console()
        self.failed: dict[str, str] = {}  # key of a cell -> why it has no record
        self._cores: queue.Queue[int | None] = queue.Queue()
        for core in (cores() * jobs)[:jobs]:
            self._cores.put(core)
        self._processes: set[subprocess.Popen[str]] = set()
        self._stopped, self._lock = False, Lock()  # held where a process is started or all are ended

    def run(self) -> bool:
        """Everything that can be run. Returns whether all of the plan's cells have a record now."""
        with (
            Progress(
                BarColumn(), MofNCompleteColumn(), TextColumn("cells  {task.description}"), console=self.console
            ) as bar,
            ThreadPoolExecutor(self.jobs) as pool,
        ):
            task = bar.add_task("")
            running: dict[Future[Record | None], Cell] = {}
            try:
                while True:
                    cells = distinct(self.plan(self.records))
                    missing = [cell for cell in cells if self.records.of(cell) is None and cell.key not in self.failed]
                    bar.update(task, total=len(cells), completed=len(cells) - len(missing))
                    bar.update(task, description=left(missing, self.records, self.jobs))
                    begun = {cell.key for cell in running.values()}
                    ready = [cell for cell in missing if not cell.waits and cell.key not in begun]
                    for cell in ready[: self.jobs - len(running)]:
                        running[pool.submit(self._train, cell)] = cell
                    if not running:
                        return not missing and not self.failed
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        self._finish(running.pop(done), done.result())
            finally:
                self._stop()

    def _finish(self, cell: Cell, record: Record | None) -> None:
        if record is None:
            self.console.print(f"failed  {cell}: {self.failed[cell.key]}", style="red", highlight=False)
            return
        self.records.add(cell, record)
        found = f"diverged at batch {record.diverged}" if record.diverged else f"loss {record.loss:.4f}"
        if record.error is not None:
            found += f", error {record.error:.2f} %"
        self.console.print(f"{cell}: {found} ({record.seconds:.0f} s)", highlight=False, soft_wrap=True)

    def _train(self, cell: Cell) -> Record | None:
        """One cell, in a thread that waits for its process. None if there is no result; `failed` says why."""
        folder = self.records.folder / "runs" / sha256(cell.key.encode()).hexdigest()[:16]
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run has left
        core = self._cores.get()
        try:
            began = time.monotonic()
            status, said = self._process(cell, folder, core)
            struck = DIVERGED.search(said) if status == 1 else None
            if status and not struck:
                self.failed[cell.key] = said.strip().splitlines()[-1] if said.strip() else f"exit status {status}"
                return None
            record = read(cell, folder, time.monotonic() - began, int(struck[1]) if struck else None)
            if record is None:
                self.failed[cell.key] = "it was stopped before its last batch"
            return record
        finally:
            self._cores.put(core)
            if not self.keep:
                shutil.rmtree(folder, ignore_errors=True)

    def _process(self, cell: Cell, folder: Path, core: int | None) -> tuple[int, str]:
        """(exit status, what it wrote to stderr)."""
        command = [sys.executable, "-m", *cell.command(self.roots.get(cell.loaded.data.name, ""))]
        command += [f"--output.run={folder.resolve()}", f"--output.every={EVERY}", "--output.quiet=true"]
        with self._lock:
            if self._stopped:
                return -1, "not begun"
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is for us: we end it
            )
            self._processes.add(process)
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        _, said = process.communicate()
        with self._lock:
            self._processes.discard(process)
        return process.returncode, said

    def _stop(self) -> None:
        """No process stays behind, whatever ended the grid."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.kill()


def cores() -> list[int | None]:
    """The cores that this process may use; None for each where the system does not say which."""
    if hasattr(os, "sched_getaffinity"):
        return list(sorted(os.sched_getaffinity(0)))
    return [None] * (os.cpu_count() or 1)


def distinct(cells: Iterable[Cell]) -> list[Cell]:
    """Without those that mean the same run as one before. Which run a waiting one means is not known."""
    found: dict[str, Cell] = {}
    for cell in cells:
        found.setdefault(str(cell) if cell.waits else cell.key, cell)
    return list(found.values())


def left(missing: Sequence[Cell], records: Iterable[Record], jobs: int) -> str:
    """An estimate of the time that these cells take: by what a batch of their kind of run has taken so far."""
    taken: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record.diverged is None:
            taken[_kind(record.settings)].append(record.seconds / record.settings["train.batches"])
    if not missing or not taken:
        return ""
    known = {kind: mean(seconds) for kind, seconds in taken.items()}
    usual = mean(known.values())
    seconds = sum(known.get(_kind(cell.settings), usual) * cell.loaded.train.batches for cell in missing) / jobs
    return f"about {seconds / 3600:.1f} h left" if seconds > 5400 else f"about {seconds / 60:.0f} min left"


def _kind(settings: Mapping[str, Any]) -> str:
    """What decides how long a batch takes, roughly."""
    return json.dumps({name: value for name, value in sorted(settings.items()) if name not in ALIKE})
