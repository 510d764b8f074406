"""The study `learning`: valid cells, equal budgets, tables from given records. Nothing is trained here."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cells import ROOT, Records
from benchmarks.learning.__main__ import main
from benchmarks.learning.report import LearningStudy
from benchmarks.learning.study import OF_BLEND, OF_HEADS, OF_LESSONS, OF_REMEDIES, QUICK, SEARCH, TASKS, Axes
from benchmarks.plots import draw
from dnipipe.config import flat, load
from tests.benchmarks.conftest import record

LM = replace(Axes(), tasks=("lm",))


@pytest.mark.parametrize(
    "study",
    [
        LearningStudy(),
        LearningStudy(OF_BLEND, OF_BLEND),
        LearningStudy(OF_LESSONS, OF_LESSONS),
        LearningStudy(OF_HEADS, OF_HEADS),
        LearningStudy(OF_REMEDIES, OF_REMEDIES),
        LearningStudy(QUICK, QUICK, quick=True),
    ],
)
def test_every_cell_is_a_run_in_the_laboratory(study: LearningStudy, tmp_path: Path) -> None:
    cells = study.cells(Records(tmp_path))
    assert len({str(cell) for cell in cells}) == len(cells) > 15
    for cell in cells:
        config = cell.loaded
        assert config.transport.kind == "local" and config.train.batches > 0 and config.eval.sample in (0, 200)
        alone = str(cell.labels["rule"]).startswith("sync")
        assert config.pipeline.stages == (1 if alone else cell.labels.get("stages", 4))


def test_the_task_first_is_the_run_without_a_file_but_for_what_it_shows_and_where_it_runs() -> None:
    given, plain = dict(flat(load(ROOT / TASKS["first"].config))), dict(flat(load(None)))
    assert {name for name in plain if given[name] != plain[name]} == {
        *("eval.every", "eval.sample", "checkpoint.every", "transport.kind")
    }


def test_every_rule_has_the_same_budget(tmp_path: Path) -> None:
    searches = [cell for cell in LearningStudy().cells(Records(tmp_path)) if SEARCH in cell.labels]
    count = Counter((cell.table, cell.labels["rule"], cell.labels["delay"]) for cell in searches)
    assert set(count.values()) == {3}
    given = {"wait", "sync-nadam", "blend", "blend-10", "blend-every-2", "blend-every-4"}  # take the rate that sync has
    assert {rule for _, rule, _ in count} == set(Axes().rules) - given
    assert all(cell.loaded.data.evaluate == "validation" and cell.loaded.train.seed == 0 for cell in searches)


@pytest.mark.parametrize(
    ("axes", "plain", "changed"),
    [
        (
            OF_BLEND,
            "blend",
            [
                {"rule.bp_lambda": 0.0},
                {"rule.correction": 1.0},
                {"rule.lookahead": 0},
                {"rule.stash": False},
                {"predictor.matching": 0.1},
                {"rule.lookahead": 10},
            ],
        ),
        (
            OF_LESSONS,
            "synthetic",
            [
                {"predictor.matching": 0.0},
                {"predictor.matching": 0.1},
                {"predictor.normalise": True},
                {"predictor.cosine": 0.1},
                {"predictor.rows": 0.25},
                {"predictor.steps": 2},
                {"predictor.replay": 4},
                {"predictor.residual": True},
                {"predictor.lr": 1e-3},
                {"predictor.lr": 1e-2},
            ],
        ),
    ],
)
def test_each_variant_differs_from_its_rule_in_one_setting(
    axes: Axes, plain: str, changed: list[dict[str, object]], tmp_path: Path
) -> None:
    study, records = LearningStudy(axes, axes), Records(tmp_path)
    variants = [rule for rule in axes.rules if rule not in ("sync", plain)]
    before, *others = (study.cell("mnist-cnn", rule, 4, 2, 0, records).settings for rule in (plain, *variants))
    assert [{name: value for name, value in other.items() if value != before[name]} for other in others] == changed


def searched(study: LearningStudy, records: Records, rule: str, losses: list[float | None]) -> None:
    for cell, loss in zip(study.searches("lm", rule, 0), losses, strict=True):
        records.add(cell, record(cell, loss))


def test_a_run_waits_for_its_rate_and_takes_the_best(tmp_path: Path) -> None:
    study, records = LearningStudy(LM, LM), Records(tmp_path)
    searched(study, records, "vfbn", [2.0, None, 1.9])
    cell = study.cell("lm", "vfbn", 8, 0, 1, records)
    assert not cell.waits and cell.loaded.optimizer.lr == float(TASKS["lm"].rates[2])
    assert study.cell("lm", "vfbn", 8, 2, 1, records).waits and study.cell("lm", "wait", 8, 0, 1, records).waits


def test_the_table_shows_means_what_diverged_and_what_is_missing(tmp_path: Path) -> None:
    study, records = LearningStudy(LM, LM), Records(tmp_path)
    found: dict[str, list[float | None]] = {"sync": [1.6, 1.58, 1.62], "vfbn": [1.7, None, 1.72], "local": [None] * 3}
    for rule, losses in found.items():
        searched(study, records, rule, [2.0, 1.9, 2.1])
        for seed, loss in enumerate(losses):
            cell = study.cell("lm", rule, 4, 0, seed, records)
            records.add(cell, record(cell, loss))
    rows, best = study.tables(Records(tmp_path))["lm"].splitlines(), TASKS["lm"].rates[1]
    assert rows[0] == "## lm: held-out loss, nats per byte"
    assert f"| sync | any | {best} | 1.600 ± 0.020 (3) | 1.600 ± 0.020 (3) | – |" in rows  # one model for K = 2 and 4
    assert f"| vfbn | 0 | {best} | – | 1.710 ± 0.010 (2) +6.9 %, diverged (1) | – |" in rows
    assert f"| local | any | {best} | – | diverged (3) | – |" in rows
    assert rows[-1].startswith("Not run: sync-nadam, wait, ") and "vfbn at 2, vfbn at 8, " in rows[-1]
    cell = study.cell("lm", "wait", 4, 0, 1, records)  # tuned as sync; of one seed, held against that seed's sync
    records.add(cell, record(cell, 1.58 * 1.01))
    assert f"| wait | any | {best} | – | 1.596 (1) +1.0 % | – |" in study.tables(records)["lm"].splitlines()
    names = [plot.name for plot in study.plots(records) if any(plot.panels.values())]
    assert names == ["lm-training", "lm-cosine", "lm-stages", "lm-delay"]


def test_without_records_there_is_a_table_and_no_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--table", "--task", "mnist-cnn", "--out", str(tmp_path)]) == 0
    assert "\nNot run: sync, sync-nadam, " in (tmp_path / "README.md").read_text()
    shown = capsys.readouterr().out
    assert "Nothing has been run yet." in shown and "## mnist-cnn" in shown and "## lm" not in shown
    assert len(list(tmp_path.iterdir())) == 1


def test_plots_are_drawn_if_they_can_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, records = LearningStudy(LM, LM), Records(tmp_path)
    searched(study, records, "vfbn", [2.0, 1.9, 2.1])
    cell = study.cell("lm", "vfbn", 4, 0, 0, records)
    records.add(cell, record(cell, 1.7))
    written = draw(study.plots(records), tmp_path)
    assert written == sorted((path.name for path in tmp_path.glob("*.png")), key=written.index)
    assert len(written) == 4 or "matplotlib is not installed" in capsys.readouterr().out


def test_a_part_can_be_listed_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = ["--task", "lm", "--rules", "sync", "wait", "--stages", "4", "--seeds", "1", "--out", str(tmp_path)]
    assert main(["--list", "--text", "input.txt", *part]) == 0
    commands = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert len(commands) == 3 + 1 + 1
    assert all(line.startswith("dnipipe train benchmarks/learning/lm.toml --data.root input.txt ") for line in commands)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", ""], "where is the data? pass --text, or set DNIPIPE_TEXT"),
        (["--text", "/nowhere/input.txt"], "--text /nowhere/input.txt: there is no such file"),
        (["--quick", "--rules", "vfbn"], "--quick has no such rules"),
    ],
)
def test_what_is_missing_is_told_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--task", "lm", "--out", str(tmp_path), *words])
    assert end.value.code == 2 and message in capsys.readouterr().err
