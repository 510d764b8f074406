"""The process of one target: `python -m benchmarks.fuzz.watched TARGET FOLDER SECONDS SEED`. libFuzzer ends it."""

from __future__ import annotations

import sys
from pathlib import Path

LARGEST = 4096  # bytes of an input
SLOWEST = 20  # seconds for one input


def main(name: str, folder: Path, seconds: int, seed: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["dnipipe", "tomllib"]):  # only what is imported here first is watched
        from benchmarks.fuzz.targets import TARGETS
    target = TARGETS[name]
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(target.seeds()):
        (corpus / str(number)).write_bytes(data)
    limits = [f"-max_total_time={seconds}", f"-timeout={SLOWEST}", f"-max_len={LARGEST}", f"-seed={seed}"]
    atheris.Setup([sys.argv[0], str(corpus), *limits, f"-artifact_prefix={folder}/"], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
