"""The model cache: one folder per user, shared by every process of a host.

A file appears under its final name only when it is whole (written beside it, then renamed), and one process at a time
makes it (flock, which the kernel drops when its holder dies, kill -9 included).
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from modelfiles.errors import CacheNotWritable, NoDiskSpace

ENVIRONMENT_VARIABLE = "BATON_MODEL_CACHE"
_WAIT_S = 0.1
_FULL = {errno.ENOSPC, errno.EDQUOT}
_UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT}


def default_cache_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """$BATON_MODEL_CACHE, or baton/models below the user's cache folder."""
    configured = environment.get(ENVIRONMENT_VARIABLE)
    if configured:
        return Path(configured).expanduser()
    return Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "baton" / "models"


@contextmanager
def exclusive(lock_file: Path, while_waiting: Callable[[], None] | None = None) -> Generator[int]:
    """Hold a lock among processes and threads; waits for its present holder, calling `while_waiting` now and then.

    Yields the lock's file descriptor. A child process that inherits it keeps the lock until it ends, too.
    """
    with explained(lock_file.parent):
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while while_waiting is not None and not _try_lock(descriptor):
            while_waiting()
            time.sleep(_WAIT_S)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)  # drops the lock; the file stays, since removing it would race with a waiter


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def temporary_path(final: Path) -> Path:
    """Where to write what will be renamed to `final`; what a dead process left is swept under the lock."""
    return final.with_name(f".{final.name}.{os.getpid()}.tmp")


def sweep_temporaries(final: Path) -> None:
    """Remove what a killed writer of `final` left. Only for the holder of its lock."""
    for leftover in final.parent.glob(f".{final.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


@contextmanager
def explained(folder: Path) -> Generator[None]:
    """Turn the operating system's complaints about the cache into ours, which say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise NoDiskSpace(
                f"no space left on the disk of {folder}; free some, or set {ENVIRONMENT_VARIABLE} to another disk"
            ) from error
        if error.errno in _UNUSABLE:
            raise CacheNotWritable(
                f"cannot write to {folder} ({error.strerror}); set {ENVIRONMENT_VARIABLE} to a folder that you own"
            ) from error
        raise
