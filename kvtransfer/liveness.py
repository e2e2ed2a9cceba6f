"""Whether the peer of a stream is alive and moving. Pure: time comes in as an argument, a verdict goes out."""

from __future__ import annotations

from enum import Enum

HEARTBEAT_INTERVAL_S = 1.0
SILENCE_LIMIT_S = 10.0
STEP_LIMIT_S = 10.0
STEP_LIMIT_FACTOR = 10.0


class Verdict(Enum):
    ALIVE = "alive"
    SILENT = "silent"  # nothing heard for SILENCE_LIMIT_S
    STALLED = "stalled"  # it speaks, but has work and makes no step


class LivenessMonitor:
    """Judges one peer by when it spoke and by the step counter in its heartbeats.

    `pending` is what this side waits for. The stall clock runs only while something is pending; it starts again when
    work appears and when the counter changes.
    """

    def __init__(self, now: float) -> None:
        self._heard_at = now
        self._step_counter: int | None = None
        self._predicted_step_s = 0.0
        self._num_pending = 0
        self._stepped_at = now

    def heard(self, now: float) -> None:
        """Any message arrived."""
        self._heard_at = max(self._heard_at, now)

    def heartbeat(self, step_counter: int, predicted_step_s: float, now: float) -> None:
        self.heard(now)
        if step_counter != self._step_counter:
            self._step_counter = step_counter
            self._stepped_at = now
        self._predicted_step_s = predicted_step_s

    def pending(self, num_pending: int, now: float) -> None:
        """How many things only the peer's steps can bring forward."""
        if self._num_pending == 0 and num_pending > 0:
            self._stepped_at = now
        self._num_pending = num_pending

    def verdict(self, now: float) -> Verdict:
        if now - self._heard_at >= SILENCE_LIMIT_S:
            return Verdict.SILENT
        if self._num_pending > 0 and now - self._stepped_at >= self.step_limit_s:
            return Verdict.STALLED
        return Verdict.ALIVE

    @property
    def step_limit_s(self) -> float:
        return max(STEP_LIMIT_S, STEP_LIMIT_FACTOR * self._predicted_step_s)
