"""Numbers about one stage: where its time goes, how good its synthetic gradient is; and the files they go to.

clock, memory ◄─ measures: StageMetrics ─► numbers, totals ─► files: metrics/stage-k.jsonl, TensorBoard, summary.json
"""

from dnipipe.metrics.clock import LABELS, WAITS, Clock
from dnipipe.metrics.files import JsonLines, TensorBoard, summary, write_json
from dnipipe.metrics.measures import FOLD, StageMetrics

__all__ = ["FOLD", "LABELS", "WAITS", "Clock", "JsonLines", "StageMetrics", "TensorBoard", "summary", "write_json"]
