"""Ports of loopback for servers that are told theirs before they listen, or that come back to the same one."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

_TAKES_FROM = Path("/proc/sys/net/ipv4/ip_local_port_range")
_NUM_BELOW = 12_000


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on, outside the range from which the kernel takes those of clients.

    A port in that range, found free and given back, is any connection's on the machine until the server has it; a busy
    machine starts one in 20 s. Servers that have died leave theirs to others likewise.
    """
    lowest = _lowest_of_clients()
    found: list[int] = []
    with ExitStack() as held:  # all held at once, so that they differ
        for port in random.sample(range(lowest - _NUM_BELOW, lowest), _NUM_BELOW):
            if len(found) == count:
                break
            with suppress(OSError):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
                found.append(port)
    assert len(found) == count, f"{count} ports asked for, {len(found)} free below {lowest}"
    return found


def free_port() -> int:
    """One such port."""
    return free_ports(1)[0]


def _lowest_of_clients() -> int:
    """Linux says it; 32768 where it says less, as in a container, or nothing."""
    with suppress(OSError):
        return max(int(_TAKES_FROM.read_text().split()[0]), _NUM_BELOW + 1024)
    return 32_768
