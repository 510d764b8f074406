"""Proof (a): h.backward(g) with a known g gives Σ g·∂h/∂θ and x.grad = Σ g·∂h/∂x. The fact the whole design builds on.

Checked against the explicit Jacobian and against central differences, in float64. Then what docs/known-gradient.md says
beside it: its snippets are run as they stand, and each of its traps is sprung.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, jacrev

DOC = Path(__file__).parent.parent / "docs" / "known-gradient.md"
SNIPPETS = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```\n", DOC.read_text(encoding="utf-8"), re.DOTALL)


def dense() -> tuple[nn.Module, Tensor]:
    stage = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    return stage, torch.randn(5, 3)


def convolution() -> tuple[nn.Module, Tensor]:
    stage = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 2, 2))
    return stage, torch.randn(3, 2, 4, 4)


@pytest.fixture(params=[dense, convolution], ids=["dense", "convolution"])
def problem(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    """A stage with batch norm in training mode, an input and a gradient for its output, in float64."""
    torch.manual_seed(0)
    stage, x = request.param()
    stage, x = stage.double().train(), x.double()
    return stage, x, torch.randn_like(stage(x))


def known(stage: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """What h.backward(g) leaves in .grad: of every parameter by its name, and of x."""
    stage.zero_grad()
    x = x.clone().requires_grad_()
    stage(x).backward(g)
    leaves = {**dict(stage.named_parameters()), "x": x}
    return {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}


def output(stage: nn.Module, at: dict[str, Tensor]) -> Tensor:
    """h as a function of the parameters and x; batch norm counts on copies, which leave no trace in the stage."""
    values = {name: value for name, value in at.items() if name != "x"}
    buffers = {name: buffer.clone() for name, buffer in stage.named_buffers()}
    h: Tensor = functional_call(stage, {**values, **buffers}, (at["x"],))
    return h


def point(stage: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {**{name: parameter.detach().clone() for name, parameter in stage.named_parameters()}, "x": x}


# -- the proof ---------------------------------------------------------------------------------------------------


def test_a_known_gradient_times_the_explicit_jacobian(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    stage, x, g = problem
    at = point(stage, x)
    jacobian = jacrev(lambda values: output(stage, values))(at)  # {name: (*h.shape, *parameter.shape)}
    found = known(stage, x, g)
    assert found.keys() == at.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, torch.tensordot(g, jacobian[name], dims=g.dim()), rtol=1e-10, atol=1e-12)


def test_a_known_gradient_against_central_differences(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    """No autograd on this side: Σ g·h at θ ± step, one element of θ at a time."""
    stage, x, g = problem
    at, step = point(stage, x), 1e-5
    for name, grad in known(stage, x, g).items():
        slopes = torch.empty_like(grad).flatten()
        for i in range(slopes.numel()):
            ends = []
            for sign in (1, -1):
                moved = at[name].clone()
                moved.view(-1)[i] += sign * step
                with torch.no_grad():
                    ends.append((g * output(stage, {**at, name: moved})).sum())
            slopes[i] = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(grad, slopes.view_as(grad), rtol=1e-6, atol=1e-8)


def test_scaling_g_scales_the_result(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    stage, x, g = problem
    once, scaled = known(stage, x, g), known(stage, x, -2.5 * g)
    for name in once:
        torch.testing.assert_close(scaled[name], -2.5 * once[name])
    assert once["x"].abs().sum() > 0


def test_a_graph_older_than_an_optimizer_step_raises(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    """So what waits for its gradient keeps data, never a graph (stage.py, step 5)."""
    stage, x, g = problem
    stale, fresh = stage(x), stage(x)
    fresh.backward(g)
    torch.optim.SGD(stage.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward(g)
    assert known(stage, x, g)  # the remedy: run the forward again


# -- docs/known-gradient.md --------------------------------------------------------------------------------------


def test_every_snippet_of_the_doc_is_found() -> None:
    text = DOC.read_text(encoding="utf-8")
    assert len(SNIPPETS) == text.count("```python") == text.count("```text") == 3


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_of_the_doc_prints_what_the_doc_says(number: int, tmp_path: Path) -> None:
    code, expected = SNIPPETS[number]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-W", "error", "-c", code]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=100)
    assert (ran.returncode, ran.stderr, ran.stdout) == (0, "", expected)


@pytest.fixture
def line() -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)


def test_the_shape_of_g_must_be_that_of_h(line: tuple[nn.Linear, Tensor, Tensor]) -> None:
    stage, x, g = line
    for wrong in (g[:1], g[:, :1], g.flatten(), g.sum()):
        with pytest.raises(RuntimeError, match="shape"):
            stage(x).backward(wrong)
    with pytest.raises(RuntimeError, match="scalar outputs"):
        stage(x).backward()


def test_a_detached_output_and_whole_numbers_have_no_gradient(line: tuple[nn.Linear, Tensor, Tensor]) -> None:
    stage, x, g = line
    with pytest.raises(RuntimeError, match="does not require grad"):
        stage(x).detach().backward(g)
    with pytest.raises(RuntimeError, match="floating point"):
        torch.arange(4).requires_grad_()


def test_the_mean_makes_g_smaller_by_the_number_of_loss_terms() -> None:
    """Class labels of shape (B, T) are B·T terms: per term, the gradient does not depend on how many there are."""
    torch.manual_seed(0)
    h, y = torch.randn(4, 6, 3).requires_grad_(), torch.randint(3, (4, 6))
    total = torch.autograd.grad(F.cross_entropy(h.flatten(0, 1), y.flatten(), reduction="sum"), h)[0]
    for samples in (1, 2, 4):
        mean = F.cross_entropy(h[:samples].flatten(0, 1), y[:samples].flatten())
        (g,) = torch.autograd.grad(mean, h)
        torch.testing.assert_close(samples * 6 * g[:samples], total[:samples])


def test_a_second_backward_raises_and_one_needs_no_retained_graph(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    stage, x, g = problem
    h = stage(x)
    h.backward(g)
    with pytest.raises(RuntimeError, match="second time"):
        h.backward(g)


def test_gradients_add_up_until_zeroed(line: tuple[nn.Linear, Tensor, Tensor]) -> None:
    stage, x, g = line
    x.requires_grad_()
    stage(x).backward(g)
    assert stage.weight.grad is not None and x.grad is not None
    once, at_x = stage.weight.grad.clone(), x.grad.clone()
    stage(x).backward(g)
    torch.testing.assert_close(stage.weight.grad, 2 * once)
    torch.testing.assert_close(x.grad, 2 * at_x)


def test_a_forward_that_is_run_again_counts_batch_norm_twice_and_drops_others() -> None:
    torch.manual_seed(0)
    stage, x = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)), torch.randn(64, 3)
    first = stage(x)
    assert stage[0].num_batches_tracked == 1
    again = stage(x)
    assert stage[0].num_batches_tracked == 2
    assert not torch.equal(first == 0, again == 0)


def test_a_product_gives_the_same_but_broadcasts_and_reaches_the_predictor(
    line: tuple[nn.Linear, Tensor, Tensor],
) -> None:
    stage, x, g = line
    expected = torch.autograd.grad(stage(x), list(stage.parameters()), g)
    g.requires_grad_()
    (stage(x) * g).sum().backward()
    for parameter, grad in zip(stage.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grad)
    assert g.grad is not None  # the product's other factor: whatever made g would be trained to be h
    (stage(x) * g[:1]).sum().backward()  # a wrong shape, and no word
    stage(x).backward(g)
    assert torch.equal(g.grad[1:], stage(x).detach()[1:])  # backward(g) itself leaves g alone
