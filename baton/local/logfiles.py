"""Log files of bounded size that a process may go on appending to.

The processes write to the files themselves (append mode), so a busy or dead supervisor never holds up a worker. A file
that has grown too long is copied to `<name>.1` and cut: lines written between copy and cut are lost, as logs can bear.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

MAX_LOG_BYTES = 8 * 2**20
STDOUT = 1


def open_log(path: Path) -> int:
    """A descriptor that appends, for a child's stdout and stderr."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def begin_anew(folder: Path) -> None:
    """A log tells of one run: those of the run before become the older parts, but for the one we write to ourselves."""
    for path in folder.glob("*.log"):
        if not os.path.samestat(path.stat(), os.fstat(STDOUT)):
            path.replace(_older(path))


def rotate(folder: Path, *, max_bytes: int = MAX_LOG_BYTES) -> None:
    """Cut every log of the folder that is longer than `max_bytes`, keeping one older part."""
    for path in folder.glob("*.log"):
        if path.stat().st_size > max_bytes:
            shutil.copyfile(path, _older(path))
            os.truncate(path, 0)


def tail(path: Path, num_lines: int, *, max_bytes: int = 256 * 1024) -> str:
    """The last lines of a log; "" if there is none."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - max_bytes))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(lines[-num_lines:])


def _older(path: Path) -> Path:
    return path.with_name(path.name + ".1")
