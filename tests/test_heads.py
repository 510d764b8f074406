"""The parts of a head: what each sees, against the definition it is written from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dnipipe.config import Predictor as Settings
from dnipipe.heads import Attention, Position, Scores, Similarity
from dnipipe.kinds import build
from dnipipe.learner import Learner
from dnipipe.models import Block, cross_entropy
from dnipipe.predictors import VFBN, Edge

# -- position ------------------------------------------------------------------------------------------------------


def test_a_place_has_a_vector_which_is_zero_at_first() -> None:
    layer, h = Position(5, 8), torch.randn(3, 5, 8)
    assert torch.equal(layer(h), h)
    layer(h).sum().backward()
    assert layer.vectors.grad is not None and torch.equal(layer.vectors.grad, torch.full((5, 8), 3.0))
    with torch.no_grad():
        layer.vectors[1] = 1.0
    assert torch.equal(layer(h[:, :2]) - h[:, :2] > 0.5, torch.tensor([False, True])[None, :, None].expand(3, 2, 8))


# -- attention ---------------------------------------------------------------------------------------------------


def test_attention_is_what_the_fused_kernel_computes_and_has_a_second_derivative() -> None:
    torch.manual_seed(0)
    layer, h = Attention(8, 2), torch.randn(3, 5, 8)
    q, k, v = layer.qkv(layer.norm(h)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(layer(h), h + layer.out(fused.transpose(1, 2).flatten(2)))
    double, x = layer.double(), torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(double, (x,))


# -- a large vocabulary ------------------------------------------------------------------------------------------


def test_the_scores_of_a_batchs_own_labels_are_those_of_all_classes() -> None:
    torch.manual_seed(0)
    scores, h = Scores(4, 50, sampled=10), torch.randn(2, 3, 4)
    y = torch.tensor([[7, 49, 7], [-100, 3, 7]])  # -100: a token that the loss leaves out
    out, numbered = scores.among(h, y)
    own = torch.tensor([7, 49, 7, 3, 7])
    kept = numbered != -100
    assert torch.equal(kept, y != -100)
    here = out[kept].gather(1, numbered[kept, None]).flatten()
    torch.testing.assert_close(here, scores(h)[kept].gather(1, own[:, None]).flatten())


def test_what_is_sampled_stands_for_all_that_is_left_out() -> None:
    """Averaged over a round through the vocabulary, the softmax's sum is that over all classes; exactly so where the
    batch's own labels (here 0 … 9) are one of the samples and every other sample lies outside them."""
    torch.manual_seed(0)
    scores, h, y = Scores(4, 50, sampled=10), torch.randn(6, 4), torch.tensor([0, 2, 4, 6, 8, 1])
    with torch.no_grad():
        rounds = [scores.among(h, y) for _ in range(5)]
        whole = scores(h).exp()
    assert [out.shape for out, _ in rounds] == [(6, 6 + 4)] + [(6, 6 + 10)] * 4  # 3, 5, 7, 9 are left of the first
    for number, (out, _) in enumerate(rounds[1:], start=1):
        part = whole[:, 10 * number : 10 * number + 10].sum(1) * 44 / 10
        torch.testing.assert_close(out.exp().sum(1), whole[:, [0, 1, 2, 4, 6, 8]].sum(1) + part)
    assert scores.next.item() == 0


def test_a_50_000_word_vocabulary_costs_a_tenth_of_its_stage() -> None:
    """Floating-point operations of a stage of three blocks, and of predicting and learning for it."""
    torch.manual_seed(0)
    width, words, rows = 512, 50_000, (2, 64)
    stage = nn.Sequential(*[Block(width, 8, 0.0) for _ in range(3)])
    edge = Edge((*rows, width), rows, (*rows, words), words)
    h, y = torch.randn(*rows, width), torch.randint(words, rows)

    def cost(settings: Settings) -> int:
        learner = Learner(build(settings, edge, cross_entropy), 1e-3)
        return operations(lambda: learner.learn(h, y, learner.guess(h, y)))

    whole = operations(lambda: stage(h.requires_grad_()).sum().backward())
    assert cost(Settings(sampled=64)) < 0.1 * whole < cost(Settings())


def operations(work: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as seen:
        work()
    return sum(event.flops for event in seen.key_averages())


def test_a_sampled_head_learns_what_the_whole_one_does() -> None:
    """200 classes, told by h exactly: both end near no loss, measured over all classes."""

    def learnt(sampled: int) -> float:
        torch.manual_seed(0)
        places = torch.randn(200, 16)
        predictor = build(Settings(sampled=sampled), Edge((64, 16), (64,), (64, 200), 200), F.cross_entropy)
        assert isinstance(predictor, VFBN)
        learner = Learner(predictor, 3e-2)
        for _ in range(300):
            y = torch.randint(200, (64,))
            learner.guess(places[y], y)
        scores = predictor.scores or predictor.head[0]  # type: ignore[index]
        everything = torch.arange(200)
        return F.cross_entropy(scores(places), everything).item()

    whole, part = learnt(0), learnt(20)
    assert whole < 0.3 and part < 2 * whole + 0.1


# -- similarity --------------------------------------------------------------------------------------------------


def test_similarity_is_zero_where_classes_are_apart_as_their_labels_are() -> None:
    loss = Similarity(3, 3)
    nn.init.eye_(loss.project.weight)
    nn.init.zeros_(loss.project.bias)
    y = torch.tensor([0, 1, 2, 1])
    h = 5 * F.one_hot(y, 3).float() + torch.tensor([0.0, 7.0, -2.0])  # scaled and moved: cosines of centred rows stay
    assert loss(h, y).item() == pytest.approx(0, abs=1e-9)
    assert loss(h, torch.tensor([0, 0, 2, 1])).item() > 0.1


def test_similarity_looks_at_so_many_rows_at_most() -> None:
    loss, seen = Similarity(4, 3), []
    loss.project.register_forward_hook(lambda module, given, out: seen.append(given[0].shape))
    loss(torch.randn(600, 4), torch.randint(3, (600,)))
    loss(torch.randn(8, 100, 4), torch.randint(3, (8, 100)))
    assert seen == [(200, 4), (200, 4)]


def test_the_share_of_the_similarity_loss() -> None:
    torch.manual_seed(0)
    predictor = build(Settings(similarity=0.25), Edge((6, 8), (6,), (6, 3), 3), F.cross_entropy)
    assert isinstance(predictor, VFBN) and predictor.similarity is not None
    h, y = torch.randn(6, 8), torch.randint(3, (6,))
    expected: Tensor = 0.75 * F.cross_entropy(predictor.head(h), y) + 0.25 * predictor.similarity(h, y)
    torch.testing.assert_close(predictor.own_loss(h, y), expected)
