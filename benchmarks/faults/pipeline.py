"""A pipeline of independent stages as processes, on which faults can be made, and what its ledgers say afterwards."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from benchmarks.cells import ROOT
from benchmarks.emulator import Emulator
from benchmarks.faults import proc, witness
from benchmarks.relay import LOOPBACK, Recorder
from dnipipe.service import ledger

WIDTH, BATCH, CONTEXT, WINDOW = 32, 16, 32, 4  # an activation has 64 KB
CONFIG = """
[model]
width = {width}
heads = 2
[data]
limit = 400000
batch = {batch}
context = {context}
validation = 0.02
[pipeline]
stages = {stages}
window = {window}
[train]
batches = {batches}
seed = {seed}
[eval]
sample = 0
every = {evaluate}
[checkpoint]
every = 0
[service]
addresses = {addresses}
unguided_batches = {unguided}
save_every = 1.0
silence = {silence}
hung = {hung}
patience = {patience}
restarts = 1000
[transport]
address = "{address}"
max_message = 1
[security]
keys = "{keys}"
[output]
run = "{run}"
every = 0.5
"""
LIMIT = 60.0  # seconds without progress at a stage, after a fault has ended: the pipeline counts as hung
PORT = 7400  # in hosts of their own
BESIDE = "127.0.0.2"  # where stages connect whose links somebody sits on; he connects to where the others listen
TAIL = 4096  # bytes at a ledger's end, in which a batch is begun
BEGUN = re.compile(rb'"begun": ([0-9]+), "time"')
SAMPLE = 0.25  # seconds between two looks at the processes' memory


class Hung(Exception):
    """Something did not happen within LIMIT; what, and what the stages said last."""


class Pipeline:
    """K stages, each with its supervisor, for as long as it is entered.

    Args:
        folder: for the run and what the stages say. rate: batches a second that stage 0 begins at most; 0: no limit.
        emulator: whose hosts the stages are on; on loopback without. locked: with keys; in hosts of their own always.
        cabled: with a Recorder on each link, by the index of the stage that listens.
        settings: of CONFIG, over the ordinary ones.
    """

    def __init__(
        self,
        folder: Path,
        stages: int,
        rate: float = 0.0,
        emulator: Emulator | None = None,
        *,
        locked: bool = False,
        cabled: bool = False,
        **settings: object,
    ) -> None:
        self.folder, self.stages, self.rate, self.emulator = folder, stages, rate, emulator
        self.run, self.config = folder / "run", folder / "run.toml"
        self.supervisors: dict[int, subprocess.Popen[bytes]] = {}
        self.extra: list[subprocess.Popen[bytes]] = []  # second processes of a stage
        self.environment: dict[int, dict[str, str]] = {}  # of a stage's processes, over ours
        self.peak = [0] * stages  # bytes of resident memory, of any process of the stage
        self._pids: dict[int, int] = {}
        self.left = 0  # processes found behind the end
        chosen: dict[str, object] = {
            "batches": 10**7,
            "seed": 0,
            "evaluate": 200,
            "unguided": 100_000,
            "silence": 2.0,
            "hung": 6.0,
            "patience": 120.0,
        }
        folder.mkdir(parents=True)
        self.keys = self._made_keys() if emulator or locked else None
        self.cables = [Recorder(BESIDE) for _ in range(stages - 1)] if cabled else []
        chosen |= {"stages": stages, "run": self.run, "keys": self.keys or "", "address": LOOPBACK if cabled else ""}
        chosen |= {"width": WIDTH, "batch": BATCH, "context": CONTEXT, "window": WINDOW, **settings}
        self.config.write_text(CONFIG.format(addresses=json.dumps(self._addresses()), **chosen))
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._measure, daemon=True)

    def __enter__(self) -> Pipeline:
        for stage, cable in enumerate(self.cables):
            cable.start(self.endpoint(stage))
        for stage in range(self.stages):
            self.start(stage)
        self._watch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._watch.join()
        self.close()
        for cable in self.cables:
            cable.__exit__()

    def endpoint(self, stage: int) -> str:
        """Where a stage listens that the next one does not connect to directly."""
        return f"tcp://{LOOPBACK}:{self.cables[stage].port}"

    def _addresses(self) -> list[str]:
        if self.cables:
            return [f"{BESIDE}:{cable.port}" for cable in self.cables]
        if self.emulator:
            return [f"{self.emulator.address(k)}:{PORT}" for k in range(self.stages - 1)]
        with contextlib.ExitStack() as stack:
            probes = [stack.enter_context(socket.socket()) for _ in range(self.stages - 1)]
            for probe in probes:
                probe.bind((LOOPBACK, 0))
            return [f"{LOOPBACK}:{probe.getsockname()[1]}" for probe in probes]

    def _made_keys(self) -> Path:
        folder = self.folder / "keys"
        command = [sys.executable, "-m", "dnipipe", "keys", "new", str(folder), "--stages", str(self.stages)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return folder

    # -- processes ---------------------------------------------------------------------------------------------

    def start(self, stage: int) -> None:
        self.supervisors[stage] = self.started(stage)

    def started(self, stage: int) -> subprocess.Popen[bytes]:
        """A supervisor of that stage, and so a process."""
        within = self.emulator.within(stage) if self.emulator else []
        own = [str(self.config), f"--index={stage}", f"--rate={self.rate}"]
        with self.said(stage).open("a") as said:
            return subprocess.Popen(
                [*within, sys.executable, "-m", "benchmarks.faults.victim", *own],
                cwd=ROOT,
                stdout=said,
                stderr=said,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self.environment.get(stage, {})},
                start_new_session=True,
            )

    def said(self, stage: int) -> Path:
        return self.folder / f"said-{stage}"

    def pid(self, stage: int) -> int | None:
        """Of the stage's own process, under its supervisor; None while it has none."""
        above = self.supervisors[stage].pid
        if proc.parent(self._pids.get(stage, 0)) != above:
            self._pids[stage] = proc.child(above)
        return self._pids[stage] or None

    def signal(self, stage: int, number: int) -> bool:
        """Whether there was a process to send it to."""
        pid = self.pid(stage)
        with contextlib.suppress(ProcessLookupError):
            if pid is not None:
                os.kill(pid, number)
                return True
        return False

    def order(self, stage: int, name: str) -> None:
        """Of victim.ORDERS; it is followed in the stage's next forward."""
        (self.run / f"stage-{stage}" / "order").write_text(name)

    def close(self) -> None:
        """Every stage is asked to end, and ended if it does not; what is there afterwards is counted, and ended."""
        ours = [*self.supervisors.values(), *self.extra]
        for process in ours:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + LIMIT  # a machine that is busy
        for process in ours:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in proc.naming(str(self.config)):
            self.left += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while proc.naming(str(self.config)):  # its files are about to be removed
            time.sleep(0.01)

    def _measure(self) -> None:
        while not self._ended.wait(SAMPLE):
            for stage in range(self.stages):
                pid = self.pid(stage)
                self.peak[stage] = max(self.peak[stage], proc.peak(pid) if pid else 0)

    # -- what it does ------------------------------------------------------------------------------------------

    def testimonies(self) -> list[witness.Testimony]:
        """Of all stages: what they sent is read last, so of a run that goes on nothing is given before it was sent."""
        given, sent = ([witness.read(self.folder / f"witness-{k}") for k in range(self.stages)] for _ in range(2))
        return [replace(mine, sent=later.sent) for mine, later in zip(given, sent, strict=True)]

    def account(self, stage: int) -> ledger.Account:
        path = self.run / f"stage-{stage}" / ledger.NAME
        return ledger.read(path) if path.exists() else ledger.Account()

    def accounts(self) -> list[ledger.Account]:
        """Of all stages. The last is read first: so of a run that goes on, no stage is seen to have what the one before
        it, which was read earlier, had not yet."""
        return [self.account(stage) for stage in reversed(range(self.stages))][::-1]

    def begun(self, stage: int) -> int:
        """The batch id that the stage began last, from the end of its ledger."""
        path = self.run / f"stage-{stage}" / ledger.NAME
        with contextlib.suppress(OSError):
            text = path.read_bytes()[-TAIL:]
            found = BEGUN.findall(text)
            return int(found[-1]) if found else 0
        return 0

    def last(self) -> int:
        """The highest batch id that any stage has begun."""
        return max(self.begun(stage) for stage in range(self.stages))

    def losses(self) -> dict[int, float]:
        """Of every evaluation so far: the batch that it stands behind, and its loss, nats a byte of held-out text."""
        return {batch: loss for batch, (_, loss) in self.evaluations().items()}

    def evaluations(self) -> dict[int, tuple[float, float]]:
        """The same, and when it was made, seconds since 1970: batch -> (time, loss)."""
        path = self.run / "metrics" / "stage-0.jsonl"
        found = {}
        for text in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):  # a line cut short by a kill
                line = json.loads(text)
                if "eval.loss" in line:
                    found[int(line["eval.batch"])] = float(line["time"]), float(line["eval.loss"])
        return found

    def until(self, what: str, happens: Callable[[], bool], limit: float = LIMIT) -> None:
        """Raises Hung."""
        end = time.monotonic() + limit
        while not happens():
            if time.monotonic() > end:
                said = {k: self.said(k).read_text()[-400:] for k in range(self.stages)}
                raise Hung(f"not within {limit:g} s: {what}; {said}")
            time.sleep(0.1)

    def until_all_pass(self, batch: int, limit: float = LIMIT) -> None:
        """Until every stage has begun a batch behind that one. Raises Hung."""
        for stage in range(self.stages):
            self.until(
                f"stage {stage} begins a batch behind {batch}",
                lambda k=stage: self.begun(k) > batch,  # type: ignore[misc]
                limit,
            )


def window_bytes(stage: int, stages: int) -> int:
    """What a full window may take at a stage: batches that lack their gradient (x, h, ĝ, J^T ĝ and y of each, if there
    is a next stage), and on each edge as many activations with labels, and gradients."""
    h, y = 4 * BATCH * CONTEXT * WIDTH, 8 * BATCH * CONTEXT
    last, edges = stage == stages - 1, (stage > 0) + (stage < stages - 1)
    return WINDOW * ((not last) * (4 * h + y) + edges * (2 * h + y))


def wrong(accounts: list[ledger.Account]) -> list[str]:
    """What is not exact in the ledgers of a run that goes on: batches still under way are not counted."""
    passed = accounts[-1].last
    found = [f"stage {k}: {what}" for k, account in enumerate(accounts) for what in account.violations()]
    for k, (before, after) in enumerate(itertools.pairwise(accounts)):
        gaps = [batch for batch in ledger.unexplained(before, after) if batch <= passed]
        if gaps:
            found.append(f"between stages {k} and {k + 1}, without a reason: {_ranges(gaps)}")
    return found


def _ranges(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return f"{len(numbers)} batches ({shown}{', …' if len(numbers) > 5 else ''})"
