"""`dnipipe train` with keys and without: what it trains, and where it does not listen."""

from __future__ import annotations

from pathlib import Path

import pytest

from dnipipe import checkpoint, keys
from tests.test_processes import train

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]
FAR = {"transport__scheme": "tcp", "transport__address": "192.0.2.1"}  # no machine's
TWO = {"pipeline__stages": 2}


def test_encrypted_links_carry_the_same_numbers(tmp_path: Path) -> None:
    assert list(keys.new(tmp_path / "keys", [0, 1]))
    settings: dict[str, object] = {"transport__scheme": "tcp", "rule__name": "wait", "train__batches": 20, **TWO}
    for name, folder in (("locked", tmp_path / "keys"), ("open", "")):
        status, _, err = train(tmp_path / name, security__keys=folder, **settings)
        assert status == 0, err
    one, other = (checkpoint.weights(tmp_path / name) for name in ("locked", "open"))
    assert all(bool((one[name] == other[name]).all()) for name in one)


def test_without_keys_it_listens_where_nobody_else_can_connect(tmp_path: Path) -> None:
    status, _, err = train(tmp_path / "run", **FAR, **TWO)
    assert status == 2 and len(err.strip().splitlines()) == 1, err
    assert "tcp://192.0.2.1:* can be reached by other machines" in err
    assert "`dnipipe keys new keys --stages K`" in err and "security.private_network = true" in err


@pytest.mark.parametrize("way", ["keys", "private_network"])
def test_with_keys_or_on_a_private_network_it_would(tmp_path: Path, way: str) -> None:
    assert list(keys.new(tmp_path / "keys", [0, 1]))
    setting = {"security__keys": tmp_path / "keys"} if way == "keys" else {"security__private_network": True}
    status, _, err = train(tmp_path / "run", **FAR, **TWO, **setting)
    assert status == 2 and "cannot listen on tcp://192.0.2.1:*: Cannot assign requested address" in err


def test_a_stage_without_its_secret_key_says_so(tmp_path: Path) -> None:
    assert list(keys.new(tmp_path / "keys", [0, 1]))
    (tmp_path / "keys" / "secret" / "stage-1-1.key").unlink()
    status, _, err = train(tmp_path / "run", security__keys=tmp_path / "keys", **TWO)
    assert status == 2 and "no secret key of stage 1" in err and "keys --stage 1`" in err
