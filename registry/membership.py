"""The seam: what a worker may do to a registry, and what a gateway may ask of one.

Implementations: directory.py (one host), redis_membership.py (a cluster), dns.py (read only: headless Services).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from registry.entry import Entry

MAX_MEMBERS = 4096
"""More than any service has; what is beyond was not written by its workers."""


@dataclass(frozen=True, slots=True)
class Hint:
    """An address that may have a worker. Role and revision are empty where only `Hello` can tell."""

    address: str
    role: str = ""
    worker_id: str = ""
    revision: str = ""


Snapshot = Mapping[str, Hint]
"""By address."""


class Source(Protocol):
    """Where a gateway looks."""

    name: str

    async def snapshot(self) -> Snapshot:
        """Who is announced now. Raises: RegistryError if that cannot be said: it never means that nobody is there."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


class Membership(Source, Protocol):
    """Where a worker announces itself, too. Both calls end in bounded time and may be repeated."""

    async def announce(self, entry: Entry, lease_s: float) -> None:
        """Be found for `lease_s` seconds. Raises: RegistryError."""
        ...

    async def withdraw(self, entry: Entry) -> None:
        """Be found no more; an entry of another boot under the same worker id stays. Raises: RegistryError."""
        ...


def hint_of(entry: Entry) -> Hint:
    return Hint(entry.address, entry.role, entry.worker_id, entry.revision)
