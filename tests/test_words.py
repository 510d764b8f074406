"""examples/words.py: a vocabulary of words, of which predictors score a sample."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = str(Path(__file__).parents[1] / "examples" / "words.py")


def test_words_are_numbered_the_frequent_first() -> None:
    words, count = runpy.run_path(EXAMPLE, run_name="example")["numbered"]("To be, or not\nto be: to sleep")
    assert words.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 6, 0, 7] and count == 8


@pytest.mark.parametrize("ways", [["--sampled", "8"], ["--stages", "1"]])
def test_it_trains_and_says_what_it_came_to(
    ways: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text(" ".join(f"{number} follows {number - 1}." for number in range(200)))
    monkeypatch.setattr(sys, "argv", ["words.py", "text", "--batches", "5", *ways])
    runpy.run_path(EXAMPLE, run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("203 words: held-out loss ") and 0 < float(last.split()[4]) < 7
