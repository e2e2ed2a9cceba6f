"""Which revision of the service a request goes to. Pure.

A revision is *complete* when it has a pair: a decode worker and a prefill worker that fit each other.
Prefill and decode of two revisions never serve one attempt together, whatever is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Member(Protocol):
    """What counts of a worker here (router.WorkerState)."""

    @property
    def revision(self) -> str: ...
    @property
    def layout_fingerprint(self) -> str: ...
    @property
    def is_draining(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Preference:
    """`serving` is what the operator says, None while it says nothing; `last` is where requests went lately.

    `needs_prefill` is False where the service never hands over: then a decode worker alone is a revision.
    """

    serving: str | None = None
    last: str | None = None
    needs_prefill: bool = True


@dataclass(slots=True)
class PoolCount:
    ready: int = 0
    total: int = 0


@dataclass(slots=True)
class RevisionCount:
    """For /internal/status."""

    prefill: PoolCount = field(default_factory=PoolCount)
    decode: PoolCount = field(default_factory=PoolCount)


def choose(preference: Preference, decode: Sequence[Member], prefill: Sequence[Member]) -> str | None:
    """The revision whose workers a request may use; None if no decode worker is left.

    A complete one before one that is not (its decode workers prefill for themselves), then the serving one, then where
    requests went lately, then the one with most decode workers. `decode` are the workers that could take the request.
    """
    num_decode = Counter(worker.revision for worker in decode)
    if not num_decode:
        return None
    complete = complete_revisions(decode, prefill) if preference.needs_prefill else set(num_decode)
    return max(
        num_decode,
        key=lambda revision: (
            revision in complete,
            revision == preference.serving,
            revision == preference.last,
            num_decode[revision],
            revision,
        ),
    )


def complete_revisions(decode: Sequence[Member], prefill: Sequence[Member]) -> set[str]:
    """Those with a routable pair."""
    senders = {(p.revision, p.layout_fingerprint) for p in prefill if not p.is_draining}
    return {d.revision for d in decode if not d.is_draining and (d.revision, d.layout_fingerprint) in senders}


def count(decode: Collection[Member], prefill: Collection[Member]) -> dict[str, RevisionCount]:
    """How many workers of each revision are connected, and how many of them take requests."""
    found: dict[str, RevisionCount] = {}
    for worker in prefill:
        _add(found.setdefault(worker.revision, RevisionCount()).prefill, worker)
    for worker in decode:
        _add(found.setdefault(worker.revision, RevisionCount()).decode, worker)
    return found


def _add(pool: PoolCount, worker: Member) -> None:
    pool.total += 1
    pool.ready += not worker.is_draining
