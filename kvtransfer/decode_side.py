"""D's state machine for hand-overs: messages and local events in, actions out. No I/O, no clock of its own.

    PROMISED -> RESERVING -> FILLING -> VERIFYING -> COMMITTED
        \\___________\\___________\\__________\\
                                 STOPPING ----> FAILED           (states: see baton.proto, "Prefill: D <-> P")

One `DecodeSide` per control stream, that is per pair of D and one incarnation of P. Every public method takes `now`
(any monotonic clock, seconds) and returns the actions to carry out, in order. What the driver owes it:

    Send     put the message on the control stream
    Reserve  get blocks for the prompt, then call `reserved`
    Pull     move the blocks, take each digest over the destination, call `blocks_read` as they arrive;
             on an error call `pull_stopped(error)`
    StopPulling   end the pull; when nothing writes into the destinations any more, call `pull_stopped`
    Commit / Fail the last action of a transfer, exactly one of them. Only after Commit may a token of this attempt
             exist (T3); after Fail nothing writes into the destinations (T1)

Messages of another boot id, unknown or ended transfers, repeats: no effect but a counter in `ignored` (T4).
Every state has a deadline of its own; the driver calls `tick` at `next_deadline` or more often (T7).
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from kvtransfer.digest import DIGEST_BYTES, manifest_digest
from kvtransfer.errors import FailureKind, TransferFailure
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.transport import MAX_OUTSTANDING_BYTES, TICKET_BYTES, BlockRead, SourceBlock


class TransferState(Enum):
    PROMISED = "promised"
    RESERVING = "reserving"
    FILLING = "filling"
    VERIFYING = "verifying"
    COMMITTED = "committed"
    STOPPING = "stopping"
    FAILED = "failed"


REPORT_S = 1.0
REPORT_BLOCKS = 16
"""Verified blocks that one acknowledgement, or one more credit, tells of while others are still under way."""

_S = TransferState
_TRANSITIONS: dict[TransferState, frozenset[TransferState]] = {
    _S.PROMISED: frozenset({_S.RESERVING, _S.FAILED}),
    _S.RESERVING: frozenset({_S.FILLING, _S.FAILED}),
    _S.FILLING: frozenset({_S.VERIFYING, _S.STOPPING, _S.FAILED}),
    _S.VERIFYING: frozenset({_S.COMMITTED, _S.STOPPING, _S.FAILED}),
    _S.STOPPING: frozenset({_S.FAILED}),
    _S.COMMITTED: frozenset(),
    _S.FAILED: frozenset(),
}
_ENDED = (_S.COMMITTED, _S.FAILED)


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """How long each state may last without progress, and how much may be under way."""

    answer_s: float = 5.0  # StartPrefill -> Queued
    queued_s: float = 60.0  # Queued -> Starting
    reserve_s: float = 9.0  # Starting -> reserved; less than P's patience
    progress_s: float = 30.0  # FILLING: between two blocks; a chunk of the prompt must fit in
    verify_s: float = 10.0  # Manifest -> all verified, between two blocks
    max_outstanding_bytes: int = MAX_OUTSTANDING_BYTES
    # P computes chunk by chunk and never beyond the credit: a smaller window would not hold a chunk, and so never
    # open again. Weighs more than the bytes where a token's KV has more than half a megabyte.
    min_window_tokens: int = 128


@dataclass(frozen=True, slots=True)
class PrefillOrder:
    """What D asks of a prefill worker: all of the prompt, and what D already holds of it."""

    request_id: str
    token_ids: Sequence[int]
    num_blocks_held: int
    sampling: pb.SamplingParams
    choices: tuple[int, ...]  # that want a first token; empty: KV only
    cache_salt: bytes
    deadline_s: float  # time left for the request
    ttft_left_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Send:
    message: pb.PrefillUp


@dataclass(frozen=True, slots=True)
class Reserve:
    transfer_id: int
    first_index: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Pull:
    transfer_id: int
    ticket: bytes
    boot_id: bytes
    blocks: tuple[SourceBlock, ...]


@dataclass(frozen=True, slots=True)
class StopPulling:
    transfer_id: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Every block is in place and verified."""

    transfer_id: int
    first_tokens: tuple[pb.FirstToken, ...]
    num_blocks: int
    num_cached_tokens: int  # that P took from its own cache
    queue_s: float
    prefill_s: float
    transfer_s: float  # exposed: manifest received to committed


@dataclass(frozen=True, slots=True)
class Fail:
    transfer_id: int
    failure: TransferFailure


@dataclass(frozen=True, slots=True)
class ArrivedBlock:
    """What the transport saw, and the digest taken over the destination after the read."""

    read: BlockRead
    digest: bytes


Action = Send | Reserve | Pull | StopPulling | Commit | Fail


@dataclass(slots=True)
class _Transfer:
    """One hand-over. Only DecodeSide assigns to it."""

    transfer_id: int
    order: PrefillOrder
    num_blocks: int  # that P will publish, the tail included
    request_deadline: float
    state: TransferState = TransferState.PROMISED
    state_deadline: float = 0.0
    ticket: bytes = b""
    num_cached_tokens: int = 0
    refs: dict[int, pb.BlockRef] = field(default_factory=dict[int, pb.BlockRef])
    verified: set[int] = field(default_factory=set[int])
    num_granted: int = 0
    num_acknowledged: int = 0
    acknowledged_at: float = 0.0
    manifest: pb.Manifest | None = None
    manifest_at: float = 0.0
    failure: TransferFailure | None = None

    @property
    def is_pulling(self) -> bool:
        return len(self.verified) < len(self.refs)

    @property
    def end_index(self) -> int:
        return self.order.num_blocks_held + self.num_blocks


class _Refused(Exception):
    """A message of P, or a read, that this transfer cannot survive."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.failure = TransferFailure(kind, message)


class DecodeSide:
    """All transfers of one control stream."""

    def __init__(
        self,
        boot_id: bytes,
        layout_fingerprint: str,
        block_size: int,
        block_bytes: int,
        limits: DecodeLimits = DecodeLimits(),
        ignored: Counter[str] | None = None,
        first_transfer_id: int | None = None,
    ) -> None:
        """`boot_id` is P's, from its Hello on this connection; the rest must be equal on both sides."""
        self.ignored = ignored if ignored is not None else Counter[str]()
        self._boot_id = boot_id
        self._layout = layout_fingerprint
        self._block_size = block_size
        self._block_bytes = block_bytes
        self._limits = limits
        # A random start: a message that strayed in from an earlier stream names no transfer of this one.
        self._last_id = secrets.randbits(48) if first_transfer_id is None else first_transfer_id
        self._transfers: dict[int, _Transfer] = {}
        self._by_ticket: dict[bytes, _Transfer] = {}

    # ------------------------------------------------------------ what the caller wants

    def start(self, order: PrefillOrder, now: float) -> tuple[int, list[Action]]:
        """Ask P for a prompt. Returns the transfer id."""
        num_all = -(-len(order.token_ids) // self._block_size)
        assert 0 <= order.num_blocks_held <= len(order.token_ids) // self._block_size, order.num_blocks_held
        self._last_id += 1
        transfer = _Transfer(
            transfer_id=self._last_id,
            order=order,
            num_blocks=num_all - order.num_blocks_held,
            request_deadline=now + order.deadline_s,
            state_deadline=now + self._limits.answer_s,
        )
        self._transfers[transfer.transfer_id] = transfer
        return transfer.transfer_id, [Send(self._start_message(transfer))]

    def cancel(self, transfer_id: int, now: float) -> list[Action]:
        """The request is gone. Ends in Fail(CANCELLED), at once or when the pull has stopped."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            return self._ignore("cancel_of_ended")
        return self._give_up(transfer, TransferFailure(FailureKind.CANCELLED), tell_peer=True)

    def stream_lost(self, failure: TransferFailure, now: float) -> list[Action]:
        """The control stream is gone, and with it every transfer (the stream is the lease)."""
        actions: list[Action] = []
        for transfer in list(self._transfers.values()):
            actions += self._give_up(transfer, failure, tell_peer=False)
        return actions

    # ------------------------------------------------------------ what P says

    def handle(self, message: pb.PrefillDown, now: float) -> list[Action]:
        """A control message. Heartbeats are the driver's."""
        match message.WhichOneof("kind"):
            case "queued":
                return self._on_queued(message.queued, now)
            case "starting":
                return self._on_ticket(message.starting.ticket, lambda t: self._on_starting(t, message.starting, now))
            case "published":
                return self._on_ticket(
                    message.published.ticket, lambda t: self._on_published(t, message.published, now)
                )
            case "manifest":
                return self._on_ticket(message.manifest.ticket, lambda t: self._on_manifest(t, message.manifest, now))
            case "failed":
                return self._on_failed(message.failed)
            case _:
                return self._ignore("unknown_kind")

    # ------------------------------------------------------------ what happened here

    def reserved(self, transfer_id: int, now: float) -> list[Action]:
        """The destination blocks are ours: grant the first credit."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is not _S.RESERVING:
            return self._ignore("late_reservation")
        self._enter(transfer, _S.FILLING, now + self._limits.progress_s)
        transfer.acknowledged_at = now
        return self._grant(transfer)

    def reservation_refused(self, transfer_id: int, failure: TransferFailure, now: float) -> list[Action]:
        """D's admission will not give the blocks."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is not _S.RESERVING:
            return self._ignore("late_reservation")
        return self._give_up(transfer, failure, tell_peer=True)

    def blocks_read(self, transfer_id: int, arrived: Sequence[ArrivedBlock], now: float) -> list[Action]:
        """Blocks arrived, and are checked (T2). One acknowledgement answers all of them."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state not in (_S.FILLING, _S.VERIFYING):
            return self._ignore("late_block")
        try:
            for block in arrived:
                self._verify_block(transfer, block.read, block.digest)
                transfer.verified.add(block.read.index)
        except _Refused as refused:
            return self._give_up(transfer, refused.failure, tell_peer=True)
        self._renew(transfer, now)
        if ended := self._commit_if_complete(transfer, now):
            return ended  # the release says all that an acknowledgement would
        return [*self._acknowledge(transfer, now), *self._grant(transfer)]

    def pull_stopped(self, transfer_id: int, failure: TransferFailure | None, now: float) -> list[Action]:
        """The pull let go of the destinations: as asked (`failure` None), or because it failed."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            return self._ignore("late_pull_stop")
        if transfer.state is _S.STOPPING:
            return self._end(transfer)
        if transfer.state in (_S.FILLING, _S.VERIFYING) and failure is not None:
            transfer.refs = {index: transfer.refs[index] for index in transfer.verified}  # nothing is under way
            return self._give_up(transfer, failure, tell_peer=True)
        return self._ignore("late_pull_stop")

    def tick(self, now: float) -> list[Action]:
        """Fail what has outlived a deadline. STOPPING has none: it waits for our own transport only."""
        actions: list[Action] = []
        for transfer in list(self._transfers.values()):
            if transfer.state is _S.STOPPING:
                continue
            if now >= transfer.request_deadline:
                actions += self._give_up(transfer, TransferFailure(FailureKind.DEADLINE), tell_peer=True)
            elif now >= transfer.state_deadline:
                kind = self._timeout_kind(transfer)
                failure = TransferFailure(kind, f"no progress while {transfer.state.value}")
                actions += self._give_up(transfer, failure, tell_peer=True)
        return actions

    # ------------------------------------------------------------ what can be asked

    def next_deadline(self) -> float | None:
        """When `tick` has something to do, at the earliest."""
        waiting = [t for t in self._transfers.values() if t.state is not _S.STOPPING]
        return min((min(t.state_deadline, t.request_deadline) for t in waiting), default=None)

    def state(self, transfer_id: int) -> TransferState | None:
        """None once it has ended."""
        transfer = self._transfers.get(transfer_id)
        return transfer.state if transfer is not None else None

    def count(self, *states: TransferState) -> int:
        return sum(1 for transfer in self._transfers.values() if transfer.state in states)

    @property
    def num_transfers(self) -> int:
        return len(self._transfers)

    @property
    def num_waiting_for_steps(self) -> int:
        """Transfers that only a step of P can bring forward: the `pending` of its liveness monitor."""
        return sum(1 for t in self._transfers.values() if t.ticket and self._waits_for_step(t))

    # ------------------------------------------------------------ messages, one by one

    def _on_ticket(self, ticket: bytes, then: Callable[[_Transfer], list[Action]]) -> list[Action]:
        transfer = self._by_ticket.get(ticket)
        if transfer is None:
            return self._ignore("unknown_ticket")
        try:
            return then(transfer)
        except _Refused as refused:
            return self._give_up(transfer, refused.failure, tell_peer=True)

    def _on_queued(self, queued: pb.Queued, now: float) -> list[Action]:
        transfer = self._transfers.get(queued.transfer_id)
        if transfer is None:
            return self._ignore("unknown_transfer")
        if queued.boot_id != self._boot_id:
            return self._ignore("other_boot_id")
        if transfer.state is not _S.PROMISED or transfer.ticket or queued.ticket in self._by_ticket:
            return self._ignore("repeated_queued")
        if len(queued.ticket) != TICKET_BYTES:
            failure = TransferFailure(FailureKind.PROTOCOL, f"ticket of {len(queued.ticket)} bytes")
            return self._give_up(transfer, failure, tell_peer=True)
        transfer.ticket = queued.ticket
        transfer.state_deadline = now + self._limits.queued_s
        self._by_ticket[queued.ticket] = transfer
        return []

    def _on_starting(self, transfer: _Transfer, starting: pb.Starting, now: float) -> list[Action]:
        if transfer.state is not _S.PROMISED:
            return self._ignore("repeated_starting")
        _require_equal(FailureKind.PROTOCOL, "num_blocks", starting.num_blocks, transfer.num_blocks)
        transfer.num_cached_tokens = min(starting.num_cached_tokens, len(transfer.order.token_ids))
        self._enter(transfer, _S.RESERVING, now + self._limits.reserve_s)
        return [Reserve(transfer.transfer_id, transfer.order.num_blocks_held, transfer.num_blocks)]

    def _on_published(self, transfer: _Transfer, published: pb.Published, now: float) -> list[Action]:
        if transfer.state not in (_S.FILLING, _S.VERIFYING):
            return self._ignore("late_published")
        fresh: list[pb.BlockRef] = []
        for ref in published.blocks:
            if self._is_repeat(transfer, ref):
                self.ignored["repeated_block"] += 1
                continue
            self._check_ref(transfer, ref, self._block_size)
            transfer.refs[ref.index] = ref
            fresh.append(ref)
        if not fresh:
            return []
        self._renew(transfer, now)
        return [self._pull(transfer, fresh)]

    def _on_manifest(self, transfer: _Transfer, manifest: pb.Manifest, now: float) -> list[Action]:
        if manifest.boot_id != self._boot_id:
            return self._ignore("other_boot_id")
        if transfer.state is not _S.FILLING:
            return self._ignore("repeated_manifest")
        self._check_manifest(transfer, manifest)
        transfer.manifest = manifest
        transfer.manifest_at = now
        self._enter(transfer, _S.VERIFYING, now + self._limits.verify_s)
        actions: list[Action] = []
        if manifest.HasField("tail"):
            transfer.refs[manifest.tail.index] = manifest.tail
            actions.append(self._pull(transfer, [manifest.tail]))
        return actions + self._commit_if_complete(transfer, now)

    def _on_failed(self, failed: pb.PrefillFailed) -> list[Action]:
        transfer = self._by_ticket.get(failed.ticket) if failed.ticket else self._transfers.get(failed.transfer_id)
        if transfer is None:
            return self._ignore("unknown_ticket" if failed.ticket else "unknown_transfer")
        kind = _FAILURES.get(failed.reason, FailureKind.INTERNAL)
        return self._give_up(transfer, TransferFailure(kind, failed.message[:200]), tell_peer=False)

    # ------------------------------------------------------------ T2, before and after the read

    def _check_ref(self, transfer: _Transfer, ref: pb.BlockRef, num_tokens: int) -> None:
        first, end = transfer.order.num_blocks_held, transfer.end_index
        if not first <= ref.index < end:
            raise _Refused(FailureKind.PROTOCOL, f"block {ref.index} is outside [{first}, {end})")
        if ref.index in transfer.refs:
            raise _Refused(FailureKind.PROTOCOL, f"block {ref.index} was announced differently before")
        if len(transfer.refs) >= transfer.num_granted:
            raise _Refused(FailureKind.PROTOCOL, f"block {ref.index} exceeds the credit of {transfer.num_granted}")
        if len(ref.digest) != DIGEST_BYTES:
            raise _Refused(FailureKind.PROTOCOL, f"digest of {len(ref.digest)} bytes")
        expected = min(num_tokens, len(transfer.order.token_ids) - ref.index * self._block_size)
        _require_equal(FailureKind.PROTOCOL, f"num_tokens of block {ref.index}", ref.num_tokens, expected)

    def _check_manifest(self, transfer: _Transfer, manifest: pb.Manifest) -> None:
        num_tokens = len(transfer.order.token_ids)
        _require_equal(FailureKind.LAYOUT, "layout fingerprint", manifest.layout_fingerprint, self._layout)
        _require_equal(FailureKind.PROTOCOL, "num_prompt_tokens", manifest.num_prompt_tokens, num_tokens)
        _require_equal(FailureKind.PROTOCOL, "num_blocks", manifest.num_blocks, transfer.num_blocks)
        choices = sorted(token.choice for token in manifest.first_tokens)
        _require_equal(FailureKind.PROTOCOL, "choices with a first token", choices, sorted(transfer.order.choices))
        has_tail = num_tokens % self._block_size != 0
        _require_equal(FailureKind.PROTOCOL, "tail", manifest.HasField("tail"), has_tail)
        if has_tail:
            _require_equal(FailureKind.PROTOCOL, "tail index", manifest.tail.index, num_tokens // self._block_size)
            self._check_ref(transfer, manifest.tail, num_tokens % self._block_size)

    def _verify_block(self, transfer: _Transfer, read: BlockRead, digest: bytes) -> None:
        ref = transfer.refs.get(read.index)
        if ref is None or read.index in transfer.verified:
            raise _Refused(FailureKind.PROTOCOL, f"block {read.index} was not asked for")
        _require_equal(FailureKind.STALE, f"boot id of block {read.index}", read.boot_id, self._boot_id)
        _require_equal(FailureKind.STALE, f"generation of block {read.index}", read.generation, ref.generation)
        _require_equal(FailureKind.TRUNCATED, f"bytes of block {read.index}", read.num_bytes, self._block_bytes)
        _require_equal(FailureKind.CORRUPT, f"digest of block {read.index}", digest, ref.digest)

    def _commit_if_complete(self, transfer: _Transfer, now: float) -> list[Action]:
        if transfer.manifest is None or len(transfer.verified) < transfer.num_blocks:
            return []
        manifest = transfer.manifest
        digest = manifest_digest(transfer.refs[index].digest for index in sorted(transfer.refs))
        if digest != manifest.digest:
            failure = TransferFailure(FailureKind.CORRUPT, "digest of the manifest")
            return self._give_up(transfer, failure, tell_peer=True)
        assert transfer.verified == set(range(transfer.order.num_blocks_held, transfer.end_index))
        self._enter(transfer, _S.COMMITTED, now)
        self._forget(transfer)
        return [
            Send(pb.PrefillUp(release=pb.ReleaseTicket(ticket=transfer.ticket, ok=True))),
            Commit(
                transfer.transfer_id,
                tuple(manifest.first_tokens),
                transfer.num_blocks,
                transfer.num_cached_tokens,
                manifest.queue_s,
                manifest.prefill_s,
                now - transfer.manifest_at,
            ),
        ]

    # ------------------------------------------------------------ parts

    def _start_message(self, transfer: _Transfer) -> pb.PrefillUp:
        order = transfer.order
        return pb.PrefillUp(
            start=pb.StartPrefill(
                transfer_id=transfer.transfer_id,
                request_id=order.request_id,
                token_ids=order.token_ids,
                num_blocks_held=order.num_blocks_held,
                sampling=order.sampling,
                choices=order.choices,
                layout_fingerprint=self._layout,
                cache_salt=order.cache_salt,
                deadline_s=order.deadline_s,
                ttft_left_s=order.ttft_left_s,
            )
        )

    def _grant(self, transfer: _Transfer) -> list[Action]:
        """Credit so that what is granted and not verified stays within the reserved blocks and the byte limit."""
        limits = self._limits
        min_window = -(-limits.min_window_tokens // self._block_size)
        window = max(1, min_window, limits.max_outstanding_bytes // self._block_bytes)
        granted = min(transfer.num_blocks, len(transfer.verified) + window)
        if granted == transfer.num_granted and transfer.num_blocks > 0:  # a credit of 0 still says "go"
            return []
        is_small = granted - transfer.num_granted < min(window // 4, REPORT_BLOCKS)
        if transfer.num_granted and is_small and granted < transfer.num_blocks and transfer.is_pulling:
            return []  # the rest of the window keeps P busy meanwhile
        transfer.num_granted = granted
        return [Send(pb.PrefillUp(credit=pb.GrantCredit(ticket=transfer.ticket, num_blocks=granted)))]

    def _acknowledge(self, transfer: _Transfer, now: float) -> list[Action]:
        """Once for REPORT_BLOCKS, each REPORT_S on a slow wire, and when nothing is under way.

        Each message costs both event loops a turn; P's patience is ten times REPORT_S.
        """
        num_verified = len(transfer.verified)
        is_early = (
            num_verified - transfer.num_acknowledged < REPORT_BLOCKS and now < transfer.acknowledged_at + REPORT_S
        )
        if transfer.is_pulling and is_early:
            return []
        transfer.num_acknowledged, transfer.acknowledged_at = num_verified, now
        return [Send(pb.PrefillUp(acknowledge=pb.AcknowledgeBlocks(ticket=transfer.ticket, num_blocks=num_verified)))]

    def _pull(self, transfer: _Transfer, refs: Iterable[pb.BlockRef]) -> Pull:
        blocks = tuple(SourceBlock(ref.index, ref.block_id, ref.generation) for ref in refs)
        return Pull(transfer.transfer_id, transfer.ticket, self._boot_id, blocks)

    def _is_repeat(self, transfer: _Transfer, ref: pb.BlockRef) -> bool:
        known = transfer.refs.get(ref.index)
        return known is not None and known == ref

    def _waits_for_step(self, transfer: _Transfer) -> bool:
        if transfer.state is _S.PROMISED:
            return True
        return transfer.state is _S.FILLING and not transfer.is_pulling

    def _timeout_kind(self, transfer: _Transfer) -> FailureKind:
        if transfer.state is _S.PROMISED:
            return FailureKind.QUEUE_TIMEOUT if transfer.ticket else FailureKind.ANSWER_TIMEOUT
        return FailureKind.RESERVE_TIMEOUT if transfer.state is _S.RESERVING else FailureKind.FILL_TIMEOUT

    def _give_up(self, transfer: _Transfer, failure: TransferFailure, tell_peer: bool) -> list[Action]:
        if transfer.state is _S.STOPPING:
            return self._ignore("already_stopping")
        transfer.failure = failure
        actions: list[Action] = []
        if tell_peer:
            release = pb.ReleaseTicket(
                ticket=transfer.ticket, transfer_id=transfer.transfer_id, ok=False, suspect=failure.kind.is_wrong_bytes
            )
            actions.append(Send(pb.PrefillUp(release=release)))
        if transfer.is_pulling:
            self._enter(transfer, _S.STOPPING, transfer.state_deadline)
            return [*actions, StopPulling(transfer.transfer_id)]
        return actions + self._end(transfer)

    def _end(self, transfer: _Transfer) -> list[Action]:
        assert transfer.failure is not None
        self._enter(transfer, _S.FAILED, transfer.state_deadline)
        self._forget(transfer)
        return [Fail(transfer.transfer_id, transfer.failure)]

    def _enter(self, transfer: _Transfer, state: TransferState, deadline: float) -> None:
        assert state in _TRANSITIONS[transfer.state], (transfer.state, state)
        transfer.state = state
        transfer.state_deadline = deadline

    def _renew(self, transfer: _Transfer, now: float) -> None:
        patience = self._limits.verify_s if transfer.state is _S.VERIFYING else self._limits.progress_s
        transfer.state_deadline = max(transfer.state_deadline, now + patience)  # T6: never shortened

    def _forget(self, transfer: _Transfer) -> None:
        assert transfer.state in _ENDED
        del self._transfers[transfer.transfer_id]
        self._by_ticket.pop(transfer.ticket, None)

    def _ignore(self, why: str) -> list[Action]:
        self.ignored[why] += 1
        return []


_FAILURES = {
    pb.PREFILL_FAILURE_OVERLOADED: FailureKind.OVERLOADED,
    pb.PREFILL_FAILURE_DRAINING: FailureKind.DRAINING,
    pb.PREFILL_FAILURE_INVALID: FailureKind.INVALID,
    pb.PREFILL_FAILURE_LAYOUT: FailureKind.LAYOUT,
    pb.PREFILL_FAILURE_DEADLINE: FailureKind.DEADLINE,
    pb.PREFILL_FAILURE_NO_PROGRESS: FailureKind.NO_PROGRESS,
    pb.PREFILL_FAILURE_INTERNAL: FailureKind.INTERNAL,
}


def _require_equal(kind: FailureKind, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise _Refused(kind, f"{what} is {_shown(found)}, not {_shown(expected)}")


def _shown(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
