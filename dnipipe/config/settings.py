"""Every setting, its default, its explanation and its limits: frozen dataclasses, a section each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_type_hints

from dnipipe.config.values import check, hints, name_of
from dnipipe.errors import ConfigError


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
    name: Literal["stdlib", "text", "mnist", "cifar10"] = setting(
        "stdlib", "Python's own source files, a text file, MNIST or CIFAR-10"
    )
    root: str = setting(
        "", "text: the file; mnist: the folder with the four IDX files; cifar10: with the six binary ones", local=True
    )
    batch: int = setting(32, "samples a batch", low=1)
    context: int = setting(64, "bytes a sample (text)", low=1)
    limit: int = setting(0, "use only the first so many bytes or training samples (0: all)", low=0)
    validation: float = setting(0.1, "share of the training data held out at its end", low=0.001, high=0.9)
    evaluate: Literal["validation", "test"] = setting(
        "validation", "evaluate on the held-out share, or train on everything and evaluate on the test set (images)"
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
    name: Literal["synthetic", "blend", "local", "delayed", "wait"] = setting(
        "synthetic", "where a stage's gradient comes from"
    )
    then: str = setting("", "rules that follow and the batch that each begins with, e.g. 501:synthetic,1501:blend")
    bp_lambda: float = setting(
        0.0, "BP(λ): 0 bootstrapped targets, 1 the true gradient travelling from the loss", low=0.0, high=1.0
    )
    warmup: int = setting(0, "batches during which predictors learn but are not trusted", low=0)
    warmup_rule: Literal["wait", "zero", "local", "scale"] = setting(
        "wait",
        "meanwhile: apply the true gradient, late; or none; or the prediction, taught by its own loss alone (vfbn); or "
        "the prediction times its cosine with what arrives",
    )
    trust: float = setting(
        -1.0,
        "cosine with what arrives below which a prediction is not used, until it is above again (-1: used always); "
        "rule.warmup_rule says what is done meanwhile",
        low=-1.0,
        high=1.0,
    )
    p_update: float = setting(
        1.0, "probability with which a stage updates on a batch; each stage draws for itself", low=1e-3, high=1.0
    )
    forward_unlock: bool = setting(
        False, "synthetic, local: train on a guess of the stage's input, made from x, so that no forward waits either"
    )
    correction: float = setting(1.0, "blend: weight w of g - ĝ, which joins the next update", low=1e-3)
    accumulate: int = setting(1, "batches whose gradients, averaged, make one update of a stage", low=1)
    reschedule: int = setting(
        0, "batches over which an update that is late by n updates goes from lr/n to lr (0: at lr always)", low=0
    )


@dataclass(frozen=True)
class Predictor:
    name: Literal["vfbn", "linear", "mlp", "conv"] = setting("vfbn", "which synthetic-gradient model")
    condition: bool = setting(True, "let linear, mlp and conv see the labels (cDNI); vfbn always does")
    hidden: int = setting(-1, "hidden layers (-1: the kind's own: vfbn and linear 0, mlp 1, conv 2)", low=-1, high=8)
    width: int = setting(0, "features of a hidden layer (0: the kind's own)", low=0)
    lr: float = setting(3e-3, "learning rate of the predictor's Adam", low=0.0)
    attention: int = setting(0, "vfbn: heads of a causal attention at the head's entrance, for tokens (0: none)", low=0)
    sampled: int = setting(
        0, "vfbn: classes that its head scores besides those of the batch, for a large vocabulary (0: all)", low=0
    )
    similarity: float = setting(
        0.0, "vfbn: share of the similarity loss in its own loss (predsim, with rule.name = local)", low=0.0, high=1.0
    )
    matching: float = setting(0.1, "vfbn: weight of the squared distance to the arriving gradient", low=0.0)


@dataclass(frozen=True)
class Optimizer:
    name: Literal["adam", "adamw", "nadam", "sgd"] = setting("adam", "of every stage")
    lr: float = setting(1e-3, "learning rate", low=0.0)
    weight_decay: float = setting(0.0, "weight decay", low=0.0)
    momentum: float = setting(0.0, "of sgd", low=0.0, high=1.0)
    beta1: float = setting(0.9, "momentum of adam, adamw and nadam", low=0.0, high=0.999)
    clip: float = setting(0.0, "largest norm of a stage's gradient (0: no limit)", low=0.0)
    schedule: Literal["constant", "linear", "cosine", "steps"] = setting(
        "constant", "how lr falls over the run, by batch id"
    )
    drops: tuple[int, ...] = setting((), "steps: batches behind each of which lr is a tenth, e.g. 300000,400000")
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
    kind: Literal["zmq", "local"] = setting(
        "zmq", "zmq: a process a stage; local: all stages in one process, taking turns, the same each time"
    )
    delay: int = setting(0, "local: batches that a message is under way on each hop", low=0)
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
            check(name, value, type(getattr(self, section)), key)
        self._check_together()

    def _check_together(self) -> None:
        pipeline, boundaries = self.pipeline, self.pipeline.boundaries
        if boundaries and len(boundaries) != pipeline.stages - 1:
            raise ConfigError(
                f"pipeline.boundaries = {list(boundaries)} cuts {len(boundaries) + 1} stages, but pipeline.stages = "
                f"{pipeline.stages}: give one boundary fewer than stages"
            )
        rules = {name for _, name in phases(self.rule)}
        if rules == {"wait"} and pipeline.window not in ("auto", 1):
            raise ConfigError(
                f"pipeline.window = {pipeline.window} with rule.name = wait: waiting is exact with one batch in "
                "flight only; leave pipeline.window at auto, or use rule.name = synthetic"
            )
        self._check_rule()
        self._check_meanwhile()
        self._check_schedule()
        if self.model.name == "transformer" and self.model.width % self.model.heads:
            raise ConfigError(f"model.width = {self.model.width} is not a multiple of model.heads = {self.model.heads}")
        if self.transport.delay and self.transport.kind != "local":
            raise ConfigError(
                f"transport.delay = {self.transport.delay} with transport.kind = {self.transport.kind}: a real link "
                "has a delay of its own; use transport.kind = local"
            )
        if self.data.evaluate == "test" and self.data.name not in ("mnist", "cifar10"):
            raise ConfigError(f"data.evaluate = test: data.name = {self.data.name} has no test set; use validation")

    def _check_schedule(self) -> None:
        schedule, drops = self.optimizer.schedule, self.optimizer.drops
        if (schedule == "steps") != bool(drops):
            way = "name the batches, e.g. 300000,400000" if schedule == "steps" else "use optimizer.schedule = steps"
            raise ConfigError(f"optimizer.drops = {list(drops)} with optimizer.schedule = {schedule}: {way}")

    def _check_rule(self) -> None:
        rule, names = self.rule, {name for _, name in phases(self.rule)}
        if names == {"delayed"} and rule.warmup:
            raise ConfigError(
                f"rule.warmup = {rule.warmup} with rule.name = delayed: it predicts nothing that must warm up; "
                "leave rule.warmup at 0, or use rule.name = blend"
            )
        if rule.trust > -1 and not names & {"synthetic", "blend"}:
            raise ConfigError(
                f"rule.trust = {rule.trust} with rule.name = {rule.name}: it uses no prediction of what arrives; leave "
                "rule.trust at -1, or use rule.name = synthetic"
            )
        if rule.forward_unlock:
            self._check_unlocked()
        if rule.p_update < 1 and rule.accumulate > 1:
            raise ConfigError(
                f"rule.p_update = {rule.p_update} with rule.accumulate = {rule.accumulate}: batches that are left out "
                "make an update of fewer than it is averaged over; set one of the two to 1"
            )
        if rule.bp_lambda and names <= {"delayed", "blend"}:
            why = "it predicts nothing" if rule.name == "delayed" else "it answers at once, from its prediction alone"
            raise ConfigError(
                f"rule.bp_lambda = {rule.bp_lambda} with rule.name = {rule.name}: {why}; leave rule.bp_lambda at 0, or "
                "use rule.name = synthetic"
            )

    def _check_meanwhile(self) -> None:
        if self.rule.warmup_rule == "local" and self.predictor.name != "vfbn":
            raise ConfigError(
                f"rule.warmup_rule = local with predictor.name = {self.predictor.name}: it has no loss of its own; use "
                "predictor.name = vfbn, or rule.warmup_rule = wait, zero or scale"
            )

    def _check_unlocked(self) -> None:
        """What arrives was taken at the next stage's guess of this stage's output: to be learnt from, not applied."""
        rule, unlocked = self.rule, "with rule.forward_unlock = true: "
        if self.pipeline.stages == 1:
            raise ConfigError(f"pipeline.stages = 1 {unlocked}there is no input to guess; use more stages, or false")
        applied = "the gradient that arrives is of a guessed input, and would be applied; "
        names = {name for _, name in phases(rule)}
        if other := sorted(names - {"synthetic", "local"}):
            raise ConfigError(f"rule.name = {other[0]} {unlocked}{applied}use rule.name = synthetic or local")
        if "synthetic" in names and rule.warmup_rule == "wait" and (rule.warmup or rule.trust > -1):
            way = "use rule.warmup_rule = zero, local or scale"
            raise ConfigError(f"rule.warmup_rule = wait {unlocked}{applied}{way}")


def phases(rule: Rule) -> list[tuple[int, str]]:
    """(first batch id, rule) of each part of a run, in order; the first from 1 on. Raises ConfigError."""
    known = get_args(get_type_hints(Rule)["name"])
    found: list[tuple[int, str]] = [(1, rule.name)]
    for part in filter(None, (word.strip() for word in rule.then.split(","))):
        start, _, name = part.partition(":")
        if not start.isdecimal() or int(start) <= found[-1][0] or name not in known:
            raise ConfigError(
                f"rule.then = {rule.then!r}: {part!r} should be BATCH:RULE, a batch id above {found[-1][0]} and one of "
                f"{', '.join(known)}"
            )
        found.append((int(start), name))
    return found


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
        kind = hints(Config)[section.name]
        for item in fields(kind):
            hint = hints(kind)[item.name]
            yield f"{section.name}.{item.name}", name_of(hint), item.default, item.metadata["help"]


def replace(config: Config, **settings: Any) -> Config:
    """A copy with some settings changed: replace(config, train={"batches": 10})."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **part) for name, part in settings.items()}
    )
