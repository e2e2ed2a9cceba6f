"""Who may call a worker: everyone who proves the service's secret, nobody else.

The secret travels as gRPC metadata on every call (TLS or the pod network's encryption is the operator's business) and
is compared in constant time. It is never logged, and `Secret` does not print it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from kvtransfer import rpc

METADATA_KEY = "baton-secret"


class Secret:
    """The service's secret, made by `baton up` or the operator."""

    def __init__(self, value: str) -> None:
        """An empty value proves nothing: only for tests and single processes, which install no interceptor."""
        if not value.isascii() or not value.isprintable():
            raise ValueError("the service's secret must be printable ASCII")
        self._value = value

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a client adds to each call."""
        return ((METADATA_KEY, self._value),) if self._value else ()

    def signing_key(self, purpose: bytes) -> bytes:
        """A key of its own for each purpose, so that no use tells of the secret itself; empty without a secret."""
        return hmac.digest(self._value.encode(), purpose, "sha256") if self._value else b""

    def matches(self, offered: str | bytes | None) -> bool:
        """Constant in time for equal lengths and for different ones: digests are compared."""
        if offered is None or not self._value:
            return False
        data = offered.encode() if isinstance(offered, str) else offered
        return hmac.compare_digest(hashlib.sha256(data).digest(), hashlib.sha256(self._value.encode()).digest())

    def sign(self, *parts: bytes) -> bytes:
        """HMAC-SHA256 over the parts: proves the secret where it must not travel (the shared memory socket)."""
        mac = hmac.new(self._value.encode(), digestmod=hashlib.sha256)
        for part in parts:
            mac.update(len(part).to_bytes(4, "big") + part)
        return mac.digest()

    def __repr__(self) -> str:
        return "Secret(...)"


class SecretInterceptor(rpc.ServerInterceptor):
    """Ends every call without the secret as UNAUTHENTICATED, before its handler runs."""

    def __init__(self, secret: Secret | str) -> None:
        self._secret = secret if isinstance(secret, Secret) else Secret(secret)
        self._refuse = rpc.unary_handler(_unauthenticated, None, None)
        self._refuse_stream = rpc.stream_handler(_unauthenticated, None, None)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[rpc.Handler]], handler_call_details: Any
    ) -> rpc.Handler:
        offered = [value for key, value in handler_call_details.invocation_metadata or () if key == METADATA_KEY]
        if len(offered) == 1 and self._secret.matches(offered[0]):
            return await continuation(handler_call_details)
        handler = await continuation(handler_call_details)  # to answer in the shape that the caller expects
        return self._refuse_stream if handler is not None and handler.request_streaming else self._refuse


async def _unauthenticated(request_or_requests: object, context: rpc.Context) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the service's secret is missing or wrong")
