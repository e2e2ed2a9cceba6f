"""P's state machine for hand-overs: messages and engine events in, actions out. No I/O, no clock of its own.

    QUEUED -> STARTING -> PREFILLING -> DRAINING -> CLOSED      (states: see baton.proto, "Prefill: D <-> P")

One `PrefillSide` per control stream, that is per D that is connected. Every public method takes `now` (any monotonic
clock, seconds) and returns the actions to carry out, in order. What the driver owes it:

    SendDown       put the message on the control stream
    StartBackend   queue the prompt in the engine under `key`; the engine answers through `prefill_starting`,
                   `blocks_filled`, `prefill_done`, `prefill_failed`
    GrantBackend   the engine may fill `num_blocks` blocks more for `key`
    OpenTicket, Publish, CloseTicket    BlockSource's methods of these names
    ReleaseBackend the transfer owner lets go of every block of `key`: exactly once per StartBackend, always after
                   CloseTicket, and the last action for the key (T1)

A ticket is 128 random bits and used once. Messages for unknown or closed tickets and repeats have no effect but a
counter in `ignored` (T4). Every state has a deadline of its own; the driver calls `tick` at `next_deadline` or more
often (T7).
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from kvtransfer.digest import manifest_digest
from kvtransfer.protocol import MAX_REQUEST_S
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.transport import TICKET_BYTES, SourceBlock


class TicketState(Enum):
    QUEUED = "queued"
    STARTING = "starting"
    PREFILLING = "prefilling"
    DRAINING = "draining"
    CLOSED = "closed"


_S = TicketState
_TRANSITIONS: dict[TicketState, frozenset[TicketState]] = {
    _S.QUEUED: frozenset({_S.STARTING, _S.CLOSED}),
    _S.STARTING: frozenset({_S.PREFILLING, _S.CLOSED}),
    _S.PREFILLING: frozenset({_S.DRAINING, _S.CLOSED}),
    _S.DRAINING: frozenset({_S.CLOSED}),
    _S.CLOSED: frozenset(),
}

MAX_CHOICES = 128
MAX_BLOCKS_PER_MESSAGE = 4096


@dataclass(frozen=True, slots=True)
class PrefillLimits:
    """What one D may ask for, and how long P waits for it."""

    max_prompt_tokens: int
    max_tickets: int = 1024  # per stream
    patience_s: float = 10.0  # D owes an acknowledgement, credit or release


@dataclass(slots=True)
class HeldTokens:
    """Tokens published and not yet released, over all streams of a worker. At the cap, new prompts are refused."""

    max_tokens: int
    num_tokens: int = 0

    @property
    def is_full(self) -> bool:
        return self.num_tokens >= self.max_tokens


@dataclass(frozen=True, slots=True)
class ReadyBlock:
    """A block whose bytes will not change any more, and its digest."""

    index: int
    block_id: int
    generation: int
    num_tokens: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class SendDown:
    message: pb.PrefillDown


@dataclass(frozen=True, slots=True)
class StartBackend:
    key: int
    start: pb.StartPrefill


@dataclass(frozen=True, slots=True)
class GrantBackend:
    key: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class ReleaseBackend:
    key: int
    ok: bool
    is_suspect: bool = False  # D read other bytes than were announced


@dataclass(frozen=True, slots=True)
class OpenTicket:
    ticket: bytes


@dataclass(frozen=True, slots=True)
class Publish:
    ticket: bytes
    blocks: tuple[SourceBlock, ...]


@dataclass(frozen=True, slots=True)
class CloseTicket:
    ticket: bytes


PrefillAction = SendDown | StartBackend | GrantBackend | ReleaseBackend | OpenTicket | Publish | CloseTicket


@dataclass(frozen=True, slots=True)
class _Done:
    tail: ReadyBlock | None
    first_tokens: tuple[pb.FirstToken, ...]
    queue_s: float
    prefill_s: float


@dataclass(slots=True)
class _Ticket:
    """One prompt for one D. Only PrefillSide assigns to it."""

    ticket: bytes
    key: int
    transfer_id: int
    num_prompt_tokens: int
    num_blocks_held: int
    num_blocks: int  # to publish, the tail included
    deadline: float
    choices: tuple[int, ...]
    state: TicketState = TicketState.QUEUED
    num_granted: int = 0
    num_acknowledged: int = 0
    published: list[ReadyBlock] = field(default_factory=list[ReadyBlock])
    held_back: list[ReadyBlock] = field(default_factory=list[ReadyBlock])  # filled beyond the credit
    num_filled: int = 0
    done: _Done | None = None
    waiting_since: float = 0.0  # for D

    @property
    def is_waiting_for_peer(self) -> bool:
        if self.state is _S.QUEUED:
            return False
        if self.state is not _S.PREFILLING:
            return True
        is_starved = self.num_granted <= len(self.published) and self.num_granted < self.num_blocks
        return self.num_acknowledged < len(self.published) or is_starved


class PrefillSide:
    """All tickets of one control stream."""

    def __init__(
        self,
        boot_id: bytes,
        layout_fingerprint: str,
        block_size: int,
        limits: PrefillLimits,
        held: HeldTokens,
        next_key: Callable[[], int],
        mint: Callable[[], bytes] = lambda: secrets.token_bytes(TICKET_BYTES),
        ignored: Counter[str] | None = None,
    ) -> None:
        """`next_key` names prompts towards the engine: unique over all streams of this worker."""
        self.ignored = ignored if ignored is not None else Counter[str]()
        self.is_draining = False
        self._boot_id = boot_id
        self._layout = layout_fingerprint
        self._block_size = block_size
        self._limits = limits
        self._held = held
        self._next_key = next_key
        self._mint = mint
        self._last_transfer_id = 0
        self._by_ticket: dict[bytes, _Ticket] = {}
        self._by_key: dict[int, _Ticket] = {}
        self._by_transfer: dict[int, _Ticket] = {}

    # ------------------------------------------------------------ what D says

    def handle(self, message: pb.PrefillUp, now: float) -> list[PrefillAction]:
        """A control message. Heartbeats are the driver's."""
        match message.WhichOneof("kind"):
            case "start":
                return self._on_start(message.start, now)
            case "credit":
                return self._on_ticket(message.credit.ticket, lambda t: self._on_credit(t, message.credit, now))
            case "acknowledge":
                return self._on_ticket(
                    message.acknowledge.ticket, lambda t: self._on_acknowledge(t, message.acknowledge, now)
                )
            case "release":
                return self._on_release(message.release)
            case _:
                return self._ignore("unknown_kind")

    def stream_lost(self) -> list[PrefillAction]:
        """The control stream is gone, and with it every ticket (the stream is the lease)."""
        return [action for ticket in list(self._by_key.values()) for action in self._close(ticket, ok=False)]

    # ------------------------------------------------------------ what the engine says

    def prefill_starting(self, key: int, num_blocks: int, num_cached_tokens: int, now: float) -> list[PrefillAction]:
        """The engine has reserved the prompt's whole need. `num_blocks` it will fill from num_blocks_held on."""
        ticket = self._by_key.get(key)
        if ticket is None or ticket.state is not _S.QUEUED:
            return self._ignore("late_engine_event")
        assert num_blocks == ticket.num_blocks, (num_blocks, ticket.num_blocks)
        self._enter(ticket, _S.STARTING, now)
        starting = pb.Starting(ticket=ticket.ticket, num_blocks=num_blocks, num_cached_tokens=num_cached_tokens)
        return [SendDown(pb.PrefillDown(starting=starting))]

    def blocks_filled(self, key: int, blocks: Sequence[ReadyBlock], now: float) -> list[PrefillAction]:
        """Full blocks, ascending, each once; those found in P's own cache too. Blocks that D holds are skipped here.

        What exceeds D's credit is held back. So an engine whose next chunk completes more blocks than the window will
        ever cover may run it on any credit that is left.
        """
        ticket = self._by_key.get(key)
        if ticket is None:
            return self._ignore("late_engine_event")
        assert ticket.state in (_S.STARTING, _S.PREFILLING), f"blocks filled while {ticket.state}"
        assert ticket.done is None, "blocks filled after prefill was done"
        for block in blocks:
            if block.index < ticket.num_blocks_held:
                continue
            assert block.index == ticket.num_blocks_held + ticket.num_filled, (block.index, ticket.num_filled)
            assert block.num_tokens == self._block_size, "full blocks only; the tail comes with prefill_done"
            ticket.num_filled += 1
            ticket.held_back.append(block)
        return self._publish(ticket, now)

    def prefill_done(
        self,
        key: int,
        tail: ReadyBlock | None,
        first_tokens: Sequence[pb.FirstToken],
        queue_s: float,
        prefill_s: float,
        now: float,
    ) -> list[PrefillAction]:
        """The last chunk has run. `tail` is the partial last block, its unused slots zeroed before the digest."""
        ticket = self._by_key.get(key)
        if ticket is None:
            return self._ignore("late_engine_event")
        assert ticket.state in (_S.STARTING, _S.PREFILLING), f"prefill done while {ticket.state}"
        assert ticket.done is None, "prefill was done twice"
        assert ticket.num_filled + (tail is not None) == ticket.num_blocks, "a block was not reported"
        assert sorted(t.choice for t in first_tokens) == sorted(ticket.choices), "first tokens for other choices"
        ticket.done = _Done(tail, tuple(first_tokens), queue_s, prefill_s)
        return self._publish(ticket, now)

    def prefill_failed(self, key: int, reason: pb.PrefillFailure, message: str) -> list[PrefillAction]:
        """The engine gives the prompt up (it still gets its ReleaseBackend)."""
        ticket = self._by_key.get(key)
        if ticket is None:
            return self._ignore("late_engine_event")
        return self._fail(ticket, reason, message)

    # ------------------------------------------------------------ time

    def tick(self, now: float) -> list[PrefillAction]:
        """Close what has outlived a deadline."""
        actions: list[PrefillAction] = []
        for ticket in list(self._by_key.values()):
            if now >= ticket.deadline:
                actions += self._fail(ticket, pb.PREFILL_FAILURE_DEADLINE, "the request's deadline passed")
            elif ticket.is_waiting_for_peer and now >= ticket.waiting_since + self._limits.patience_s:
                silence = f"nothing acknowledged for {self._limits.patience_s:g} s while {ticket.state.value}"
                actions += self._fail(ticket, pb.PREFILL_FAILURE_NO_PROGRESS, silence)
        return actions

    def next_deadline(self) -> float | None:
        """When `tick` has something to do, at the earliest."""
        return min((self._deadline(ticket) for ticket in self._by_key.values()), default=None)

    # ------------------------------------------------------------ what can be asked

    def state(self, ticket: bytes) -> TicketState:
        known = self._by_ticket.get(ticket)
        return known.state if known is not None else TicketState.CLOSED

    def count(self, *states: TicketState) -> int:
        return sum(1 for ticket in self._by_key.values() if ticket.state in states)

    @property
    def num_tickets(self) -> int:
        return len(self._by_key)

    @property
    def num_waiting_for_peer(self) -> int:
        return sum(1 for ticket in self._by_key.values() if ticket.is_waiting_for_peer)

    # ------------------------------------------------------------ messages, one by one

    def _on_start(self, start: pb.StartPrefill, now: float) -> list[PrefillAction]:
        if start.transfer_id <= self._last_transfer_id:
            return self._ignore("repeated_start")
        self._last_transfer_id = start.transfer_id
        refusal = self._refusal(start)
        if refusal is not None:
            refusal.transfer_id = start.transfer_id
            return [SendDown(pb.PrefillDown(failed=refusal))]
        ticket = self._admit(start, now)
        queued = pb.Queued(transfer_id=start.transfer_id, ticket=ticket.ticket, boot_id=self._boot_id)
        return [
            OpenTicket(ticket.ticket),
            SendDown(pb.PrefillDown(queued=queued)),
            StartBackend(ticket.key, start),
        ]

    def _refusal(self, start: pb.StartPrefill) -> pb.PrefillFailed | None:
        num_tokens, limit = len(start.token_ids), self._limits.max_prompt_tokens
        if self.is_draining:
            return pb.PrefillFailed(reason=pb.PREFILL_FAILURE_DRAINING, message="this worker is draining")
        if start.layout_fingerprint != self._layout:
            message = f"layout fingerprint {start.layout_fingerprint[:64]!r} is not this worker's {self._layout!r}"
            return pb.PrefillFailed(reason=pb.PREFILL_FAILURE_LAYOUT, message=message)
        invalid = self._invalid(start)
        if invalid:
            return pb.PrefillFailed(reason=pb.PREFILL_FAILURE_INVALID, message=invalid)
        if num_tokens > limit:
            message = f"prompt of {num_tokens} tokens exceeds {limit}"
            return pb.PrefillFailed(reason=pb.PREFILL_FAILURE_INVALID, message=message)
        if len(self._by_key) >= self._limits.max_tickets:
            message = f"{len(self._by_key)} open tickets of at most {self._limits.max_tickets}"
            return pb.PrefillFailed(reason=pb.PREFILL_FAILURE_OVERLOADED, message=message)
        if self._held.is_full:
            message = f"{self._held.num_tokens} tokens await pulling, at most {self._held.max_tokens}"
            return pb.PrefillFailed(reason=pb.PREFILL_FAILURE_OVERLOADED, message=message)
        return None

    def _invalid(self, start: pb.StartPrefill) -> str:
        num_full = len(start.token_ids) // self._block_size
        if not start.token_ids:
            return "token_ids is empty"
        if start.num_blocks_held > num_full:
            return f"num_blocks_held is {start.num_blocks_held} of {num_full} full blocks"
        if not 0 < start.deadline_s <= MAX_REQUEST_S:
            return f"deadline_s is {start.deadline_s}, expected at most {MAX_REQUEST_S:g}"
        if len(start.choices) > MAX_CHOICES or len(set(start.choices)) != len(start.choices):
            return f"choices must be at most {MAX_CHOICES} different ones"
        return ""

    def _admit(self, start: pb.StartPrefill, now: float) -> _Ticket:
        num_all = -(-len(start.token_ids) // self._block_size)
        ticket = _Ticket(
            ticket=self._mint(),
            key=self._next_key(),
            transfer_id=start.transfer_id,
            num_prompt_tokens=len(start.token_ids),
            num_blocks_held=start.num_blocks_held,
            num_blocks=num_all - start.num_blocks_held,
            deadline=now + start.deadline_s,
            choices=tuple(start.choices),
            waiting_since=now,
        )
        assert ticket.ticket not in self._by_ticket
        assert ticket.key not in self._by_key
        self._by_ticket[ticket.ticket] = ticket
        self._by_key[ticket.key] = ticket
        self._by_transfer[ticket.transfer_id] = ticket
        return ticket

    def _on_ticket(self, ticket: bytes, then: Callable[[_Ticket], list[PrefillAction]]) -> list[PrefillAction]:
        known = self._by_ticket.get(ticket)
        return then(known) if known is not None else self._ignore("unknown_ticket")

    def _on_credit(self, ticket: _Ticket, credit: pb.GrantCredit, now: float) -> list[PrefillAction]:
        if ticket.state not in (_S.STARTING, _S.PREFILLING):
            return self._ignore("late_credit")
        granted = min(credit.num_blocks, ticket.num_blocks)
        is_first = ticket.state is _S.STARTING
        if granted <= ticket.num_granted and not is_first:
            return self._ignore("repeated_credit")
        added = granted - ticket.num_granted
        ticket.num_granted = granted
        ticket.waiting_since = now
        if is_first:
            self._enter(ticket, _S.PREFILLING, now)
        return [GrantBackend(ticket.key, added), *self._publish(ticket, now)]

    def _on_acknowledge(self, ticket: _Ticket, acknowledge: pb.AcknowledgeBlocks, now: float) -> list[PrefillAction]:
        if not ticket.num_acknowledged < acknowledge.num_blocks <= len(ticket.published):
            return self._ignore("repeated_acknowledge")
        ticket.num_acknowledged = acknowledge.num_blocks
        ticket.waiting_since = now
        return []

    def _on_release(self, release: pb.ReleaseTicket) -> list[PrefillAction]:
        known = self._by_ticket.get(release.ticket) if release.ticket else self._by_transfer.get(release.transfer_id)
        if known is None:
            return self._ignore("unknown_ticket" if release.ticket else "unknown_transfer")
        if release.ok:
            return self._close(known, ok=known.state is _S.DRAINING)
        return self._close(known, ok=False, is_suspect=release.suspect)

    # ------------------------------------------------------------ parts

    def _publish(self, ticket: _Ticket, now: float) -> list[PrefillAction]:
        """Publish what is filled and covered by credit; then the manifest, if that was the last."""
        actions: list[PrefillAction] = []
        if ticket.state is _S.STARTING:
            return actions  # D has no blocks yet
        room = ticket.num_granted - len(ticket.published)
        blocks, ticket.held_back = ticket.held_back[:room], ticket.held_back[room:]
        for first in range(0, len(blocks), MAX_BLOCKS_PER_MESSAGE):
            part = blocks[first : first + MAX_BLOCKS_PER_MESSAGE]
            published = pb.Published(ticket=ticket.ticket, blocks=[_ref(block) for block in part])
            actions += [self._open_to_pulls(ticket, part, now), SendDown(pb.PrefillDown(published=published))]
        if ticket.done is not None and not ticket.held_back:
            actions += self._finish(ticket, ticket.done, now)
        return actions

    def _finish(self, ticket: _Ticket, done: _Done, now: float) -> list[PrefillAction]:
        actions: list[PrefillAction] = []
        if done.tail is not None:
            if len(ticket.published) >= ticket.num_granted:
                return []  # the tail waits for credit like any block
            actions.append(self._open_to_pulls(ticket, [done.tail], now))
        self._enter(ticket, _S.DRAINING, now)
        manifest = pb.Manifest(
            ticket=ticket.ticket,
            boot_id=self._boot_id,
            layout_fingerprint=self._layout,
            num_prompt_tokens=ticket.num_prompt_tokens,
            num_blocks=ticket.num_blocks,
            digest=manifest_digest(block.digest for block in ticket.published),
            tail=_ref(done.tail) if done.tail is not None else None,
            first_tokens=done.first_tokens,
            queue_s=done.queue_s,
            prefill_s=done.prefill_s,
        )
        return [*actions, SendDown(pb.PrefillDown(manifest=manifest))]

    def _open_to_pulls(self, ticket: _Ticket, blocks: Sequence[ReadyBlock], now: float) -> Publish:
        if not ticket.is_waiting_for_peer:
            ticket.waiting_since = now
        ticket.published += blocks
        self._held.num_tokens += sum(block.num_tokens for block in blocks)
        return Publish(ticket.ticket, tuple(SourceBlock(b.index, b.block_id, b.generation) for b in blocks))

    def _fail(self, ticket: _Ticket, reason: pb.PrefillFailure, message: str) -> list[PrefillAction]:
        failed = pb.PrefillFailed(
            transfer_id=ticket.transfer_id, ticket=ticket.ticket, reason=reason, message=message[:200]
        )
        return [SendDown(pb.PrefillDown(failed=failed)), *self._close(ticket, ok=False)]

    def _close(self, ticket: _Ticket, ok: bool, is_suspect: bool = False) -> list[PrefillAction]:
        ticket.state = self._checked(ticket, _S.CLOSED)
        del self._by_ticket[ticket.ticket], self._by_key[ticket.key], self._by_transfer[ticket.transfer_id]
        self._held.num_tokens -= sum(block.num_tokens for block in ticket.published)
        return [CloseTicket(ticket.ticket), ReleaseBackend(ticket.key, ok, is_suspect)]

    def _enter(self, ticket: _Ticket, state: TicketState, now: float) -> None:
        ticket.state = self._checked(ticket, state)
        ticket.waiting_since = now

    def _checked(self, ticket: _Ticket, state: TicketState) -> TicketState:
        assert state in _TRANSITIONS[ticket.state], (ticket.state, state)
        return state

    def _deadline(self, ticket: _Ticket) -> float:
        if not ticket.is_waiting_for_peer:
            return ticket.deadline
        return min(ticket.deadline, ticket.waiting_since + self._limits.patience_s)

    def _ignore(self, why: str) -> list[PrefillAction]:
        self.ignored[why] += 1
        return []


def _ref(block: ReadyBlock) -> pb.BlockRef:
    return pb.BlockRef(
        index=block.index,
        block_id=block.block_id,
        generation=block.generation,
        digest=block.digest,
        num_tokens=block.num_tokens,
    )
