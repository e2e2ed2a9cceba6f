"""What can go wrong in a hand-over.

KvTransferError
├── PullError               data path; the transfer fails, the next candidate may work
│   ├── TicketRefused       unknown, used or closed ticket, or another boot id
│   ├── BlockNotPublished   a block outside what the ticket published
│   └── TransportLost       the connection, the mapping or the peer is gone
├── PeerUnusable            a prefill worker that cannot serve us: secret, protocol, layout, unreachable
└── TransferFailed          one transfer ended without KV; `failure` says why and whether another P may be tried
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class FailureKind(Enum):
    """Why a transfer ended without KV. The values are metric labels."""

    # said by P
    OVERLOADED = "overloaded"
    DRAINING = "draining"
    INVALID = "invalid"
    NO_PROGRESS = "no_progress"
    INTERNAL = "internal"
    # seen by D
    UNREACHABLE = "unreachable"
    STREAM_LOST = "stream_lost"
    SILENT = "silent"
    STALLED = "stalled"
    DEADLINE = "deadline"
    ANSWER_TIMEOUT = "answer_timeout"
    QUEUE_TIMEOUT = "queue_timeout"
    RESERVE_TIMEOUT = "reserve_timeout"
    FILL_TIMEOUT = "fill_timeout"
    PULL = "pull"
    CORRUPT = "corrupt"
    TRUNCATED = "truncated"
    STALE = "stale"
    LAYOUT = "layout"
    PROTOCOL = "protocol"
    CANCELLED = "cancelled"

    @property
    def is_wrong_bytes(self) -> bool:
        """What arrived was not what was announced (T2)."""
        return self in (FailureKind.CORRUPT, FailureKind.TRUNCATED, FailureKind.STALE)

    @property
    def is_retryable(self) -> bool:
        """Whether another prefill worker might do better with the same prompt."""
        return self not in (FailureKind.INVALID, FailureKind.DEADLINE, FailureKind.CANCELLED)


@dataclass(frozen=True, slots=True)
class TransferFailure:
    """One reason, with a message for the log (no tokens, no secrets)."""

    kind: FailureKind
    message: str = ""

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.message}" if self.message else self.kind.value


class KvTransferError(Exception):
    """Any error of this package."""


class PullError(KvTransferError):
    """Blocks could not be moved."""


class TicketRefused(PullError):
    """The source does not honour this ticket."""


class BlockNotPublished(PullError):
    """The source was asked for a block that its ticket has not published."""


class TransportLost(PullError):
    """The data path broke."""


class PeerUnusable(KvTransferError):
    """This prefill worker cannot serve us now."""


class TransferFailed(KvTransferError):
    """A transfer ended without KV. Nothing writes into its destinations any more."""

    def __init__(self, failure: TransferFailure) -> None:
        super().__init__(str(failure))
        self.failure = failure
