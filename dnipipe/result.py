"""What stage 0 says before and after a run: plain lines, for a person."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dnipipe.building import Job
from dnipipe.config import Config, phases
from dnipipe.data import Task
from dnipipe.head import Head
from dnipipe.split import Plan

MANY, FEW = 1000, 64  # classes: so many that a sample of them is worth a try, and how many
MOST = 0.5  # of a stage's time


def opening(config: Config, task: Task, plan: Plan, run: str, start: int) -> Iterator[str]:
    """What will be trained, on what, cut where."""
    yield f"data    {task.corpus}"
    yield f"run     {run}" + (f", continued from batch {start}" if start else "")
    yield from table(config, plan)


def table(config: Config, plan: Plan) -> Iterator[str]:
    """What was cut where, a line a stage; where many classes make predictors take most of the time, a hint."""
    whole = sum(plan.seconds) or 1.0
    for stage in range(plan.stages):
        layers = plan.layers_of(stage)
        names = f"{plan.layers[layers[0]]}" + (f" … {plan.layers[layers[-1]]}" if len(layers) > 1 else "")
        seconds = plan.seconds[stage]
        yield (
            f"stage {stage} layers {names}: {sum(plan.parameters[layer] for layer in layers):,} parameters, "
            f"{seconds * 1e3:.1f} ms a batch ({seconds / whole:.0%} of all)"
        )
    yield from _hint(config, plan)


def _hint(config: Config, plan: Plan) -> Iterator[str]:
    shares = [part / every for part, every in zip(plan.predicting, plan.seconds, strict=False) if every]
    whole = config.predictor.name == "vfbn" and not config.predictor.sampled
    if whole and (plan.classes or 0) >= MANY and max(shares, default=0.0) > MOST:
        yield (
            f"hint    predictors score all {plan.classes:,} classes, which takes up to {max(shares):.0%} of a stage's "
            f"time: predictor.sampled = {FEW} scores those in a batch and {FEW} others"
        )


def closing(job: Job, task: Task, run: Path, head: Head, summary: dict[str, Any]) -> None:
    """How it went, where it lies, and what to try next."""
    config, train = job.config, summary["train"]
    if head.interrupted:
        way = f'fit(..., resume="{run}")' if job.script else f"dnipipe train --resume {run}"
        print(f"stopped at batch {head.batch} of {head.total}; go on with: {way}", flush=True)
        return
    print(
        f"trained {train['batches']} batches in {train['seconds']:.1f} s: {train['samples_per_second']:.0f} samples/s, "
        f"{config.pipeline.stages} stages, rule {rule_of(config)}"
    )
    for stage in summary["stage"]:
        for reason, count in stage["reasons"].items():
            print(f"skipped {count} batches in stage {stage['index']}: {reason}")
        if stage["unlearnt"]:
            print(f"predictor of stage {stage['index']} had no time to learn from {stage['unlearnt']:,} gradients")
        if stage["untraced"]:
            print(f"trace   of stage {stage['index']} is full: {stage['untraced']:,} later spans and messages left out")
    if not config.output.quiet:
        print("\n".join(spent(summary["stage"])))
    if head.evaluation:
        print(_evaluated(config, task, *head.evaluation))
    if head.sample and not config.output.quiet:
        print(f"sample  (the model's own words, {len(head.sample)} bytes)\n{_indented(head.sample)}")
    print(f"files   {run}: summary.json, metrics/, checkpoints/")
    if not config.output.quiet and not job.script:
        print(f"next    dnipipe export {run} -o model.safetensors")
        if config.rule.name != "sync" and config.transport.kind != "local":
            print(f"        dnipipe compare {run / 'config.toml'}        beside synchronous training, 200 batches each")
        print("        dnipipe settings                                     everything that can be set")


def spent(stages: list[dict[str, Any]]) -> Iterator[str]:
    """What each stage spent its time on, in per cent of all of it: a column a stage, each adds up to 100."""
    yield "time, %      " + "".join(f"{'stage ' + str(stage['index']):>9}" for stage in stages)
    for label in stages[0]["shares"]:
        shares = [100 * stage["shares"][label] for stage in stages]
        if label == "unaccounted" or max(shares) >= 0.05:
            yield f"  {label.replace('_', ' '):11}" + "".join(f"{share:9.1f}" for share in shares)


def _evaluated(config: Config, task: Task, loss: float, accuracy: float | None) -> str:
    what = f"{config.data.evaluate} loss {loss:.4f}"
    if task.baseline:
        name, value = task.baseline
        return f"{what} nats per byte ({name}: {value:.4f})"
    return what + (f", error {100 * (1 - accuracy):.2f} %" if accuracy is not None else "")


def _indented(text: str) -> str:
    return "\n".join(f"    │ {line}" for line in text.splitlines())


def rule_of(config: Config) -> str:
    """The rule's name; or each one's, with the batch it began with."""
    return ", ".join(name if start == 1 else f"{name} from batch {start}" for start, name in phases(config.rule))
