"""Why membership could not be read or written.

RegistryError
├── Unreachable     nobody answered in time: try again
├── Refused         it said no (password, rights, a replica that takes no writes): try again, files may change
└── BadEntry        what stands there is not an entry; never acted on
"""

from __future__ import annotations


class RegistryError(Exception):
    """The tree's root. Messages never hold a password."""


class Unreachable(RegistryError):
    pass


class Refused(RegistryError):
    pass


class BadEntry(RegistryError):
    pass
