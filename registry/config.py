"""The settings of the registry, which workers and gateways share. Imports nothing slow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from servicekit.config import option


@dataclass(frozen=True, kw_only=True)
class RegistryConfig:
    """Field names are flag names. A URL that cannot be used is refused where it is read (redis_url.py): what the
    command line says of a bad value would show the password in it."""

    registry: str = option(
        "", help="Redis or Valkey that holds who is there: redis://[user@]host:port[/db], rediss:// for TLS"
    )
    registry_file: Path | None = option(
        None, help="file with the registry's URL, password included; read at each connection"
    )
    registry_password_file: Path | None = option(
        None, help="file with the registry's password; read at each connection"
    )
    registry_ca_file: Path | None = option(
        None, help="certificate authority of a rediss:// registry; empty: the system's"
    )
    registry_prefix: str = option("baton", help="what this service's keys in the registry begin with")
    registry_dir: Path | None = option(None, help="local mode: folder where workers announce themselves")
