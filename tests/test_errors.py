"""The tree drawn at the top of errors.py is the tree."""

from __future__ import annotations

import inspect
import re

from dnipipe import errors


def drawn() -> dict[str, str]:
    """class -> parent, read off the drawing."""
    parents: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^([ │├└─]*)([A-Z]\w+)(\s|$)", line)
        if not found or found[2] == "A":
            continue
        depth = len(found[1])
        path = [(d, name) for d, name in path if d < depth]
        if path or found[2] == "DnipipeError":
            parents[found[2]] = path[-1][1] if path else "Exception"
            path.append((depth, found[2]))
    return parents


def test_the_drawing_is_the_tree() -> None:
    real = {
        name: kind.__bases__[0].__name__
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.DnipipeError)
    }
    assert len(real) > 10
    assert {name: parent for name, parent in drawn().items() if name in real} == real


def test_what_can_be_mended_ends_with_two_and_the_rest_with_one() -> None:
    told_to_the_supervisor = {errors.GaveUp: 3, errors.Replaced: 0}
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        assert kind.exit_status == told_to_the_supervisor.get(kind, 2 if issubclass(kind, errors.UsageError) else 1)


def test_others_are_told_the_type_too_unless_the_error_is_ours() -> None:
    assert errors.told(errors.NonFiniteLoss("the loss is nan at batch 3")) == "the loss is nan at batch 3"
    assert errors.told(KeyError("h")) == "KeyError: 'h'"
    assert errors.told(KeyboardInterrupt()) == "KeyboardInterrupt"
