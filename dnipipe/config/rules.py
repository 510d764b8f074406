"""What the rules of a run read of the settings. What none of them reads must be as it begins: nobody would notice.

rule.name, rule.then ─► phases ─► the rules' names ─► READ_BY, and what some settings are read with
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from dnipipe.config.sections import Rule
from dnipipe.errors import ConfigError

if TYPE_CHECKING:
    from dnipipe.config.settings import Config

# setting of [rule] -> the rules that read it, the first of them named as the way out, and what the others lack
READ_BY: dict[str, tuple[tuple[str, ...], str]] = {
    "warmup": (("blend", "synthetic", "local"), "it predicts nothing that must warm up"),
    "warmup_rule": (("blend", "synthetic"), "there is no prediction of what arrives that it might not trust"),
    "trust": (("synthetic", "blend"), "it uses no prediction of what arrives"),
    "trust_length": (("synthetic", "blend"), "it uses no prediction of what arrives"),
    "bp_lambda": (("synthetic", "blend"), "it mixes no prediction with what arrives"),
    "stash": (("delayed", "blend"), "only rule.name = delayed and blend have a use for old weights"),
    "compensate": (("delayed",), "only rule.name = delayed makes up for a gradient's delay"),
    "lookahead": (("blend", "delayed"), "it applies no gradient late"),
}


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


def check_rules(config: Config) -> None:
    """Raises ConfigError for settings of [rule] that nothing reads, or that do not go together."""
    rule, names = config.rule, {name for _, name in phases(config.rule)}
    for key, (readers, why) in READ_BY.items():
        value, usual = getattr(rule, key), getattr(Rule, key)
        if value != usual and not names & set(readers):
            raise ConfigError(
                f"rule.{key} = {shown(value)} with {_named(rule)}: {why}; leave rule.{key} at {shown(usual)}, or use "
                f"rule.name = {readers[0]}"
            )
    if rule.compensate and not rule.stash:
        raise ConfigError(
            f"rule.compensate = {rule.compensate} without the weights it is computed from: set rule.stash = true"
        )
    if rule.reschedule and not ("delayed" in names or (waits(rule) and names & {"synthetic", "blend"})):
        raise ConfigError(
            f"rule.reschedule = {rule.reschedule} with {_named(rule)}: no update of it comes late; leave "
            "rule.reschedule at 0, or use rule.name = delayed"
        )
    if rule.forward_unlock:
        _check_unlocked(config, names)
    if rule.p_update < 1 and rule.accumulate > 1:
        raise ConfigError(
            f"rule.p_update = {rule.p_update} with rule.accumulate = {rule.accumulate}: batches that are left out "
            "make an update of fewer than it is averaged over; set one of the two to 1"
        )
    _check_meanwhile(config)


def waits(rule: Rule) -> bool:
    """Whether a prediction may be left alone until the gradient is here, which is then applied, late."""
    return rule.warmup_rule == "wait" and may_distrust(rule)


def may_distrust(rule: Rule) -> bool:
    """Whether there may be predictions that are not used, in a warm-up or later."""
    return rule.warmup > 0 or rule.trust > -1 or rule.trust_length > 0


def shown(value: Any) -> str:
    """A value as a person would write it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _named(rule: Rule) -> str:
    return f"rule.name = {rule.name}" + (f" and rule.then = {rule.then}" if rule.then else "")


def _check_meanwhile(config: Config) -> None:
    rule = config.rule
    if rule.warmup_rule == "local" and config.predictor.name != "vfbn":
        raise ConfigError(
            f"rule.warmup_rule = local with predictor.name = {config.predictor.name}: it has no loss of its own; use "
            "predictor.name = vfbn, or rule.warmup_rule = wait, zero or scale"
        )


def _check_unlocked(config: Config, names: set[str]) -> None:
    """What arrives was taken at the next stage's guess of this stage's output: to be learnt from, not applied."""
    unlocked = "with rule.forward_unlock = true: "
    if config.pipeline.stages == 1:
        raise ConfigError(f"pipeline.stages = 1 {unlocked}there is no input to guess; use more stages, or false")
    applied = "the gradient that arrives is of a guessed input, and would be applied; "
    if other := sorted(names - {"synthetic", "local"}):
        raise ConfigError(f"rule.name = {other[0]} {unlocked}{applied}use rule.name = synthetic or local")
    if "synthetic" in names and waits(config.rule):
        way = "use rule.warmup_rule = zero, local or scale"
        raise ConfigError(f"rule.warmup_rule = wait {unlocked}{applied}{way}")
