"""Settings: two sources, one check, and errors that name the setting, its value and the way out."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.nn as nn
import torch.nn.functional as F

from dnipipe.config import Config, build, default, describe, flat, load, replace, shared_settings, under
from dnipipe.config.rules import READ_BY
from dnipipe.config.sections import LONGEST, Rule
from dnipipe.errors import ConfigError
from dnipipe.folders import check_unused, write_config
from dnipipe.gradient_rules import RULES
from dnipipe.learner import Learner
from dnipipe.predictors import VFBN

UNLOCKED = ["--rule.name", "synthetic", "--rule.forward_unlock"]
EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_command_line_goes_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(
        '[rule]\nname = "wait"\n[train]\nepochs = 3\n[optimizer]\nlr = 1\n[pipeline]\nboundaries = [1, 2, 3]\n'
    )
    config = load(path, ["--train.epochs", "5", "--output.quiet", "--data.root=x=y", "--pipeline.window", "auto"])
    assert (config.rule.name, config.train.epochs, config.optimizer.lr) == ("wait", 5, 1.0)
    assert (config.pipeline.boundaries, config.output.quiet, config.data.root) == ((1, 2, 3), True, "x=y")


@pytest.mark.parametrize("words", [["--rule.name", "blend"], ["--rule.then", "9:local, 20:blend"]])
def test_a_rule_begins_with_its_own_settings_and_any_source_goes_over_them(words: list[str]) -> None:
    begun = load(None, words)
    assert (begun.rule.bp_lambda, begun.rule.correction, begun.rule.stash) == (1.0, 0.5, True)
    assert (begun.rule.lookahead, begun.predictor.matching) == (1, 0.0)
    own = load(None, [*words, "--rule.bp_lambda", "0", "--predictor.matching", "0.2"])
    assert (own.rule.bp_lambda, own.predictor.matching, own.rule.lookahead) == (0.0, 0.2, 1)
    plain = build({"rule": {"name": "local"}})
    assert plain.rule.lookahead == 0 and plain.predictor.matching == 0.1 and load(None).rule.stash


def test_blend_looks_further_ahead_where_the_rate_stays_what_it_is() -> None:
    assert build({}).rule.lookahead == load(None, ["--optimizer.schedule", "constant"]).rule.lookahead == 10
    assert build({}, scheduled=True).rule.lookahead == build({"optimizer": {"schedule": "linear"}}).rule.lookahead == 1
    assert build({"rule": {"lookahead": 3}}).rule.lookahead == 3
    assert build({"rule": {"name": "delayed"}}).rule.lookahead == 0
    assert load(None, ["--rule.name", "local", "--optimizer.schedule", "constant"]).rule.lookahead == 0


def test_a_run_that_changes_its_rule_leaves_behind_what_the_old_one_began_with(tmp_path: Path) -> None:
    """As a resumed run does: its config.toml says every setting."""
    run = write_config(tmp_path, load(None, ["--rule.name", "blend", "--rule.correction", "0.7"]))
    local = load(run, ["--rule.name", "local"])
    assert (local.rule.stash, local.rule.lookahead, local.rule.bp_lambda) == (False, 0, 0.0)
    assert local.rule.correction == 0.7 and local.predictor.matching == 0.1
    again = load(write_config(tmp_path, local), ["--rule.name", "blend"])
    assert (again.rule.stash, again.rule.lookahead, again.predictor.matching) == (True, 1, 0.0)
    assert load(run, ["--train.seed", "1"]).rule.correction == 0.7
    constant = write_config(tmp_path, load(None, ["--optimizer.schedule", "constant"]))
    assert load(constant, ["--rule.name", "local"]).rule.lookahead == 0


@pytest.mark.parametrize("name", ["sync", "wait"])
def test_the_same_run_under_another_rule_has_the_wire_as_it_begins(name: str) -> None:
    """Fewer gradients are for the rule that only learns from them, and sync's tensors go by torch's own way."""
    few = ["--wire.gradient_every", "4", "--wire.gradient_rows", "0.5", "--wire.gradient_queue", "2"]
    config = load(None, ["--rule.name", "synthetic", "--wire.activations", "int8", *few])
    other = under(config, name)
    assert other.rule.name == name and not other.wire.changed
    assert config.wire.changed.keys() - {"wire.activations"} == {word[2:] for word in few[::2]}


@pytest.mark.parametrize(
    "words",
    [
        "--rule.name blend --rule.then 9:delayed --rule.compensate 0.1",
        "--rule.name wait --rule.then 9:synthetic --rule.warmup 20 --rule.bp_lambda 0.5",
        "--rule.name local --rule.warmup 20 --wire.activations int8",
        "--rule.name local --rule.then 9:synthetic --wire.gradients int8",
        "--rule.name synthetic --rule.trust 0 --rule.warmup_rule scale",
        "--rule.name synthetic --rule.warmup_rule scale",  # so that rule.trust alone can be tried
        "--rule.name blend --rule.warmup 20 --rule.reschedule 9",  # what is applied meanwhile comes late
        "--rule.name delayed --rule.reschedule 9",
        "--rule.name blend --rule.then 9:local --wire.gradient_every 2",
    ],
)
def test_what_one_rule_of_a_run_reads_is_let_in(words: str) -> None:
    load(None, words.split())


class Noting:
    """[rule], and which of its settings were asked for."""

    def __init__(self, rule: Rule) -> None:
        self._rule, self.read = rule, set[str]()

    def __getattr__(self, key: str) -> object:
        self.read.add(key)
        return getattr(self._rule, key)


def test_the_table_of_who_reads_what_is_what_they_read() -> None:
    read = {}
    for name in RULES.keys() - {"sync"}:
        config = load(None, [f"--rule.name={name}"])
        noting = Noting(dataclasses.replace(config.rule, stash=True))
        learner = Learner(VFBN(nn.Linear(4, 3), F.cross_entropy, 0.1), 1e-3)
        RULES[name].build(SimpleNamespace(rule=noting, predictor=config.predictor), lambda: learner)  # type: ignore[arg-type]
        read[name] = noting.read
    for key, (readers, _) in READ_BY.items():
        if key not in ("lookahead", "trust", "trust_length"):  # the optimizer's and the predictor's, which ask no rule
            assert {name for name in read if key in read[name]} == set(readers), key
    assert set.union(*read.values()) - READ_BY.keys() == {"correction"}


def test_a_rule_that_is_no_name_is_refused_whoever_goes_over_it(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('[rule]\nname = ["blend"]\n')
    with pytest.raises(ConfigError, match=r"rule\.name = \['blend'\]: expected synthetic"):
        load(path)
    assert load(path, ["--rule.name", "local"]).rule.name == "local"


def test_settings_show_what_a_rule_begins_with() -> None:
    shown = {name: help for name, _, _, help in describe()}
    assert shown["rule.bp_lambda"].endswith("[with blend: 1.0]") and "with blend" not in shown["rule.accumulate"]


def test_the_embedded_default_is_valid() -> None:
    assert load(None) == build(default())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rule.nam", "wait"], "unknown setting rule.nam (did you mean rule.name?)"),
        (["--rul.name", "wait"], "unknown section [rul] (did you mean rule?)"),
        (
            ["--rule.name", "wiat"],
            "rule.name = 'wiat': expected synthetic | blend | local | delayed | wait | sync (did you mean wait?)",
        ),
        (["--train.epochs", "many"], "train.epochs = 'many': expected a whole number"),
        (["--train.epochs", "1.5"], "train.epochs = '1.5': expected a whole number"),
        (["--train.epochs", "0"], "train.epochs = 0: expected at least 1"),
        (["--rule.bp_lambda", "1.5"], "rule.bp_lambda = 1.5: expected at least 0.0 and at most 1.0"),
        (["--optimizer.lr", "nan"], "optimizer.lr = nan: expected at least 0.0"),
        (["--output.quiet", "maybe"], "output.quiet = 'maybe': expected true or false"),
        (["--pipeline.window", "0"], "pipeline.window = 0: expected at least 1"),
        (["--pipeline.window", "big"], "pipeline.window = 'big': expected a whole number or auto"),
        (["--pipeline.boundaries", "1,x"], "pipeline.boundaries = '1,x': expected a list of whole numbers"),
        (["--pipeline.boundaries", "1.5"], "pipeline.boundaries = '1.5': expected a list of whole numbers"),
        (["--pipeline.boundaries", "1"], "pipeline.boundaries = [1] cuts 2 stages, but pipeline.stages = 4"),
        (["--rule.name", "wait", "--pipeline.window", "4"], "pipeline.window = 4 with rule.name = wait"),
        (["--rule.name", "sync", "--pipeline.window", "4"], "pipeline.window = 4 with rule.name = sync"),
        (["--rule.name", "sync", "--rule.accumulate", "4"], "rule.accumulate = 4 with rule.name = sync: it is for"),
        (["--rule.name", "sync", "--rule.stash"], "rule.stash = true with rule.name = sync: it is for stages that"),
        (["--rule.name", "sync", "--rule.then", "9:local"], "rule.name = sync with rule.then = '9:local': a run is"),
        (["--rule.name", "local", "--rule.then", "9:sync"], "change the rule with --resume"),
        (["--rule.name", "sync", "--transport.kind", "local"], "transport.kind = local with rule.name = sync"),
        (["--rule.name", "sync", "--train.on_nan", "skip"], "train.on_nan = skip with rule.name = sync"),
        (
            ["--rule.name", "sync", "--wire.gradients", "int8"],
            "wire.gradients = int8 with rule.name = sync: torch sends each tensor as it is, and all; leave "
            "wire.gradients at as is, or use another rule",
        ),
        (["--rule.name", "sync", "--wire.gradient_every", "2"], "wire.gradient_every = 2 with rule.name = sync: torch"),
        (["--sync.schedule", "zb"], "sync.schedule = 'zb': expected 1f1b | gpipe"),
        (
            ["--rule.name", "delayed", "--rule.warmup", "9"],
            "rule.warmup = 9 with rule.name = delayed: it predicts nothing",
        ),
        (["--rule.name", "wait", "--rule.warmup", "9"], "rule.warmup = 9 with rule.name = wait: it predicts nothing"),
        (
            ["--rule.name", "delayed", "--rule.then", "9:wait", "--rule.warmup", "9"],
            "rule.warmup = 9 with rule.name = delayed and rule.then = 9:wait: it predicts nothing",
        ),
        (["--rule.name", "wait", "--rule.bp_lambda", "1"], "rule.bp_lambda = 1.0 with rule.name = wait: it mixes no"),
        (
            ["--rule.name", "local", "--rule.bp_lambda", "1"],
            "leave rule.bp_lambda at 0.0, or use rule.name = synth",
        ),
        (
            ["--rule.name", "blend", "--rule.compensate", "10"],
            "rule.compensate = 10.0 with rule.name = blend: only rule.name = delayed makes up for a gradient's delay",
        ),
        (
            ["--rule.name", "wait", "--rule.warmup_rule", "zero"],
            "rule.warmup_rule = zero with rule.name = wait: there",
        ),
        (
            ["--rule.name", "local", "--rule.warmup", "9", "--rule.warmup_rule", "zero"],
            "rule.warmup_rule = zero with rule.name = local",
        ),
        (
            ["--rule.name", "local", "--rule.reschedule", "9"],
            "rule.reschedule = 9 with rule.name = local: no update",
        ),
        (["--rule.name", "blend", "--rule.reschedule", "9"], "leave rule.reschedule at 0, or use rule.name = delayed"),
        (
            ["--rule.name", "local", "--wire.gradients", "int8"],
            "wire.gradients = int8 with rule.name = local: no grad",
        ),
        (["--rule.name", "local", "--rule.lookahead", "3"], "rule.lookahead = 3 with rule.name = local"),
        (["--rule.name", "delayed", "--rule.bp_lambda", "1"], "rule.bp_lambda = 1.0 with rule.name = delayed"),
        (["--rule.name", "blend", "--rule.correction", "0"], "rule.correction = 0.0: expected at least 0.001"),
        (["--rule.p_update", "0"], "rule.p_update = 0.0: expected at least 0.001 and at most 1.0"),
        (
            ["--rule.p_update", "0.5", "--rule.accumulate", "4"],
            "rule.p_update = 0.5 with rule.accumulate = 4: batches that are left out",
        ),
        (
            ["--rule.forward_unlock", "--rule.name", "blend"],
            "rule.name = blend with rule.forward_unlock = true: the gradient that arrives is of a guessed input",
        ),
        (["--rule.forward_unlock", "--rule.name", "wait"], "use rule.name = synthetic or local"),
        (["--rule.forward_unlock", "--rule.name", "delayed"], "use rule.name = synthetic or local"),
        ([*UNLOCKED, "--rule.warmup", "9"], "rule.warmup_rule = wait with rule.forward_unlock = true"),
        (
            ["--rule.stash", "--rule.name", "synthetic"],
            "rule.stash = true with rule.name = synthetic: only rule.name = delayed and blend have",
        ),
        (
            ["--rule.name", "delayed", "--rule.compensate", "0.1"],
            "rule.compensate = 0.1 without the weights it is computed from: set rule.stash = true",
        ),
        (
            ["--rule.warmup_rule", "local", "--predictor.name", "linear"],
            "rule.warmup_rule = local with predictor.name = linear: it has no loss of its own; use predictor.name = ",
        ),
        ([*UNLOCKED, "--rule.trust", "0"], "would be applied; use rule.warmup_rule = zero"),
        (
            ["--rule.forward_unlock", "--pipeline.stages", "1"],
            "pipeline.stages = 1 with rule.forward_unlock = true: there is no input to guess",
        ),
        (["--wire.gradients", "int4"], "wire.gradients = 'int4': expected as is | bfloat16 | float16 | int8 (did you"),
        (
            ["--rule.name", "delayed", "--wire.gradient_every", "2"],
            "wire.gradient_every = 2 with rule.name = delayed: it does not only learn from gradients or mend with "
            "them; leave wire.gradient_every at 1, or use rule.name = blend or synthetic",
        ),
        (["--rule.name", "local", "--wire.gradient_every", "2"], "wire.gradient_every = 2 with rule.name = local"),
        (
            ["--rule.name", "synthetic", "--rule.then", "9:wait", "--wire.gradient_every", "2"],
            "wire.gradient_every = 2 with rule.name = synthetic and rule.then = 9:wait",
        ),
        (
            ["--rule.name", "synthetic", "--rule.warmup", "9", "--wire.gradient_every", "2"],
            "wire.gradient_every = 2 with rule.warmup_rule = wait: it applies each gradient meanwhile; use",
        ),
        (
            ["--rule.name", "blend", "--wire.gradient_rows", "0.5"],
            "wire.gradient_rows = 0.5 with rule.name = blend: it does not only learn from gradients; leave",
        ),
        (
            ["--rule.name", "synthetic", "--rule.bp_lambda", "0.5", "--wire.gradient_rows", "0.5"],
            "wire.gradient_rows = 0.5 with rule.bp_lambda = 0.5: a gradient that goes on to the stage before",
        ),
        (
            [
                *["--rule.name", "synthetic", "--rule.warmup", "9", "--rule.warmup_rule", "zero"],
                *["--wire.gradient_rows", "0.5"],
            ],
            "wire.gradient_rows = 0.5 with rule.warmup_rule = zero: meanwhile each gradient goes on",
        ),
        (
            ["--rule.name", "delayed", "--wire.gradient_queue", "4"],
            "wire.gradient_queue = 4 with rule.name = delayed: it does not only learn from gradients; leave",
        ),
        (
            ["--rule.name", "synthetic", "--transport.kind", "gloo", "--wire.gradient_queue", "2"],
            "wire.gradient_queue = 2 with transport.kind = gloo: it does not tell whether a link is full; use",
        ),
        (["--rule.accumulate", "0"], "rule.accumulate = 0: expected at least 1"),
        (["--rule.reschedule", "-1"], "rule.reschedule = -1: expected at least 0"),
        (["--optimizer.beta1", "1"], "optimizer.beta1 = 1.0: expected at least 0.0 and at most 0.999"),
        (["--optimizer.schedule", "steps"], "optimizer.drops = [] with optimizer.schedule = steps: name the batches"),
        (
            ["--optimizer.drops", "9"],
            "optimizer.drops = [9] with optimizer.schedule = cosine: use optimizer.schedule",
        ),
        (["--model.width", "90"], "model.width = 90 is not a multiple of model.heads = 4"),
        (["--data.evaluate", "test"], "data.evaluate = test: data.name = stdlib has no test set"),
        (["train"], "cannot read 'train': settings are written --section.key value"),
        (["--verbose"], "cannot read '--verbose'"),
    ],
)
def test_what_is_wrong_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nepochs = true\n", "train.epochs = True: expected a whole number"),
        ("[train]\nepochs = 2.0\n", "train.epochs = 2.0: expected a whole number"),
        ("train = 3\n", "train = 3 is a section, not a setting"),
        ("epochs = 3\n", "unknown section [epochs]"),
        ("[train\n", "is not valid TOML"),
        ('[service]\naddresses = "a:1"\n', "service.addresses = 'a:1': expected a list of texts"),
        ("[service]\naddresses = [7000]\n", "service.addresses = (7000,): expected a list of texts"),
    ],
)
def test_a_file_is_checked_alike(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert message in str(caught.value)


def test_a_list_of_texts_is_read_from_either_source(tmp_path: Path) -> None:
    words = ["--service.addresses", "10.0.0.1:7000, [::1]:7001,/run/stage-2"]
    listed = load(None, words)
    assert listed.service.addresses == ("10.0.0.1:7000", "[::1]:7001", "/run/stage-2")
    assert load(write_config(tmp_path, listed)).service.addresses == listed.service.addresses
    assert load(None, ["--service.addresses", ""]).service.addresses == ()
    kinds = {name: kind for name, kind, *_ in describe()}
    assert (kinds["service.addresses"], kinds["optimizer.drops"]) == ("a list of texts", "a list of whole numbers")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.toml: No such file"):
        load(tmp_path / "none.toml")


def test_a_run_folder_holds_its_settings(tmp_path: Path) -> None:
    config = load(
        None,
        [
            "--output.run",
            "elsewhere",
            "--pipeline.boundaries",
            "1,2,3",
            "--data.root",
            'a "quoted" \\ path',
            "--optimizer.lr",
            "1e-7",
        ],
    )
    assert load(write_config(tmp_path / "run", config)) == replace(config, output={"run": ""})


@pytest.mark.parametrize("left", ["summary.json", "checkpoints/00000010/manifest.json"])
def test_a_run_is_not_trained_over(tmp_path: Path, left: str) -> None:
    check_unused(tmp_path / "new")
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    check_unused(tmp_path)  # an unfinished checkpoint is no run
    (tmp_path / left).touch()
    with pytest.raises(ConfigError, match=rf"output.run = {tmp_path} holds a run already: continue it with --resume"):
        check_unused(tmp_path)


def test_stages_may_differ_in_paths_and_display_only() -> None:
    shared = {line.split("=")[0] for line in shared_settings(Config())}
    local = {name for name, _ in flat(Config())} - shared
    assert local == {
        "data.root",
        "pipeline.device",
        "transport.address",
        "service.restarts",
        "security.keys",
        "security.private_network",
        "output.dir",
        "output.run",
        "output.quiet",
        "output.tensorboard",
        "output.every",
    }


def test_no_wait_is_longer_than_can_be_waited() -> None:
    """Seconds end as milliseconds, in a C int, or as a timedelta: neither knows infinity."""
    timed = [name for name, kind, _, help in describe() if kind == "a number" and "seconds" in help]
    assert timed == [
        "transport.timeout",
        *(f"service.{key}" for key in ("patience", "silence", "hung", "save_every")),
        "output.every",
    ]
    for name in timed:
        for value in ("inf", "1e7"):
            with pytest.raises(ConfigError, match=rf"{name} = {float(value)}: expected .* and at most 1000000\.0"):
                load(None, [f"--{name}={value}"])
        load(None, [f"--{name}={LONGEST}"])
    assert 1000 * LONGEST < 2**31 and timedelta(seconds=LONGEST)


def test_every_setting_explains_itself() -> None:
    rows = list(describe())
    assert [name for name, *_ in rows] == [name for name, _ in flat(Config())]
    assert all(kind and help for _, kind, _, help in rows)


@pytest.mark.parametrize("name", ["mnist.toml", "lm.toml"])
def test_the_examples_load(name: str) -> None:
    settings = load(EXAMPLES / name, ["--data.root", "somewhere"])
    assert settings.pipeline.stages == 4 and settings.data.root == "somewhere"
