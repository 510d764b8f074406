"""Independent stages with keys: strangers stay out, a key changes while the run goes on, a revoked one is cut off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dnipipe import keys
from tests.service.conftest import Services
from tests.service.test_stages import exact

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

Make = Callable[..., Services]


def with_keys(folder: Path, more: str = "") -> str:
    assert list(keys.new(folder, [0, 1, 2]))
    return f'{more}\n[security]\nkeys = "{folder}"'


def reasons(run: Services, stage: int) -> str:
    return " ".join(line.get("why", "") for line in run.account(stage).away)


def test_a_key_changes_while_the_run_goes_on(services: Make, tmp_path: Path) -> None:
    run = services(1500, with_keys(tmp_path / "keys", "unguided_batches = 100000"))
    run.start(0, 1, 2)
    run.until_trained(2, 50)
    assert list(keys.new(tmp_path / "keys", [1]))
    run.kill(1)  # it comes back with the newest of its keys
    run.until(
        "stage 1 is back", lambda: len(run.account(1).starts) == 2 and any("back" in e for e in run.account(1).away)
    )
    assert list(keys.revoke(tmp_path / "keys", ["stage-1-1"]))
    assert run.statuses() == [0, 0, 0]
    exact(run)
    assert run.account(0).begun == list(range(1, 1501)) and 1 < run.loss() < 6


def test_a_revoked_key_is_cut_off_until_there_is_another(services: Make, tmp_path: Path) -> None:
    run = services(100_000, with_keys(tmp_path / "keys", "unguided_batches = 100000"))
    run.start(0, 1, 2)
    run.until_trained(2, 30)
    assert list(keys.revoke(tmp_path / "keys", ["stage-1-1"]))
    run.until("both neighbours cut it off", lambda: all("was revoked" in reasons(run, k) for k in (0, 2)))
    last = run.account(2).last
    run.until("stage 0 goes on alone", lambda: len(run.account(0).alone) > 20)
    assert run.account(2).last == last
    run.until("it is told", lambda: "does not accept this stage's key: copy its" in run.said[1].read_text())
    assert list(keys.new(tmp_path / "keys", [1]))
    run.kill(1)
    run.until_trained(2, last + 1)
    exact(run)


def test_a_stage_with_a_key_of_its_own_making_hears_and_says_nothing(services: Make, tmp_path: Path) -> None:
    run = services(100, with_keys(tmp_path / "keys"))
    assert list(keys.new(tmp_path / "stranger", [0, 1, 2]))
    known = Path("public", "stage-0-1.key")
    (tmp_path / "stranger" / known).write_bytes((tmp_path / "keys" / known).read_bytes())
    run.start(0)
    run.until("stage 0 waits", lambda: "waiting for stage 1" in run.said[0].read_text())
    run.config.write_text(run.config.read_text().replace(f"{tmp_path}/keys", f"{tmp_path}/stranger"))
    run.start(1)
    run.until("stage 0 refuses it", lambda: "connection refused" in run.said[0].read_text())
    run.until("it is told", lambda: "does not accept this stage's key" in run.said[1].read_text())
    assert run.account(0).begun == [] and run.account(0).away == []
