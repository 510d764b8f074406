"""One process of a run: `python -m benchmarks.throughput.rank JSON OUT`. What it measured is written to OUT as JSON."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.throughput.workload import FEATURES, Workload


@dataclass(frozen=True)
class Order:
    """What a rank is to do.

    Args:
        system: "dnipipe", "alone", or the schedule of a synchronous pipeline; "traced": dnipipe from its first batch.
        words: settings of dnipipe. microbatches: of a synchronous step. stage: that is alone.
        batches: to count. seconds: to measure, where there is no number of batches.
        folder: of dnipipe's run.
    """

    system: str
    stages: int
    sleep: float = 0.0
    slow: tuple[tuple[int, float], ...] = ()
    features: int = FEATURES
    words: tuple[str, ...] = ()
    microbatches: int = 1
    stage: int = 0
    batches: int = 0
    seconds: float = 0.0
    folder: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Order:
        values = json.loads(text)
        slow = tuple((int(stage), float(factor)) for stage, factor in values.pop("slow"))
        return cls(words=tuple(values.pop("words")), slow=slow, **values)


def carry_out(order: Order) -> dict[str, float | None]:
    import torch

    from benchmarks.throughput import decoupled, synchronous
    from benchmarks.throughput.window import Window

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    workload = Workload(order.stages, order.sleep, order.slow, order.features)
    if order.system == "dnipipe":
        return asdict(decoupled.train(workload, order.words, order.batches, Path(order.folder)))
    window = Window()
    if order.system == "traced":
        window.open()
        decoupled.run(workload, order.words, order.batches, Path(order.folder))
        window.close(order.batches)
    elif order.system == "alone":
        synchronous.alone(workload, order.stage, order.seconds, window)
    else:
        synchronous.pipeline(workload, order.system, order.microbatches, order.seconds, window)
    assert window.measured is not None
    return asdict(window.measured)


if __name__ == "__main__":
    found = carry_out(Order.from_json(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(found))
