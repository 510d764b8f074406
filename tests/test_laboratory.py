"""All stages in one process, on a link with an exact delay: repeatable, exact, and the same code as over the wire.

tick             1   2   3   4   5   6          delay 2: what stage 0 sends at tick 1 is with stage 1 at 3,
stage 0  draws   1   2   3   4   5   6          whose answer is back at 5, when stage 0 has stepped on 1 … 4
stage 1          .   .   1   2   3   4
"""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import dnipipe
from dnipipe import checkpoint, cli
from dnipipe.config import load
from dnipipe.head import Head
from dnipipe.messages import Message
from dnipipe.tracing import merged, read
from tests.checkpoint.disk import files_limited_to
from tests.conftest import SMALL
from tests.test_processes import plain, same

OURS = {
    "transport.kind": "local",
    **SMALL,
    "train.batches": 50,
    "eval.sample": 5,
    "checkpoint.every": 0,
    "output.quiet": True,
}


def train(run: Path, *arguments: str, **settings: object) -> dict[str, Any]:
    named = {**OURS, **{key.replace("__", "."): value for key, value in settings.items()}}
    assert cli.main(["train", *arguments, f"--output.run={run}", *(f"--{k}={v}" for k, v in named.items())]) == 0
    told: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return told


@pytest.fixture(autouse=True)
def no_thread_stays() -> Any:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_each_evaluation_has_a_line_of_metrics(tmp_path: Path) -> None:
    """Though all of them fall between two lines."""
    told = train(tmp_path / "run", eval__every=10, output__every=1000)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics" / "stage-0.jsonl").read_text().splitlines()]
    found = [(line["eval.batch"], line["eval.loss"]) for line in lines if "eval.loss" in line]
    assert [batch for batch, _ in found] == [10, 20, 30, 40, 50]
    assert found[-1][1] == told["eval"]["loss"]


@pytest.mark.parametrize("delay", [0, 3])
def test_a_run_repeats_bitwise(tmp_path: Path, delay: int) -> None:
    settings = {"transport__delay": delay, "model__dropout": 0.1, "eval__every": 20}
    told = [
        train(tmp_path / "a", output__every=1000, **settings),
        train(tmp_path / "b", output__every=0.05, **settings),
    ]
    assert same(*(checkpoint.weights(tmp_path / name) for name in "ab"))
    assert told[0]["eval"] == told[1]["eval"]
    kept = [[stage[key] or 0 for key in ("cosine", "norm_ratio", "staleness")] for a in told for stage in a["stage"]]
    # sums are cut where a line of metrics is written, which is a matter of time: their last bits may differ
    assert torch.allclose(torch.tensor(kept[:4]), torch.tensor(kept[4:]), rtol=1e-5)


@pytest.mark.parametrize("delay", [0, 1, 4])
def test_a_gradient_is_late_by_there_and_back(tmp_path: Path, delay: int) -> None:
    """After the updates of its own batch and of those drawn until it came: 2·delay. The last batches lack followers."""
    log = tmp_path / "run" / "metrics" / "stage-{}.jsonl"
    train(tmp_path / "run", rule__name="synthetic", transport__delay=delay, output__every=1000)
    for k in range(3):
        (line,) = map(json.loads, Path(str(log).format(k)).read_text().splitlines())
        missing = sum(range(1, 2 * delay))  # updates that batches 50, 49, … would have seen, had there been more
        assert line["staleness"] == pytest.approx(max(1, 2 * delay) - missing / 50)


@pytest.mark.parametrize("settings", [{"rule__name": "delayed"}, {"rule__name": "blend", "rule__bp_lambda": 1.0}])
def test_a_gradient_from_the_loss_is_late_by_all_the_way_there_and_back(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """2·delay for each stage behind, and nothing holds stage 0 up meanwhile. What a batch has seen at either end is
    less: behind the last that is drawn blend makes no update, and delayed none before a gradient came."""
    train(tmp_path / "run", transport__delay=3, output__every=1000, **settings)
    for k, way in ((0, 18), (1, 12), (2, 6)):
        (line,) = map(json.loads, (tmp_path / "run" / "metrics" / f"stage-{k}.jsonl").read_text().splitlines())
        most = way - (settings["rule__name"] == "delayed")  # its own batch's update comes with the gradient
        assert line["staleness"] == pytest.approx(most - sum(range(1, way)) / 50)


@pytest.mark.parametrize("delay", [0, 1])
def test_without_a_delay_no_lookahead_goes_beyond_one_update(tmp_path: Path, delay: int) -> None:
    """So benchmarks/learning takes the runs of either lookahead for both, where no hop has a delay."""
    ended = [
        train(tmp_path / str(ahead), rule__name="blend", rule__lookahead=ahead, transport__delay=delay)["eval"]["loss"]
        for ahead in (1, 10)
    ]
    assert (ended[0] == ended[1]) == (delay == 0)


@pytest.mark.parametrize(("stages", "delay"), [(1, 0), (2, 5), (4, 0)])
def test_waiting_is_plain_autograd_whatever_the_delay(tmp_path: Path, stages: int, delay: int) -> None:
    settings = {"rule__name": "wait", "pipeline__stages": stages}
    train(tmp_path / "run", transport__delay=delay, **settings)
    shared = {key.replace(".", "__"): value for key, value in OURS.items() if not key.startswith("transport")}
    assert same(checkpoint.weights(tmp_path / "run"), plain(50, **{**shared, **settings}))


def test_the_wire_rounds_here_too_alike_in_every_run(tmp_path: Path) -> None:
    wire = {"rule__name": "synthetic", "wire__activations": "int8", "wire__gradients": "bfloat16"}
    for name, settings in {"a": wire, "b": wire, "exact": {"rule__name": "synthetic"}}.items():
        train(tmp_path / name, **settings)
    weights = {name: checkpoint.weights(tmp_path / name) for name in ("a", "b", "exact")}
    assert same(weights["a"], weights["b"]) and not same(weights["a"], weights["exact"])


def test_each_fifth_gradient_only_teaches(tmp_path: Path) -> None:
    """The others are answers without one: nothing waits for them, and each stage updates on every batch."""
    told = train(tmp_path / "run", rule__name="synthetic", wire__gradient_every=5, transport__delay=2)
    for stage in told["stage"][:-1]:
        assert stage["reasons"] == {"no gradient came": 40} and stage["at_once"] == 1.0
    assert told["stage"][-1]["skipped"] == 0


def test_a_quarter_of_each_gradient_teaches_alike_in_every_run(tmp_path: Path) -> None:
    wire = {"rule__name": "synthetic", "wire__gradient_rows": 0.25, "transport__delay": 2}
    told = [train(tmp_path / name, **wire) for name in ("a", "b")]
    assert same(checkpoint.weights(tmp_path / "a"), checkpoint.weights(tmp_path / "b"))
    assert all(stage["at_once"] == 1.0 and not stage["reasons"] for one in told for stage in one["stage"][:-1])
    train(tmp_path / "whole", rule__name="synthetic", transport__delay=2)
    assert not same(checkpoint.weights(tmp_path / "a"), checkpoint.weights(tmp_path / "whole"))


def test_a_run_is_cut_and_resumed(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, rule__name="wait")
    train(cut, rule__name="wait", train__batches=20)
    train(cut, "--resume", str(cut), rule__name="wait", pipeline__stages=2)
    assert same(checkpoint.weights(whole), checkpoint.weights(cut))


def saved(run: Path, what: str) -> dict[str, Tensor]:
    folder = checkpoint.newest(run).folder
    parts = [safetensors.torch.load_file(folder / f"stage-{k}.safetensors") for k in range(3)]
    return {f"{k} {name}": part[name] for k, part in enumerate(parts) for name in part if name.startswith(what)}


@pytest.mark.parametrize("lazily", [1, 30])
def test_a_run_goes_on_with_another_rule_and_keeps_what_both_have_learned(tmp_path: Path, lazily: int) -> None:
    """synthetic ─► delayed, which has no use for the predictors ─► synthetic, which goes on with them"""
    run, resume = tmp_path / "run", ["--resume", str(tmp_path / "run")]
    train(run, train__batches=20, rule__name="synthetic", predictor__lazily=lazily)
    before = saved(run, "predictor")
    train(run, *resume, train__batches=30, rule__name="delayed")
    assert before and same(saved(run, "predictor"), before)
    moments = saved(run, "optimizer")
    assert {name for name in moments if name.endswith("step")} and all(
        tensor.item() == 30 for name, tensor in moments.items() if name.endswith("step")
    )
    train(run, *resume, train__batches=40, rule__name="synthetic")
    after = saved(run, "predictor")
    assert after.keys() == before.keys() and not same(after, before)
    steps = {tensor.item() for name, tensor in after.items() if name.endswith("/step")}
    # of its optimizer: two lessons a batch in both stretches, at once and from g, which is learnt before all is saved
    assert steps == {2 * (20 + 10)}


@pytest.mark.parametrize(("stages", "cut"), [(3, ["0", "3", ""]), (2, None)])
def test_a_run_goes_on_cut_as_it_was_if_in_as_many_stages(stages: int, cut: list[str] | None, tmp_path: Path) -> None:
    """Its predictors stand where the cuts are."""

    def run(stages: int | list[int], epochs: int, resume: Path | None = None) -> Path:
        torch.manual_seed(1)
        net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
        ours = {"transport": {"kind": "local"}, "output": {"dir": str(tmp_path), "quiet": True}}
        made = dnipipe.Run(
            net, stages=stages, loss=F.cross_entropy, optimizer=lambda p: torch.optim.Adam(p, 1e-3), **ours
        )
        made.fit(batches(), epochs=epochs, resume=resume)
        assert made.folder is not None
        return made.folder

    def boundaries(folder: Path) -> list[str]:
        return [part.boundary for part in checkpoint.newest(folder).parts]

    first = run([1, 4], 1)  # which no balance would choose
    assert boundaries(first) == ["0", "3", ""]
    again = boundaries(run(stages, 2, resume=first))
    assert again == cut or (cut is None and again == ["2", ""])


def test_a_predictor_that_was_not_trusted_is_not_trusted_again_by_a_resume(tmp_path: Path) -> None:
    """As if it had never stopped, to the last bit: what is asked of it, and what is used."""
    wary = {"rule__name": "synthetic", "rule__trust": 0.99, "rule__warmup_rule": "zero", "checkpoint__every": 20}
    train(tmp_path / "whole", **wary)
    train(tmp_path / "cut", train__batches=20, **wary)
    train(tmp_path / "cut", "--resume", str(tmp_path / "cut"), **wary)
    assert same(*(checkpoint.weights(tmp_path / name) for name in ("whole", "cut")))
    kept = [checkpoint.at(tmp_path / "whole", batch).weights() for batch in (20, 50)]
    first = [{name: tensor for name, tensor in each.items() if name.startswith("embedding")} for each in kept]
    assert same(*first)  # stage 0 was not trusted all the while


def test_the_part_that_is_used_of_a_prediction_is_the_same_behind_a_resume(tmp_path: Path) -> None:
    """Its cosine and its length are what the part is made of."""
    wary = {"rule__name": "synthetic", "rule__trust": 0.99, "rule__warmup_rule": "scale", "checkpoint__every": 20}
    train(tmp_path / "whole", **wary)
    train(tmp_path / "cut", train__batches=20, **wary)
    train(tmp_path / "cut", "--resume", str(tmp_path / "cut"), **wary)
    assert same(*(checkpoint.weights(tmp_path / name) for name in ("whole", "cut")))
    kept = checkpoint.at(tmp_path / "whole", 20).parts
    assert max(part.counters.get("length", 0.0) for part in kept) > 1.05  # so it counts


def test_another_optimizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", train__batches=10)
    words = [f"--{k}={v}" for k, v in OURS.items()]
    assert cli.main(["train", "--resume", str(tmp_path / "run"), *words, "--optimizer.name", "nadam"]) == 2
    assert "trained with Adam, and NAdam cannot go on" in capsys.readouterr().err
    train(tmp_path / "run", "--resume", str(tmp_path / "run"), optimizer__name="adamw")


def test_another_kind_of_predictor_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train(run, train__batches=5)
    arguments = ["train", "--resume", str(run), "--train.batches=9", "--predictor.hidden=1", "--transport.kind=local"]
    before = (run / "config.toml").read_bytes()
    assert cli.main(arguments) == 2
    assert "is of another kind than the settings say" in capsys.readouterr().err
    assert (run / "config.toml").read_bytes() == before
    assert cli.main(["train", "--resume", str(run), "--train.batches=9"]) == 0  # as if nothing had been tried
    assert load(run / "config.toml").train.batches == 9


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_are_not_at_work_in_one_folder(
    resume: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second begins in the middle of the first."""
    run = tmp_path / "run"
    status: list[int] = []
    again = ["--resume", str(run)] if resume else []
    words = [f"--{name}={value}" for name, value in OURS.items()]

    def within(head: Head) -> Message | None:
        if not status:
            status.append(cli.main(["train", *again, *words, "--train.batches=60", f"--output.run={run}"]))
        return next(head._script)

    if resume:
        train(run, train__batches=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Head, "next", within)
        train(run, *again)
    assert status == [2] and f"output.run = {run}: another run is at work" in capsys.readouterr().err
    assert json.loads((run / "summary.json").read_text())["train"]["batches"] == (30 if resume else 50)
    assert not (run / "lock").exists()


@pytest.mark.parametrize("ends", ["interrupted", "dies"])
def test_what_ended_in_its_last_evaluation_is_resumed_for_that_alone(
    ends: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, whole = tmp_path / "run", train(tmp_path / "whole", train__batches=20, eval__every=10)
    evaluate = Head._evaluate

    def cut_short(head: Head, batch: int) -> Iterator[Message | None]:
        for number, message in enumerate(evaluate(head, batch)):
            if batch == head.total and number == 2:
                if ends == "dies":
                    raise ArithmeticError("no more")
                head.interrupt()
            yield message

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Head, "_evaluate", cut_short)
        words = {**OURS, "train.batches": 20, "eval.every": 10, "output.run": run}
        assert cli.main(["train", *(f"--{k}={v}" for k, v in words.items())]) == (ends == "dies")
    assert (
        ends == "dies"
        or f"stopped at batch 20 of 20; go on with: dnipipe train --resume {run}" in capsys.readouterr().out
    )
    assert checkpoint.newest(run).batch == 20
    told = train(run, "--resume", str(run), train__batches=20, eval__every=10)
    assert (told["eval"], told["batch"], told["finished"]) == (whole["eval"], 20, True)
    assert told["train"]["batches"] == 0
    assert cli.main(["train", "--resume", str(run)]) == 2  # now it is at its end
    assert f"the checkpoint in {run} is at batch 20 and the run ends at 20" in capsys.readouterr().err


# -- a disk that is full -----------------------------------------------------------------------------------------


def fails(run: Path, capsys: pytest.CaptureFixture[str], **settings: object) -> str:
    """The one line that a run ends with that was under way."""
    named = {**OURS, **{key.replace("__", "."): value for key, value in settings.items()}}
    assert cli.main(["train", f"--output.run={run}", *(f"--{k}={v}" for k, v in named.items())]) == 1
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1
    return shown


def test_a_trace_that_the_disk_does_not_take_ends_the_run_by_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel itself refuses it: more than is needed for anything else."""
    with files_limited_to(400_000):
        shown = fails(tmp_path / "run", capsys, train__batches=400, output__every=1000, output__trace=True)
    assert re.search(r"cannot write .*/run/trace/stage-[0-3].jsonl: File too large; make room there, or train", shown)
    assert merged(read(tmp_path / "run")).stages[3].spans  # what was written can be read


def test_a_line_of_metrics_that_the_disk_does_not_take_ends_the_run_by_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behind what a killed run has left in the file, there is no room for another one."""
    path = tmp_path / "run" / "metrics" / "stage-1.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("\n" * 400_000)
    with files_limited_to(400_000):
        shown = fails(tmp_path / "run", capsys, output__every=1000)
    assert f"cannot write {path}: File too large; make room there, and resume the run" in shown


def test_a_checkpoint_that_cannot_be_completed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("dnipipe.checkpoint.save.sync", full)
    shown = fails(tmp_path / "run", capsys)
    assert "cannot complete checkpoint 50: No space left on device; older checkpoints are untouched (" in shown


def test_a_summary_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "summary.json.unfinished").mkdir(parents=True)
    shown = fails(tmp_path / "run", capsys)
    assert f"cannot write {tmp_path / 'run' / 'summary.json'}: Is a directory" in shown
    assert checkpoint.newest(tmp_path / "run").batch == 50


class Failing(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if threading.current_thread().name == "stage 2" and self.training:
            raise ArithmeticError("no more")
        return super().forward(input)


def a_run(folder: Path, *layers: nn.Module, rule: str = "blend") -> dnipipe.Run:
    return dnipipe.Run(
        nn.Sequential(*layers),
        stages=[1, 2],
        loss=F.cross_entropy,
        optimizer=lambda p: torch.optim.Adam(p, 1e-2),
        rule=rule,
        transport={"kind": "local", "delay": 0 if rule == "wait" else 1},
        output={"dir": str(folder), "quiet": True},
    )


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(96, 8)
    return list(zip(x.split(32), x[:, :3].argmax(1).split(32), strict=True))


def test_ones_own_model_in_a_session_without_a_script(tmp_path: Path) -> None:
    torch.manual_seed(1)
    run = a_run(tmp_path, nn.Linear(8, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, 16)), nn.Linear(16, 3))
    told = run.fit(batches(), batches(), epochs=30)
    assert told["eval"]["accuracy"] > 0.8 and told["train"]["batches"] == 90
    trained = run.model().eval()
    loss = sum(F.cross_entropy(trained(x), y).item() for x, y in batches()) / 3
    assert loss == pytest.approx(told["eval"]["loss"], rel=1e-5)


@pytest.mark.parametrize("rule", ["wait", "blend", "delayed"])
def test_a_layer_that_writes_into_its_input_learns_as_one_that_does_not(rule: str, tmp_path: Path) -> None:
    """In a stage, and where one begins; what waits runs its forward again."""
    learnt = []
    for inplace in (False, True):
        torch.manual_seed(1)
        acts = [nn.LeakyReLU(0.5, inplace=inplace) for _ in range(3)]
        second = nn.Sequential(acts[0], nn.Linear(16, 16), acts[1], nn.Linear(16, 16))
        run = a_run(tmp_path, nn.Linear(8, 16), second, nn.Sequential(acts[2], nn.Linear(16, 3)), rule=rule)
        run.fit(batches(), epochs=4)
        learnt.append(run.model().state_dict())
    assert same(*learnt)


@pytest.mark.parametrize("stages", [[1, 3], [2, 4]])
def test_a_layer_may_stand_in_several_places(stages: list[int], tmp_path: Path) -> None:
    """One activation for all, in a stage or in two: what is trained is the model, and none of its places is missing."""
    torch.manual_seed(1)
    act = nn.Softsign()
    model = nn.Sequential(nn.Linear(8, 16), act, nn.Linear(16, 16), act, nn.Linear(16, 3), act)
    run = dnipipe.Run(
        model,
        stages=stages,
        loss=F.cross_entropy,
        optimizer=lambda p: torch.optim.Adam(p, 1e-2),
        rule="wait",
        transport={"kind": "local"},
        output={"dir": str(tmp_path), "quiet": True},
    )
    alone = copy.deepcopy(model)
    optimizer = torch.optim.Adam(alone.parameters(), 1e-2)
    run.fit(batches())
    for x, y in batches():
        optimizer.zero_grad()
        F.cross_entropy(alone(x), y).backward()
        optimizer.step()
    assert same(run.model().state_dict(), alone.state_dict())


class Shifts(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.sub_(1.0)


def test_a_layer_that_writes_into_its_input_leaves_the_data_as_it_is(tmp_path: Path) -> None:
    """Another evaluation measures the same."""
    train, validation = batches(), batches()
    run = a_run(tmp_path, nn.Sequential(Shifts(), nn.Linear(8, 16)), nn.Linear(16, 16), nn.Linear(16, 3))
    run._settings["eval"] = {"every": 1}
    run.fit(train, validation)
    for (x, _), (untouched, _) in zip([*train, *validation], batches() * 2, strict=True):
        assert torch.equal(x, untouched)


def test_layers_train_in_training_mode_whatever_they_were_left_in(tmp_path: Path) -> None:
    """By their user, or by the evaluation at the end of the fit before."""
    run = a_run(tmp_path, nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)), nn.Linear(6, 6), nn.Linear(6, 3))
    run._model.eval()
    for fits in (1, 2):
        run.fit(batches(), batches()[:2])
        counted = run.model().state_dict()["0.1.num_batches_tracked"].item()
        assert counted == fits * len(batches())


def several_labels(h: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(h, y.float().view_as(h))


@pytest.mark.parametrize(
    "label",
    [
        lambda x: (x[:, :3] > 0).long(),  # several labels a sample
        lambda x: (x[:, 0] > 0).long(),  # one, beside a single score
        lambda x: (x[:, :1] > 0).long(),
        lambda x: (x[:, :3] > 0).to(torch.uint8),
    ],
)
def test_whole_numbers_that_name_no_class_have_a_loss_and_no_accuracy(
    label: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    data = [(x, label(x)) for x, _ in batches()]
    scores = 1 if data[0][1].dim() == 1 else data[0][1].shape[1]
    run = a_run(tmp_path, nn.Linear(8, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, 16)), nn.Linear(16, scores))
    run._loss = several_labels
    told = run.fit(data, data, epochs=30)
    assert told["eval"]["loss"] < 0.5 and told["eval"]["accuracy"] is None


class Stream(torch.utils.data.IterableDataset[tuple[Tensor, Tensor]]):
    """Data whose length nobody knows: its DataLoader has a __len__ that raises."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in batches():
            yield from zip(x, y, strict=True)


def test_validation_data_may_have_no_length(tmp_path: Path) -> None:
    run = a_run(tmp_path, nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3))
    assert run.fit(batches(), torch.utils.data.DataLoader(Stream(), batch_size=16))["eval"]["accuracy"] > 0


def test_validation_data_without_a_batch_is_refused_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path, nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3))
    with pytest.raises(SystemExit) as end:
        run.fit(batches(), batches()[3:])
    assert end.value.code == 2 and "the validation data has no batch" in capsys.readouterr().err


def test_a_stage_that_fails_is_the_reason_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path, nn.Linear(8, 16), nn.Linear(16, 16), Failing(16, 3))
    with pytest.raises(SystemExit) as end:
        run.fit(batches())
    assert end.value.code == 1
    assert "ArithmeticError: no more" in capsys.readouterr().err


def test_it_is_not_for_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr("faulthandler.enable", lambda **_: None)  # it is pytest's here
    assert cli.main(["train", "--transport.kind=local", "--output.run=x"]) == 2
    assert "start it without torchrun" in capsys.readouterr().err


def test_a_delay_needs_the_laboratory(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--transport.delay=3"]) == 2
    assert "a real link has a delay of its own; use transport.kind = local" in capsys.readouterr().err


def at_work(run: Path, **settings: object) -> subprocess.Popen[str]:
    """An endless run in a process of its own, which has told of a batch."""
    endless = {**OURS, "train.batches": 10**6, "output.quiet": False, "output.every": 0.1, **settings}
    process = subprocess.Popen(
        [sys.executable, "-m", "dnipipe", "train", f"--output.run={run}", *(f"--{k}={v}" for k, v in endless.items())],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    tells_of_a_batch(process)
    return process


def tells_of_a_batch(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    while not process.stdout.readline().startswith("batch "):
        assert process.poll() is None, process.communicate()


def ends_in_order(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=40)
    assert process.returncode == 0, err
    assert "stopped at batch" in out and err == ""


@pytest.mark.processes
def test_an_interrupt_ends_it_in_order(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ends_in_order(at_work(run))
    assert checkpoint.newest(run).batch >= 1


@pytest.mark.processes
def test_a_run_that_was_stopped_for_longer_than_any_wait_goes_on(tmp_path: Path) -> None:
    """As by Ctrl-Z and fg."""
    process = at_work(tmp_path / "run", **{"transport.timeout": 2})
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    tells_of_a_batch(process)
    ends_in_order(process)
