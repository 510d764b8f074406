"""Where a stage's gradient comes from. A rule is two questions:

    now(batch, h, y)                 the batch has just been computed: a gradient for it, at once?
    arrived(batch, h, y, g, ĝ)       the next stage's gradient g is here: what is to be done with it?

Both answer with a `Use`, or None: nothing to do; `now` also with a `Skip`: leave the batch out; `arrived` also with a
`Mend`: what was used at once was not all. Batch ids start at 1. A rule is one class here and one line in RULES.

                        now                        arrived
    Synthetic, λ = 0    update with ĝ, send J^T ĝ  the predictor learns
    Synthetic, λ > 0    update with ĝ              the predictor learns; send J^T (λ g + (1-λ) ĝ)
      not trusted:
        wait, zero      (ĝ is only measured)       the predictor learns; update with g, or not; send J^T g
        local           as ever                    the predictor learns nothing from g
        scale           as ever, with a part of ĝ  the predictor learns
    Local               update with ĝ (its own loss' gradient); the predictor learns      nothing arrives
    Blend, λ = 0        update with ĝ, send J^T ĝ  the predictor learns; v (g - ĝ) joins the next update
    Blend, λ > 0        update with ĝ              the same; and send J^T ĝ + λ J^T (g - ĝ)
    Delayed, Wait                                  update with g, send J^T g
    (last_stage.py      update with ∂loss/∂h, send it back                               nothing arrives)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dnipipe.config import Config
from dnipipe.errors import ConfigError
from dnipipe.learner import Learner
from dnipipe.predictors import VFBN

LEAST = 0.01  # part of a prediction that is used at least: of nothing, no likeness could be measured


@dataclass(frozen=True, eq=False)
class Use:
    """What to do with a gradient at h."""

    g: Tensor  # (B, D...) like h, d(mean loss over the batch)/d(element of h)
    update: bool  # add it, backpropagated, to the parameters' gradients
    send: bool  # give x.grad to the stage before


@dataclass(frozen=True, eq=False)
class Mend:
    """What was used at once, ĝ, is not what has come, g. The difference, backpropagated, joins the next update."""

    off: Tensor  # g - ĝ at h, (B, D...)
    weight: float  # w, of it in the parameters' gradients, at the full learning rate and age 0 (Descent.join)
    age: int  # batches that the stage has predicted for since
    bp_lambda: float  # λ: the stage before has waited for J^T ĝ + λ J^T off; 0: it was answered at once


@dataclass(frozen=True)
class Skip:
    """The stage never updates on this batch, and the stage before is told so at once."""

    why: str  # counted under this in the metrics


class GradientRule(ABC):
    """One stage's source of gradients."""

    teaches: bool  # whether gradients travel at all: False spares every stage the backward to its input
    late = False  # whether a gradient that comes late moves the stage: what rule.lookahead is for
    again = False  # whether a batch that was applied and answered at once is applied again when its gradient is here
    in_flight: int | None = None  # batches that may lack their gradient; None: as many as the window holds
    stash: float | None = None  # λ of Stash.hand_over: differentiate at the weights a batch came through with; None: no
    learner: Learner | None = None
    shelf: tuple[dict[str, Any], dict[str, Any]] = ({}, {})  # a predictor's saved state, for a rule that has one again

    def at(self, batch: int) -> GradientRule:
        """The rule that this batch belongs to."""
        return self

    def draws(self, batch: int) -> bool:
        """Whether the stage updates on this batch at all."""
        return True

    def settle(self) -> None:  # noqa: B027  most put nothing off
        """Do what was put off, before the stage is saved. May raise what `now` may."""

    @abstractmethod
    def now(self, batch: int, h: Tensor, y: Tensor) -> Use | Skip | None:
        """What to do with the batch at once."""

    @abstractmethod
    def arrived(
        self, batch: int, h: Tensor, y: Tensor, g: Tensor | None, predicted: Tensor | None
    ) -> Use | Mend | None:
        """What to do now that its gradient is here; g is None if none was made for this batch."""


class Synthetic(GradientRule):
    """Update at once with the predicted gradient; what arrives teaches the predictor (arXiv:1608.05343, section 2).

    Args:
        bp_lambda: λ of BP(λ), the paper's appendix A.2. What the stage before is taught is J^T ḡ with
            ḡ = λ g + (1-λ) ĝ, and g itself such a mixture from further down. 0 needs no second backward.
        warmup: batches during which the prediction is not trusted.
        meanwhile: what is done with a prediction that is not trusted. "wait" and "zero" only measure it, and true
            gradients travel all the way; the stage updates, late, with the one that arrived, or not at all. "local"
            uses it, taught by its own loss alone. "scale" uses a part of it, Trust.part, at least LEAST.

    Nor is it trusted while the learner's trust in it is lost (trust.py).
    """

    teaches = True

    def __init__(
        self,
        learner: Learner,
        bp_lambda: float = 0.0,
        warmup: int = 0,
        meanwhile: str = "wait",
    ) -> None:
        self.learner: Learner = learner
        self.bp_lambda = bp_lambda
        self.warmup = warmup
        self.meanwhile = meanwhile
        self.trust = learner.trust
        # batches whose prediction was not trusted, and whose gradient is not here -> the part of it that was used
        self._distrusted: dict[int, float] = {}

    @classmethod
    def build(cls, config: Config, learner: Callable[[], Learner]) -> Synthetic:
        rule = config.rule
        return cls(learner(), rule.bp_lambda, rule.warmup, rule.warmup_rule)

    def now(self, batch: int, h: Tensor, y: Tensor) -> Use | None:
        guess = self.learner.guess(h, y)
        if batch <= self.warmup or not self.trust.good:
            part = self._distrusted[batch] = max(LEAST, self.trust.part) if self.meanwhile == "scale" else 1.0
            if self.meanwhile in ("wait", "zero"):
                return Use(guess, update=False, send=False)
            guess *= part
        return Use(guess, update=True, send=self.bp_lambda == 0)

    def arrived(
        self, batch: int, h: Tensor, y: Tensor, g: Tensor | None, predicted: Tensor | None
    ) -> Use | Mend | None:
        use = self.learnt(batch, h, y, g, predicted)
        if use or g is None or predicted is None or self.bp_lambda == 0:
            return use
        return Use(torch.lerp(predicted, g, self.bp_lambda), update=False, send=True)

    def learnt(self, batch: int, h: Tensor, y: Tensor, g: Tensor | None, predicted: Tensor | None) -> Use | None:
        """The predictor learns, and so does the trust in it. A batch that has waited for g is finished with it."""
        meanwhile = self.meanwhile if batch in self._distrusted else ""
        part = self._distrusted.pop(batch, 1.0)
        if g is None:
            return None
        if meanwhile != "local":
            self.learner.learn(h, y, g)
        if predicted is None:
            return None  # nothing was asked of this batch
        self.trust.observe(predicted / part if part < 1 else predicted, g)
        return Use(g, update=meanwhile == "wait", send=True) if meanwhile in ("wait", "zero") else None


class Blend(Synthetic):
    """Synthetic, and its error mended when it is known: v (g - ĝ) is backpropagated, and what that gives joins the next
    update; v = w / √(1 + age) at the full rate, age the batches that the stage has predicted for since (Descent.join).

    With λ = 1 what arrives comes all the way from the loss, the true gradient: then, at v = 1, a stage has, summed over
    a run, followed it, a part of it late. With λ = 0 it looks no further than the next stage's own prediction.
    It joins, for a step of its own would be as long as any: Adam steps as far for a small gradient as for a large one.
    The older, the less of it: what is mended late is mended while the stage has moved; and the more, the less it moves,
    as the rate falls (docs/learning-measured.md).

    Args: correction, w; stash, whether the difference is backpropagated at the weights that the batch went through
    with, as ĝ was: then the stage before is sent the gradient of a single point, though long past; else of none. The
    others are Synthetic's.
    """

    late = again = True

    def __init__(
        self,
        learner: Learner,
        correction: float,
        bp_lambda: float = 0.0,
        warmup: int = 0,
        meanwhile: str = "wait",
        stash: bool = False,
    ) -> None:
        super().__init__(learner, bp_lambda, warmup, meanwhile)
        self.correction = correction
        self.stash = 0.0 if stash else None
        self._asked = 0  # batches so far
        self._order: dict[int, int] = {}  # batch -> how many that were when it came

    @classmethod
    def build(cls, config: Config, learner: Callable[[], Learner]) -> Blend:
        rule = config.rule
        return cls(learner(), rule.correction, rule.bp_lambda, rule.warmup, rule.warmup_rule, rule.stash)

    def now(self, batch: int, h: Tensor, y: Tensor) -> Use | None:
        self._asked += 1
        self._order[batch] = self._asked
        return super().now(batch, h, y)

    def arrived(
        self, batch: int, h: Tensor, y: Tensor, g: Tensor | None, predicted: Tensor | None
    ) -> Use | Mend | None:
        age = self._asked - self._order.pop(batch, self._asked)
        use = self.learnt(batch, h, y, g, predicted)
        if use or g is None or predicted is None:
            return use  # what was not used needs no mending
        return Mend(g - predicted, self.correction, age, self.bp_lambda)


class Local(GradientRule):
    """The gradient of the predictor's own loss, nothing from below: decoupled greedy learning (arXiv:1901.08164)."""

    teaches = False

    def __init__(self, learner: Learner, warmup: int = 0) -> None:
        self.learner: Learner = learner
        self.warmup = warmup

    @classmethod
    def build(cls, config: Config, learner: Callable[[], Learner]) -> Local:
        taught = learner()
        if not isinstance(taught.predictor, VFBN):
            raise ConfigError(
                f"rule.name = local needs a predictor with a loss of its own, but predictor.name = "
                f"{config.predictor.name}: use predictor.name = vfbn"
            )
        return cls(taught, config.rule.warmup)

    def now(self, batch: int, h: Tensor, y: Tensor) -> Use | None:
        return Use(self.learner.guess(h, y), update=batch > self.warmup, send=True)

    def arrived(self, batch: int, h: Tensor, y: Tensor, g: Tensor | None, predicted: Tensor | None) -> Use | None:
        return None


class Delayed(GradientRule):
    """No prediction: update when the gradient is here, though other batches' updates lie between (arXiv:1804.10574).

    The forward is run again at the weights of that moment (as in arXiv:1807.04511), so what is stale is g alone; or,
    with a stash, at those that the batch went through with, so that the gradient is one of a single point, long past.
    """

    teaches = late = True

    def __init__(self, stash: float | None = None) -> None:
        self.stash = stash

    @classmethod
    def build(cls, config: Config, learner: Callable[[], Learner]) -> Delayed:
        return cls(config.rule.compensate if config.rule.stash else None)

    def now(self, batch: int, h: Tensor, y: Tensor) -> Use | None:
        return None

    def arrived(self, batch: int, h: Tensor, y: Tensor, g: Tensor | None, predicted: Tensor | None) -> Use | None:
        return None if g is None else Use(g, update=True, send=True)


class Wait(Delayed):
    """Delayed with one batch in flight: nothing lies between, so it is exact."""

    in_flight = 1

    @classmethod
    def build(cls, config: Config, learner: Callable[[], Learner]) -> Wait:
        return cls()


RULES: dict[str, type[Synthetic] | type[Local] | type[Delayed]] = {
    "synthetic": Synthetic,
    "blend": Blend,
    "local": Local,
    "delayed": Delayed,
    "wait": Wait,
    "sync": Delayed,  # as sync.py has it: along torch's own schedule, so that nothing lies between there either
}
