"""python -m benchmarks.outage: a stage is away for a while; are the others better off going on, or waiting for it?

seconds   0 ───── before ─────┬──────── away ────────┬───── after ─────
go on     all train           │ those before it      │ all train
                              │ learn by predictors  │
wait      all train           │ nobody trains        │ all train
never     all train, and nothing happens

The stage and its supervisor are killed, and started again from the state that it saved itself. A pipeline of
benchmarks/faults, at the same pace in each run, so what differs is what was learnt in the same time, and from what.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cells import ROOT
from benchmarks.faults.pipeline import Pipeline, wrong
from benchmarks.figures import processor
from benchmarks.outage.report import NEVER, WAYS, Outage, Settings, plots, table
from benchmarks.plots import draw

RESULTS = ROOT / "benchmarks" / "outage" / "results"
WARM = 20  # batches that every stage has trained when the clock starts
START = 240.0  # seconds until then: a machine that is busy
EVERY = 20  # batches from one evaluation to the next
UNBOUND = 10**6  # service.unguided_batches: more than a run has


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outage", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--before", type=float, default=30.0, metavar="S", help="seconds of training before (default: %(default)g)")
    add("--away", type=float, default=30.0, metavar="S", help="seconds that the stage is away (default: %(default)g)")
    add("--after", type=float, default=60.0, metavar="S", help="seconds of training behind it (default: %(default)g)")
    add("--stages", type=int, default=3, metavar="K")
    add("--rate", type=float, default=20.0, help="batches a second at most (default: %(default)g)")
    add("--seeds", type=int, default=3, help="runs of each kind (default: %(default)s)")
    add("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where the table and the picture go")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = Settings(options.before, options.away, options.after, options.stages, options.rate)
    about = f"Measured {time.strftime('%Y-%m-%d')} on {processor()}, load {os.getloadavg()[0]:.1f}."
    found = []
    for seed in range(options.seeds):
        for stage, way in [(None, NEVER), *((stage, way) for stage in range(1, options.stages) for way in WAYS)]:
            found.append(run(settings, stage, way, seed))
            print(found[-1].line(), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    results = {"settings": dataclasses.asdict(settings), "about": about, "runs": list(map(dataclasses.asdict, found))}
    (options.out / "outage.json").write_text(json.dumps(results))
    print(write(options.out), end="")
    return 0


def write(folder: Path) -> str:
    """Table and picture of what is kept in outage.json; returns the table."""
    results = json.loads((folder / "outage.json").read_text())
    settings, found = Settings(**results["settings"]), [Outage(**values) for values in results["runs"]]
    pictures = "".join(f"\n![{name}]({name})\n" for name in draw(plots(settings, found), folder))
    text = f"{settings}\n{results['about']}\n\n{table(settings, found)}"
    (folder / "README.md").write_text(f"# A stage that is away\n\n{text}{pictures}")
    return text


def run(settings: Settings, stage: int | None, way: str, seed: int) -> Outage:
    """One run; `stage` is that which is away. Raises Hung, and SystemExit for a ledger that is not exact."""
    unguided = 0 if way == "wait" else UNBOUND
    with (
        tempfile.TemporaryDirectory(prefix="dnipipe-outage-") as folder,
        Pipeline(
            Path(folder) / "pipeline",
            settings.stages,
            settings.rate,
            seed=seed,
            unguided=unguided,
            evaluate=EVERY,
            patience=settings.away + START,  # who waits for the stage is there when it is back
        ) as pipeline,
    ):
        pipeline.until_all_pass(WARM, START)
        clock = _Clock()
        clock.until(settings.before)
        if stage is not None:
            os.killpg(pipeline.supervisors[stage].pid, signal.SIGKILL)
            pipeline.supervisors[stage].wait()
        clock.until(settings.before + settings.away)
        if stage is not None:
            pipeline.start(stage)
        clock.until(settings.end)
        losses = [(at - clock.began, loss) for at, loss in pipeline.evaluations().values()]
        pipeline.close()
        accounts = pipeline.accounts()
    if found := wrong(accounts):
        raise SystemExit(f"ledgers: {'; '.join(found)}")
    trained = [sum(at <= clock.began + settings.end for at in account.times) for account in accounts]
    alone = [len(account.alone) for account in accounts]
    return Outage(stage, way, seed, trained, alone, [one for one in losses if one[0] <= settings.end])


@dataclass
class _Clock:
    """Seconds of a run, as its files have them."""

    began: float = dataclasses.field(default_factory=time.time)

    def until(self, second: float) -> None:
        time.sleep(max(0.0, self.began + second - time.time()))


if __name__ == "__main__":
    sys.exit(main())
