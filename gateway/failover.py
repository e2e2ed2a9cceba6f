"""What to do when an attempt ends without completing its request. Pure: a history and an end in, a decision out.

Budget: an attempt that committed a token, and a drain, cost nothing; everything else costs one of MAX_ATTEMPTS.
Poison: a worker death without one new token is held against the request. After two it runs alone on a worker; a third
quarantines it. (Deaths that committed tokens only count towards a far limit: a long stream may outlive many workers.)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from gateway.errors import (
    AttemptsExhausted,
    DeadlineExceeded,
    GatewayError,
    InternalError,
    InvalidRequest,
    Overloaded,
    Quarantined,
)

MAX_ATTEMPTS = 3
DEATHS_UNTIL_ALONE = 2
DEATHS_UNTIL_QUARANTINE = 3
MAX_DEATHS_WITH_PROGRESS = 64


class EndKind(Enum):
    """How an attempt ended, in one word list for what workers say and what the gateway sees."""

    FINISHED = "finished"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    INVALID = "invalid"
    OVERLOADED = "overloaded"
    DRAINING = "draining"
    INTERNAL = "internal"
    WORKER_LOST = "worker_lost"
    WORKER_SILENT = "worker_silent"
    TOKEN_GAP = "token_gap"
    GATEWAY_FAULT = "gateway_fault"  # a bug of ours: neither client nor worker is to blame


DEATHS = frozenset({EndKind.WORKER_LOST, EndKind.WORKER_SILENT})


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """One attempt's end. `was_accepted` is False where the worker never took it: then its death is not its doing."""

    kind: EndKind
    worker_id: str
    num_committed: int = 0
    was_accepted: bool = True
    message: str = ""


@dataclass(frozen=True, slots=True)
class History:
    """What counts against a request so far."""

    num_charged: int = 0
    num_barren_deaths: int = 0
    num_deaths: int = 0
    avoid: frozenset[str] = field(default_factory=frozenset[str])

    @property
    def must_run_alone(self) -> bool:
        return self.num_barren_deaths >= DEATHS_UNTIL_ALONE


@dataclass(frozen=True, slots=True)
class Retry:
    """Route again, after `pause_s` (a worker that refused needs a moment)."""

    history: History
    pause_s: float = 0.0


def after(history: History, end: AttemptEnd) -> Retry | GatewayError:
    """Decide what follows an attempt that ended while choices are unfinished."""
    match end.kind:
        case EndKind.DEADLINE:
            return DeadlineExceeded(f"the request's deadline passed on worker {end.worker_id}: {end.message}")
        case EndKind.INVALID:
            return InvalidRequest(end.message or "the worker can never run this request")
        case EndKind.GATEWAY_FAULT:  # its token is committed without its text: no other attempt would say it again
            return InternalError()
        case EndKind.DRAINING:
            return Retry(replace(history, avoid=frozenset({end.worker_id})))
        case _:
            return _charge(history, end)


def _charge(history: History, end: AttemptEnd) -> Retry | GatewayError:
    is_barren = end.num_committed == 0
    is_death = end.kind in DEATHS and end.was_accepted
    updated = History(
        num_charged=history.num_charged + is_barren,
        num_barren_deaths=history.num_barren_deaths + (is_death and is_barren),
        num_deaths=history.num_deaths + is_death,
        avoid=frozenset({end.worker_id}),
    )
    if updated.num_barren_deaths >= DEATHS_UNTIL_QUARANTINE or updated.num_deaths > MAX_DEATHS_WITH_PROGRESS:
        return Quarantined(
            f"{updated.num_deaths} workers died while running this request, the last one alone with it; it will not be"
            " tried again"
        )
    if updated.num_charged >= MAX_ATTEMPTS:
        reason = (
            f"after {updated.num_charged} attempts, the last on worker {end.worker_id}: {end.kind.value} {end.message}"
        )
        is_full = end.kind is EndKind.OVERLOADED
        return Overloaded(f"every worker refused {reason}") if is_full else AttemptsExhausted(f"gave up {reason}")
    return Retry(updated, pause_s=0.1 * 2**updated.num_charged if end.kind is EndKind.OVERLOADED else 0.0)
