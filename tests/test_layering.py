"""Who may import whom. A module may import those of the rows before its own, and no other of dnipipe's."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from dnipipe.gradient_rules import RULES

PACKAGE = Path(__file__).parents[1] / "dnipipe"

# module -> what it may import of dnipipe's; the picture is in docs/design.md
MAY = {
    "errors": "",
    "messages": "",
    "config": "errors",
    "disk": "errors",
    "likeness": "",
    "metrics": "disk errors likeness",
    "tracing": "disk errors",
    "fields": "messages errors",
    "codec": "messages errors fields",
    "keys": "errors",
    "socket_file": "errors",
    "transport": "beside messages errors codec keys socket_file",
    "beside": "",
    "staging": "beside errors messages transport",
    "wire": "beside config errors messages randomness transport",
    "expected": "config errors labels messages pairs split transport wire",
    "labels": "",
    "pairs": "",
    "heads": "labels",
    "lessons": "",
    "nets": "",
    "predictors": "heads labels lessons",
    "kinds": "config errors heads lessons nets predictors",
    "trust": "likeness",
    "optim": "config errors",
    "finite": "",
    "learner": "finite lessons optim predictors trust",
    "gradient_rules": "config errors learner predictors",
    "last_stage": "beside errors finite gradient_rules labels predictors",
    "phases": "gradient_rules",
    "turns": "gradient_rules phases",
    "randomness": "",
    "sometimes": "gradient_rules randomness",
    "inputs": "config errors nets optim predictors",
    "unlocked": "errors inputs messages stage",
    "stash": "",
    "passes": "pairs randomness stash",
    "pending": "stash",
    "stage": "beside messages errors finite gradient_rules last_stage predictors metrics optim pairs passes pending "
    "stash window",
    "measuring": "errors labels pairs predictors",
    "split": "errors measuring pairs predictors",
    "costs": "gradient_rules measuring",
    "models": "config errors",
    "data": "config errors labels pairs randomness started",
    "scaling": "pairs",
    "execution": "config errors pairs scaling",
    "window": "",
    "folders": "config disk errors",
    "checkpoint": "errors",
    "display": "messages",
    "loopback": "",
    "rendezvous": "errors loopback",
    "gloo": "errors rendezvous transport",
    "schedules": "errors metrics predictors",
    "sync": "config errors labels messages pairs randomness schedules split stage",
    "head": "checkpoint config data display errors messages metrics pairs started",
    "greeting": "errors messages transport",
    "measured": "messages metrics tracing transport",
    "worker": "errors greeting head measured messages metrics stage tracing transport window",
    "result": "building config data head split",
    "building": "beside config costs data errors execution gradient_rules inputs kinds last_stage learner lessons "
    "measuring metrics optim pairs phases predictors randomness sometimes split stage staging started stash sync "
    "transport trust turns unlocked window wire",
    "state": "checkpoint errors learner split stage unlocked",
    "opening": "building config expected keys metrics rendezvous split transport",
    "agreement": "building checkpoint config data disk errors folders split",
    "session": "agreement building checkpoint config data display errors gloo greeting head messages metrics opening "
    "rendezvous result stage state sync tracing transport worker",
    "service": "agreement building checkpoint codec config data errors expected greeting head keys messages metrics "
    "opening pairs process session socket_file split stage started state transport unlocked worker",
    "check": "building config messages metrics pairs result split stage sync unlocked wire",
    "started": "",
    "launcher": "loopback started",
    "jobs": "building config data models optim",
    "laboratory": "agreement building data errors session transport worker",
    "compare": "building config errors gloo loopback sync",
    "verify": "building checkpoint config data laboratory metrics optim pairs randomness session",
    "process": "building errors laboratory session started",
    "children": "config disk errors folders launcher models started",
    "run": "building checkpoint children compare config data errors folders launcher optim predictors process service "
    "started verify",
    "cli": "building check checkpoint children compare config errors folders jobs keys process service started tracing "
    "verify",
    "__init__": "config errors run started",
    "__main__": "cli",
}
FOREIGN = {  # libraries that only these may import
    "zmq": {"transport", "keys"},
    "msgpack": {"codec"},
    "xxhash": {"codec"},
    "safetensors": {"checkpoint", "agreement"},
    "rich": {"display"},
    "matplotlib": {"tracing"},
    "torch.distributed": {"transport", "loopback", "rendezvous", "launcher", "process", "gloo", "schedules"},
    "time": {"greeting", "metrics", "transport", "worker", "measuring", "folders", "display", "service", "keys"},
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def modules() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found.setdefault(room, set()).update(imports(path))
    return found


def test_every_room_is_in_the_picture() -> None:
    assert set(modules()) == set(MAY)


def test_nobody_imports_upwards() -> None:
    wrong = [
        f"{room} imports {name}"
        for room, names in modules().items()
        for name in MAY
        if any(used == f"dnipipe.{name}" or used.startswith(f"dnipipe.{name}.") for used in names)
        and name != room
        and name not in MAY[room].split()
    ]
    assert wrong == []


def test_benchmarks_see_the_settings_and_the_command_line() -> None:
    """A cell is what a person can type; so what runs it needs nothing else of the package. And a trace may be drawn.

    But benchmarks/throughput trains the same stages with other engines, and so sees what they are made of;
    benchmarks/transport measures transports, benchmarks/gpu both, benchmarks/fuzz attacks them, and benchmarks/wire
    counts the bytes of what is sent; and benchmarks/faults reads what independent stages have written down, starts
    them so that they can be told to fail, notes what passes between them, and attacks them.
    """
    allowed = {"dnipipe.cli", "dnipipe.config", "dnipipe.errors", "dnipipe.tracing"}
    parts = {
        "throughput": ("building", "data", "models", "optim", "process"),
        "transport": ("messages", "transport"),
        "faults": ("codec", "keys", "messages", "service", "transport"),
        "fuzz": ("checkpoint", "codec", "expected", "keys", "messages", "service", "split", "transport"),
        "wire": ("wire",),
        "gpu": ("beside", "building", "execution", "jobs", "messages", "split", "staging", "transport"),
    }
    folder = PACKAGE.parent / "benchmarks"
    for path in folder.rglob("*.py"):
        known = (*allowed, *(f"dnipipe.{name}" for name in parts.get(path.parent.name, ())))
        assert not [name for name in imports(path) if name.startswith("dnipipe.") and not name.startswith(known)], path


def test_stage_and_transport_never_see_each_other() -> None:
    found = modules()
    assert not any("transport" in name for name in found["stage"])
    assert not any("stage" in name for name in found["transport"])


def test_where_a_batch_passes_through_no_rule_is_known_by_its_name() -> None:
    """A rule is what it answers: adding one touches no stage and no loop."""
    for room in ("stage", "last_stage", "passes", "pending", "learner", "stash", "worker", "measured", "window"):
        path = PACKAGE / f"{room}.py"
        words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not words & set(RULES), path


def test_heavy_and_io_libraries_stay_in_their_rooms() -> None:
    wrong = [
        f"{room} imports {library}"
        for room, names in modules().items()
        for library, rooms in FOREIGN.items()
        if any(name == library or name.startswith(f"{library}.") for name in names) and room not in rooms
    ]
    assert wrong == []


def test_nothing_on_a_socket_or_from_a_file_can_run_code() -> None:
    """No pickle, no torch.load, no eval or exec, no YAML, anywhere in the package."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"eval", "exec", "torch.load", "torch.save", "pickle.loads", "pickle.load", "yaml.load"}, (
            path
        )
        # what pickles without being called so
        assert not {name.split(".")[-1] for name in calls} & {"recv_pyobj", "send_pyobj", "recv_object_list"}, path
        assert not imports(path) & {"pickle", "cloudpickle", "dill", "shelve", "marshal", "yaml"}, path


def test_nothing_polls() -> None:
    """Every wait is for something that wakes it: nowhere in the package a sleep, in the worker's loop least of all."""
    for path in PACKAGE.rglob("*.py"):
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        assert not {name for name in calls if name.split(".")[-1] == "sleep"}, path


def test_a_health_check_does_without_torch() -> None:
    """It takes a second of a core, and 200 MB, each time. A supervisor imports it once, by name, for its processes."""
    code = "import sys, dnipipe.cli, dnipipe.service.place, dnipipe.service.supervisor; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
