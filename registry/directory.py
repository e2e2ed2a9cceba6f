"""Membership as files in a folder: `<worker_id>.json`, for processes of one user on one host (the local mode).

No lease: whoever starts the processes removes the file of one that was killed.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from registry.entry import MAX_ENTRY_BYTES, Entry, decode, encode
from registry.errors import BadEntry, Unreachable
from registry.membership import MAX_MEMBERS, Hint, Snapshot, hint_of
from servicekit.lifecycle import write_atomically


class DirectoryMembership:
    """A file that is half written, foreign or gone is simply nobody."""

    name = "directory"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def announce(self, entry: Entry, lease_s: float) -> None:
        try:
            write_atomically(self._path(entry), encode(entry))
        except OSError as error:
            raise Unreachable(f"{self._folder}: {error.strerror}") from error

    async def withdraw(self, entry: Entry) -> None:
        """A worker restarted under the same id has its own file here: leave it."""
        found = _read(self._path(entry))
        if found is not None and found.boot_id == entry.boot_id:
            self._path(entry).unlink(missing_ok=True)

    async def snapshot(self) -> Snapshot:
        try:
            paths = sorted(islice(self._folder.glob("*.json"), MAX_MEMBERS))
        except OSError as error:
            raise Unreachable(f"{self._folder}: {error.strerror}") from error
        found: dict[str, Hint] = {}
        for path in paths:
            entry = _read(path)
            if entry is not None:
                found[entry.address] = hint_of(entry)
        return found

    async def close(self) -> None:
        pass

    def _path(self, entry: Entry) -> Path:
        return self._folder / f"{entry.worker_id}.json"


def _read(path: Path) -> Entry | None:
    try:
        with path.open("rb") as file:
            return decode(file.read(MAX_ENTRY_BYTES + 1))
    except (OSError, BadEntry):
        return None
