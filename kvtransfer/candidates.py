"""Which prefill worker to try next, and when to give up and prefill locally. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtransfer.errors import FailureKind, TransferFailure


@dataclass(frozen=True, slots=True)
class Candidate:
    """A prefill worker that the gateway named, best first. `boot_id` is the gateway's last knowledge: a hint."""

    worker_id: str
    address: str
    boot_id: bytes = b""


@dataclass(frozen=True, slots=True)
class Tried:
    """A candidate and why it did not deliver (for the log and the path reason)."""

    candidate: Candidate
    failure: TransferFailure


class CandidatePlan:
    """Tries candidates in order, each once, inside one attempt; `None` from `next` means: prefill locally.

    A failure that would repeat on every worker (see FailureKind.is_retryable) ends the plan at once.
    """

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._left = list(candidates)
        self._current: Candidate | None = None
        self._tried: list[Tried] = []

    def next(self) -> Candidate | None:
        assert self._current is None, "report how the last candidate ended first"
        self._current = self._left.pop(0) if self._left else None
        return self._current

    def failed(self, failure: TransferFailure) -> None:
        assert self._current is not None, "no candidate is being tried"
        self._tried.append(Tried(self._current, failure))
        self._current = None
        if not failure.kind.is_retryable:
            self._left.clear()

    @property
    def tried(self) -> tuple[Tried, ...]:
        return tuple(self._tried)

    @property
    def local_reason(self) -> str:
        """Why the prompt is prefilled locally, as a metric label."""
        return f"prefill_{self._tried[-1].failure.kind.value}" if self._tried else "no_candidate"

    @property
    def is_expired(self) -> bool:
        """The request's own end came first: neither another candidate nor local prefill is of use."""
        last = self._tried[-1].failure.kind if self._tried else None
        return last in (FailureKind.DEADLINE, FailureKind.CANCELLED)
