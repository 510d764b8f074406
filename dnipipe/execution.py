"""How layers are run: under autocast, compiled, or as they are. Their parameters keep names, dtype and place.

    x float32 ──► [ layers: matrix products in bfloat16 or float16 ] ──► h float32         pipeline.autocast
                  [ several operations in one kernel               ]                       pipeline.compile

What leaves is float32 again, so that the rule, the wire and the optimizer are as ever; in float16 gradients go back
scaled (scaling.py). Not nn.Module.compile: it leaves
an nn.Sequential as it is (torch 2.13), without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from dnipipe.config import Pipeline
from dnipipe.errors import ConfigError, told
from dnipipe.pairs import first
from dnipipe.scaling import scaled

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

Run = Callable[..., Any]


def rounded(run: Run, settings: Pipeline, device: torch.device) -> Run:
    """`run` under autocast, if the settings want it; what it returns in float32."""
    dtype = DTYPES.get(settings.autocast)
    if dtype is None:
        return run

    @functools.wraps(run)
    def under(*arguments: Any) -> Any:
        with torch.autocast(device.type, dtype):
            out = run(*arguments)
        return first(lambda h: h.float() if h.dtype is dtype else h, out)

    return under


def round_off(module: nn.Module, settings: Pipeline, device: torch.device, guesses: bool = False) -> nn.Module:
    """Make the module's forward, in place, one under autocast. Not to be deep-copied afterwards: a copy would run this
    one's layers.

    guesses: it is a part of a predictor, whose guess may be a gradient, to be compared and learnt from: what cannot be
    done with a scaled one, so in float16 such a part is left as it is.
    """
    if settings.autocast not in DTYPES or (guesses and settings.autocast == "float16"):
        return module
    run = rounded(module.forward, settings, device)
    module.forward = scaled(module, run) if settings.autocast == "float16" else run
    return module


def compile_forward(module: nn.Module, x: Any) -> None:
    """Make the module's forward, in place, a compiled one, and run it on x, one of its inputs, which changes nothing.

    Random numbers are drawn as without (fallback_random): a batch's are a function of its id (randomness.py).
    Raises ConfigError where torch cannot compile it.
    """
    plain = module.forward

    def forward(x: Any) -> Any:
        return plain(x)  # torch compiles a function of ours, and not one of nn.Sequential's own

    # torch counts what it has compiled by code object, up to 8, which stages of one process would share
    forward.__code__ = forward.__code__.replace()
    module.forward = torch.compile(forward, options={"fallback_random": True})
    was = module.training
    try:
        with torch.no_grad(), torch.random.fork_rng():
            module.eval()(x)
    except Exception as error:
        raise ConfigError(
            f"pipeline.compile = true: torch.compile cannot compile these layers here ({_first_line(error)}); a C++ "
            "compiler is needed (on a GPU also Triton); or leave pipeline.compile at false"
        ) from error
    finally:
        module.train(was)


def _first_line(error: Exception) -> str:
    return told(error).strip().partition("\n")[0]


__all__ = ["compile_forward", "round_off", "rounded"]
