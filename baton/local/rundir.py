"""The folder of one run: lock, secret, registry, control socket, logs. Only the logs outlive the run.

<state>/<name>/lock       held with flock by supervisor and janitor: whoever can take it knows that the run is over
<state>/<name>/secret     what the processes prove to each other, 0600
<state>/<name>/registry/  one file a worker
<state>/<name>/control    unix socket, 0600
<state>/<name>/logs/      one bounded file a process, and as <name>.1 what it said before or in the run before
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import socket
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

from baton.local.errors import AlreadyRunning
from baton.local.logfiles import begin_anew
from baton.local.plan import RunPaths

_MAX_SOCKET_PATH = 100  # sun_path holds 108 bytes on Linux, 104 on macOS


@dataclass(frozen=True, slots=True)
class RunDir:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def secret(self) -> Path:
        return self.path / "secret"

    @property
    def registry(self) -> Path:
        return self.path / "registry"

    @property
    def control(self) -> Path:
        return self.path / "control"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.registry, self.secret)

    def log_of(self, worker_id: str) -> Path:
        return self.logs / f"{worker_id}.log"

    def is_locked_by(self, descriptor: int) -> bool:
        """Whether the locked file still has its name: cleaning removes it, and another run may make its own."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.lock))
        except FileNotFoundError:
            return False

    def prepare(self) -> None:
        """Make the folder as a new run needs it. The caller holds the lock."""
        self.clean(keep_lock=True)
        self.registry.mkdir(mode=0o700)
        self.logs.mkdir(mode=0o700, exist_ok=True)
        begin_anew(self.logs)
        descriptor = os.open(self.secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32))

    def clean(self, *, keep_lock: bool = False) -> None:
        """Remove what must not outlive a run. The caller holds the lock."""
        shutil.rmtree(self.registry, ignore_errors=True)
        for path in (self.secret, self.control, *(() if keep_lock else (self.lock,))):
            path.unlink(missing_ok=True)


def state_dir(environ: Mapping[str, str]) -> Path:
    """Where runs live: $BATON_RUN_DIR, else the user's state folder."""
    if environ.get("BATON_RUN_DIR"):
        return Path(environ["BATON_RUN_DIR"]).absolute()
    base = environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base).absolute() / "baton"


def known_runs(state: Path) -> list[RunDir]:
    """Runs that have a control socket: those that are up, and those that died a moment ago."""
    return sorted((RunDir(path.parent) for path in state.glob("*/control")), key=lambda run: run.name)


def take_lock(run: RunDir, *, patience_s: float) -> int:
    """Take the run's lock; returns its descriptor, to be kept open (and inherited by the janitor).

    Waits `patience_s` for the janitor of a run that has just died.
    Raises: AlreadyRunning.
    """
    run.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    deadline = time.monotonic() + patience_s
    while True:
        descriptor = os.open(run.lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() >= deadline:
                raise AlreadyRunning(
                    f"a service named {run.name!r} is up already: see `baton ps`, stop it with `baton down`, "
                    f"or give this one another metadata.name"
                ) from None
            time.sleep(0.05)
            continue
        if run.is_locked_by(descriptor):
            return descriptor
        os.close(descriptor)  # the run before removed the file between our open and our lock


@contextlib.contextmanager
def socket_address(path: Path) -> Generator[str]:
    """A name for a unix socket's path that is short enough to bind or connect to, valid while inside."""
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def bind_control(path: Path) -> socket.socket:
    """The control socket, readable and writable by its owner only from the moment it exists."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        with socket_address(path) as address:
            listener.bind(address)
    finally:
        os.umask(previous)
    listener.listen(16)
    listener.setblocking(False)
    return listener
