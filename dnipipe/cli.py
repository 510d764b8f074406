"""dnipipe train | stage | check | verify | compare | export | trace | keys | settings.

Settings come from a TOML file (examples/), and from --section.key value on top; `dnipipe settings` lists them all.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dnipipe.children import check_layers, launched
from dnipipe.config import Config, Output, build, describe, load, over, replace
from dnipipe.errors import ConfigError, DiskError, DnipipeError, UsageError
from dnipipe.folders import INITIAL, begun, check_apart, newest_run
from dnipipe.started import LAUNCHED, Alone, importing, is_worker

# what an independent stage runs on; the last is what torch imports for the first backward from a known gradient
STAGE = ("dnipipe.jobs", "dnipipe.service.own", "torch.fx.experimental.symbolic_shapes")

NEWEST = "newest"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 2 for what can be mended, 1 for a run that failed."""
    parser = _parser()
    words, rest = separate(sys.argv[1:] if arguments is None else arguments)
    options, unknown = parser.parse_known_args(words)
    rest = unknown + rest
    if not hasattr(options, "run"):
        parser.print_help()
        return 2
    try:
        status: int = options.run(options, rest)
        return status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except DnipipeError as error:
        if options.debug:
            traceback.print_exc()
        print(f"dnipipe: {error}", file=sys.stderr)
        return error.exit_status


def separate(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what argparse is for, `--section.key value` pairs): argparse would take a setting's value for the file."""
    words: list[str] = []
    settings: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not (word.startswith("--") and "." in word.partition("=")[0]):
            words.append(word)
            continue
        settings.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            settings.append(rest.pop(0))
    return words, settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dnipipe", description="Pipeline-parallel training whose stages never wait.")
    commands = parser.add_subparsers(title="commands")
    train = commands.add_parser("train", help="train a model, one process a stage", allow_abbrev=False, epilog=__doc__)
    train.add_argument("config", nargs="?", help="TOML file; none: a small language model on Python's own sources")
    train.add_argument(
        "--resume", nargs="?", const=NEWEST, metavar="RUN", help="continue RUN (default: the newest run)"
    )
    train.add_argument("--quiet", action="store_true", help="print only the result")
    train.set_defaults(run=_train)
    stage = commands.add_parser("stage", help="one stage of a run as a service of its own, started again when it dies")
    stage.add_argument("config", help="TOML file, or a script with a dnipipe.Run, the same for all stages")
    stage.add_argument("--index", type=int, required=True, metavar="K", help="which stage, from 0")
    stage.add_argument("--no-restart", action="store_true", help="end when it dies: somebody else starts it again")
    stage.add_argument("--healthy", action="store_true", help="only say, by the exit status, whether it gets on")
    stage.set_defaults(run=_stage)
    check = commands.add_parser("check", help="send one batch through all stages in one process; print the plan")
    check.add_argument("config", nargs="?", help="TOML file")
    check.set_defaults(run=_check)
    verify = commands.add_parser("verify", help="show that K stages learn what one process does, on this very model")
    verify.add_argument("config", nargs="?", help="TOML file")
    verify.add_argument("--batches", type=_count, default=20, metavar="N", help="batches to train (default: 20)")
    verify.set_defaults(run=_verify)
    compare = commands.add_parser(
        "compare", help="train as it is and synchronously, side by side, and say which to choose"
    )
    compare.add_argument("config", nargs="?", help="TOML file")
    compare.add_argument("--batches", type=_count, default=200, metavar="N", help="batches to train (default: 200)")
    compare.set_defaults(run=_compare)
    export = commands.add_parser("export", help="the trained weights as one safetensors file")
    export.add_argument("folder", help="folder of the run")
    export.add_argument("-o", "--output", required=True, help="file to write")
    export.set_defaults(run=_export)
    trace = commands.add_parser(
        "trace", help="what a run with output.trace = true spent its time on: for Perfetto, as PNG"
    )
    trace.add_argument("folder", help="folder of the run")
    trace.add_argument("-o", "--output", metavar="FILE", help="JSON for https://ui.perfetto.dev [RUN/trace/trace.json]")
    trace.add_argument("--png", metavar="FILE", help="draw the timeline; without --from and --to, of some batches")
    moment = "a batch id, or seconds since the run began, as 1.5s"
    trace.add_argument("--from", dest="begin", metavar="BEGIN", help=f"leave out what was before: {moment}")
    trace.add_argument("--to", dest="end", metavar="END", help="leave out what came after, likewise")
    trace.set_defaults(run=_trace)
    keys = commands.add_parser("keys", help="who the stages are: make, check and revoke their keys (docs/security.md)")
    keys.add_argument("what", choices=("new", "check", "revoke"))
    keys.add_argument(
        "folder", help="security.keys: FOLDER/public for every stage, FOLDER/secret/stage-K-* for stage K"
    )
    keys.add_argument("name", nargs="*", help="revoke: which, e.g. stage-2-1")
    keys.add_argument("--stages", type=_count, metavar="K", help="new, check: of stages 0 to K-1")
    keys.add_argument("--stage", type=int, metavar="k", help="new: one more pair of stage k alone")
    keys.set_defaults(run=_keys)
    settings = commands.add_parser("settings", help="list every setting, its default and what it does")
    settings.set_defaults(run=_settings)
    for command in (train, stage, check, verify, compare, export, trace, keys, settings):
        command.add_argument("--debug", action="store_true", help="show tracebacks and the launcher's log")
    return parser


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r}: expected a whole number, at least 1")
    return int(word)


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    config, name = _configured(options, overrides)
    resume = options.resume is not None
    if is_worker() or config.transport.kind == "local":
        with importing():
            from dnipipe.jobs import job_of
            from dnipipe.process import guarded

        return guarded(job_of(config), resume, options.debug, name=name)[0]
    with begun(config.output, name, resume) as folder:
        again = ["--resume", str(folder)] * resume
        return launched("train", config, folder, *again, debug=options.debug)


def _configured(options: argparse.Namespace, overrides: list[str]) -> tuple[Config, str]:
    """The file's settings, the command line's on top; output.run is a resumed run's. And what a new one is called."""
    path = Path(options.config) if options.config else None
    resumed = None
    if options.resume:
        resumed = (
            Path(options.resume) if options.resume != NEWEST else newest_run(Path(load(path, overrides).output.dir))
        )
    if resumed and (resumed / INITIAL).exists():
        raise UsageError(f'{resumed} was begun by a script: continue it there, with fit(..., resume="{resumed}")')
    config = load(resumed / "config.toml" if resumed and path is None else path, overrides)
    run = str(resumed) if resumed else config.output.run
    if path and run and not resumed:
        check_apart(path, Path(run), f", or continue what is there with --resume {run}")
    return replace(config, output={"run": run, "quiet": config.output.quiet or options.quiet}), _name(path)


def _name(path: Path | None) -> str:
    return path.stem if path else "default"


def _stage(options: argparse.Namespace, overrides: list[str]) -> int:
    from dnipipe.service import place, supervisor

    path = Path(options.config)
    script = path.suffix == ".py"
    config = _before(overrides) if script else load(path, overrides)
    run = Path(config.output.run or Path(config.output.dir) / path.stem)
    if not script:  # whose own settings are checked when it comes to its fit
        place.check(config, options.index)
    if options.healthy:
        why = place.unhealthy(run, options.index, config.service.hung)
        print(why or f"stage {options.index} gets on, or waits for a neighbour")
        return 1 if why else 0
    if options.index == 0 and not script and not (run / "stage-0" / place.START).exists():
        check_apart(path, run)
    if not options.no_restart:
        command = ["stage", str(path), *overrides, f"--index={options.index}", "--no-restart"]
        stood = partial(place.stood, run, options.index, config.service.hung)
        part = partial(main, command + ["--debug"] * options.debug)
        return supervisor.supervise(part, options.index, config.service.restarts, stood, imports=STAGE)
    with importing():
        from dnipipe.jobs import job_of
        from dnipipe.process import guarded
        from dnipipe.service.own import run_script
        from dnipipe.service.session import serve

    if script:
        alone = Alone(options.index, str(run), config.service.restarts, tuple(overrides))
        return run_script(path, alone, config.train.seed)
    job = job_of(replace(config, output={"run": str(run)}))
    return guarded(job, debug=options.debug, part=lambda job, _: serve(job, options.index))[0]


def _before(overrides: list[str]) -> Config:
    """What the command line says of that which is needed before a script runs."""
    said = over({}, overrides)
    return build({section: said[section] for section in ("output", "service", "train") if section in said})


def _check(options: argparse.Namespace, overrides: list[str]) -> int:
    with importing():
        from dnipipe.check import check
        from dnipipe.jobs import job_of

    config = load(Path(options.config) if options.config else None, overrides)
    for line in check(job_of(config)):
        print(line)
    return 0


def _verify(options: argparse.Namespace, overrides: list[str]) -> int:
    with importing():
        from dnipipe import verify

    config = replace(load(Path(options.config) if options.config else None, overrides), model={"dropout": 0.0})
    if LAUNCHED in os.environ:
        from dnipipe.jobs import job_of
        from dnipipe.process import guarded

        job = verify.prepared(job_of(config), options.batches, Path(config.output.run))
        return guarded(job, debug=options.debug, part=verify.work)[0]
    if is_worker():
        raise UsageError("dnipipe verify starts its processes itself: run it without torchrun")
    with tempfile.TemporaryDirectory(prefix="dnipipe-verify-") as folder:
        run = Path(folder) / "run"
        status = launched("verify", config, run, "--batches", str(options.batches), debug=options.debug)
        if status:
            return status
        equal, lines = verify.read(run)
    print("\n".join(lines))
    return 0 if equal else 1


def _compare(options: argparse.Namespace, overrides: list[str]) -> int:
    with importing():
        from dnipipe import compare
        from dnipipe.building import first_batch
        from dnipipe.jobs import job_of

    path = Path(options.config) if options.config else None
    config = load(path, overrides)
    if is_worker():
        raise UsageError("dnipipe compare starts its processes itself: run it without torchrun")
    check_layers(config)
    both, said = compare.sides(config, options.batches, len(first_batch(job_of(config).task())[1]))
    print("".join(f"{line}\n" for line in said), end="")
    sides = {}
    with begun(Output(dir=config.output.dir), f"compare-{_name(path)}") as above:
        for name, settings in both.items():
            print(f"{name}: {options.batches} batches, rule {settings.rule.name}", flush=True)
            status = launched("train", settings, above / name, debug=options.debug)
            if status:
                return status
            sides[name] = compare.side(above / name, settings.rule.accumulate)
    print("\n".join(compare.report(sides["as-it-is"], sides["sync"], options.batches)))
    return 0


def _export(options: argparse.Namespace, overrides: list[str]) -> int:
    from dnipipe import checkpoint
    from dnipipe.service import whole

    if overrides:
        raise ConfigError(f"cannot read {overrides[0]!r}: export takes the run's folder and -o FILE")
    if Path(options.output).is_dir():
        raise UsageError(f"cannot write {options.output}: it is a folder; name a file with -o")
    try:
        parts = whole.parts(Path(options.folder))
        weights = whole.weights(parts)
        checkpoint.export(weights, Path(options.output))
    except DiskError as error:
        raise UsageError(f"{error.strerror} with -o") from None
    for note in whole.notes(parts):
        print(note)
    print(f"{options.output}: {len(weights)} tensors, for load_state_dict(safetensors.torch.load_file(...))")
    return 0


def _trace(options: argparse.Namespace, overrides: list[str]) -> int:
    from dnipipe import tracing

    if overrides:
        raise ConfigError(f"cannot read {overrides[0]!r}: trace takes the run's folder, -o, --png, --from and --to")
    folder = Path(options.folder)
    whole = tracing.merged(tracing.read(folder))
    shown = tracing.cut(whole, options.begin, options.end)
    for line in whole.notes():
        print(line)
    path = Path(options.output or folder / "trace" / "trace.json")
    try:
        tracing.write_chrome(shown, path)
        print(f"{path}: {sum(len(trace.spans) for trace in shown.stages):,} spans, {len(shown.flows):,} messages")
        if options.png:
            drawn = shown if options.begin or options.end else tracing.some_batches(whole)
            title = f"{folder.name}, {drawn.begin:.3f} to {drawn.end:.3f} s"
            tracing.draw({title: drawn.rows()}, Path(options.png))
            print(f"{options.png}: {title}")
    except OSError as error:
        raise UsageError(f"cannot write {error.filename}: {error.strerror}; name another with -o or --png") from None
    return 0


def _keys(options: argparse.Namespace, overrides: list[str]) -> int:
    from dnipipe import keys

    folder, stages, stage, names = Path(options.folder), options.stages, options.stage, options.name
    if overrides or bool(names) != (options.what == "revoke"):
        raise ConfigError(f"cannot read {(overrides or names or ['revoke'])[0]!r}: only revoke takes names, stage-2-1")
    if options.what == "new" and (stages is None) == (stage is None):
        raise ConfigError("keys new: give --stages K for a pair of each stage, or --stage k for one more of stage k")
    lines = {
        "new": lambda: keys.new(folder, list(range(stages)) if stage is None else [stage]),
        "check": lambda: keys.check(folder, stages),
        "revoke": lambda: keys.revoke(folder, names),
    }
    for line in lines[options.what]():
        print(line)
    return 0


def _settings(options: argparse.Namespace, overrides: list[str]) -> int:
    for name, kind, default, help in describe():
        shown = "" if default in ("", ()) else f" [{str(default).lower() if isinstance(default, bool) else default}]"
        print(f"--{name} ({kind}){shown}\n      {help}")
    return 0
