"""started.importing: the collector stands aside while a process begins.

importing ──► off within, on again behind it, also when it fails ──► what was made within is never looked through
"""

from __future__ import annotations

import gc
import weakref

import pytest

from dnipipe.started import importing


class Knot:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


def test_the_collector_is_off_within_and_on_again_behind_it() -> None:
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_is_on_again_behind_an_import_that_fails() -> None:
    with pytest.raises(ModuleNotFoundError), importing():
        import dnipipe.no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()


def test_whoever_had_it_off_finds_it_off() -> None:
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_is_made_within_is_never_looked_through_and_what_comes_later_is() -> None:
    with importing():
        within = weakref.ref(Knot())
    later = weakref.ref(Knot())
    gc.collect()
    assert within() is not None
    assert later() is None
