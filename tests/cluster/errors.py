"""What goes wrong with a test cluster.

ClusterError
├── Unavailable    this machine cannot have the tier: tests are skipped with the reason
├── BuildFailed    a program did not compile
└── StartFailed    a part of the cluster ended or was not ready in time; carries the end of its log
"""

from __future__ import annotations


class ClusterError(Exception):
    """Anything about the test cluster itself."""


class Unavailable(ClusterError):
    """This machine cannot have the tier, and why."""


class BuildFailed(ClusterError):
    """A program did not compile or a package could not be installed."""


class StartFailed(ClusterError):
    """A part of the cluster ended or was not ready in time."""
