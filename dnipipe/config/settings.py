"""All settings of a run together, and what they must not be together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from dnipipe.config.rules import check_rules, may_distrust, phases, shown, waits
from dnipipe.config.sections import (
    AT_A_CONSTANT_RATE,
    PRESETS,
    Checkpoints,
    Data,
    Eval,
    Model,
    Optimizer,
    Output,
    Pipeline,
    Predictor,
    Rule,
    Security,
    Service,
    Sync,
    Train,
    TransportSettings,
    WireSettings,
)
from dnipipe.config.values import check, hints, name_of
from dnipipe.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """All settings of a run. Every section is a frozen dataclass, every value checked."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    pipeline: Pipeline = field(default_factory=Pipeline)
    rule: Rule = field(default_factory=Rule)
    sync: Sync = field(default_factory=Sync)
    predictor: Predictor = field(default_factory=Predictor)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    checkpoint: Checkpoints = field(default_factory=Checkpoints)
    transport: TransportSettings = field(default_factory=TransportSettings)
    wire: WireSettings = field(default_factory=WireSettings)
    service: Service = field(default_factory=Service)
    security: Security = field(default_factory=Security)
    output: Output = field(default_factory=Output)

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
        if pipeline.compile and pipeline.autocast == "float16":
            raise ConfigError(
                "pipeline.compile = true with pipeline.autocast = float16: gradients cannot be scaled within a "
                "compiled graph; use bfloat16 or leave pipeline.compile at false"
            )
        rules = {name for _, name in phases(self.rule)}
        if rules == {"wait"} and pipeline.window not in ("auto", 1):
            raise ConfigError(
                f"pipeline.window = {pipeline.window} with rule.name = wait: waiting is exact with one batch in "
                "flight only; leave pipeline.window at auto, or use rule.name = synthetic"
            )
        if "sync" in rules:
            self._check_sync()
        check_rules(self)
        self._check_schedule()
        self._check_wire()
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

    def _check_wire(self) -> None:
        """Only what teaches or mends may be left out: a gradient that would be applied is needed for each batch."""
        rule, wire, default = self.rule, self.wire, WireSettings()
        names = {name for _, name in phases(rule)}
        if wire.gradients != default.gradients and names == {"local"}:
            raise ConfigError(
                f"wire.gradients = {wire.gradients} with rule.name = local: no gradient travels; leave wire.gradients "
                f"at {default.gradients}, or use another rule"
            )
        for key in ("gradient_every", "gradient_rows", "gradient_queue"):
            value, usual = getattr(wire, key), getattr(default, key)
            if value == usual:
                continue
            without = {"synthetic", "blend"} if key == "gradient_every" else {"synthetic"}
            if names - without - {"local"} or not names & without:
                then = f" and rule.then = {rule.then}" if rule.then else ""
                use = "learn from gradients or mend with them" if "blend" in without else "learn from gradients"
                raise ConfigError(
                    f"wire.{key} = {value} with rule.name = {rule.name}{then}: it does not only {use}; leave "
                    f"wire.{key} at {usual}, or use rule.name = {' or '.join(sorted(without))}"
                )
            if waits(rule):
                raise ConfigError(
                    f"wire.{key} = {value} with rule.warmup_rule = wait: it applies each gradient meanwhile; use "
                    "rule.warmup_rule = zero, local or scale"
                )
        if wire.gradient_rows < 1 and rule.bp_lambda > 0:
            raise ConfigError(
                f"wire.gradient_rows = {wire.gradient_rows} with rule.bp_lambda = {rule.bp_lambda}: a gradient that "
                "goes on to the stage before is needed whole; use rule.bp_lambda = 0"
            )
        if wire.gradient_rows < 1 and rule.warmup_rule == "zero" and may_distrust(rule):
            raise ConfigError(
                f"wire.gradient_rows = {wire.gradient_rows} with rule.warmup_rule = zero: meanwhile each gradient goes "
                "on to the stage before, whole; use rule.warmup_rule = local or scale"
            )
        if wire.gradient_queue and self.transport.kind != "zmq":
            raise ConfigError(
                f"wire.gradient_queue = {wire.gradient_queue} with transport.kind = {self.transport.kind}: it does not "
                "tell whether a link is full; use transport.kind = zmq"
            )

    def _check_sync(self) -> None:
        """One step of all stages at a time: what lets a stage go its own way does not fit."""
        if self.rule.name != "sync" or self.rule.then:
            raise ConfigError(
                f"rule.name = {self.rule.name} with rule.then = {self.rule.then!r}: a run is synchronous from its "
                "first batch to its last; change the rule with --resume"
            )
        for item in fields(Rule):
            value = getattr(self.rule, item.name)
            if item.name != "name" and value != item.default:
                raise ConfigError(
                    f"rule.{item.name} = {shown(value)} with rule.name = sync: it is for stages that update on their "
                    f"own; leave it at {shown(item.default)}"
                )
        for name, value in self.wire.changed.items():
            raise ConfigError(
                f"{name} = {value} with rule.name = sync: torch sends each tensor as it is, and all; leave "
                f"{name} at {getattr(WireSettings, name.partition('.')[2])}, or use another rule"
            )
        if self.transport.kind == "local":
            raise ConfigError(
                "transport.kind = local with rule.name = sync: torch.distributed.pipelining needs a process a stage; "
                "leave transport.kind at zmq, or use rule.name = wait, which learns the same"
            )
        if self.pipeline.window != "auto":
            raise ConfigError(
                f"pipeline.window = {self.pipeline.window} with rule.name = sync: one batch is under way, in "
                "sync.microbatches parts; leave pipeline.window at auto"
            )
        if self.train.on_nan != "stop":
            raise ConfigError(
                f"train.on_nan = {self.train.on_nan} with rule.name = sync: every stage would have to know of such a "
                "loss before it steps; use train.on_nan = stop"
            )


def under(config: Config, name: str) -> Config:
    """The same run under another rule, as that rule begins: what the old one was given, or the laboratory, goes.

    So does [wire]: what it leaves out only one rule can do without, and a rounded tensor is another one under any.
    """
    return replace(
        config,
        rule=vars(Rule(name=name)),  # type: ignore[arg-type]
        wire=vars(WireSettings()),
        pipeline={"window": "auto"},
        train={"on_nan": "stop"},
        transport={"kind": "zmq", "delay": 0},
    )


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
            name, help = f"{section.name}.{item.name}", item.metadata["help"]
            for rule, preset in PRESETS.items():
                begun = {f"with {rule}": preset, "at a constant rate": AT_A_CONSTANT_RATE.get(rule, {})}
                values = {when: table.get(section.name, {}).get(item.name) for when, table in begun.items()}
                words = [f"{when}: {str(value).lower()}" for when, value in values.items() if value is not None]
                help += f" [{'; '.join(words)}]" if words else ""
            yield name, name_of(hint), item.default, help


def replace(config: Config, **settings: Any) -> Config:
    """A copy with some settings changed: replace(config, train={"batches": 10})."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **part) for name, part in settings.items()}
    )
