"""A gateway's side: the last that each source said. A source that is silent, and one that fails, changes nothing."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from registry.errors import RegistryError
from registry.membership import Hint, Snapshot, Source

log = logging.getLogger(__name__)

RETRY_MIN_S, RETRY_MAX_S = 0.25, 5.0


@dataclass(frozen=True, slots=True)
class Watched:
    """A source, and how often it is asked."""

    source: Source
    every_s: float


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """For /internal/status and the metrics. `age_s` is None until the first answer."""

    name: str
    is_connected: bool
    age_s: float | None
    num_members: int
    error: str


class Table:
    """The union of all sources' last answers."""

    def __init__(
        self,
        watched: Sequence[Watched],
        seeds: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._clock = clock
        self._rng = rng or random.Random()
        self._rows = [_Row(each) for each in watched]
        self._seeds: Snapshot = {seed: Hint(seed) for seed in seeds}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._keep_asking(row), name=f"registry {row.watched.source.name}")
            for row in self._rows
        ]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for row in self._rows:
            await row.watched.source.close()

    def hints(self) -> Mapping[str, Hint]:
        """By address; what names a role knows more and wins."""
        found = dict(self._seeds)
        for row in self._rows:
            for address, hint in row.snapshot.items():
                if hint.role or address not in found:
                    found[address] = hint
        return found

    def statuses(self) -> list[SourceStatus]:
        now = self._clock()
        return [row.status(now) for row in self._rows]

    async def ask(self, number: int) -> float:
        """Ask one source, and say in how many seconds to ask again."""
        row = self._rows[number]
        try:
            snapshot = await row.watched.source.snapshot()
        except RegistryError as error:
            row.note_failure(str(error))
            bound = min(RETRY_MAX_S, RETRY_MIN_S * 2.0 ** min(row.num_failed, 16))
            return RETRY_MIN_S + self._rng.uniform(0.0, bound)
        row.note_answer(snapshot, self._clock())
        return row.watched.every_s * self._rng.uniform(0.8, 1.2)

    async def _keep_asking(self, row: _Row) -> None:
        number = self._rows.index(row)
        while True:
            try:
                pause = await self.ask(number)
            except Exception:  # the loop's boundary: a bug with one source must not stop the gateway finding workers
                log.exception("registry source failed", extra={"registry": row.watched.source.name})
                pause = RETRY_MAX_S
            await asyncio.sleep(pause)


class _Row:
    """What is known of one source."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        self.snapshot: Snapshot = {}
        self.num_failed = 0
        self._answered_at: float | None = None
        self._error = "not asked yet"

    def note_answer(self, snapshot: Snapshot, now: float) -> None:
        if self.num_failed:
            log.info("registry answers again", extra={"registry": self.watched.source.name})
        self.snapshot, self._answered_at, self.num_failed, self._error = snapshot, now, 0, ""

    def note_failure(self, error: str) -> None:
        self.num_failed += 1
        self._error = error
        if self.num_failed == 1:
            log.warning(
                "registry not reachable; routing goes on with the workers known",
                extra={"registry": self.watched.source.name, "reason": error},
            )

    def status(self, now: float) -> SourceStatus:
        age_s = None if self._answered_at is None else now - self._answered_at
        return SourceStatus(self.watched.source.name, not self._error, age_s, len(self.snapshot), self._error)
