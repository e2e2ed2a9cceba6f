"""What can go wrong in local mode. Messages say what was found, the limit, and what to do next.

LocalError
├── PlanError         the service does not fit this machine
├── AlreadyRunning    a service of this name is up
├── NotRunning        no service of this name is up
├── StartFailed       a process ended before the service was ready
└── ControlError      the supervisor refused a command or did not answer
"""

from __future__ import annotations


class LocalError(Exception):
    """Root of local mode's errors: shown to the user as one message, without a stack trace."""


class PlanError(LocalError):
    """The service does not fit this machine."""


class AlreadyRunning(LocalError):
    """A service of this name is up, or its port is taken."""


class NotRunning(LocalError):
    """There is nothing to talk to."""


class StartFailed(LocalError):
    """The service cannot become ready."""


class ControlError(LocalError):
    """The supervisor refused a command or did not answer."""
