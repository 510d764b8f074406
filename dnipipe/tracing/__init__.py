"""A run's time, span by span: written by each process, merged afterwards.

    stage 0: clock ─► writer ─► RUN/trace/stage-0.jsonl ─┐
    …                                                    ├─► reading ─► merging ─► window ─► chrome: JSON for Perfetto
    stage K-1 ────────► writer ─► …/stage-(K-1).jsonl ───┘                              └──► picture: a PNG

Nothing of it is on the wire: the clocks of several machines are aligned by the messages that both ends wrote down.
"""

from dnipipe.tracing.chrome import write_chrome
from dnipipe.tracing.merging import Timeline, merged
from dnipipe.tracing.picture import Row, draw
from dnipipe.tracing.reading import read
from dnipipe.tracing.window import cut, some_batches
from dnipipe.tracing.writer import Trace

__all__ = ["Row", "Timeline", "Trace", "cut", "draw", "merged", "read", "some_batches", "write_chrome"]
