"""The bounded queue: how many requests and prompt tokens may wait for their first token, and when to come back.

Synchronous, no I/O. A request is *queued* from admission until its first token (or its end).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from gateway.errors import Overloaded, TooManyRequests

RETRY_MIN_S, RETRY_MAX_S = 0.5, 60.0
RATE_HALF_LIFE_S = 10.0


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """`max_key_share`: the part of either limit that one API key may hold, when there is more than one key."""

    max_requests: int
    max_tokens: int
    max_key_share: float = 1.0


class DrainRate:
    """Tokens per second leaving the queue: an average that forgets with a half-life."""

    def __init__(self, now: float) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._at = now

    def leave(self, now: float, num_tokens: int) -> None:
        elapsed = max(0.0, now - self._at)
        keep = 0.5 ** (elapsed / RATE_HALF_LIFE_S)
        self._tokens = self._tokens * keep + num_tokens
        self._seconds = self._seconds * keep + elapsed
        self._at = now

    @property
    def tokens_per_s(self) -> float:
        return self._tokens / self._seconds if self._seconds > 0.0 else 0.0


@dataclass(slots=True)
class Place:
    """One request's place in the queue. Leaving twice is the same as once."""

    num_tokens: int
    tenant: str
    is_queued: bool = True


class Admission:
    """Who may wait."""

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float], rng: random.Random | None = None) -> None:
        self._limits = limits
        self._clock = clock
        self._rng = rng or random.Random()
        self._rate = DrainRate(clock())
        self._requests_of: Counter[str] = Counter()
        self._tokens_of: Counter[str] = Counter()
        self.num_requests = 0
        self.num_tokens = 0

    def admit(self, num_tokens: int, tenant: str) -> Place:
        """Take a place, or refuse at once.

        Raises: TooManyRequests (429) for one key's share, Overloaded (503) for the whole queue. A prompt longer than
        the token limit is let in when nothing else waits: else it could never run.
        """
        limits = self._limits
        share = limits.max_key_share
        if share < 1.0:
            self._check(TooManyRequests, "this API key's share of queued requests", self._requests_of[tenant] + 1,
                        max(1, int(limits.max_requests * share)))  # fmt: skip
            if self._requests_of[tenant]:
                self._check(TooManyRequests, "this API key's share of queued prompt tokens",
                            self._tokens_of[tenant] + num_tokens, int(limits.max_tokens * share))  # fmt: skip
        self._check(Overloaded, "queued requests", self.num_requests + 1, limits.max_requests)
        if self.num_requests:
            self._check(Overloaded, "queued prompt tokens", self.num_tokens + num_tokens, limits.max_tokens)
        self._count(tenant, 1, num_tokens)
        return Place(num_tokens, tenant)

    def leave(self, place: Place) -> None:
        """The request got its first token, or ended."""
        if place.is_queued:
            place.is_queued = False
            self._count(place.tenant, -1, -place.num_tokens)
            self._rate.leave(self._clock(), place.num_tokens)

    def retry_after_s(self) -> float:
        """When a quarter of the queue will be gone at the present rate; jitter keeps clients apart."""
        rate = self._rate.tokens_per_s
        wait = 0.25 * self.num_tokens / rate if rate > 0 else 1.0
        return min(RETRY_MAX_S, max(RETRY_MIN_S, wait) * self._rng.uniform(1.0, 1.5))

    def _check(self, error: type[Overloaded | TooManyRequests], what: str, value: int, limit: int) -> None:
        if value > limit:
            retry = self.retry_after_s()
            raise error(
                f"{what}: {value} would exceed the limit of {limit}; try again in {retry:.1f} s", retry_after_s=retry
            )

    def _count(self, tenant: str, num_requests: int, num_tokens: int) -> None:
        self.num_requests += num_requests
        self.num_tokens += num_tokens
        self._requests_of[tenant] += num_requests
        self._tokens_of[tenant] += num_tokens
        if not self._requests_of[tenant]:
            del self._requests_of[tenant], self._tokens_of[tenant]
