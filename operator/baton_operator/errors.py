"""What can go wrong between the operator and the API server.

ApiError
├── Refused       400, 403, 404, 422: the same request will be refused again; named in the status
└── TryAgain      the pass ends and is begun anew after a jittered delay
    ├── Conflict      409: somebody wrote since; look again
    └── Unreachable   429, 5xx, timeout, lost connection: whether it was written is not known
"""

from __future__ import annotations


class ApiError(Exception):
    """`code` is the HTTP status, 0 where there was no answer."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Refused(ApiError):
    pass


class TryAgain(ApiError):
    """`after_s`: not before, as the server asked (Retry-After)."""

    def __init__(self, message: str, code: int, after_s: float = 0.0) -> None:
        super().__init__(message, code)
        self.after_s = after_s


class Conflict(TryAgain):
    pass


class Unreachable(TryAgain):
    pass
