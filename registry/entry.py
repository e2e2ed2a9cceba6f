"""What a worker says of itself, and the only form in which it is believed: closed, bounded and, in Redis, signed.

Who can write to the registry could send a gateway, and with it the service's secret, to an address of its own. So
entries carry a MAC made with the secret that workers and gateways share, and one that does not fit is no entry.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from registry.errors import BadEntry

MAX_ENTRY_BYTES = 2048
SIGNING_PURPOSE = b"baton registry entry 1"
ROLES = ("prefill", "decode")

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,252}")
_REVISION = re.compile(r"[A-Za-z0-9._-]{0,63}")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253}):([0-9]{1,5})")
_FINGERPRINT = re.compile(r"[\x21-\x7e]{0,256}")
_BOOT_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One worker. `boot_id` in hex; `address` is that of gRPC, `http` that of health and metrics."""

    worker_id: str
    role: str
    address: str
    http: str
    revision: str
    fingerprint: str
    boot_id: str
    pid: int


def is_worker_id(value: object) -> bool:
    return _is_match(_NAME, value)


def is_revision(value: object) -> bool:
    return _is_match(_REVISION, value)


def is_address(value: object) -> bool:
    """`host:port` with a port that can be connected to."""
    found = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    return found is not None and 0 < int(found[2]) < 65536


_CHECKS: Mapping[str, Callable[[object], bool]] = {
    "worker_id": is_worker_id,
    "role": lambda value: value in ROLES,
    "address": is_address,
    "http": is_address,
    "revision": is_revision,
    "fingerprint": lambda value: _is_match(_FINGERPRINT, value),
    "boot_id": lambda value: _is_match(_BOOT_ID, value),
    "pid": lambda value: type(value) is int and 0 <= value < 1 << 32,
}


def encode(entry: Entry, key: bytes = b"") -> bytes:
    """The entry as JSON; with a key, signed."""
    fields: dict[str, object] = asdict(entry)
    return json.dumps(fields | {"mac": _mac(fields, key)} if key else fields, separators=(",", ":")).encode()


def decode(data: bytes, key: bytes = b"") -> Entry:
    """Read what `encode` wrote. With a key only what was signed with it counts.

    Raises: BadEntry naming the field, never its value.
    """
    if len(data) > MAX_ENTRY_BYTES:
        raise BadEntry(f"longer than {MAX_ENTRY_BYTES} bytes")
    try:
        fields: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadEntry("not JSON") from error
    if not isinstance(fields, dict):
        raise BadEntry("not an object")
    found: dict[str, Any] = {str(key): value for key, value in fields.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]  # whatever stood there
    mac: object = found.pop("mac", "")
    if found.keys() != _CHECKS.keys():
        raise BadEntry(f"fields missing or unknown: {', '.join(sorted(found.keys() ^ _CHECKS.keys()))[:200]!a}")
    for name, is_right in _CHECKS.items():
        if not is_right(found[name]):
            raise BadEntry(f"{name} is not what it must be")
    if key and not (isinstance(mac, str) and hmac.compare_digest(mac.encode(), _mac(found, key).encode())):
        raise BadEntry("not signed with this service's secret")
    return Entry(**found)


def _mac(fields: Mapping[str, object], key: bytes) -> str:
    """HMAC-SHA256 over the fields in one form."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _is_match(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
