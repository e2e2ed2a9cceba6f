"""What can go wrong in the gateway, and what the client is told.

    GatewayError
    ├── permanent (the same request would fail again)
    │   ├── InvalidRequest       400  names field, value, limit
    │   ├── Unauthorized         401
    │   ├── NotFound             404
    │   ├── BodyTooSlow          408
    │   ├── BodyTooLarge         413
    │   ├── InternalError        500  a bug of ours
    │   └── Quarantined          500  three workers died while running this request
    └── retryable (Retry-After, retry-after-ms)
        ├── TooManyRequests      429  one key's share of the queue is used up
        ├── Overloaded           503  the whole queue is full, or every worker refused
        ├── Unavailable          503  no routable worker, or the gateway drains
        ├── AttemptsExhausted    503  the attempt budget is spent
        └── DeadlineExceeded     504

Inside the process, never shown to a client:
    TokenGap                     an attempt skipped an index: the attempt fails, not the request
"""

from __future__ import annotations

from typing import Any


class GatewayError(Exception):
    """Base: carries what the error body and headers need."""

    status = 500
    type = "InternalServerError"
    is_retryable = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """vLLM's error body; `code` is the HTTP status."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.status}}


class InvalidRequest(GatewayError):
    status = 400
    type = "BadRequestError"


class Unauthorized(GatewayError):
    status = 401
    type = "AuthenticationError"


class NotFound(GatewayError):
    status = 404
    type = "NotFoundError"


class BodyTooSlow(GatewayError):
    status = 408
    type = "RequestTimeoutError"


class BodyTooLarge(GatewayError):
    status = 413
    type = "RequestEntityTooLargeError"


class InternalError(GatewayError):
    """Tells a client where the details are, and nothing more."""

    def __init__(self) -> None:
        super().__init__("internal error; the server's log has the details under this request's id")


class Quarantined(GatewayError):
    status = 500
    type = "RequestQuarantinedError"


class TooManyRequests(GatewayError):
    status = 429
    type = "RateLimitError"
    is_retryable = True


class Overloaded(GatewayError):
    status = 503
    type = "ServiceUnavailableError"
    is_retryable = True


class Unavailable(Overloaded):
    pass


class AttemptsExhausted(Overloaded):
    pass


class DeadlineExceeded(GatewayError):
    status = 504
    type = "DeadlineExceededError"
    is_retryable = True


class TokenGap(Exception):
    """A token's index lies beyond the end of the log."""

    def __init__(self, choice: int, expected: int, got: int) -> None:
        super().__init__(f"choice {choice}: expected index {expected}, got {got}")
        self.choice = choice
        self.expected = expected
        self.got = got
