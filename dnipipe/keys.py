"""The keys of a run's stages: files that say who a stage is, and who its neighbours may be.

    FOLDER/public/stage-2-1.key    everybody's to read; together they are the list of who is let in, the same everywhere
    FOLDER/secret/stage-2-1.key    0600; on the machine of stage 2 and nowhere else
    FOLDER/public/stage-2-1.revoked    of nobody any more

A file is one line, a CURVE key of 40 characters (Z85). The last number tells the pairs of a stage apart: while an old
and a new one are both in FOLDER/public, both are valid; a stage itself uses the newest whose secret it has.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import zmq

from dnipipe.errors import ConfigError

AGAIN = 1.0  # seconds, at least, between two looks at the folder
NAME = re.compile(r"stage-(\d{1,6})-(\d{1,6})\.(key|revoked)")
KEY = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
SIZE = 64  # bytes that are read of a file, at most

log = logging.getLogger(__name__)


def new(folder: Path, stages: list[int]) -> Iterator[str]:
    """One more key pair for each of these stages; nothing that exists is touched. Yields what was written, as lines.

    Raises ConfigError if the folder cannot be written to.
    """
    try:
        (folder / "public").mkdir(parents=True, exist_ok=True)
        (folder / "secret").mkdir(mode=0o700, exist_ok=True)
        for stage in stages:
            names = (NAME.match(path.name) for part in ("public", "secret") for path in (folder / part).iterdir())
            used = [int(name[2]) for name in names if name and int(name[1]) == stage]  # revoked ones too
            name = f"stage-{stage}-{max(used, default=0) + 1}.key"
            public, secret = zmq.curve_keypair()
            _write(folder / "secret" / name, secret, 0o600)
            _write(folder / "public" / name, public, 0o644)
            yield f"stage {stage}: {folder / 'public' / name}, {folder / 'secret' / name}"
    except OSError as error:
        raise ConfigError(f"cannot write keys to {folder}: {error.strerror}: {error.filename}") from None


def _write(path: Path, key: bytes, mode: int) -> None:
    """A file that is new: never somebody's own one, nor through a link, and never readable by more for a moment."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(key + b"\n")


def revoke(folder: Path, names: list[str]) -> Iterator[str]:
    """Make key pairs invalid, by name, as stage-2-1. Yields a line each. Raises ConfigError for an unknown name."""
    for name in names:
        public = folder / "public" / f"{name}.key"
        if not NAME.fullmatch(f"{name}.key") or not public.exists():
            known = ", ".join(path.stem for path in sorted((folder / "public").glob("*.key")))
            raise ConfigError(f"{folder} has no key {name!r} to revoke: it has {known or 'none'}")
        public.rename(public.with_suffix(".revoked"))
        (folder / "secret" / public.name).unlink(missing_ok=True)
        yield f"{name}: revoked in {folder}; do the same in each copy of that folder"


def check(folder: Path, stages: int | None) -> Iterator[str]:
    """A line a stage: its public keys, and the secret ones that are here. Raises ConfigError at what is wrong.

    stages: K; None: as many as there are keys of.
    """
    public, secret = _pairs(folder / "public"), _pairs(folder / "secret")
    if not public:
        raise ConfigError(f"{folder / 'public'} holds no keys: make them with `{command(folder, stages)}`")
    for stage in range(max(public) + 1 if stages is None else stages):
        if stage not in public:
            raise ConfigError(f"{folder / 'public'} holds no key of stage {stage}: {_one_more(folder, stage)}")
        for _, path in public[stage]:
            _read(path)
        if stage in secret:
            own_pair(folder, stage)
        mine = ", ".join(path.stem for _, path in secret.get(stage, [])) or "none here"
        yield f"stage {stage}: public {', '.join(path.stem for _, path in public[stage])}; secret {mine}"


def command(folder: Path, stages: int | None) -> str:
    return f"dnipipe keys new {folder} --stages {stages or 'K'}"


def _one_more(folder: Path, stage: int) -> str:
    return f"make one with `dnipipe keys new {folder} --stage {stage}`, or copy it there"


def own_pair(folder: Path, stage: int) -> tuple[bytes, bytes]:
    """(public, secret) of a stage, the newest that is here. Raises ConfigError if others may read it, or it is none."""
    found = _pairs(folder / "secret").get(stage)
    if not found:
        raise ConfigError(
            f"security.keys = {folder}: no secret key of stage {stage} in {folder / 'secret'}: "
            f"{_one_more(folder, stage)}"
        )
    path = found[0][1]
    secret = _read(path, private=True)
    public = zmq.curve_public(secret)
    if (listed := folder / "public" / path.name).exists() and _read(listed) != public:
        raise ConfigError(f"{path} and {listed} are not one pair: copy both from where they were made")
    return public, secret


def _pairs(folder: Path) -> dict[int, list[tuple[int, Path]]]:
    """stage -> its (number, file), the newest first. Empty if there is no such folder."""
    found: dict[int, list[tuple[int, Path]]] = {}
    for path in folder.glob("stage-*.key"):
        if name := NAME.fullmatch(path.name):
            found.setdefault(int(name[1]), []).append((int(name[2]), path))
    return {stage: sorted(pairs, reverse=True) for stage, pairs in found.items()}


def _read(path: Path, private: bool = False) -> bytes:
    """The key in a file. Raises ConfigError if it is none, or if it is a secret that others may read."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            key = file.read(SIZE).strip()
    except OSError as error:
        raise ConfigError(f"cannot read the key {path}: {error.strerror}") from None
    if private and mode & 0o077:
        raise ConfigError(f"{path} has mode {mode:04o}, so others may read this secret key: chmod 600 {path}")
    if not KEY.fullmatch(key):
        raise ConfigError(f"{path} is no key: it should be one line of 40 characters, as `dnipipe keys new` writes it")
    return key


class KeyRing:
    """One stage's own pair, and the keys that every other stage may have. Any thread may ask.

    Raises ConfigError if its own secret is not there, may be read by others, or a public file is no key.
    """

    @classmethod
    def of(cls, folder: str, stage: int) -> KeyRing | None:
        """What security.keys says; None: no keys."""
        return cls(Path(folder), stage) if folder else None

    def __init__(self, folder: Path, stage: int) -> None:
        self.folder, self.stage = folder, stage
        self.public, self.secret = own_pair(folder, stage)
        self._seen: list[tuple[str, int, int]] = []
        self._next = 0.0
        self._keys: dict[int, list[bytes]] = {}
        for pairs in _pairs(folder / "public").values():
            for _, path in pairs:
                _read(path)

    def keys(self, stage: int, anew: bool = False) -> list[bytes]:
        """Those of a stage that are valid now, the newest first. If the folder cannot be read, none is.

        anew: whatever was read a moment ago.
        """
        if anew or time.monotonic() >= self._next:
            self._next = time.monotonic() + AGAIN
            self._look()
        return self._keys.get(stage, [])

    def _look(self) -> None:
        """Read the folder again if a file in it is another than before."""
        folder = self.folder / "public"
        try:
            seen = sorted((e.name, e.stat().st_mtime_ns, e.stat().st_ino) for e in os.scandir(folder))
        except OSError as error:
            log.warning("no key is valid: cannot read %s: %s", folder, error.strerror)
            self._seen, self._keys = [], {}
            return
        if seen != self._seen:
            self._seen, self._keys = seen, {stage: list(_good(pairs)) for stage, pairs in _pairs(folder).items()}


def _good(pairs: list[tuple[int, Path]]) -> Iterator[bytes]:
    """Their keys, without the files that hold none: one may just be being copied."""
    for _, path in pairs:
        try:
            yield _read(path)
        except ConfigError as error:
            log.warning("%s", error)


__all__ = ["KeyRing", "check", "command", "new", "own_pair", "revoke"]
