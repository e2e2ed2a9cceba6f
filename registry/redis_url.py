"""Which Redis, and as whom. Read again for each connection: secrets are rotated under a running process."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from registry.config import RegistryConfig

MAX_FILE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """A connection's parameters. The password has no place in its text form."""

    host: str
    port: int
    db: int
    username: str
    password: str = field(repr=False)
    is_tls: bool
    ca_file: Path | None

    def __str__(self) -> str:
        return f"{'rediss' if self.is_tls else 'redis'}://{self.host}:{self.port}/{self.db}"


def read_address(config: RegistryConfig) -> RedisAddress:
    """Raises: ValueError in words that show no secret, OSError."""
    url = _read(config.registry_file) if config.registry_file is not None else config.registry
    address = parse_url(url, config.registry_ca_file)
    if config.registry_password_file is None:
        return address
    return RedisAddress(
        address.host, address.port, address.db, address.username, _read(config.registry_password_file),
        address.is_tls, address.ca_file,
    )  # fmt: skip


def parse_url(url: str, ca_file: Path | None = None) -> RedisAddress:
    """Raises: ValueError that never repeats the URL, since a password may be in it."""
    wanted = "registry URL: expected redis://[user[:password]@]host[:port][/db] or rediss://..."
    try:
        parts = urlsplit(url)
        port = parts.port or 6379
    except ValueError:
        raise ValueError(f"{wanted}; host or port cannot be read") from None
    if parts.scheme not in ("redis", "rediss"):
        raise ValueError(f"{wanted}; the scheme is neither redis nor rediss")
    if not parts.hostname:
        raise ValueError(f"{wanted}; there is no host")
    if parts.query or parts.fragment:
        raise ValueError(
            f"{wanted}; it takes no ?query and no #fragment (a '#' or '?' in a password is written %23, %3F)"
        )
    db = parts.path.strip("/") or "0"
    if not (db.isascii() and db.isdigit()):
        raise ValueError(f"{wanted}; the database is not a number")
    is_tls = parts.scheme == "rediss"
    if ca_file is not None and not is_tls:
        raise ValueError("registry URL: a certificate authority is given, but the scheme is redis, without TLS")
    return RedisAddress(
        parts.hostname, port, int(db), unquote(parts.username or ""), unquote(parts.password or ""), is_tls, ca_file
    )


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES).decode(errors="replace").strip()
