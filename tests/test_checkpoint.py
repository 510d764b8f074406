"""Checkpoints: what is saved comes back bit by bit, under any cut; what is damaged or unfinished is passed over."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn as nn
from torch import Tensor

from dnipipe import checkpoint
from dnipipe.checkpoint import StageState, files
from dnipipe.errors import CheckpointError

CUTS = {
    1: (0, 8),
    2: (0, 5, 8),
    3: (0, 2, 4, 8),
    4: (0, 2, 4, 7, 8),
}  # stages -> where the 8 layers are cut; 5 is in no other


class Odd(nn.Module):
    """Buffers of every awkward kind."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))  # zero-dim
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("brain", torch.tensor([1.0, float("nan"), -0.0], dtype=torch.bfloat16))
        self.register_buffer("mask", torch.tensor([[True, False]]))
        self.register_buffer("turned", torch.arange(12.0).reshape(3, 4).t()[1:])  # part of a storage, transposed

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 6), tied, nn.Linear(6, 6), Odd(), nn.Linear(6, 3)
    )


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": adam,
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters),  # states of other shapes than the weight's
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=0.1),  # no state at all
}


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        net(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()


def stage_states(net: nn.Sequential, optimizer: torch.optim.Optimizer, stages: int, batch: int = 0) -> list[StageState]:
    """The whole model's state as `stages` stages would have it."""
    whole = checkpoint.optimizer_state(optimizer, dict(net.named_parameters()))
    states = []
    for k in range(stages):
        part = cut(net, stages, k)
        last = k == stages - 1
        torch.manual_seed(CUTS[stages][k + 1])
        states.append(
            StageState(
                weights=dict(part.state_dict()),
                optimizer={name: whole[name] for name, _ in part.named_parameters() if name in whole},
                boundary="" if last else str(CUTS[stages][k + 1] - 1),
                predictor={} if last else {"weight": torch.randn(3, 2), "bias": torch.randn(3)},
                predictor_optimizer={} if last else {"weight": {"exp_avg": torch.randn(3, 2), "step": 7}},
                counters={"batch": batch, "share": 0.1 + k},
            )
        )
    return states


def cut(net: nn.Sequential, stages: int, k: int) -> nn.Sequential:
    children = list(net.named_children())
    return nn.Sequential(OrderedDict(children[CUTS[stages][k] : CUTS[stages][k + 1]]))


def save(run: Path, batch: int, states: list[StageState], keep: int = 9) -> Path:
    for k, state in enumerate(states):
        checkpoint.save_part(run, batch, k, state)
    return checkpoint.complete(run, batch, len(states), {"seed": batch}, keep)


def small(batch: int, stages: int = 2) -> list[StageState]:
    """Stages of one weight each, whose value tells the batch."""
    return [
        StageState(
            {f"{k}.w": torch.full((3,), float(batch + k))}, {}, str(k) if k + 1 < stages else "", {}, {}, {"n": batch}
        )
        for k in range(stages)
    ]


def folders(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    dense = tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensor.dtype, tuple(tensor.shape), bytes(dense.reshape(-1).view(torch.uint8).tolist())


def plain(value: Any) -> Any:
    """Something == can compare: tensors become their bits."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return bits(value) if isinstance(value, Tensor) else (type(value), value)


# -- round trips -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_bit_of_every_stage_comes_back(tmp_path: Path, name: str) -> None:
    net = model()
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer, range(3))
    states = stage_states(net, optimizer, 4)
    assert save(tmp_path, 300, states) == tmp_path / "checkpoints" / "00000300"
    found = checkpoint.newest(tmp_path)
    assert (found.batch, found.stages, found.settings, found.skipped) == (300, 4, {"seed": 300}, ())
    found.check_model(net.state_dict())
    for k, state in enumerate(states):
        again = found.state_for(cut(net, 4, k).state_dict(), state.boundary)
        assert plain(vars(again)) == plain(vars(state))


def test_numbers_none_and_settings_keep_their_type(tmp_path: Path) -> None:
    kept = {"step": 3, "rate": 0.1, "on": True, "buffer": None, "limit": float("inf"), "moment": torch.ones(2)}
    state = StageState({"w": torch.ones(2)}, {"w": kept}, "", {}, {}, {"updates": 2**70, "share": 1 / 3})
    settings = {"a": 1, "b": 0.5, "c": "ĝ", "d": True, "e": None, "f": [1, 2], "g": {10: 1, 9: 2}}
    checkpoint.save_part(tmp_path, 1, 0, state)
    checkpoint.complete(tmp_path, 1, 1, settings, keep=1)
    found = checkpoint.newest(tmp_path)
    assert found.settings == {**settings, "g": {"10": 1, "9": 2}}
    assert plain(vars(found.state_for(state.weights, ""))) == plain(vars(state))


def test_what_is_loaded_outlives_the_files_and_owns_its_memory(tmp_path: Path) -> None:
    save(tmp_path, 1, small(5))
    loaded = checkpoint.newest(tmp_path).weights()
    for file in (tmp_path / "checkpoints").rglob("*.safetensors"):
        file.write_bytes(b"")
    shutil.rmtree(tmp_path / "checkpoints")
    loaded["0.w"] += 1
    assert loaded["0.w"].tolist() == [6.0] * 3 and loaded["1.w"].tolist() == [6.0] * 3


def test_the_parts_of_one_checkpoint_are_of_one_batch(tmp_path: Path) -> None:
    """Stages save batch 1 and 2 at different times; each checkpoint holds its own batch only."""
    one, two = small(100), small(200)
    checkpoint.save_part(tmp_path, 1, 0, one[0])
    checkpoint.save_part(tmp_path, 2, 0, two[0])
    checkpoint.save_part(tmp_path, 1, 1, one[1])
    checkpoint.complete(tmp_path, 1, 2, {}, keep=3)
    assert {name: w[0].item() for name, w in checkpoint.weights(tmp_path).items()} == {"0.w": 100, "1.w": 101}
    checkpoint.save_part(tmp_path, 2, 1, two[1])
    checkpoint.complete(tmp_path, 2, 2, {}, keep=3)
    assert {name: w[0].item() for name, w in checkpoint.weights(tmp_path).items()} == {"0.w": 200, "1.w": 201}


# -- another cut -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_run_of_four_stages_goes_on_with_fewer(tmp_path: Path, stages: int) -> None:
    net = model()
    optimizer = adam(net.parameters())
    train(net, optimizer, range(3))
    old = {state.boundary: state for state in stage_states(net, optimizer, 4)}
    save(tmp_path, 300, list(old.values()))
    found = checkpoint.newest(tmp_path)
    for k, state in enumerate(stage_states(net, optimizer, stages)):
        again = found.state_for(state.weights, state.boundary)
        assert plain(again.weights) == plain(state.weights)
        assert plain(again.optimizer) == plain(state.optimizer)
        before = old.get(state.boundary)  # the same boundary brings its predictor; a new one starts anew
        assert plain(again.predictor) == plain(before.predictor if before else {}), k
        assert plain(again.predictor_optimizer) == plain(before.predictor_optimizer if before else {})
        assert again.counters == (before.counters if before else {})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.update({"9.weight": torch.ones(1)}), "9.weight"),
        (lambda w: w.update({"0.weight": torch.ones(6, 5)}), r"0.weight is float32 \[6, 4\] .* float32 \[6, 5\]"),
        (lambda w: w.update({"0.bias": w["0.bias"].double()}), "0.bias is float32 .* float64"),
        (lambda w: w.pop("7.bias"), "7.bias"),
    ],
    ids=["missing", "shape", "dtype", "extra"],
)
def test_another_model_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], named: str
) -> None:
    net = model()
    save(tmp_path, 1, stage_states(net, adam(net.parameters()), 2))
    other = dict(net.state_dict())
    change(other)
    with pytest.raises(CheckpointError, match=named):
        checkpoint.newest(tmp_path).check_model(other)


def test_a_stage_asking_for_an_unknown_weight_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, small(1))
    with pytest.raises(CheckpointError, match=r"no 2\.w"):
        checkpoint.newest(tmp_path).state_for({"0.w": torch.ones(3), "2.w": torch.ones(3)}, "")


# -- optimizers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_run_goes_on_bitwise_as_the_uncut_one(tmp_path: Path, name: str) -> None:
    whole = model()
    uncut = OPTIMIZERS[name](groups(whole))
    train(whole, uncut, range(6))

    first = model()
    optimizer = OPTIMIZERS[name](groups(first))
    train(first, optimizer, range(3))
    save(tmp_path, 3, stage_states(first, optimizer, 4))
    second = model(seed=1)
    train(second, OPTIMIZERS[name](groups(second)), range(9, 11))
    again = OPTIMIZERS[name](groups(second))
    state = checkpoint.newest(tmp_path).state_for(second.state_dict(), "")
    before = plain(vars(state))
    second.load_state_dict(state.weights)
    checkpoint.load_optimizer_state(again, dict(second.named_parameters()), state.optimizer)
    train(second, again, range(3, 6))
    assert plain(dict(second.state_dict())) == plain(dict(whole.state_dict()))
    assert plain(again.state_dict()["state"]) == plain(uncut.state_dict()["state"])
    assert plain(vars(state)) == before  # the optimizer works on its own copies


def test_state_goes_by_the_name_of_its_own_parameter() -> None:
    net = model()
    optimizer = adam(groups(net))
    train(net, optimizer, range(2))
    named = dict(net.named_parameters())
    state = checkpoint.optimizer_state(optimizer, named)
    assert state.keys() == named.keys()
    assert all(state[name]["exp_avg"] is optimizer.state[parameter]["exp_avg"] for name, parameter in named.items())


def groups(net: nn.Module) -> list[dict[str, Any]]:
    """Biases in a group of their own, so the optimizer's order is not the model's."""
    biases = [p for name, p in net.named_parameters() if name.endswith("bias")]
    return [{"params": biases}, {"params": [p for name, p in net.named_parameters() if not name.endswith("bias")]}]


def test_options_come_from_the_configuration_and_casting_is_torchs() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = torch.optim.Adam([weight], lr=0.25)
    state = {"w": {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}}
    checkpoint.load_optimizer_state(optimizer, {"w": weight}, state)
    assert optimizer.param_groups[0]["lr"] == 0.25
    kept = optimizer.state[weight]
    assert kept["exp_avg"].dtype == torch.bfloat16 and kept["step"].dtype == torch.float32


def test_optimizer_state_that_cannot_be_placed_or_saved_is_refused() -> None:
    layer = nn.Linear(2, 2)
    named = dict(layer.named_parameters())
    with pytest.raises(CheckpointError, match=r"state of 4\.gone"):
        checkpoint.load_optimizer_state(adam(layer.parameters()), named, {"4.gone": {}})
    with pytest.raises(ValueError, match="no name"):
        checkpoint.optimizer_state(adam(layer.parameters()), {"weight": layer.weight})
    lbfgs = torch.optim.LBFGS(layer.parameters())
    lbfgs.state[layer.weight]["old"] = [1, 2]
    with pytest.raises(CheckpointError, match="LBFGS keeps old of weight as a list"):
        checkpoint.optimizer_state(lbfgs, named)
    optimizer = adam(layer.parameters())
    optimizer.state["everything"] = 3  # type: ignore[index]
    with pytest.raises(CheckpointError, match="'everything', which belongs to no parameter"):
        checkpoint.optimizer_state(optimizer, named)


# -- what cannot be saved ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weights": {"w": torch.ones(1), "bad\nname": torch.ones(1)}}, "bad"),
        ({"weights": {"w": torch.ones(1), "": torch.ones(1)}}, "name"),
        ({"weights": {"w": 1.0}}, "weights/w"),
        ({"weights": {"w": torch.ones(1, dtype=torch.complex128)}}, "complex128"),
        ({"optimizer": {"v": {"step": 1}}}, "optimizer state of v"),
        ({"optimizer": {"w": {"a/b": 1}}}, "a/b"),
        ({"optimizer": {"w": {"kind": "text"}}}, "optimizer/w/kind"),
        ({"counters": {"n": torch.ones(1)}}, "counter 'n'"),
    ],
)
def test_what_cannot_be_saved_is_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    empty: dict[str, Any] = {"optimizer": {}, "predictor": {}, "predictor_optimizer": {}, "counters": {}}
    with pytest.raises(CheckpointError, match=named):
        checkpoint.save_part(
            tmp_path, 1, 0, StageState(**{"weights": {"w": torch.ones(1)}, "boundary": "", **empty, **change})
        )
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("*.tmp"))


def test_missing_parts_are_named(tmp_path: Path) -> None:
    states = small(1, stages=3)
    checkpoint.save_part(tmp_path, 1, 1, states[1])
    with pytest.raises(CheckpointError, match=r"lacks stage-0.safetensors, stage-0.json, stage-2.safetensors"):
        checkpoint.complete(tmp_path, 1, 3, {}, keep=1)
    assert not (tmp_path / "checkpoints" / "00000001" / "manifest.json").exists()


def test_parts_of_two_different_cuts_make_no_checkpoint(tmp_path: Path) -> None:
    checkpoint.save_part(tmp_path, 1, 0, StageState({"0.w": torch.ones(1), "1.w": torch.ones(1)}, {}, "1", {}, {}, {}))
    checkpoint.save_part(tmp_path, 1, 1, small(1)[1])
    with pytest.raises(CheckpointError, match=r"stages 0 and 1 both saved '1\.w'"):
        checkpoint.complete(tmp_path, 1, 2, {}, keep=1)


@pytest.mark.parametrize(
    "change", [{"stage": 0}, {"batch": 2}, {"counters": 3}, {"bytes": 5}], ids=["stage", "batch", "form", "size"]
)
def test_a_record_that_is_not_this_parts_makes_no_checkpoint(tmp_path: Path, change: dict[str, Any]) -> None:
    for k, state in enumerate(small(1)):
        checkpoint.save_part(tmp_path, 1, k, state)
    resign(tmp_path / "checkpoints" / "00000001" / "stage-1.json", lambda record: record.update(change))
    with pytest.raises(CheckpointError, match=r"00000001/stage-1"):
        checkpoint.complete(tmp_path, 1, 2, {}, keep=1)


def test_a_part_saved_again_but_not_to_the_end_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k, state in enumerate(small(1)):
        checkpoint.save_part(tmp_path, 1, k, state)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            checkpoint.save_part(tmp_path, 1, 1, small(50)[1])
    with pytest.raises(CheckpointError, match=r"lacks stage-1\.json:"):
        checkpoint.complete(tmp_path, 1, 2, {}, keep=1)


# -- unfinished and damaged --------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


def resign(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and make its checksum fit: no damage, but hostile or from another version."""
    content = json.loads(path.read_text())["content"]
    change(content)
    crc32 = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    path.write_text(json.dumps({"crc32": crc32, "content": content}))


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_link(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "manifest missing": lambda folder: os.remove(folder / "manifest.json"),
    "manifest half written": lambda folder: (folder / "manifest.json").rename(folder / "manifest.json.tmp"),
    "manifest cut short": lambda folder: truncate(folder / "manifest.json"),
    "manifest empty": lambda folder: (folder / "manifest.json").write_bytes(b""),
    "manifest changed": lambda folder: (folder / "manifest.json").write_text(
        (folder / "manifest.json").read_text().replace('"seed": 200', '"seed": 201')
    ),
    "manifest a list": lambda folder: (folder / "manifest.json").write_text("[1]"),
    "manifest too deep": lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
    "manifest not text": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe{}"),
    "manifest a folder": lambda folder: a_folder(folder / "manifest.json"),
    "manifest a link": lambda folder: a_link(folder / "manifest.json"),
    "part missing": lambda folder: os.remove(folder / "stage-1.safetensors"),
    "part truncated": lambda folder: truncate(folder / "stage-1.safetensors"),
    "part empty": lambda folder: (folder / "stage-1.safetensors").write_bytes(b""),
    "part flipped": lambda folder: flip(folder / "stage-1.safetensors"),
    "part a pipe": lambda folder: a_pipe(folder / "stage-1.safetensors"),
    "part a link": lambda folder: a_link(folder / "stage-1.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_passed_over_and_named(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    save(tmp_path, 100, small(100))
    damage(save(tmp_path, 200, small(200)))
    found = checkpoint.newest(tmp_path)
    assert found.batch == 100 and found.weights()["1.w"].tolist() == [101.0] * 3
    assert len(found.skipped) == 1 and "00000200" in found.skipped[0] and "\n" not in found.skipped[0]


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "format": lambda content: content.update(format=2),
    "batch": lambda content: content.update(batch=300),
    "settings": lambda content: content.update(settings=[1]),
    "no parts": lambda content: content.update(parts=[]),
    "stages": lambda content: content.update(stages=3),
    "part": lambda content: content.update(parts=[1, 2]),
    "bytes": lambda content: content["parts"][0].update(bytes="many"),
    "negative": lambda content: content["parts"][0].update(bytes=-1),
    "boundary": lambda content: content["parts"][0].update(boundary="\x1b[2J"),
    "one boundary twice": lambda content: content["parts"][0].update(boundary=""),
    "tensors": lambda content: content["parts"][0].update(tensors=[]),
    "section": lambda content: content["parts"][0]["tensors"].update({"../../etc/passwd": ["float32", [1]]}),
    "name": lambda content: content["parts"][0]["tensors"].update({"weights/\x00": ["float32", [1]]}),
    "shape": lambda content: content["parts"][0]["tensors"].update({"weights/0.w": ["float32", [-3]]}),
    "form": lambda content: content["parts"][0]["tensors"].update({"weights/0.w": "float32"}),
    "number": lambda content: content["parts"][0]["numbers"].update({"optimizer/0.w/step": "3"}),
    "number as weight": lambda content: content["parts"][0]["numbers"].update({"weights/0.v": 3}),
    "counter": lambda content: content["parts"][0]["counters"].update(n=[]),
    "weight twice": lambda content: content["parts"][0]["tensors"].update({"weights/1.w": ["float32", [3]]}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_manifest_is_checked_whatever_its_checksum_says(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    save(tmp_path, 100, small(100))
    resign(save(tmp_path, 200, small(200)) / "manifest.json", change)
    found = checkpoint.newest(tmp_path)
    assert found.batch == 100 and "00000200" in found.skipped[0] and found.skipped[0].isprintable()


@pytest.mark.parametrize(
    "tensor", [{"weights/0.w": ["float64", [3]]}, {"weights/0.w": ["float32", [3]], "weights/0.v": ["float32", [1]]}]
)
def test_a_file_that_is_not_what_the_manifest_says_is_refused(tmp_path: Path, tensor: dict[str, Any]) -> None:
    folder = save(tmp_path, 200, small(200))
    resign(folder / "manifest.json", lambda content: content["parts"][0].update(tensors=tensor))
    with pytest.raises(CheckpointError, match=r"stage-0.safetensors is damaged"):
        checkpoint.newest(tmp_path).weights()


def test_damage_after_the_choice_is_noticed_when_the_file_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path, 200, small(200))
    found = checkpoint.at(tmp_path, 200)
    flip(folder / "stage-1.safetensors")
    assert plain(found.state_for({"0.w": torch.ones(3)}, "0").weights) == plain(small(200)[0].weights)
    with pytest.raises(CheckpointError, match=r"stage-1.safetensors is damaged"):
        found.state_for({"1.w": torch.ones(3)}, "")


def test_no_checkpoint_says_so_and_what_was_passed_over(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in .*checkpoints: name a run"):
        checkpoint.newest(tmp_path)
    (tmp_path / "checkpoints" / "notes").mkdir(parents=True)  # not ours
    checkpoint.save_part(tmp_path, 7, 0, small(7)[0])
    with pytest.raises(CheckpointError, match=r"passed over: .*00000007.*never completed"):
        checkpoint.newest(tmp_path)
    with pytest.raises(CheckpointError, match=r"00000009.*never completed"):
        checkpoint.at(tmp_path, 9)


# -- killed, or the disk is full ---------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def die_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> list[str]:
    """Every call that changes the disk counts as a step; the one numbered `step` raises instead."""
    done: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            done.append(name)
            if len(done) == step:
                raise error
            return real(*args, **options)

        return call

    for holder, name in (
        (os, "fsync"),
        (os, "replace"),
        (files, "save_file"),
        (shutil, "rmtree"),
        (Path, "write_text"),
    ):
        monkeypatch.setattr(holder, name, counted(name, getattr(holder, name)))
    return done


def test_a_run_killed_at_any_step_has_a_whole_checkpoint_and_can_save_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for batch in (50, 100):
        save(tmp_path / "before", batch, small(batch))
    steps, seen = 0, set()
    while True:
        steps += 1
        run = tmp_path / str(steps)
        shutil.copytree(tmp_path / "before", run)
        with monkeypatch.context() as patch:
            done = die_at(patch, steps, Killed())
            with contextlib.suppress(Killed):
                save(run, 200, small(200), keep=2)
        found = checkpoint.newest(run)
        seen.add(found.batch)
        assert plain(found.weights()) == plain(
            {name: w for state in small(found.batch) for name, w in state.weights.items()}
        )
        save(run, 300, small(300), keep=2)
        assert folders(run)[-1] == 300 and len(folders(run)) == 2
        assert not list(run.rglob("*.tmp"))
        if len(done) < steps:
            break
    assert seen == {100, 200} and steps > 15


@pytest.mark.parametrize("step", range(1, 16))
def test_a_full_disk_is_a_clear_error_and_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    save(tmp_path, 100, small(100))
    with monkeypatch.context() as patch:
        die_at(patch, step, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OSError, match=r"cannot .* 200: No space left on device; older checkpoints") as caught:
            save(tmp_path, 200, small(200))
    assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.tmp"))  # they would keep the disk full
    assert plain(checkpoint.at(tmp_path, 100).weights())["1.w"] == bits(torch.full((3,), 101.0))


def test_files_are_synced_before_their_rename_and_folders_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[int | str] = []  # inode of what was synced; "rename"
    real_sync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        events.append(os.fstat(descriptor).st_ino)
        real_sync(descriptor)

    def rename(source: Path, target: Path) -> None:
        assert events[-1] == source.stat().st_ino
        real_replace(source, target)
        events.append("rename")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    folder = save(tmp_path, 1, small(1))
    inside = folder.stat().st_ino
    renames = [i for i, event in enumerate(events) if event == "rename"]
    assert len(renames) == 5 and all(events[i + 1] == inside for i in renames)
    assert events[-2:] == [folder.parent.stat().st_ino, tmp_path.stat().st_ino]


def test_an_old_checkpoint_half_removed_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for batch in (100, 200):
        save(tmp_path, batch, small(batch))

    def rmtree(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(OSError, match=r"checkpoint 300 is complete, but .* cannot be removed: Permission denied"):
        save(tmp_path, 300, small(300), keep=2)
    assert checkpoint.newest(tmp_path).batch == 300 and checkpoint.at(tmp_path, 200).batch == 200
    with pytest.raises(CheckpointError, match="never completed"):
        checkpoint.at(tmp_path, 100)


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """The kernel itself refuses to write more into one file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_kernel_refuses_half_way_keeps_its_errno(tmp_path: Path) -> None:
    save(tmp_path, 100, small(100))
    large = StageState({"0.w": torch.ones(1 << 20)}, {}, "", {}, {}, {})
    with pytest.raises(OSError, match="cannot save stage 0 at batch 200") as caught, files_limited_to(1 << 16):
        checkpoint.save_part(tmp_path, 200, 0, large)
    assert caught.value.errno == errno.EFBIG
    assert checkpoint.newest(tmp_path).batch == 100 and not list(tmp_path.rglob("*.tmp"))


# -- tidying -----------------------------------------------------------------------------------------------------


def test_the_newest_complete_are_kept_and_older_unfinished_go(tmp_path: Path) -> None:
    for batch in (100, 200, 300):
        save(tmp_path, batch, small(batch))
    checkpoint.save_part(tmp_path, 350, 0, small(350)[0])  # unfinished, older than 400
    checkpoint.save_part(tmp_path, 500, 0, small(500)[0])  # unfinished, but still to come
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "checkpoints" / "00000001").symlink_to(outside)
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    save(tmp_path, 400, small(400), keep=2)
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"00000300", "00000400", "00000500", "00000001", "notes.txt"} and outside.is_dir()
    (tmp_path / "checkpoints" / "notes.txt").unlink()
    (tmp_path / "checkpoints" / "00000001").unlink()
    save(tmp_path, 500, small(500), keep=1)
    assert folders(tmp_path) == [500]


def test_parts_left_by_a_killed_start_with_more_stages_do_not_get_in(tmp_path: Path) -> None:
    save(tmp_path, 100, small(100))
    for k, state in enumerate(small(1, stages=4)):
        checkpoint.save_part(tmp_path, 200, k, state)
    folder = save(tmp_path, 200, small(200, stages=2))
    names = {"manifest.json", *(f"stage-{k}.{kind}" for k in (0, 1) for kind in ("json", "safetensors"))}
    assert {path.name for path in folder.iterdir()} == names
    assert {name: w[0].item() for name, w in checkpoint.weights(tmp_path).items()} == {"0.w": 200, "1.w": 201}


# -- export ------------------------------------------------------------------------------------------------------


def test_an_export_loads_into_the_plain_model(tmp_path: Path) -> None:
    net = model()
    optimizer = adam(net.parameters())
    train(net, optimizer, range(2))
    save(tmp_path, 2, stage_states(net, optimizer, 4))
    out = tmp_path / "model.safetensors"
    assert checkpoint.export(tmp_path, out) == len(net.state_dict())
    other = model(seed=5)
    other.load_state_dict(safetensors.torch.load_file(out), strict=True)
    assert plain(dict(other.state_dict())) == plain(dict(net.state_dict()))
    assert plain(checkpoint.weights(tmp_path)) == plain(dict(net.state_dict()))


def test_an_export_that_fails_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, small(1))
    out = tmp_path / "model.safetensors"
    out.write_text("older")
    with monkeypatch.context() as patch:
        die_at(patch, 2, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(OSError, match=r"cannot write .*model.safetensors: Input/output error"):
            checkpoint.export(tmp_path, out)
    assert out.read_text() == "older" and not list(tmp_path.glob("*.tmp"))
    with pytest.raises(OSError, match="No such file or directory"):
        checkpoint.export(tmp_path, tmp_path / "nowhere" / "model.safetensors")
