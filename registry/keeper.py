"""A worker's side: announced at ready, again each third of the lease, at once after a failure; withdrawn at drain."""

from __future__ import annotations

import asyncio
import logging
import random

from registry.entry import Entry
from registry.errors import RegistryError
from registry.membership import Membership

log = logging.getLogger(__name__)

LEASE_S = 15.0
RETRY_MIN_S = 0.25
WITHDRAW_TIMEOUT_S = 3.0


class Keeper:
    """Keeps one entry in one registry. Nothing that happens to the registry reaches the worker's requests."""

    def __init__(
        self, membership: Membership, entry: Entry, lease_s: float = LEASE_S, rng: random.Random | None = None
    ) -> None:
        self.membership = membership
        self.is_connected = False
        self.num_announced = 0
        self._entry = entry
        self._lease_s = lease_s
        self._rng = rng or random.Random()
        self._num_failed = 0
        self._is_withdrawn = False

    async def run(self) -> None:
        """Announce for ever."""
        while True:
            try:
                pause = await self.announce_once()
            except Exception:  # the loop's boundary: a bug in here must not end a worker that serves
                log.exception("announcing failed", extra={"registry": self.membership.name})
                pause = self._lease_s
            await asyncio.sleep(pause)

    async def announce_once(self) -> float:
        """Announce, and say in how many seconds to do it again."""
        try:
            await self.membership.announce(self._entry, self._lease_s)
        except RegistryError as error:
            self._note(False, str(error))
        else:
            self.num_announced += 1
            self._note(True)
        return pause_s(self._num_failed, self._lease_s, self._rng)

    async def withdraw(self) -> None:
        """Once; best effort, since the lease ends it anyway. `run` must have ended."""
        if self._is_withdrawn:
            return
        self._is_withdrawn = True
        try:
            async with asyncio.timeout(WITHDRAW_TIMEOUT_S):
                await self.membership.withdraw(self._entry)
        except (RegistryError, TimeoutError) as error:
            log.info(
                "not withdrawn; the lease will end", extra={"registry": self.membership.name, "reason": str(error)}
            )
        await self.membership.close()

    def _note(self, is_well: bool, reason: str = "") -> None:
        was_well = self.is_connected
        self.is_connected, self._num_failed = is_well, 0 if is_well else self._num_failed + 1
        if is_well and not was_well:
            log.info("announced", extra={"registry": self.membership.name})
        elif not is_well and (was_well or self._num_failed == 1):
            log.warning("registry not reachable", extra={"registry": self.membership.name, "reason": reason})


def pause_s(num_failed: int, lease_s: float, rng: random.Random) -> float:
    """Until the next announcement: a third of the lease and a fifth of that as jitter; after failures full jitter under
    a growing bound, so that a registry that comes back does not meet all workers at once."""
    usual = lease_s / 3
    if not num_failed:
        return usual * rng.uniform(0.8, 1.2)
    return RETRY_MIN_S + rng.uniform(0.0, min(usual, RETRY_MIN_S * 2.0 ** min(num_failed, 16)))
