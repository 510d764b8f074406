"""The study: which rules, tasks, numbers of stages, delays and seeds, and how a rule's learning rate is chosen.

for each task, rule and delay      three runs, one a rate: STAGES stages, seed 0      on data that is held out
the rate with the lowest loss   ─► a run for each number of stages and each seed      what the tables show
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from benchmarks.cells import Cell, Records

STAGES, SEED = 4, 0  # of the runs that choose a rate
SEARCH = "rate"  # the label of such a run

# What `synthetic` is recommended with; the one place to change when research goes on.
HIDDEN = ("--predictor.hidden", "1")
RECOMMENDED = ("--rule.name", "synthetic", *HIDDEN)


@dataclass(frozen=True)
class Rule:
    """A line of the tables.

    Args:
        words: its settings.
        late: whether a delay changes what it computes; if not, it is run at the first one only.
        tuned_as: the rule whose rate it takes, where both compute the same.
    """

    words: tuple[str, ...]
    late: bool = True
    tuned_as: str = ""


SYNTHETIC = ("--rule.name", "synthetic")
DELAYED = ("--rule.name", "delayed")
BLEND = ("--rule.name", "blend")
LOCAL = ("--rule.name", "local")
ATTENTION = ("--predictor.attention", "4")
BARE = (
    *("--rule.bp_lambda", "0", "--rule.correction", "1", "--rule.lookahead", "0", "--rule.stash", "false"),
    *("--predictor.matching", "0.1"),
)
FAR = ("--rule.lookahead", "10")
AHEAD = (*FAR, "--rule.stash", "true")
RULES = {
    "sync": Rule((), late=False),  # one stage, one process: plain autograd
    "sync-nadam": Rule(("--optimizer.name", "nadam"), late=False, tuned_as="sync"),  # lookahead helps backprop too
    "wait": Rule(("--rule.name", "wait"), late=False, tuned_as="sync"),  # exact backprop, bitwise
    "local": Rule(LOCAL, late=False),
    "local-1": Rule((*LOCAL, *HIDDEN), late=False),
    "delayed": Rule(DELAYED),
    "delayed-4": Rule((*DELAYED, "--rule.accumulate", "4")),
    "delayed-ahead": Rule((*DELAYED, *AHEAD)),
    "blend-0": Rule((*BLEND, *BARE)),  # λ = 0: mended by the next stage's prediction
    "blend": Rule(BLEND, tuned_as="sync"),
    "blend-10": Rule((*BLEND, *FAR), tuned_as="sync"),  # as it began until 2026-11-28
    "blend-every-2": Rule((*BLEND, "--wire.gradient_every", "2"), tuned_as="sync"),  # mends each second batch only
    "blend-every-4": Rule((*BLEND, "--wire.gradient_every", "4"), tuned_as="sync"),
    "linear": Rule((*SYNTHETIC, "--predictor.name", "linear")),
    "mlp": Rule((*SYNTHETIC, "--predictor.name", "mlp")),
    "vfbn": Rule((*SYNTHETIC, "--predictor.name", "vfbn")),
    "vfbn-1": Rule((*SYNTHETIC, "--predictor.name", "vfbn", "--predictor.hidden", "1")),
    "synthetic": Rule(RECOMMENDED),
}
VARIANTS = {  # blend with one of the settings that it begins with as the other rules have it: what that setting brings
    "blend-lambda-0": Rule((*BLEND, "--rule.bp_lambda", "0"), tuned_as="sync"),
    "blend-whole": Rule((*BLEND, "--rule.correction", "1"), tuned_as="sync"),
    "blend-no-lookahead": Rule((*BLEND, "--rule.lookahead", "0"), tuned_as="sync"),
    "blend-no-stash": Rule((*BLEND, "--rule.stash", "false"), tuned_as="sync"),
    "blend-matching": Rule((*BLEND, "--predictor.matching", "0.1"), tuned_as="sync"),
}
LESSONS = {  # synthetic with another lesson for its head (dnipipe/lessons.py): what each of them brings
    "synthetic-unmatched": ("--predictor.matching", "0"),  # its own loss alone teaches it
    "synthetic-matching-0.1": ("--predictor.matching", "0.1"),
    "synthetic-normalised": ("--predictor.normalise", "true"),
    "synthetic-cosine": ("--predictor.cosine", "0.1"),
    "synthetic-quarter": ("--predictor.rows", "0.25"),
    "synthetic-steps-2": ("--predictor.steps", "2"),
    "synthetic-replay-4": ("--predictor.replay", "4"),
    "synthetic-residual": ("--predictor.residual", "true"),
    "synthetic-lr-1e-3": ("--predictor.lr", "1e-3"),
    "synthetic-lr-1e-2": ("--predictor.lr", "1e-2"),
}
HEADS = {  # what a head sees or is taught by besides its own loss (dnipipe/heads.py): what each of them brings
    "local-similar": Rule((*LOCAL, "--predictor.similarity", "0.5"), late=False, tuned_as="local"),
    "local-hidden": Rule((*LOCAL, *HIDDEN), late=False, tuned_as="local"),
    "local-attention": Rule((*LOCAL, *HIDDEN, *ATTENTION), late=False, tuned_as="local"),
    "synthetic-position": Rule((*RECOMMENDED, "--predictor.position", "true"), tuned_as="synthetic"),
    "synthetic-attention": Rule((*RECOMMENDED, *ATTENTION), tuned_as="synthetic"),
    "blend-hidden": Rule((*BLEND, *HIDDEN), tuned_as="sync"),
    "blend-attention-0": Rule((*BLEND, *ATTENTION), tuned_as="sync"),  # and no hidden layer
    "blend-attention": Rule((*BLEND, *HIDDEN, *ATTENTION), tuned_as="sync"),
}
REMEDIES = {  # what others do about a gradient that is late, each with the same budget of rates
    "delayed-stash": Rule((*DELAYED, "--rule.stash", "true")),
    # λ: g² of a mean over 16 x 32 bytes is, where noise is most of it, a 512th of what one byte's would be
    "delayed-compensated": Rule((*DELAYED, "--rule.stash", "true", "--rule.compensate", "512")),
    "delayed-rescheduled": Rule((*DELAYED, "--rule.reschedule", "400")),
}
MAIN = tuple(RULES)
RULES |= VARIANTS | HEADS | REMEDIES
RULES |= {name: Rule((*RECOMMENDED, *words), tuned_as="synthetic") for name, words in LESSONS.items()}
IMAGES = {"linear": ("conv", "0"), "mlp": ("conv", "1")}  # predictor -> its kind and hidden layers for a CNN


@dataclass(frozen=True)
class Task:
    """Args:
    config: what all its cells have in common.
    figure: "loss", or "error" in percent.
    rates: the learning rates that are tried.
    search: settings of the runs that choose among them.
    models: K -> settings of the model that is cut into so many stages, where it is another one.
    quick: settings of a run that only shows that everything works.
    images: its activations are images, which need other predictors.
    head: settings of the head of `blend`.
    """

    config: str
    figure: str
    rates: tuple[str, ...]
    search: tuple[str, ...]
    quick: tuple[str, ...]
    models: dict[int, tuple[str, ...]] = field(default_factory=dict)
    images: bool = False
    head: tuple[str, ...] = ("--predictor.hidden", "0")


VALIDATION = ("--data.evaluate", "validation")
TASKS = {
    "mnist-mlp": Task(
        "benchmarks/learning/mnist-mlp.toml",
        figure="error",
        rates=("3e-4", "1e-3", "3e-3"),
        search=VALIDATION,
        quick=("--train.batches", "150", "--data.limit", "10000", "--eval.every", "50"),
    ),
    "mnist-cnn": Task(
        "benchmarks/learning/mnist-cnn.toml",
        figure="error",
        rates=("3e-4", "1e-3", "3e-3"),
        search=VALIDATION,
        quick=("--train.batches", "30", "--data.limit", "2000", "--eval.every", "10", "--model.width", "8"),
        models={8: ("--model.layers", "7")},
        images=True,
    ),
    "lm": Task(
        "benchmarks/learning/lm.toml",
        figure="loss",
        rates=("1e-3", "2e-3", "4e-3"),
        search=("--train.batches", "400"),  # the same held-out text reports: so a shorter run, of one seed, chooses
        quick=("--train.batches", "60", "--data.limit", "100000", "--eval.every", "20", "--model.width", "64"),
        models={8: ("--model.layers", "8")},
        head=("--predictor.hidden", "1"),
    ),
}
MAIN_TASKS = tuple(TASKS)
TASKS["first"] = Task(
    "benchmarks/learning/first.toml",
    figure="loss",
    rates=("5e-4", "1e-3", "4e-3"),
    search=(),  # in full: the run with the best rate is seed 0's of the table
    quick=("--train.batches", "60"),
)


@dataclass(frozen=True)
class Axes:
    """What is crossed with what."""

    tasks: tuple[str, ...] = MAIN_TASKS
    rules: tuple[str, ...] = MAIN
    stages: tuple[int, ...] = (2, 4, 8)
    delays: tuple[int, ...] = (0, 2, 8)
    seeds: tuple[int, ...] = (0, 1, 2)


OF_BLEND = Axes(tasks=("mnist-cnn",), rules=("sync", "blend", *VARIANTS, "blend-10"), stages=(STAGES,), delays=(2, 8))
OF_LESSONS = replace(OF_BLEND, rules=("sync", "synthetic", *LESSONS))
OF_HEADS = Axes(("first",), ("sync", "local", "synthetic", "blend", *HEADS), stages=(STAGES,), delays=(2,))
OF_REMEDIES = replace(OF_HEADS, rules=("sync", "delayed", *REMEDIES, "delayed-4", "delayed-ahead"))
QUICK = Axes(rules=("sync", "local-1", "delayed", "synthetic"), stages=(4,), delays=(0, 8), seeds=(0,))


@dataclass(frozen=True)
class Learning:
    """Args:
    axes: of the tables. wanted: of what is run, a part of them.
    quick: few, small batches, and the middle one of the rates unseen.
    """

    axes: Axes = Axes()
    wanted: Axes = Axes()
    quick: bool = False

    def cells(self, records: Records) -> list[Cell]:
        """The searches, and the runs of the tables: as long as its rate is not chosen, such a run waits."""
        found: list[Cell] = []
        for task in self.wanted.tasks:
            for rule in self.wanted.rules:
                for delay in self.delays(rule, self.wanted.delays):
                    found += [] if self.quick or RULES[rule].tuned_as else self.searches(task, rule, delay)
                    found += [
                        self.cell(task, rule, stages, delay, seed, records)
                        for seed in self.wanted.seeds
                        for stages in self.wanted.stages
                    ]
        return found

    def delays(self, rule: str, wanted: Iterable[int]) -> tuple[int, ...]:
        """Those at which a rule is run; one that no delay changes is run at 0 only."""
        return tuple(wanted) if RULES[rule].late else (0,)

    def searches(self, task: str, rule: str, delay: int) -> list[Cell]:
        """A run for each rate."""
        return [
            Cell(
                task,
                {"rule": rule, "delay": delay, SEARCH: rate},
                TASKS[task].config,
                (*TASKS[task].search, *words_of(task, rule, STAGES, delay, SEED), "--optimizer.lr", rate),
            )
            for rate in TASKS[task].rates
        ]

    def rate(self, task: str, rule: str, delay: int, records: Records) -> str | None:
        """The chosen one, by the loss at the end on data held out; None: some of the runs that decide are missing."""
        rates = TASKS[task].rates
        if self.quick:
            return rates[len(rates) // 2]
        if RULES[rule].tuned_as:
            return self.rate(task, RULES[rule].tuned_as, delay, records)
        found = [records.of(cell) for cell in self.searches(task, rule, delay)]
        losses = [float("inf") if one.loss is None else one.loss for one in found if one is not None]
        return rates[losses.index(min(losses))] if len(losses) == len(rates) else None

    def cell(self, task: str, rule: str, stages: int, delay: int, seed: int, records: Records) -> Cell:
        """A run of the tables."""
        rate = self.rate(task, rule, delay, records)
        words = (
            *(TASKS[task].quick if self.quick else ()),
            *TASKS[task].models.get(stages, ()),
            *words_of(task, rule, stages, delay, seed),
            *("--optimizer.lr", rate or TASKS[task].rates[0]),
        )
        labels = {"rule": rule, "delay": delay, "stages": stages, "seed": seed}
        return Cell(task, labels, TASKS[task].config, words, waits=rate is None)


def words_of(task: str, rule: str, stages: int, delay: int, seed: int) -> tuple[str, ...]:
    """The settings of a run, but for its rate."""
    words = RULES[rule].words
    if TASKS[task].images and rule in IMAGES:
        kind, hidden = IMAGES[rule]
        words = (*SYNTHETIC, "--predictor.name", kind, "--predictor.hidden", hidden)
    if rule == "blend" and not delay:  # nothing is more than one update late: the same run as its own lookahead, 1
        words = (*words, *FAR)
    if rule.startswith("blend"):
        words = (*TASKS[task].head, *words)
    if rule.startswith("sync"):
        return (*words, "--pipeline.stages", "1", "--train.seed", str(seed))
    return (
        *words,
        *("--pipeline.stages", str(stages)),
        *("--transport.delay", str(delay)),
        *("--train.seed", str(seed)),
    )
