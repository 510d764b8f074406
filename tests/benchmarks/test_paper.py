"""The paper's experiments: valid cells, its methods, its figures beside ours. What is trained is tiny."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cells import Cell, Records
from benchmarks.paper.__main__ import main
from benchmarks.paper.published import TABLE, error
from benchmarks.paper.report import PaperStudy
from benchmarks.paper.study import LAYERS, LONGER, OURS, PROTOCOLS, TABLES, UNITS, Row
from dnipipe import cli, models
from tests.benchmarks.conftest import record
from tests.data.conftest import write_cifar10


def cell_of(study: PaperStudy, table: str, method: str, layers: int, p: str = "1") -> Cell:
    return study.seeds(table, method, Row(layers, p))[0]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("data", UNITS)
def test_every_layer_of_every_cell_is_a_stage(protocol: str, data: str, tmp_path: Path) -> None:
    for cell in PaperStudy((*TABLES, *LONGER), protocol, data).cells(Records(tmp_path)):
        config = cell.loaded
        stages = 1 if cell.labels["method"] == "backprop" else cell.labels["layers"]
        assert config.pipeline.stages == stages and config.data.name == data
        assert config.transport.kind == "local" and config.train.batches > 0 and config.data.evaluate == "test"
        assert config.optimizer.lr == config.predictor.lr and config.optimizer.drops[-1] < config.train.batches


@pytest.mark.parametrize("table", ["fcn", "cnn"])
def test_a_net_has_as_many_layers_as_the_paper_counts(table: str) -> None:
    for layers in LAYERS[table]:
        assert len(models.build(cell_of(PaperStudy(), table, "vfbn", layers).loaded)) == layers


@pytest.mark.parametrize("method", ["no backprop", "backprop", "DNI", "cDNI", OURS])
@pytest.mark.parametrize("table", ["fcn", "cnn"])
def test_every_method_trains_on_cifar_10(table: str, method: str, tmp_path: Path) -> None:
    """On small files of it, four batches, nets that are narrower."""
    for name in (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"):
        write_cifar10(tmp_path / name, 0, 6)
    cell = cell_of(PaperStudy(data="cifar10"), table, method, 3)
    small = {"train.batches": 4, "data.batch": 6, "model.width": 4, "optimizer.drops": "2,3", "output.quiet": "true"}
    small |= {"predictor.width": 4, "output.run": tmp_path / "run"}
    assert cli.main([*cell.command(str(tmp_path))[1:], *(f"--{name}={value}" for name, value in small.items())]) == 0
    told = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert told["stages"] == (1 if method == "backprop" else 3)
    assert told["train"]["batches"] == 4 and math.isfinite(told["eval"]["loss"])
    assert told["stage"][0]["at_once"] == (0 if method == "no backprop" else 1)


def test_the_papers_protocol_and_predictors() -> None:
    study = PaperStudy(protocol="paper")
    dni, cdni = cell_of(study, "fcn", "DNI", 4).loaded, cell_of(study, "fcn", "cDNI", 4).loaded
    assert (dni.train.batches, dni.data.batch, dni.optimizer.lr) == (500_000, 256, 3e-5)
    assert dni.optimizer.drops == (300_000, 400_000) and dni.model.width == 256
    seen: Any = [(c.predictor.name, c.predictor.hidden, c.predictor.width, c.predictor.condition) for c in (dni, cdni)]
    assert seen == [("mlp", 2, 1024, False), ("linear", -1, 0, True)]
    conv = cell_of(study, "cnn", "DNI", 3).loaded
    assert (conv.predictor.name, conv.predictor.hidden, conv.model.width) == ("conv", 2, 64)
    assert cell_of(study, "updates", "cDNI", 4, "0.2").loaded.rule.p_update == 0.2
    assert cell_of(study, "unlocked", "cDNI", 4, "0.2").loaded.rule.forward_unlock
    assert cell_of(study, "unlocked", "DNI", 4).loaded.predictor.hidden == 1


def test_tables_share_a_run_that_both_have() -> None:
    study = PaperStudy()
    assert cell_of(study, "updates", "cDNI", 4).key == cell_of(study, "fcn", "cDNI", 4).key


def test_a_longer_run_has_its_drops_later_and_the_first_is_the_papers_table() -> None:
    study = PaperStudy()
    runs = [study.seeds("length", "cDNI", row)[0] for row in study.rows("length")]
    assert [run.loaded.train.batches for run in runs] == [800, 2400, 8000, 24_000]
    assert [run.loaded.optimizer.drops for run in runs] == [(480, 640), (1440, 1920), (4800, 6400), (14_400, 19_200)]
    assert runs[0].key == cell_of(study, "fcn", "cDNI", 3).key


def test_the_papers_figures_stand_beside_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, records = PaperStudy(), Records(tmp_path)
    for seed, accuracy in enumerate((0.98, 0.97)):
        cell = study.seeds("fcn", "cDNI", Row(4))[seed]
        records.add(cell, record(cell, 0.1, accuracy=accuracy))
    assert main(["fcn", "--table", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "| layers | no backprop | paper | backprop | paper | DNI | paper | cDNI | paper | vfbn |" in shown
    assert "| 4 | – | 12.6 | – | 1.8 | – | 2.2 | 2.50 ± 0.50 (2) | 1.9 | – |" in shown
    assert "21 layers" not in shown and "21 layers" in (tmp_path / "README.md").read_text()
    assert "| 1 | – | 2.00 (1) | – |" in (tmp_path / "README.md").read_text()  # of `updates`


def test_the_papers_table_is_whole() -> None:
    assert {net: tuple(rows) for (data, net), rows in TABLE.items() if data == "mnist"} == {
        "fcn": LAYERS["fcn"],
        "cnn": LAYERS["cnn"],
    }
    assert error("mnist", "fcn", 6, "DNI") == 4.3 and error("mnist", "fcn", 6, "vfbn") is None
