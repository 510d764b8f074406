"""Layers under autocast, and compiled: what is rounded, what stays exact, and that names and random numbers stay.

x float32 ──► [ layers ] ──► h float32
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import dnipipe
from dnipipe import checkpoint
from dnipipe.config import Pipeline
from dnipipe.execution import compile_forward, round_off, rounded

CPU = torch.device("cpu")
ROUNDED = Pipeline(autocast="bfloat16")
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")

# torch's compiler imports a part of torch that says so
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
needs_compiler = pytest.mark.skipif(
    not COMPILER, reason="NOT TESTED: pipeline.compile needs a C++ compiler, and there is none (g++, clang++, $CXX)"
)


def layers() -> nn.Sequential:
    """Dropout, statistics, and products of matrices in both stages."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Sequential(nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2)),
        nn.Sequential(nn.Linear(32, 16), nn.Tanh()),
        nn.Linear(16, 3),
    )


def batches(samples: int = 256) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(samples, 8)
    return list(zip(x.split(32), x[:, :3].argmax(1).split(32), strict=True))


def trained(folder: Path, epochs: int = 5, resume: Path | None = None, **pipeline: object) -> tuple[Any, Path]:
    """The summary and the folder of a run of two stages under blend, with a stash, two batches a hop late."""
    run = dnipipe.Run(
        layers(),
        stages=[1],
        loss=F.cross_entropy,
        optimizer=lambda p: torch.optim.Adam(p, 1e-2),
        transport={"kind": "local", "delay": 2},
        pipeline=pipeline,
        output={"dir": str(folder), "quiet": True},
    )
    told = run.fit(batches(), batches(64), epochs=epochs, resume=resume)
    assert run.folder is not None
    return told, run.folder


# -- autocast ------------------------------------------------------------------------------------------------------


def test_products_are_rounded_and_what_leaves_is_float32() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(5, 8)
    wanted = F.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()).float()
    plain = layer(x)
    h = round_off(layer, ROUNDED, CPU)(x)
    assert h.dtype == torch.float32 and torch.equal(h, wanted) and not torch.equal(h, plain)
    h.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_off_changes_nothing() -> None:
    layer = nn.Linear(8, 4)
    assert round_off(layer, Pipeline(), CPU) is layer and "forward" not in vars(layer)
    assert rounded(F.cross_entropy, Pipeline(), CPU) is F.cross_entropy


def test_what_is_in_float64_stays_exact() -> None:
    layer, x = nn.Linear(8, 4).double(), torch.randn(5, 8, dtype=torch.float64)
    wanted = layer(x)
    assert torch.equal(round_off(layer, ROUNDED, CPU)(x), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_run_under_autocast_learns_and_keeps_float32_weights(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()
    plainly = nn.Linear.forward

    def noted(self: nn.Linear, x: Tensor) -> Tensor:
        out = plainly(self, x)
        if torch.is_autocast_enabled("cpu"):
            seen.add(out.dtype)
        else:
            seen.add(torch.float32)
        return out

    exact, _ = trained(tmp_path / "exact")
    monkeypatch.setattr(nn.Linear, "forward", noted)
    told, folder = trained(tmp_path / "rounded", autocast=str(dtype).removeprefix("torch."))
    # in the measured layers, in both stages, in the predictor, which float16 leaves as it is
    assert seen == {dtype} | ({torch.float32} if dtype == torch.float16 else set())
    assert told["eval"]["loss"] == pytest.approx(exact["eval"]["loss"], abs=0.05)
    assert told["eval"]["loss"] != exact["eval"]["loss"]
    weights = checkpoint.weights(folder)
    assert weights.keys() == layers().state_dict().keys()
    assert {t.dtype for t in weights.values() if t.is_floating_point()} == {torch.float32}
    monkeypatch.undo()
    resumed, _ = trained(tmp_path / "rounded", epochs=6, resume=folder)
    assert resumed["train"]["batches"] == len(batches())


# -- compile -------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.timeout(400)  # a first compilation also compiles torch's headers
def test_a_compiled_run_is_the_same_run(tmp_path: Path) -> None:
    """Forwards run again at old weights, statistics counted once, the same dropout masks, evaluations, a resume."""
    exact, plain = trained(tmp_path / "plain", epochs=3, window=4)
    told, folder = trained(tmp_path / "compiled", epochs=3, window=4, compile=True)
    torch.testing.assert_close(checkpoint.weights(folder), checkpoint.weights(plain), rtol=1e-3, atol=1e-4)
    assert told["eval"]["loss"] == pytest.approx(exact["eval"]["loss"], rel=1e-3)
    _, plain = trained(tmp_path / "plain", epochs=4, resume=plain, window=4)
    _, folder = trained(tmp_path / "compiled", epochs=4, resume=folder, window=4)
    torch.testing.assert_close(checkpoint.weights(folder), checkpoint.weights(plain), rtol=1e-3, atol=1e-4)


@needs_compiler
@pytest.mark.timeout(400)
def test_a_compiled_forward_is_one_and_rounds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Callable[..., Tensor]] = []
    compile = torch.compile

    def noted(function: Callable[..., Tensor], **options: Any) -> Any:
        compiled.append(function)
        return compile(function, **options)

    monkeypatch.setattr(torch, "compile", noted)
    module, x = nn.Sequential(nn.Linear(8, 4), nn.Tanh()), torch.randn(5, 8)
    wanted = round_off(nn.Sequential(*module), ROUNDED, CPU)(x)
    compile_forward(round_off(module, ROUNDED, CPU), torch.zeros(5, 8))
    torch.testing.assert_close(module(x), wanted, rtol=1e-2, atol=1e-2)
    assert len(compiled) == 1 and list(module.state_dict()) == ["0.weight", "0.bias"] and module.training
    assert module(x).dtype == torch.float32


def test_without_a_compiler_it_is_a_setting_to_mend(tmp_path: Path) -> None:
    """In a process of its own, for torch keeps what it has found and made."""
    program = """
import torch
from dnipipe.execution import compile_forward
compile_forward(torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Tanh()), torch.zeros(5, 8))
"""
    environment = {**os.environ, "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    said = ended.stderr.strip().splitlines()[-1]
    assert re.fullmatch(r".*ConfigError: pipeline.compile = true: torch.compile cannot compile these .*at false", said)
