"""One batch's journey through one stage. Messages in, messages out; no I/O, no clock of its own, no neighbour.

            x, y ──► stage 0 ──h0,y──► stage 1 ──h1,y──► … ──► stage K-1 ──► loss(h, y)
                        ▲                 ▲                        │
                        └──────g0─────────┴──────────g1────────────┘      (whenever they come)
on Activation(id, x, y):                        on Gradient(id, g):
  1 h = f_k(x)                                    6 pending = take(id)
  2 yield Activation(id, h, y)   next stage starts  7 rule.arrived(h, y, g): the predictor learns; a rule that waited
  3 ĝ = rule.now(h, y)           None: this rule waits     returns the gradient to apply now (the forward is run again)
  4 h.backward(ĝ); yield Gradient(id, x.grad); optimizer.step()
  5 pending[id] = data; with a stash, a graph     8 a rule that used ĝ may mend: g − ĝ joins the next update, and the
                                                    stage before, if it waits, is sent J^T ĝ + λ J^T (g − ĝ)

`Stage.handle(message)` is a generator, and **a yield is a send**: what follows it runs while the neighbour already
works. The caller must drain it, or the update is lost; the worker owns the only such loop.

What a layer gives along with h, a mask (pairs.py), goes the way of h, down only: no rule and no predictor sees it.

h.backward(g) with a known g is the whole trick: autograd's vector-Jacobian product gives dL/dθ = Σ g·∂h/∂θ, and x.grad
is the gradient for the stage before (docs/known-gradient.md).

A graph older than an optimizer step cannot be used: autograd raises, for the weights it saved were changed in place. So
what waits keeps its data and runs the forward again (passes.py), with the same dropout mask and without counting
BatchNorm's statistics twice; or, where a rule has a copy of the weights kept for it (stash.py), its graph on that copy.
Randomness is a function of (seed, layer, batch id) alone, so a resumed run draws what it would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn as nn
from torch import Tensor

from dnipipe.beside import NOWHERE, Beside
from dnipipe.errors import MessageError, NonFiniteLoss
from dnipipe.finite import CURES, Buffers, finite
from dnipipe.gradient_rules import GradientRule, Mend, Skip, Use
from dnipipe.last_stage import score
from dnipipe.messages import Activation, Answer, Checkpoint, Evaluation, Gradient, Message, Report, Saved
from dnipipe.metrics import StageMetrics
from dnipipe.optim import Descent
from dnipipe.pairs import joined, parted
from dnipipe.passes import Passes
from dnipipe.pending import Pending, Target
from dnipipe.predictors import Loss
from dnipipe.stash import Graphs, Stash
from dnipipe.window import Window

POISONED = "activation not finite"  # why a batch is skipped, and the next stage never sees it
OVERFLOWN = "output not finite"  # the same
SPOILT = "gradient not finite"


class Stage:
    """Stage k of K: its layers, its rule, its optimizer, and the batches that wait for their gradient.

    Args:
        index, stages: k and K.
        module: the layers; parameters keep the whole model's names.
        rule: where the gradient comes from; the loss itself (LossGradient) in the last stage.
        descent: the optimizer of the module's parameters, and when it steps.
        loss: of the model, for evaluation; used by the last stage only.
        skips_nan: learn nothing from a NaN or infinity that came or that a batch turns into here; or else raise
            NonFiniteLoss for one that a neighbour sent.
        seed: with the batch id and `first_layer`, decides every random number drawn in the forward.
        beside: how what comes is brought to the device that the module is on.
        graphs: how many may be kept, where the rule has weights stashed; none if it is left out.
        copies: whether the layers are given a copy of their input (passes.py).
    """

    def __init__(
        self,
        index: int,
        stages: int,
        module: nn.Module,
        rule: GradientRule,
        descent: Descent,
        metrics: StageMetrics,
        *,
        loss: Loss,
        skips_nan: bool = False,
        seed: int = 0,
        first_layer: int = 0,
        beside: Beside = NOWHERE,
        graphs: Graphs | None = None,
        copies: bool = False,
    ) -> None:
        self.index, self.stages = index, stages
        self.module, self.rule, self.descent, self.metrics = module, rule, descent, metrics
        self.loss, self.skips_nan, self.beside = loss, skips_nan, beside
        self.passes = Passes(module, seed, first_layer, graphs or Graphs(), copies)
        self.pending: dict[int, Pending] = {}
        self.waiting = self.largest = 0  # bytes of what is pending, and of the largest batch that ever was
        self.evaluating: set[int] = set()
        self.save_after: set[int] = set()  # checkpoints that wait for an update
        self._rule_now = metrics.clock.span("loss" if self.last else "predictor")
        self.updates = 0
        self.late = 0  # updates between the last batch whose gradient came and that gradient
        self.last_batch = 0

    @property
    def last(self) -> bool:
        return self.index == self.stages - 1

    @property
    def in_flight(self) -> int:
        """Batches sent on that the next stage has not answered: what the window limits."""
        return len(self.pending) + len(self.evaluating)

    @property
    def unanswered(self) -> set[int]:
        """Training batches among them."""
        return set(self.pending)

    def room(self, window: Window) -> bool:
        """Whether the next batch may come: the window has room, also for one as large as any before, and its rule
        allows it."""
        most = self.rule.at(self.last_batch + 1).in_flight
        if self.in_flight >= (window.size if most is None else min(window.size, most)):
            return False
        return self.in_flight < Window.START or self.waiting + self.largest <= window.memory

    def handle(self, message: Message) -> Iterator[Message]:
        """What this stage sends because of `message`. Raises MessageError for a message that does not belong here."""
        if isinstance(message, Activation):
            return self.on_activation(message)
        if isinstance(message, Gradient):
            return self.on_gradient(message)
        if isinstance(message, Evaluation):
            return self.on_evaluation(message)
        if isinstance(message, Answer):
            return self.on_answer(message)
        if isinstance(message, Checkpoint):
            return self.on_checkpoint(message)
        if isinstance(message, (Saved, Report)):
            return iter([message])  # on its way up to stage 0
        raise MessageError(f"stage {self.index} cannot handle a {type(message).__name__}")

    @property
    def behind(self) -> bool:
        """Whether there is a gradient that the predictor has put off learning from."""
        return self.rule.learner is not None and bool(self.rule.learner.put_off)

    def catch_up(self) -> None:
        """The predictor learns from one of these. Only where the stage is `behind`."""
        assert self.rule.learner
        with self.metrics.clock.span("predictor"):
            self.rule.learner.catch_up()

    # -- training ----------------------------------------------------------------------------------------------

    def on_activation(self, message: Activation) -> Iterator[Message]:
        batch, y = message.batch, self.beside.bring(message.y)
        self._check_order(batch)
        self.last_batch = batch
        if (self.index or self.skips_nan) and not self._usable(message.x, batch, "activation"):
            yield from self._leave(batch, y, POISONED)
            return
        self.passes.mode(training=True)
        rule = self.rule.at(batch)
        x = self.beside.bring(message.x.detach()).requires_grad_(self.index > 0 and rule.teaches)
        along = None if message.along is None else self.beside.bring(message.along)
        with self.metrics.clock.span("optimizer"):
            self.descent.lean(self.late if rule.late else 0)
            stash = None if rule.stash is None or self.last else Stash(self.module)
        room = self.passes.graphs.room(x) if stash else 0
        held = stash if room else None  # the weights under a graph that may wait
        buffers = Buffers(self.module) if self.skips_nan else None
        with self.metrics.clock.span("forward"):
            h, beyond = self.passes.forward(batch, x, along, stash, held)  # 1
        out = h.detach()
        if buffers and not finite(out):
            buffers.put_back()
            if not self.last:  # the last one sees it by the loss
                self.descent.stand()
                yield from self._leave(batch, y, OVERFLOWN)
                return
        if not self.last:
            yield Activation(batch, out, y, along=beyond)  # 2
        with self._rule_now:
            use = rule.now(batch, out, y)  # 3
        if isinstance(use, Use) and self.skips_nan and not finite(use.g):
            use = Skip(SPOILT)
        skip, use = (use, None) if isinstance(use, Skip) else (None, use)
        done = skip or (use and use.update and use.send and not rule.again)
        updates = self.updates
        if skip:
            yield from self._skip(batch, skip.why)
        elif use:
            yield from self._apply(batch, x, h, use, stash=held, again=held is not None and not done)  # 4
        with self.metrics.clock.span("optimizer"):
            self.descent.stand()
        answered = use is not None and use.send
        pending = Pending(
            x=None if done else x if held else x.detach(),
            along=None if done else along,
            h=out,
            y=y,
            predicted=use.g if use else None,
            back=x.grad if rule.again and not answered else None,
            updated=use is not None and use.update,
            skipped=skip is not None,
            answered=answered,
            updates=updates,
            stash=None if done else stash,
            graph=h if held and not done else None,
            taken=0 if done else room,
        )
        if not self.last:
            self.pending[batch] = pending  # 5
            self.passes.graphs.taken += pending.taken
            self.waiting += pending.kept
            self.largest = max(self.largest, pending.kept)
        self.metrics.trained(batch, y.shape[0], pending.updated)

    def on_gradient(self, message: Gradient) -> Iterator[Message]:
        batch, g = message.batch, message.g if message.g is None else self.beside.bring(message.g)
        pending = self.pending.pop(batch, None)  # 6
        of = pending and Target.of(pending, message.samples)
        if pending is None or of is None or (g is not None and g.shape != of.h.shape):
            raise MessageError(f"stage {self.index} did not ask for this gradient of batch {batch}")
        self.passes.graphs.taken -= pending.taken
        self.waiting -= pending.kept
        why = "the link was full" if message.full else "no gradient came"
        if message.g is not None and not self._usable(message.g, batch, "gradient"):
            g, why = None, SPOILT
        rule = self.rule.at(batch)
        late = self.updates - pending.updates
        if g is not None:
            self.late = late
            self.metrics.received(of.predicted, g, late)
        with self.metrics.clock.span("predictor"):
            use = rule.arrived(batch, of.h, of.y, g, of.predicted)  # 7
        self.metrics.unlearnt = rule.learner.unlearnt if rule.learner else 0
        if isinstance(use, Mend):
            yield from self._mend(batch, pending, use)  # 8
        elif use and (use.update or self.index > 0):
            x, h = self._through(batch, pending, self.index > 0 and use.send)
            yield from self._apply(batch, x, h, use, late, pending.stash)
        elif g is None and rule.teaches and not pending.skipped:
            yield from self._skip(batch, why, answered=pending.answered)
        if batch in self.save_after:
            self.save_after.remove(batch)
            yield Saved(batch, self.index)

    def _check_order(self, batch: int) -> None:
        if batch <= self.last_batch:
            raise MessageError(f"stage {self.index} received batch {batch} after batch {self.last_batch}")

    def _usable(self, tensor: Tensor, batch: int, what: str) -> bool:
        """Whether what came is finite throughout. Raises NonFiniteLoss if anything else stops the run."""
        with self.beside:
            usable = finite(tensor)
        if not usable and not self.skips_nan:
            raise NonFiniteLoss(
                f"the {what} that came to stage {self.index} holds NaN or infinity in batch {batch}: {CURES}"
            )
        return usable

    def _apply(
        self, batch: int, x: Tensor, h: Tensor, use: Use, late: int = 0, stash: Stash | None = None, again: bool = False
    ) -> Iterator[Message]:
        """Step 4: backpropagate a known gradient; the stage before has its answer before the optimizer steps.

        stash: the weights that h was made with, if they are not the module's. again: h's graph is still needed.
        """
        with self.metrics.clock.span("backward"):
            if use.update:
                h.backward(use.g, retain_graph=again)  # type: ignore[no-untyped-call]
                if stash:
                    stash.hand_over(self.module, self.rule.at(batch).stash or 0.0)
            elif use.send and x.requires_grad:
                (x.grad,) = torch.autograd.grad(h, x, use.g, retain_graph=again)
        if use.send and self.index > 0:
            yield Gradient(batch, x.grad)
        if use.update:
            with self.metrics.clock.span("optimizer"):
                self.updates += self.descent.step(batch, late)

    def _mend(self, batch: int, pending: Pending, mend: Mend) -> Iterator[Message]:
        """What was used at once was off: the rest joins the next update. The stage before may have waited for this."""
        sends = self.index > 0 and mend.bp_lambda > 0
        x, h = self._through(batch, pending, sends)
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        at = pending.stash.weights if pending.stash else named
        inputs = [x] * sends + [at[name] for name in named]
        with self.metrics.clock.span("backward"):
            found = list(torch.autograd.grad(h, inputs, mend.off, allow_unused=True))
        if sends:
            missed = found.pop(0)
            assert pending.back is not None
            yield Gradient(batch, pending.back if missed is None else pending.back + mend.bp_lambda * missed)
        with self.metrics.clock.span("optimizer"):
            self.descent.join(list(named.values()), found, mend.weight, mend.age, self.last_batch)

    def _leave(self, batch: int, y: Tensor, why: str) -> Iterator[Message]:
        """A batch that goes no further than this stage."""
        yield from self._skip(batch, why)
        self.metrics.trained(batch, y.shape[0], at_once=False)

    def _skip(self, batch: int, why: str, answered: bool = False) -> Iterator[Message]:
        """Nothing is learnt from this batch here, and the stage before is told so if it still waits."""
        self.metrics.skip(why)
        if self.index > 0 and not answered:
            yield Gradient(batch, None)

    def _through(self, batch: int, pending: Pending, sends: bool) -> tuple[Tensor, Tensor]:
        """(x, h) of a batch that waited, with the graph between them: as it was kept, or made again."""
        assert pending.x is not None
        if pending.graph is not None:
            return pending.x, pending.graph
        x = pending.x.requires_grad_(sends)
        with self.metrics.clock.span("forward"):
            return x, self.passes.again(batch, x, pending.along, pending.stash)

    # -- evaluation and markers --------------------------------------------------------------------------------

    def on_evaluation(self, message: Evaluation) -> Iterator[Message]:
        self.passes.mode(training=False)
        with self.metrics.evaluating(), torch.no_grad():
            along = None if message.along is None else self.beside.bring(message.along)
            h, along = parted(self.module(joined(self.beside.bring(message.x), along)))
            if self.last and message.y is not None:
                h = score(h, self.beside.bring(message.y), self.loss)
        if not self.last:
            self.evaluating.add(message.batch)
        yield Answer(message.batch, h) if self.last else Evaluation(message.batch, h, message.y, along)

    def on_answer(self, message: Answer) -> Iterator[Message]:
        if message.batch not in self.evaluating:
            raise MessageError(f"stage {self.index} did not ask for this answer to batch {message.batch}")
        self.evaluating.remove(message.batch)
        yield message

    def on_checkpoint(self, message: Checkpoint) -> Iterator[Message]:
        """The marker goes on at once; this stage saves right after its update on that batch, now or later."""
        if not self.last:
            yield message
        pending = self.pending.get(message.batch)
        if pending is not None and not pending.updated and not pending.skipped:
            self.save_after.add(message.batch)
        else:
            yield Saved(message.batch, self.index)


__all__ = ["OVERFLOWN", "POISONED", "Pending", "Stage"]
