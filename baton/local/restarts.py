"""Decide when a process that ended is started again. Pure: the caller brings clock and chance.

The wait doubles from FIRST_S to MAX_S with jitter, so that workers killed together do not come back together; it starts
over once a process stayed up for STABLE_S. Several quick ends in a row are a crash loop: shown, and still retried.
Only while the service starts is there an end after which nothing is tried again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

FIRST_S = 0.2  # a killed worker should be back before clients notice; its weights load in seconds anyway
MAX_S = 30.0
STABLE_S = 30.0
JITTER = 0.25
CRASH_LOOP_ENDS = 3
MAX_ENDS_BEFORE_READY = 3
HOPELESS_EXITS = (2, 78)  # a setting was refused; a worker cannot start with this model or this memory


@dataclass(frozen=True, slots=True)
class RestartHistory:
    """What one process's past says: ends in a row without a stable time between, and restarts in all."""

    num_quick_ends: int = 0
    num_restarts: int = 0


@dataclass(frozen=True, slots=True)
class Restart:
    delay_s: float
    is_crash_loop: bool
    history: RestartHistory


def is_hopeless(history: RestartHistory, exit_code: int) -> bool:
    """Whether an end during the service's start will not get better by starting again; `history` is that before it."""
    return exit_code in HOPELESS_EXITS or history.num_restarts + 1 >= MAX_ENDS_BEFORE_READY


def after_end(history: RestartHistory, *, uptime_s: float, chance: float) -> Restart:
    """When to start again a process that ended after `uptime_s`; `chance` is uniform in [0, 1)."""
    assert 0.0 <= chance < 1.0
    num_quick_ends = 1 if uptime_s >= STABLE_S else history.num_quick_ends + 1
    # The exponent is bounded: 2**1100 is no float.
    base = min(MAX_S, FIRST_S * 2.0 ** min(num_quick_ends - 1, 32))
    delay_s = base * (1.0 - JITTER + 2.0 * JITTER * chance)
    later = replace(history, num_quick_ends=num_quick_ends, num_restarts=history.num_restarts + 1)
    return Restart(delay_s, num_quick_ends >= CRASH_LOOP_ENDS, later)
