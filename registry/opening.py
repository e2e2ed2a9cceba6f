"""From settings to the registries they name."""

from __future__ import annotations

from collections.abc import Sequence

from registry.config import RegistryConfig
from registry.directory import DirectoryMembership
from registry.dns import DnsSource
from registry.membership import Membership
from registry.redis_membership import RedisMembership
from registry.redis_url import read_address
from registry.table import Table, Watched

DIRECTORY_EVERY_S = 0.25
REDIS_EVERY_S = 1.0
DNS_EVERY_S = 5.0


def open_memberships(config: RegistryConfig, key: bytes) -> list[Membership]:
    """Where a worker announces itself. Connects to nothing yet.

    Raises: ValueError for a URL that cannot be used (a file's content may still become right).
    """
    found: list[Membership] = []
    if config.registry_dir is not None:
        found.append(DirectoryMembership(config.registry_dir))
    redis = _redis(config, key)
    return [*found, redis] if redis is not None else found


def open_table(
    config: RegistryConfig, key: bytes, dns: Sequence[tuple[str, int]] = (), seeds: Sequence[str] = ()
) -> Table:
    """Where a gateway looks. Raises: ValueError as `open_memberships`."""
    every_s = {DirectoryMembership.name: DIRECTORY_EVERY_S, RedisMembership.name: REDIS_EVERY_S}
    watched = [Watched(source, every_s[source.name]) for source in open_memberships(config, key)]
    watched += [Watched(DnsSource(host, port), DNS_EVERY_S) for host, port in dns]
    return Table(watched, seeds)


def _redis(config: RegistryConfig, key: bytes) -> RedisMembership | None:
    if config.registry and config.registry_file is not None:
        raise ValueError("--registry and --registry-file are both given; give one")
    if not config.registry and config.registry_file is None:
        return None
    if config.registry:
        read_address(config)  # a bad URL on the command line never becomes right: say so now
    return RedisMembership(lambda: read_address(config), config.registry_prefix, key)
