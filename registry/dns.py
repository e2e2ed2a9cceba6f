"""Headless Services as a list of addresses: finds workers without any registry, or while there is none.

DNS says nothing but addresses: role, revision and whether anybody is there at all, `Hello` tells.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence

from registry.errors import RegistryError, Unreachable
from registry.membership import MAX_MEMBERS, Hint, Snapshot

TIMEOUT_S = 5.0

Lookup = Callable[[str, int], Awaitable[Sequence[str]]]
"""Addresses of a host; empty if the name has none. Raises: OSError."""


class DnsSource:
    """Every A and AAAA record behind one name, with the name's port."""

    def __init__(self, host: str, port: int, lookup: Lookup | None = None) -> None:
        self.name = f"dns {host}"
        self._host = host
        self._port = port
        self._lookup = lookup or look_up

    async def snapshot(self) -> Snapshot:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                addresses = await self._lookup(self._host, self._port)
        except TimeoutError as error:
            raise Unreachable(f"no answer in {TIMEOUT_S:g} s") from error
        except OSError as error:
            raise Unreachable(error.strerror or type(error).__name__) from error
        if len(addresses) > MAX_MEMBERS:
            raise RegistryError(f"{len(addresses)} addresses; no service has more than {MAX_MEMBERS}")
        joined = (join_address(address, self._port) for address in addresses)
        return {address: Hint(address) for address in joined}

    async def close(self) -> None:
        pass


def join_address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def look_up(host: str, port: int) -> Sequence[str]:
    """What the system's resolver says."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
            return ()  # a Service without pods has no records
        raise
    return sorted({str(sockaddr[0]) for _, _, _, _, sockaddr in found})
