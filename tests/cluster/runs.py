"""Where running clusters live, and how leftovers of dead ones are told apart from live ones.

Each run has a folder below `root()`. Its supervisor holds an exclusive lock on the folder's `lock` file for as long as
it lives, and the kernel takes the lock away however it ends: a folder whose lock is free belongs to nobody. Only such
folders are cleaned, so that runs of other checkouts and other developers are left alone.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tests.cluster.errors import ClusterError
from tests.cluster.processes import kill_processes_of

_CGROUPS = Path("/sys/fs/cgroup")


def root() -> Path:
    """The folder of all of this user's runs. Short, because Unix socket paths are at most 108 characters."""
    folder = Path(tempfile.gettempdir()) / f"baton-cluster-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ClusterError(f"{folder} belongs to another user")
    return folder


def new_run(name: str) -> tuple[Path, IO[str]]:
    """Make the folder of a run and lock it, for the supervisor to hold. Cleans up leftovers first."""
    with _only_one_here():
        _clean_leftovers()
        folder = root() / f"{name}-{secrets.token_hex(3)}"
        folder.mkdir(mode=0o700)
        lock = (folder / "lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        return folder, lock


def clean_leftovers() -> None:
    """Remove what dead runs left behind; live ones are not touched."""
    with _only_one_here():
        _clean_leftovers()


def live_runs() -> list[Path]:
    with _only_one_here():
        return [folder for folder in _folders() if _is_alive(folder)]


def remove(folder: Path) -> None:
    """Remove all that a run whose processes are to end has left: processes, cgroups, the folder."""
    kill_processes_of(folder.name)
    _remove_cgroups(folder.name)
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            continue  # the run's own supervisor and a new run remove it at the same time


def make_cgroups(run: str) -> None:
    """A cgroup of the run's name in each hierarchy: below it the kubelet makes those of pods."""
    for hierarchy in _hierarchies():
        if (controllers := hierarchy / "cgroup.controllers").exists():
            wanted = " ".join(f"+{name}" for name in controllers.read_text().split())
            if wanted:
                (hierarchy / "cgroup.subtree_control").write_text(wanted)
        (hierarchy / run).mkdir(exist_ok=True)
        _inherit_cpuset(hierarchy, hierarchy / run)
        _weigh_more(hierarchy / run)


def _clean_leftovers() -> None:
    for folder in _folders():
        if not _is_alive(folder):
            remove(folder)


def _folders() -> list[Path]:
    return sorted(path for path in root().iterdir() if path.is_dir())


def _is_alive(folder: Path) -> bool:
    """Whether somebody holds the lock of the run."""
    try:
        with (folder / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def _only_one_here() -> Iterator[None]:
    """Between the making of a folder and its locking nobody may look."""
    with (root() / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _hierarchies() -> Iterator[Path]:
    """Roots of the cgroup trees: one in version 2, one per controller in version 1 (links are second names)."""
    if (_CGROUPS / "cgroup.procs").exists():
        yield _CGROUPS
    elif _CGROUPS.is_dir():
        yield from (path for path in _CGROUPS.iterdir() if (path / "cgroup.procs").exists() and not path.is_symlink())


def _weigh_more(group: Path) -> None:
    """All pods together weigh as much as one process by default: on a busy machine their probes would time out."""
    for name, weight in (("cpu.shares", 16 * 1024), ("cpu.weight", 1600)):
        if (group / name).exists():
            (group / name).write_text(str(weight))


def _inherit_cpuset(parent: Path, child: Path) -> None:
    """In version 1 a new cpuset group has no processors, and no process may enter it."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        if (child / name).exists() and (parent / name).exists() and not (child / name).read_text().strip():
            (child / name).write_text((parent / name).read_text())


def _remove_cgroups(run: str) -> None:
    """Remove the run's groups, innermost first. Their processes are dead; the kernel needs a moment to see it."""
    for hierarchy in _hierarchies():
        if not (hierarchy / run).is_dir():
            continue
        for folder, _, _ in os.walk(hierarchy / run, topdown=False):
            _remove_cgroup(Path(folder))


def _remove_cgroup(folder: Path) -> None:
    deadline = time.monotonic() + 60.0
    while True:
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
