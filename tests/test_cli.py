"""Commands that need no processes of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from dnipipe import cli
from dnipipe.config import Config, describe, load
from dnipipe.service import supervisor
from dnipipe.service.place import Place
from dnipipe.started import LAUNCHED
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


# -- what a command leaves to the processes it starts ------------------------------------------------------------


class Launched:
    """In the place of the launcher: what it was asked for, the settings as the processes would read them."""

    def __init__(self) -> None:
        self.status = 2
        self.commands: list[list[str]] = []
        self.settings: list[Config] = []
        self.runs: list[Path] = []
        self.there: list[bool] = []  # the run's folder, when the processes start

    def __call__(self, stages: int, command: Sequence[str], debug: bool = False) -> int:
        self.commands.append(list(command))
        self.settings.append(load(command[3]))
        self.runs.append(Path(command[4].removeprefix("--output.run=")))
        self.there.append(self.runs[-1].is_dir())
        assert stages == self.settings[-1].pipeline.stages and command[:2] == ["-m", "dnipipe"]
        return self.status

    @property
    def files(self) -> list[Path]:
        return [Path(command[3]) for command in self.commands]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Launched]:
    for name in ("RANK", "WORLD_SIZE", LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    made = Launched()
    monkeypatch.setattr("dnipipe.launcher.launch", made)
    yield made
    assert not [path for path in made.files if path.parent.exists()]  # the settings' own folders are gone


@pytest.mark.parametrize("command", ["train", "verify", "compare"])
def test_the_settings_go_to_the_processes_beside_the_runs_folder(command: str, started: Launched) -> None:
    assert cli.main([command, "--optimizer.lr=0.5", "--output.dir=runs"]) == 2
    (settings,) = started.settings
    assert settings.optimizer.lr == 0.5
    assert started.commands[0][2] == {"compare": "train"}.get(command, command)
    assert not list(Path().rglob("config.toml"))


def test_the_launching_process_makes_the_folder_and_takes_it_away_if_nothing_came_of_it(
    started: Launched, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("time.strftime", lambda form: "20260101-120000")
    Path("runs", "default-20260101-120000").mkdir(parents=True)  # another process began in this very second
    Path("mine").mkdir()
    assert cli.main(["train"]) == cli.main(["train", "--output.run=mine"]) == cli.main(["compare"]) == 2
    names = ["default-20260101-120000-2", "mine", "as-it-is"]
    assert [run.name for run in started.runs] == names and started.there == [True, True, False]
    assert [path.name for path in Path("runs").iterdir()] == ["default-20260101-120000"] and Path("mine").is_dir()
    capsys.readouterr()


@pytest.mark.parametrize("run", [[], ["--output.run=runs/mine"]])
def test_the_laboratory_does_so_too(run: list[str], started: Launched, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *words(transport__kind="local", pipeline__stages=9), *run]) == 2
    assert "9 stages, but the model has only 6 layers" in capsys.readouterr().err
    assert not started.commands and not list(Path("runs").iterdir())


@pytest.mark.parametrize("command", ["train", "verify", "compare"])
def test_more_stages_than_layers_are_refused_before_any_is_started(
    command: str, started: Launched, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "--pipeline.stages=50", "--model.layers=4"]) == 2
    assert "50 stages, but the model has only 6 layers: use at most that many stages" in capsys.readouterr().err
    assert not started.commands and not list(Path().rglob("*-*"))


def test_a_refused_run_leaves_a_hand_written_file_as_it_was(
    started: Launched, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder of its own, and in the very folder where the run is to be."""
    Path("exp").mkdir()
    for name in ("mine.toml", "config.toml"):
        Path("exp", name).write_text("# by hand\n[pipeline]\nstages = 5\n")
    assert cli.main(["train", "exp/mine.toml", "--output.run=exp"]) == 2
    assert len(started.commands) == 1
    assert cli.main(["train", "exp/config.toml", "--output.run", "exp/../exp"]) == 2
    assert len(started.commands) == 1  # refused before anything is started
    assert "output.run = exp/../exp would write over exp/config.toml" in capsys.readouterr().err
    assert [path.read_text()[:9] for path in Path("exp").iterdir()] == ["# by hand"] * 2


def test_so_does_a_stage_of_its_own_unless_the_file_is_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others of the run may be given that very file: only stage 0 writes."""
    monkeypatch.chdir(tmp_path)
    supervised: list[int] = []
    monkeypatch.setattr(supervisor, "supervise", lambda _, stage, *__, **___: supervised.append(stage) or 0)
    run = tmp_path / "exp"
    run.mkdir()
    (run / "config.toml").write_text('# by hand\n[pipeline]\nstages = 2\n[service]\naddresses = ["127.0.0.1:7000"]\n')
    words = ["stage", "exp/config.toml", "--output.run", "exp", "--index"]
    assert [cli.main([*words, "1"]), cli.main([*words, "0"])] == [0, 2]
    said = "output.run = exp would write over exp/config.toml, from which the settings were read: name another folder\n"
    assert said in capsys.readouterr().err
    Place.taken(run, 0)
    assert cli.main([*words, "0"]) == 0 and supervised == [1, 0]


def test_a_run_that_was_resumed_in_vain_can_be_resumed_as_before(started: Launched) -> None:
    base = Path("base")
    base.mkdir()
    (base / "config.toml").write_text("[train]\nbatches = 7\n")
    arguments = ["train", "--resume", "base"]
    assert cli.main([*arguments, "--pipeline.stages=3", "--pipeline.boundaries=1,9"]) == 2
    assert started.settings[0].pipeline.boundaries == (1, 9) and "--resume" in started.commands[0]
    assert (base / "config.toml").read_text() == "[train]\nbatches = 7\n"
    assert cli.main([*arguments, "base/config.toml"]) == 2  # the same file, and no new run
    assert started.settings[1].train.batches == 7


# -- where nothing can be written --------------------------------------------------------------------------------

NOWHERE = [
    ("output.dir", "afile/x", "cannot make a folder in it: Not a directory"),
    ("output.dir", "afile", "cannot make a folder in it: File exists"),
    ("output.dir", "/proc/x", "cannot make a folder in it: No such file"),
    ("output.run", "afile/x", "cannot make this folder: File exists (afile);"),
    ("output.run", "afile", "cannot make this folder: Not a directory"),
]


@pytest.mark.parametrize("kind", ["zmq", "local"])
@pytest.mark.parametrize(("name", "value", "why"), NOWHERE, ids=[f"{name}={value}" for name, value, _ in NOWHERE])
def test_a_folder_that_cannot_be_made_is_one_line_and_nothing_starts(
    kind: str, name: str, value: str, why: str, started: Launched, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("afile").write_text("mine")
    assert cli.main(["train", *words(transport__kind=kind), f"--{name}={value}"]) == 2
    shown = capsys.readouterr().err
    assert f"{name} = {value}: {why}" in shown and "name another" in shown and len(shown.splitlines()) == 1
    assert not started.commands and Path("afile").read_text() == "mine"


def test_settings_that_cannot_be_handed_on_are_one_line(
    started: Launched, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    assert cli.main(["train"]) == 2
    shown = capsys.readouterr().err
    assert "cannot make a folder for the settings" in shown and "TMPDIR" in shown and len(shown.splitlines()) == 1
    assert not started.commands and not list(Path("runs").iterdir())


@pytest.mark.parametrize("out", ["/proc/x/y", "afile/y", "nowhere/y", "."])
def test_an_export_that_cannot_be_written_is_one_line(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("afile").touch()
    monkeypatch.setattr("dnipipe.service.whole.parts", lambda run: [])
    monkeypatch.setattr("dnipipe.service.whole.weights", lambda parts: {"0.weight": torch.ones(2)})
    assert cli.main(["export", "run", "-o", out]) == 2
    shown = capsys.readouterr().err
    assert f"cannot write {out}: " in shown and shown.endswith(" with -o\n") and len(shown.splitlines()) == 1
    assert "checkpoint" not in shown and [path.name for path in tmp_path.iterdir()] == ["afile"]
