"""A stage on a GPU: the numbers of one on a CPU, and a host that never waits for what it told the GPU to do.

up        ─ x ─►                each of these is skipped where torch sees no GPU (benchmarks/gpu.sh runs them)
compute   ── forward ── … ─►
down      ───────── h ─►
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dnipipe.beside import Beside, beside
from dnipipe.building import Job, build_stage, plan_for
from dnipipe.config import Config, load
from dnipipe.errors import NonFiniteLoss
from dnipipe.jobs import job_of
from dnipipe.messages import Activation, Gradient, Message
from dnipipe.metrics import StageMetrics
from dnipipe.split import Plan
from dnipipe.stage import Stage
from dnipipe.state import state_of
from tests.test_processes import summary, train

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.processes,
    pytest.mark.timeout(240),
]

BATCH = 32
HEAVY = 8192


@pytest.fixture
def lines() -> Beside:
    return Beside(torch.device("cuda", 0))


@pytest.fixture(scope="module")
def product() -> float:
    """Seconds of one product of two of HEAVY's size, when everything that is used here has been used before."""
    x = torch.randn(HEAVY, HEAVY, device="cuda")
    torch.isfinite((x * 2).sum()).item()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    x @ x
    began.record()
    for _ in range(10):
        x @ x
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e4


def busy(seconds: float, product: float) -> torch.cuda.Event:
    """The compute stream has so much to do; the event is there when it is done. Waits for nothing."""
    x = torch.ones(HEAVY, HEAVY, device="cuda")
    for _ in range(max(1, int(seconds / product))):
        x @ x
    event = torch.cuda.Event()
    event.record()
    return event


# -- the lines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int8])
def test_what_is_brought_and_taken_is_the_same(lines: Beside, dtype: torch.dtype) -> None:
    for n in range(20):
        x = torch.randint(-100, 100, (300, 7 + n)).to(dtype)
        here = lines.bring(x)
        assert here.is_cuda and torch.equal(here.cpu(), x)
        there = lines.take(here + 1)
        assert lines.mark()(True) and torch.equal(there, x + 1)


def test_what_comes_is_looked_at_while_the_gpu_is_busy(lines: Beside, product: float) -> None:
    x = torch.ones(1000, 1000).pin_memory()
    computed = busy(0.5, product)
    here = lines.bring(x)
    with lines:
        finite = bool(torch.isfinite(here.sum()))
    assert finite and not computed.query()  # so nobody waited for that
    assert float((here * 2).sum()) == 2e6 and computed.query()  # and who reads a result does


def test_what_goes_waits_for_what_makes_it_and_for_nothing_behind(lines: Beside, product: float) -> None:
    x = torch.full((1000, 1000), 3.0, device="cuda")
    first = busy(0.2, product)
    there, done = lines.take(x * 2), lines.mark()
    behind = busy(0.5, product)
    assert not done(False)
    assert done(True) and first.query() and not behind.query()
    assert torch.equal(there, torch.full((1000, 1000), 6.0))


def test_memory_that_is_taken_from_is_not_given_away_before(lines: Beside) -> None:
    wanted = []
    for n in range(50):
        x = torch.full((500, 500), float(n), device="cuda")
        wanted.append(lines.take(x))
        del x
        torch.full((500, 500), -1.0, device="cuda")  # gets the same memory, as soon as it may
    assert lines.mark()(True)
    assert all(bool((there == n).all()) for n, there in enumerate(wanted))


# -- a stage -----------------------------------------------------------------------------------------------------


def settings(**named: object) -> Config:
    ours = {"model.name": "mlp", "model.layers": 4, "model.width": 64, "data.name": "mnist", "pipeline.stages": 2}
    ours["pipeline.boundaries"] = 2
    given = {key.replace("__", "."): value for key, value in named.items()}
    return load(None, tuple(word for key, value in {**ours, **given}.items() for word in (f"--{key}", str(value))))


def images(batch: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(batch)
    return torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))


def stages(config: Config) -> tuple[list[Stage], Plan]:
    job: Job = job_of(config)
    torch.manual_seed(config.train.seed)
    model = job.model()
    plan = plan_for(job, model, *images(0), 10)
    return [build_stage(job, model, plan, k, 100, StageMetrics(k, 2)) for k in range(2)], plan


def weights(*both: Stage) -> Tensor:
    return torch.cat([p.detach().cpu().flatten() for stage in both for p in stage.module.parameters()])


@contextmanager
def watched(batch: int) -> Iterator[None]:
    """torch raises where the host would wait for the GPU, once the first batches have been."""
    torch.cuda.set_sync_debug_mode("error" if batch > 5 else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def there(messages: list[Message]) -> list[Message]:
    """What a stage sends, as it comes out of a socket."""
    found: list[Message] = []
    for message in messages:
        if isinstance(message, Activation):
            found.append(Activation(message.batch, message.x.cpu(), message.y.cpu()))
        if isinstance(message, Gradient) and message.g is not None:
            found.append(Gradient(message.batch, message.g.cpu()))
    return found


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("rule", ["local", "synthetic", "blend", "delayed"])
def test_the_host_never_waits_for_the_gpu(rule: str) -> None:
    """In both stages, and with gradients that come; what came from a socket is looked at before it is brought."""
    (first, last), _ = stages(settings(rule__name=rule, rule__bp_lambda=1 if rule == "blend" else 0))
    for batch in range(1, 16):
        x, y = images(batch)
        with watched(batch):
            down = list(first.handle(Activation(batch, x, y)))
        for message in there(down):
            with watched(batch):
                up = list(last.handle(message))
            for answer in there(up):
                with watched(batch):
                    list(first.handle(answer))
    assert first.updates >= 14 and last.updates == 15


@pytest.mark.parametrize("rule", ["local", "synthetic", "blend", "wait"])
def test_it_computes_what_a_cpu_does(rule: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        (first, last), _ = stages(settings(rule__name=rule, pipeline__device=device, optimizer__name="sgd"))
        for batch in range(1, 11):
            for message in there(list(first.handle(Activation(batch, *images(batch))))):
                for answer in there(list(last.handle(message))):
                    list(first.handle(answer))
        found.append(weights(first, last))
    before = weights(*stages(settings(rule__name=rule, pipeline__device="cpu"))[0])
    on_cpu, on_gpu = found
    assert float((on_gpu - on_cpu).norm() / (on_cpu - before).norm()) < 0.01  # Adam, a predictor's, enlarges rounding


def test_a_loss_that_is_not_finite_ends_the_run_with_the_next_batch_or_before_it_is_saved() -> None:
    (_, last), plan = stages(settings())
    h = torch.randn(plan.edge(0).h)
    bad = torch.full_like(h, 1e38)
    y = torch.randint(10, (BATCH,))
    list(last.handle(Activation(1, h[:BATCH], y)))
    with torch.no_grad():
        for parameter in last.module.parameters():
            parameter.fill_(1e38)
    list(last.handle(Activation(2, bad[:BATCH], y)))
    with pytest.raises(NonFiniteLoss, match="at batch 2"):
        state_of(last, plan)


def test_all_stages_of_a_process_share_their_lines() -> None:
    assert beside(torch.device("cuda", 0), True) is beside(torch.device("cuda", 0), True)
    assert not beside(torch.device("cuda", 0), False).are_there


# -- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zmq", "gloo"])
def test_a_run_learns_what_it_learns_on_a_cpu(tmp_path: Path, kind: str) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        run = tmp_path / device
        named = {"pipeline__device": device, "transport__kind": kind, "rule__name": "wait", "pipeline__stages": 2}
        status, _, err = train(run, **named)
        assert status == 0, err
        losses.append(summary(run)["eval"]["loss"])  # type: ignore[index]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.parametrize(
    "more",
    [
        {"pipeline__autocast": "bfloat16"},
        {"pipeline__autocast": "float16"},
        {"pipeline__compile": "true"},
        {"wire__activations": "int8", "wire__gradients": "bfloat16"},
    ],
)
def test_a_run_of_every_kind_ends_well(tmp_path: Path, more: dict[str, str]) -> None:
    run = tmp_path / "run"
    status, _, err = train(run, pipeline__device="cuda", pipeline__stages=2, **more)
    assert status == 0, err
    told = summary(run)
    assert told["eval"]["loss"] < 5.0  # type: ignore[index]
    assert all(stage["peak_memory"] > 0 and stage["skipped"] == 0 for stage in told["stage"])  # type: ignore[attr-defined]


def test_a_run_on_a_gpu_goes_on_there(tmp_path: Path) -> None:
    run = tmp_path / "run"
    named = {"pipeline__device": "cuda", "pipeline__stages": 2}
    assert train(run, **named)[0] == 0
    status, _, err = train(run, "--resume", str(run), **named, train__batches=70)
    assert status == 0, err
    assert summary(run)["train"]["batches"] == 20  # type: ignore[index]  # of this start
    assert '"batch": 70,' in (run / "metrics" / "stage-1.jsonl").read_text().splitlines()[-1]
