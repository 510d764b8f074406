"""Commands that need no processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from dnipipe import cli
from dnipipe.config import describe
from tests.test_processes import words


def test_settings_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["settings"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{name} (" in shown for name, *_ in describe())


def test_check_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", *words(pipeline__boundaries="2,3,4")]) == 0
    shown = capsys.readouterr().out
    assert "stage 3" in shown and "edge 2 → 3" in shown and "predictor" in shown
    assert "float32 [8, 16, 16], 8 KiB" in shown


def test_check_shows_what_an_edge_carries_if_that_is_less(capsys: pytest.CaptureFixture[str]) -> None:
    wire = {"rule__name": "synthetic", "wire__activations": "int8", "wire__gradients": "bfloat16"}
    assert cli.main(["check", *words(pipeline__boundaries="2,3,4", wire__gradient_every=4, **wire)]) == 0
    shown = capsys.readouterr().out
    less = "on the wire activations int8 2.5 KiB, gradients bfloat16 4 KiB, one in 4"  # 8·16·16 + 4·8·16, and 2·8·16·16
    assert shown.count(f"float32 [8, 16, 16], 8 KiB a batch in a stage; {less}") == 3


def test_check_shows_what_a_share_of_a_gradient_takes(capsys: pytest.CaptureFixture[str]) -> None:
    few = {"rule__name": "synthetic", "wire__gradients": "int8", "wire__gradient_rows": 0.3}
    assert cli.main(["check", *words(pipeline__boundaries="2,3,4", **few)]) == 0
    less = "on the wire activations as they are 8 KiB, gradients int8 0.9375 KiB"  # 3 of 8 samples: 3·16·16 + 4·3·16
    assert capsys.readouterr().out.count(less) == 3


@pytest.mark.parametrize(
    ("arguments", "words", "settings"),
    [
        ("train a.toml --data.root x --quiet", "train a.toml --quiet", "--data.root x"),
        ("train --train.batches 60 a.toml", "train a.toml", "--train.batches 60"),
        ("train --train.batches=60 a.toml", "train a.toml", "--train.batches=60"),
        ("train --output.quiet --debug", "train --debug", "--output.quiet"),
        ("export runs/a -o model.safetensors", "export runs/a -o model.safetensors", ""),
    ],
)
def test_a_settings_value_is_not_taken_for_the_file(arguments: str, words: str, settings: str) -> None:
    assert cli.separate(arguments.split()) == (words.split(), settings.split())


def test_check_shows_what_guesses_a_stages_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", *words(pipeline__boundaries="2,3,4", rule__name="local", rule__forward_unlock=True)]) == 0
    edges = [line for line in capsys.readouterr().out.splitlines() if line.startswith("edge")]
    model = (256 + 16) * 16 + (16 * 64 + 64) + 2 * 64 + (64 * 16 + 16)  # tokens, positions; hidden; norm; output
    for k, line in enumerate(edges, start=1):
        assert f"and x int64 [8, 16], 1 KiB, from which {model:,} parameters guess stage {k}'s input" in line
    assert len(edges) == 3


@pytest.mark.parametrize("rule", ["local", "wait", "sync"])
def test_check_knows_every_rule(rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", *words(rule__name=rule)]) == 0
    shown = capsys.readouterr().out
    assert f"rule    {rule}" in shown
    assert ("sync    1f1b: 8 micro-batches of 1 samples" in shown) == (rule == "sync")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--rule.nam", "wait"], "unknown setting rule.nam"),
        (["check", "none.toml"], "cannot read the configuration none.toml"),
        (["check", *words(predictor__name="conv")], "predictor.name = conv needs an activation"),
        (["check", *words(rule__name="local", predictor__name="linear")], "rule.name = local needs a predictor"),
        (["train", "--resume", "/nowhere"], "/nowhere"),
        (["train", "--resume", "script"], "script was begun by a script: continue it there, with fit(..., resume="),
        (["export", "/nowhere", "-o", "x"], "/nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("script").mkdir()
    Path("script", "initial.safetensors").touch()
    assert cli.main(arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and len(shown.splitlines()) == 1


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "train" in capsys.readouterr().out
