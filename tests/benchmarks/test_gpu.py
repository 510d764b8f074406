"""The study `gpu`: its model is a valid run of two stages, and without a GPU it says so. What it measures needs one."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.__main__ import FORMS, SYSTEMS, main
from benchmarks.gpu.loops import CONFIG
from dnipipe.config import load


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_its_runs_are_valid(form: str, system: str) -> None:
    config = load(CONFIG, (*FORMS[form], *SYSTEMS[system]))
    assert config.pipeline.stages == 2 and config.pipeline.device == "cuda" and config.transport.kind == "zmq"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        main([])
