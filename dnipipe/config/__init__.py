"""Every setting, its default and its check: frozen dataclasses, filled from TOML and then from `--section.key value`.

    values: one value's check ◄─ sections ◄─ settings: Config ◄─ sources: default, TOML, words ─► build
                                       └─ rules: who reads what ◄─┘

One path checks both sources: `build` takes nested plain values and returns a `Config`, or raises a ConfigError that
names the setting, its value and the way out. Nothing here touches torch or a socket, or a file but the TOML.
"""

from dnipipe.config.rules import phases
from dnipipe.config.sections import Output, Pipeline, Predictor, Sync, WireSettings
from dnipipe.config.settings import Config, describe, flat, replace, shared_settings, under
from dnipipe.config.sources import build, default, load, over

__all__ = [
    "Config",
    "Output",
    "Pipeline",
    "Predictor",
    "Sync",
    "WireSettings",
    "build",
    "default",
    "describe",
    "flat",
    "load",
    "over",
    "phases",
    "replace",
    "shared_settings",
    "under",
]
