"""API keys: only their SHA-256 is kept, and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from gateway.errors import Unauthorized

_HASH_PREFIX = "sha256:"


class ApiKeys:
    """The keys that open /v1. Without any, everyone may come in and all share one tenant."""

    def __init__(self, digests: Iterable[bytes] = ()) -> None:
        self._digests = tuple(digests)

    def __len__(self) -> int:
        return len(self._digests)

    @classmethod
    def read(cls, path: Path | None) -> ApiKeys:
        """One key a line, plain or as `sha256:<hex>`; empty lines and # comments are skipped."""
        if path is None:
            return cls()
        lines = [line.strip() for line in path.read_text().splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ValueError(f"--api-key-file {path}: no keys in it")
        return cls(_digest(key) for key in keys)

    def tenant(self, authorization: str) -> str:
        """The tenant's name (hex of the key's digest; "" for the shared one). Raises: Unauthorized."""
        if not self._digests:
            return ""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        # every key is compared, so that time tells nothing about which one is close
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized("Authorization: a valid key is needed; send `Authorization: Bearer <key>`")
        return digest.hex()


def cache_salt(tenant: str, client_salt: str | None) -> bytes:
    """Keys the first link of the prefix chain: one tenant can never reach another's KV (T9).

    The client's own `cache_salt` splits a tenant's cache further; it cannot name another tenant's.
    """
    return hashlib.sha256(f"baton cache salt\0{tenant}\0{client_salt or ''}".encode()).digest()


def _digest(key: str) -> bytes:
    if key.startswith(_HASH_PREFIX):
        return bytes.fromhex(key.removeprefix(_HASH_PREFIX))
    return hashlib.sha256(key.encode()).digest()
