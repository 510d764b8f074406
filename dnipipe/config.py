"""Every setting, its default and its check: frozen dataclasses, filled from TOML and then from `--section.key value`.

One path checks both sources: `build` takes nested plain values and returns a `Config`, or raises a ConfigError that
names the setting, its value and the way out. Nothing here touches torch, a file system or a socket.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dnipipe.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def setting(
    default: Any, help: str, *, low: float | None = None, high: float | None = None, local: bool = False
) -> Any:
    """A dataclass field with its explanation and limits. `local`: stages may differ in it (paths, display)."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "local": local})


@dataclass(frozen=True)
class Model:
    name: Literal["transformer", "mlp", "cnn"] = setting("transformer", "which of the built-in models")
    layers: int = setting(4, "blocks of the transformer or cnn; layers of the mlp, the output one included", low=1)
    width: int = setting(128, "features (mlp, transformer) or channels (cnn) between layers", low=1)
    heads: int = setting(4, "attention heads of the transformer", low=1)
    dropout: float = setting(0.0, "probability of dropping a feature", low=0.0, high=0.99)


@dataclass(frozen=True)
class Data:
    name: Literal["stdlib", "text", "mnist"] = setting("stdlib", "Python's own source files, a text file, or MNIST")
    root: str = setting("", "text: the file; mnist: the folder with the four IDX files", local=True)
    batch: int = setting(32, "samples a batch", low=1)
    context: int = setting(64, "bytes a sample (text)", low=1)
    limit: int = setting(0, "use only the first so many bytes or training samples (0: all)", low=0)
    validation: float = setting(0.1, "share of the training data held out at its end", low=0.001, high=0.9)
    evaluate: Literal["validation", "test"] = setting(
        "validation", "evaluate on the held-out share, or train on everything and evaluate on the test set (mnist)"
    )


@dataclass(frozen=True)
class Pipeline:
    stages: int = setting(4, "K, the number of processes", low=1)
    boundaries: tuple[int, ...] = setting((), "first layer of each stage after the first, e.g. 2,4,6 (empty: balance)")
    window: Union[int, Literal["auto"]] = setting("auto", "batches of a stage that may lack their gradient", low=1)
    memory: int = setting(1024, "MiB of waiting batches up to which an automatic window may grow", low=1)
    device: str = setting("auto", "auto (the GPU of LOCAL_RANK if there is one), cpu, cuda", local=True)


@dataclass(frozen=True)
class Rule:
    name: Literal["synthetic", "local", "wait"] = setting("synthetic", "where a stage's gradient comes from")
    bp_lambda: float = setting(
        0.0, "BP(λ): 0 bootstrapped targets, 1 the true gradient travelling from the loss", low=0.0, high=1.0
    )
    warmup: int = setting(0, "batches during which predictors learn but are not trusted", low=0)
    warmup_rule: Literal["wait", "zero"] = setting("wait", "meanwhile: apply the true gradient late, or none at all")


@dataclass(frozen=True)
class Predictor:
    name: Literal["vfbn", "linear", "mlp", "conv"] = setting("vfbn", "which synthetic-gradient model")
    condition: bool = setting(True, "let linear, mlp and conv see the labels (cDNI); vfbn always does")
    hidden: int = setting(-1, "hidden layers (-1: the kind's own: vfbn and linear 0, mlp 1, conv 2)", low=-1, high=8)
    width: int = setting(0, "features of a hidden layer (0: the kind's own)", low=0)
    lr: float = setting(3e-3, "learning rate of the predictor's Adam", low=0.0)
    matching: float = setting(0.1, "vfbn: weight of the squared distance to the arriving gradient", low=0.0)


@dataclass(frozen=True)
class Optimizer:
    name: Literal["adam", "adamw", "sgd"] = setting("adam", "of every stage")
    lr: float = setting(1e-3, "learning rate", low=0.0)
    weight_decay: float = setting(0.0, "weight decay", low=0.0)
    momentum: float = setting(0.0, "of sgd", low=0.0, high=1.0)
    clip: float = setting(0.0, "largest norm of a stage's gradient (0: no limit)", low=0.0)
    schedule: Literal["constant", "linear", "cosine"] = setting("constant", "how lr falls over the run, by batch id")
    warmup: int = setting(0, "batches over which lr rises from 0", low=0)


@dataclass(frozen=True)
class Train:
    epochs: int = setting(1, "passes over the training data (if train.batches is 0)", low=1)
    batches: int = setting(0, "batches to train, whatever the epochs (0: by epochs)", low=0)
    seed: int = setting(0, "decides initial weights, data order and dropout", low=0)
    on_nan: Literal["stop", "skip"] = setting("stop", "a NaN or infinite loss stops the run, or skips the batch")


@dataclass(frozen=True)
class Eval:
    every: int = setting(0, "batches between evaluations (0: only at the end)", low=0)
    sample: int = setting(200, "bytes of text to generate at the end (language models)", low=0)


@dataclass(frozen=True)
class Checkpoints:
    every: int = setting(0, "batches between checkpoints (0: only at the end)", low=0)
    keep: int = setting(3, "newest complete checkpoints to keep", low=1)


@dataclass(frozen=True)
class TransportSettings:
    scheme: Literal["auto", "ipc", "tcp"] = setting("auto", "auto: ipc on one machine, tcp between machines")
    address: str = setting("", "this machine's address for tcp (empty: the one that reaches the master)", local=True)
    timeout: float = setting(120.0, "longest wait for a neighbour, seconds", low=0.1)
    max_message: int = setting(256, "largest tensor on the wire, MiB", low=1)


@dataclass(frozen=True)
class Output:
    dir: str = setting("runs", "folder of all runs", local=True)
    run: str = setting("", "folder of this run (empty: a new one under output.dir)", local=True)
    quiet: bool = setting(False, "print only the result", local=True)
    tensorboard: bool = setting(False, "also write TensorBoard files (extra: tensorboard)", local=True)
    every: float = setting(1.0, "seconds between two lines of metrics", low=0.05, local=True)


@dataclass(frozen=True)
class Config:
    """All settings of a run. Every section is a frozen dataclass, every value checked."""

    model: Model = Model()
    data: Data = Data()
    pipeline: Pipeline = Pipeline()
    rule: Rule = Rule()
    predictor: Predictor = Predictor()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoints = Checkpoints()
    transport: TransportSettings = TransportSettings()
    output: Output = Output()

    def __post_init__(self) -> None:
        for name, value in flat(self):
            section, key = name.split(".")
            _check(name, value, type(getattr(self, section)), key)
        self._check_together()

    def _check_together(self) -> None:
        pipeline, boundaries = self.pipeline, self.pipeline.boundaries
        if boundaries and len(boundaries) != pipeline.stages - 1:
            raise ConfigError(
                f"pipeline.boundaries = {list(boundaries)} cuts {len(boundaries) + 1} stages, but pipeline.stages = "
                f"{pipeline.stages}: give one boundary fewer than stages"
            )
        if self.rule.name == "wait" and pipeline.window not in ("auto", 1):
            raise ConfigError(
                f"pipeline.window = {pipeline.window} with rule.name = wait: waiting is exact with one batch in "
                "flight only; leave pipeline.window at auto, or use rule.name = synthetic"
            )
        if self.model.name == "transformer" and self.model.width % self.model.heads:
            raise ConfigError(f"model.width = {self.model.width} is not a multiple of model.heads = {self.model.heads}")
        if self.data.evaluate == "test" and self.data.name != "mnist":
            raise ConfigError(f"data.evaluate = test: data.name = {self.data.name} has no test set; use validation")


def flat(config: Config) -> Iterator[tuple[str, Any]]:
    """(section.key, value) of every setting, in the order they are declared."""
    for section in fields(config):
        part = getattr(config, section.name)
        for item in fields(part):
            yield f"{section.name}.{item.name}", getattr(part, item.name)


def shared_settings(config: Config) -> tuple[str, ...]:
    """The settings that all stages of a run must have in common, as `section.key=value`."""
    return tuple(
        f"{section.name}.{item.name}={getattr(getattr(config, section.name), item.name)}"
        for section in fields(config)
        for item in fields(getattr(config, section.name))
        if not item.metadata["local"]
    )


def describe() -> Iterator[tuple[str, str, Any, str]]:
    """(section.key, type, default, explanation) of every setting."""
    for section in fields(Config):
        kind = get_type_hints(Config)[section.name]
        for item in fields(kind):
            hint = get_type_hints(kind)[item.name]
            yield f"{section.name}.{item.name}", _name_of(hint), item.default, item.metadata["help"]


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """A TOML file (or none: the embedded default), then `--section.key value` from the command line on top."""
    values = default() if path is None else _read(Path(path))
    for name, text in _pairs(overrides):
        section, _, key = name.partition(".")
        if isinstance(values.setdefault(section, {}), dict):
            values[section][key] = _parse(name, text)
    return build(values)


def default() -> dict[str, dict[str, Any]]:
    """The embedded default run: a byte-level language model on Python's own sources, sized for two cores."""
    return {
        "model": {"layers": 4, "width": 64},
        "data": {"batch": 16, "context": 32, "validation": 0.02},
        "optimizer": {"lr": 4e-3},
        "pipeline": {"boundaries": (2, 3, 4)},  # a block each: measured cuts differ a little from run to run
        "train": {"batches": 1200},
        "checkpoint": {"every": 600},
    }


def build(values: Mapping[str, Any]) -> Config:
    """Nested plain values, as TOML gives them, into a checked Config."""
    sections = get_type_hints(Config)
    parts = {}
    for section, table in values.items():
        if section not in sections:
            raise ConfigError(f"unknown section [{section}]{_nearest(section, sections)}")
        if not isinstance(table, Mapping):
            raise ConfigError(
                f"{section} = {table!r} is a section, not a setting: write [{section}] above its settings"
            )
        kind = sections[section]
        known = {item.name for item in fields(kind)}
        for key in table:
            if key not in known:
                raise ConfigError(f"unknown setting {section}.{key}{_nearest(f'{section}.{key}', _all_names())}")
        parts[section] = kind(**{key: _convert(kind, key, value) for key, value in table.items()})
    return Config(**parts)


def replace(config: Config, **settings: Any) -> Config:
    """A copy with some settings changed: replace(config, train={"batches": 10})."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **part) for name, part in settings.items()}
    )


# -- one value ---------------------------------------------------------------------------------------------------


def _convert(kind: type, key: str, value: Any) -> Any:
    """TOML has lists where we have tuples, and writes 1 where 1.0 is meant; all else stays, to be checked."""
    hint = get_type_hints(kind)[key]
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(value)
    if hint is float and type(value) is int:
        return float(value)
    return value


def _check(name: str, value: Any, section: type, key: str) -> None:
    hint = get_type_hints(section)[key]
    item = next(item for item in fields(section) if item.name == key)
    if not _fits(value, hint):
        choices = _choices(hint)
        near = _nearest(str(value), choices) if choices and isinstance(value, str) else ""
        raise ConfigError(f"{name} = {value!r}: expected {_name_of(hint)}{near}")
    low, high = item.metadata["low"], item.metadata["high"]
    number = type(value) in (int, float)
    if number and (value != value or (low is not None and value < low) or (high is not None and value > high)):
        bounds = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
        raise ConfigError(f"{name} = {value}: expected {' and '.join(bounds)}")


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Union:
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(element, get_args(hint)[0]) for element in value)
    return type(value) is hint


def _choices(hint: Any) -> list[str]:
    options = get_args(hint) if get_origin(hint) is Union else (hint,)
    return [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]


def _name_of(hint: Any) -> str:
    if get_origin(hint) is Union:
        return " or ".join(_name_of(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return " | ".join(get_args(hint))
    if get_origin(hint) is tuple:
        return "a list of whole numbers"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _all_names() -> list[str]:
    return [name for name, *_ in describe()]


# -- sources -----------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """`--a.b v`, `--a.b=v`; a setting without a value is a switch: `--a.b` means true."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or "." not in word.partition("=")[0]:
            raise ConfigError(f"cannot read {word!r}: settings are written --section.key value")
        name, equals, text = word[2:].partition("=")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        yield name.replace("-", "_"), text


def _parse(name: str, text: str) -> Any:
    """A word from the command line, read as its setting's type wants; what does not fit stays text, to be refused."""
    section, _, key = name.partition(".")
    kind = get_type_hints(Config).get(section)
    hint = get_type_hints(kind).get(key) if kind else None
    try:
        if get_origin(hint) is tuple:
            return tuple(int(part) for part in text.split(",") if part)
        for option in get_args(hint) if get_origin(hint) is Union else (hint,):
            if option is bool:
                return {"true": True, "false": False}.get(text.lower(), text)
            if option in (int, float):
                return option(text)
    except ValueError:
        pass
    return text
